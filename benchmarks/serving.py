"""`dalle serve` from outside: merged requests, health while sampling, cancelling, streaming, memory.

python -m benchmarks.serving --bundle runs/demo

The server is a process of its own, as users start it, and is asked over HTTP. What is compared runs in turns.
"""

import argparse
import base64
import io
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import httpx2
import numpy as np
from PIL import Image

from benchmarks.measure import RESULTS, commit, machine, say, versions

CAPTIONS = [
    f"a small {colour} circle above a large blue square on a {ground} background"
    for colour in ("red", "green", "yellow", "purple")
    for ground in ("white", "black")
]
GENERATE = "/v1/images/generations"
LONG_S = 900.0


class Server:
    """A server that was started, and what is asked of it."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._client = httpx2.Client(base_url=url, timeout=LONG_S)

    def draw(self, caption: str, seed: int, best_of: int) -> list[str]:
        """Return the pictures of a request, in base64."""
        body = {"prompt": caption, "seed": seed, "best_of": best_of, "n": 2}
        answer = self._client.post(GENERATE, json=body)
        answer.raise_for_status()
        return [picture["b64_json"] for picture in answer.json()["data"]]

    def metric(self, line: str) -> float:
        """Return a number of the metrics."""
        found = [text for text in self._client.get("/metrics").text.splitlines() if text.startswith(line)]
        return float(found[0].rsplit(" ", 1)[1]) if found else 0.0

    def health_s(self) -> float:
        """Return the seconds of one look at its health."""
        started = time.perf_counter()
        self._client.get("/healthz").raise_for_status()
        return time.perf_counter() - started

    def is_ready(self) -> bool:
        """Return whether it takes requests."""
        return self._client.get("/readyz").status_code == 200


@contextmanager
def served(bundle: Path, *options: str) -> Iterator[Server]:
    """Start a server, and end it."""
    command = [sys.executable, "-m", "dalle", "serve", "--bundle", str(bundle), "--port", "0", *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    first = process.stderr.readline()
    threading.Thread(target=process.stderr.read, daemon=True).start()
    server = Server(first.split("note: ")[1].split(": the page")[0])
    while not server.is_ready():
        time.sleep(0.2)
    try:
        yield server
    finally:
        process.terminate()
        process.wait(60)


def merging(server: Server, rounds: int, best_of: int) -> dict[str, Any]:
    """Compare eight requests at the same time with the same ones in turn, and their bytes."""
    ratios, seconds = [], []
    is_equal = True
    for number in range(rounds):
        say(f"merging, round {number + 1} of {rounds}")
        asked = [(caption, 8 * number + i, best_of) for i, caption in enumerate(CAPTIONS)]
        started = time.perf_counter()
        in_turn = [server.draw(*one) for one in asked]
        in_turn_s = time.perf_counter() - started
        started = time.perf_counter()
        with ThreadPoolExecutor(len(asked)) as pool:
            together = list(pool.map(lambda one: server.draw(*one), asked))
        together_s = time.perf_counter() - started
        ratios.append(together_s / in_turn_s)
        seconds.append((in_turn_s, together_s))
        is_equal &= in_turn == together
    return {"share_of_time": median(ratios), "seconds": seconds, "equal_bytes": is_equal}


def health(server: Server, n: int) -> dict[str, Any]:
    """Look at the health again and again while n candidates are sampled."""
    say(f"health while {n} candidates are sampled")
    thread = threading.Thread(target=server.draw, args=(CAPTIONS[0], 1, n))
    thread.start()
    found = []
    while thread.is_alive():
        found.append(server.health_s())
        time.sleep(0.01)
    found.sort()
    return {
        "looks": len(found),
        "median_s": median(found),
        "p99_s": found[int(0.99 * len(found))],
        "worst_s": found[-1],
    }


def cancelling(server: Server, n: int, rounds: int) -> dict[str, Any]:
    """Measure how long the engine goes on after the connection of a request is dropped."""
    host, port = server.url.removeprefix("http://").split(":")
    body = json.dumps({"prompt": CAPTIONS[0], "best_of": n}).encode()
    head = f"POST {GENERATE} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(body)}\r\n\r\n"
    found = []
    for number in range(rounds):
        say(f"cancelling, round {number + 1} of {rounds}")
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(head.encode() + body)
            while not server.metric("dalle_running_jobs"):
                time.sleep(0.01)
            time.sleep(0.5)
        started = time.perf_counter()
        while server.metric("dalle_running_jobs"):
            time.sleep(0.005)
        found.append(time.perf_counter() - started)
    return {"seconds": found, "worst_s": max(found)}


def streaming(server: Server) -> dict[str, Any]:
    """Measure when the first unfinished picture comes, and how much kept rows still change, but for the last two."""
    say("streaming")
    times: dict[int, list[float]] = {}
    pictures: list[Any] = []
    for best_of in (16, 1):
        body = {"prompt": CAPTIONS[0], "stream": True, "partial_images": 3, "best_of": best_of}
        started = time.perf_counter()
        times[best_of], pictures = [], []
        with httpx2.stream("POST", f"{server.url}{GENERATE}", json=body, timeout=LONG_S) as answer:
            for line in answer.iter_lines():
                if line.startswith("data: "):
                    times[best_of].append(time.perf_counter() - started)
                    data = base64.b64decode(json.loads(line[6:])["b64_json"])
                    pictures.append(np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(float) / 255)
    *unfinished, final = pictures
    change = 0.0
    for number, picture in enumerate(unfinished, start=1):
        rows = len(final) * number // 4
        kept = rows - 2 * len(final) // 12  # the demonstration has 12 rows of tokens
        change = max(change, float(np.abs(picture[:kept] - final[:kept]).max()))
    shares = {best_of: found[0] / found[-1] for best_of, found in times.items()}
    return {"first_share_of_time": shares, "seconds": times, "change_of_kept_rows": change}


def memory(server: Server, uploads: int, large: int, n: int) -> dict[str, Any]:
    """Measure how the server's memory grows with large uploads and many candidates."""
    noise = np.random.default_rng(0).integers(0, 256, (2500, 2550, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, format="PNG", compress_level=0)
    picture = file.getvalue()
    server.draw(CAPTIONS[0], 1, n)
    before = server.metric("process_resident_memory_bytes")
    for number in range(uploads):
        say(f"uploads, {number + 1} of {uploads} of {len(picture) / 1e6:.1f} MB")
        fields = {"prompt": CAPTIONS[0], "keep_rows": "6", "best_of": "1"}
        url = f"{server.url}/v1/images/edits"
        httpx2.post(url, data=fields, files={"image": picture}, timeout=LONG_S).raise_for_status()
    for number in range(large):
        say(f"large requests, {number + 1} of {large}")
        server.draw(CAPTIONS[0], number, n)
    growth = server.metric("process_resident_memory_bytes") - before
    return {"uploads": uploads, "upload_bytes": len(picture), "large": large, "growth_bytes": growth}


def main() -> None:
    """Measure everything, print it, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, default=Path("runs/demo"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--best-of", type=int, default=16, help="candidates of the requests that are merged")
    parser.add_argument("--candidates", type=int, default=512, help="of large requests")
    parser.add_argument("--uploads", type=int, default=200)
    parser.add_argument("--large", type=int, default=5, help="requests with that many candidates")
    parser.add_argument("--out", type=Path, default=RESULTS / "serving.json")
    arguments = parser.parse_args()
    sizes = {name: getattr(arguments, name) for name in ("rounds", "best_of", "candidates", "uploads", "large")}
    record: dict[str, Any] = {"machine": machine(), "versions": versions(), "commit": commit(), "sizes": sizes}
    parts: dict[str, Callable[[Server], dict[str, Any]]] = {
        "merging": lambda server: merging(server, arguments.rounds, arguments.best_of),
        "streaming": streaming,
        "cancelling": lambda server: cancelling(server, arguments.candidates, arguments.rounds),
        "health": lambda server: health(server, arguments.candidates),
        "memory": lambda server: memory(server, arguments.uploads, arguments.large, arguments.candidates),
    }
    with served(arguments.bundle) as server:
        for name, measure in parts.items():
            record[name] = measure(server)
            print(name, json.dumps(record[name]), flush=True)
            arguments.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
