"""`dalle serve` under mixed load for minutes, then under requests that nobody would write: what is lost, what leaks.

python -m benchmarks.soak --bundle runs/demo --minutes 30 --fuzz-minutes 10

Load: pictures, streams, edits with random masks, variations, jobs of the page, some of which are cancelled, and
connections that are dropped. Every request that was not dropped must end in a picture or in a told error, every
accepted job must be counted as done, failed or cancelled, and the memory must not grow. Fuzz: random values of the
documented fields, broken pictures, other methods and types; nothing may be answered with 5xx, or not at all.
"""

import argparse
import base64
import io
import json
import random
import socket
import string
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx2
import numpy as np
from PIL import Image

from benchmarks.measure import RESULTS, commit, machine, say, versions
from benchmarks.serving import CAPTIONS, GENERATE, Server, served
from dalle.server.api.requests import EDIT_FIELDS, IGNORED, QUALITIES, VARIATION_FIELDS

EDIT, VARY = "/v1/images/edits", "/v1/images/variations"
HANG_S = 600.0
"""After which a request counts as lost."""
NUMBERS = [-1, 0, 1, 2, 7, 2**63, -(2**63), 1e308, 0.5]
ODD: list[Any] = [*NUMBERS, None, True, "", "auto", "1", "NaN", "16x16", "9x9", [], {}, [[1]]]
WORDS = [*QUALITIES, "png", "jpeg", "webp", "url", "b64_json", "true", "opaque", "clip", "likelihood", "dall-e-2"]


class LostError(Exception):
    """A request ended neither in a picture nor in a told error."""


def png(rng: random.Random, side: int, *, masked: bool = False) -> bytes:
    """Return a picture of noise, of which a random rectangle is transparent if it is `masked`."""
    generator = np.random.default_rng(rng.getrandbits(32))
    pixels = generator.integers(0, 256, (side, side, 4), np.uint8)
    pixels[..., 3] = 255
    if masked:
        (top, bottom), (left, right) = (sorted(rng.sample(range(side + 1), 2)) for _ in range(2))
        pixels[top:bottom, left:right, 3] = 0
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG")
    return file.getvalue()


def told(answer: httpx2.Response) -> str:
    """Return how a request ended: "result" or the status of a told error; raises LostError for an untold one."""
    if answer.status_code < 400:
        return "result"
    error = json.loads(answer.content).get("error", {})
    if not error.get("message"):
        raise LostError(f"{answer.status_code} without a message")
    return str(answer.status_code)


class Load:
    """Requests of one client.

    Args:
        url: of the server.
        seed: of what is asked.
    """

    def __init__(self, url: str, seed: int) -> None:
        self._url, self._rng = url, random.Random(seed)
        self._client = httpx2.Client(base_url=url, timeout=HANG_S)
        self.kinds: list[Callable[[], str]] = [
            self.generate,
            self.stream,
            self.edit,
            self.vary,
            self.page,
            self.cancel,
            self.drop,
        ]

    def any(self) -> tuple[str, str]:
        """Ask for something; returns what, and how it ended."""
        kind = self._rng.choice(self.kinds)
        return kind.__name__, kind()

    def _fields(self) -> dict[str, Any]:
        rng = self._rng
        best_of = rng.choice([1, 2, 4, 8])
        fields = {"prompt": rng.choice(CAPTIONS), "best_of": best_of, "n": rng.randint(1, best_of)}
        if rng.random() < 0.5:
            fields["seed"] = rng.randint(0, 3)  # equal works are drawn once
        return fields | rng.choice([{}, {}, {"temperature": 0.5}, {"output_format": "jpeg"}, {"rank": "both"}])

    def generate(self) -> str:
        """Pictures of a caption."""
        return told(self._client.post(GENERATE, json=self._fields()))

    def stream(self) -> str:
        """The same, as a stream."""
        return self._streamed(GENERATE, json={**self._fields(), "stream": True, "partial_images": 2})

    def edit(self) -> str:
        """A part of a picture, as a stream or not."""
        rng = self._rng
        side = rng.choice([16, 40, 300])
        files = {"image": png(rng, side), "mask": png(rng, side, masked=True)}
        if rng.random() < 0.5:
            return told(self._client.post(EDIT, data=self._fields(), files=files))
        return self._streamed(EDIT, data={**self._fields(), "stream": "true", "partial_images": "1"}, files=files)

    def vary(self) -> str:
        """Variations."""
        fields = {**self._fields(), "strength": self._rng.random()}
        return told(self._client.post(VARY, data=fields, files={"image": png(self._rng, 64)}))

    def _streamed(self, path: str, **options: Any) -> str:
        with self._client.stream("POST", path, **options) as answer:
            if answer.status_code >= 400:
                answer.read()
                return told(answer)
            lines = [line for line in answer.iter_lines() if line]
        last = json.loads(lines[-1].removeprefix("data: "))
        if "error" in last:
            return str(last["error"]["code"])
        if not last["type"].endswith(".completed"):
            raise LostError(f"a stream ended with {last['type']}")
        return "result"

    def page(self) -> str:
        """A job of the page, with its pictures."""
        fields = self._fields()
        fields.pop("output_format", None)
        if self._rng.random() < 0.4:
            image, mask = png(self._rng, 48), png(self._rng, 48, masked=True)
            fields |= {name: base64.b64encode(data).decode() for name, data in (("image", image), ("mask", mask))}
        made = self._client.post("/api/jobs", json=fields)
        if made.status_code >= 400:
            return told(made)
        job = made.json()["id"]
        last = self._client.get(f"/api/jobs/{job}/events").text.strip().split("\n\n")[-1].split("\n")
        if last[0] != "event: done":
            return str(json.loads(last[-1].removeprefix("data: "))["error"]["code"])
        return told(self._client.get(f"/api/jobs/{job}/pictures/0"))

    def cancel(self) -> str:
        """A job of the page that is cancelled after a while."""
        made = self._client.post("/api/jobs", json=self._fields())
        if made.status_code >= 400:
            return told(made)
        path = f"/api/jobs/{made.json()['id']}"
        time.sleep(self._rng.random() * 2)
        self._client.delete(path)
        last = self._client.get(f"{path}/events").text.strip().split("\n\n")[-1]
        return "result" if last.startswith("event: done") else "cancelled"

    def drop(self) -> str:
        """A connection that is closed before the answer, or in the middle of a stream."""
        rng = self._rng
        host, port = self._url.removeprefix("http://").split(":")
        body = json.dumps({**self._fields(), "stream": rng.random() < 0.5}).encode()
        head = f"POST {GENERATE} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        with socket.create_connection((host, int(port)), timeout=HANG_S) as connection:
            connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            time.sleep(rng.random() * 2)
        return "dropped"


class Fuzz:
    """Requests that nobody would write.

    Args:
        url: of the server.
        seed: of what is asked.
    """

    def __init__(self, url: str, seed: int) -> None:
        self._rng = random.Random(seed)
        self._client = httpx2.Client(base_url=url, timeout=HANG_S)
        self._names = [*EDIT_FIELDS, *VARIATION_FIELDS, *IGNORED, "image", "mask", "sead", ""]

    def any(self) -> tuple[str, str]:
        """Ask for something; returns how, and what was answered; raises LostError for 5xx."""
        kind = self._rng.choice([self.json, self.form, self.bytes])
        answer = kind()
        if answer.status_code >= 500:
            raise LostError(f"{answer.status_code} {answer.text[:200]} to {answer.request.url}")
        if answer.request.method != "HEAD":
            told(answer)
        return kind.__name__, str(answer.status_code)

    def _value(self) -> Any:
        rng = self._rng
        letters = "".join(rng.choices(string.printable + "é\u202e\0\U0001f600", k=rng.randint(0, 12)))
        return rng.choice([rng.choice(ODD), rng.choice(WORDS), rng.randint(-2, 9), rng.random() * 3, letters])

    def _fields(self) -> dict[str, Any]:
        rng = self._rng
        fields = {rng.choice(self._names): self._value() for _ in range(rng.randint(0, 4))}
        return {"best_of": 2, **fields, **({"prompt": "a red cube"} if rng.random() < 0.8 else {})}

    def _picture(self) -> bytes:
        rng = self._rng
        data = bytearray(png(rng, rng.choice([8, 16, 33]), masked=rng.random() < 0.5))
        for _ in range(rng.choice([0, 0, 1, 8])):
            data[rng.randrange(len(data))] = rng.randrange(256)
        return bytes(data[: rng.choice([len(data), len(data), rng.randrange(len(data))])])

    def json(self) -> httpx2.Response:
        """JSON, of the API or the page's."""
        fields = self._fields()
        if self._rng.random() < 0.5:
            fields |= {
                name: base64.b64encode(self._picture()).decode() for name in self._rng.sample(["image", "mask"], 1)
            }
        body = json.dumps(fields).encode()
        path = self._rng.choice([GENERATE, "/api/jobs"])
        return self._client.post(path, content=body, headers={"content-type": "application/json"})

    def form(self) -> httpx2.Response:
        """A form with pictures."""
        fields = {name: str(value) for name, value in self._fields().items() if name and name not in ("image", "mask")}
        names = self._rng.choice([["image"], ["image"], ["image", "mask"], ["image[]"], ["other"]])
        files = {name: self._picture() for name in names}
        return self._client.post(self._rng.choice([EDIT, VARY]), data=fields, files=files)

    def bytes(self) -> httpx2.Response:
        """Anything to anywhere."""
        rng = self._rng
        path = rng.choice(
            [GENERATE, EDIT, VARY, "/v1/models", "/api/jobs", "/api/jobs/0/events", "/pictures/0", "/", "/é"]
        )
        kind = rng.choice(["application/json", "multipart/form-data; boundary=x", "text/plain", ""])
        method = rng.choice(["GET", "POST", "PUT", "DELETE", "OPTIONS", "PATCH", "HEAD"])
        return self._client.request(
            method, path, content=rng.randbytes(rng.randint(0, 300)), headers={"content-type": kind}
        )


def ended(server: Server) -> dict[str, float]:
    """Return how many jobs ended how, by what asked for them."""
    text = httpx2.get(f"{server.url}/metrics", timeout=HANG_S).text
    lines = [line for line in text.splitlines() if line.startswith("dalle_jobs_total")]
    return {line[len("dalle_jobs_total") :].rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in lines}


class Look(NamedTuple):
    """What the server held at a moment."""

    minutes: float
    memory: float
    """Bytes of the process."""
    kept: float
    """Bytes of pictures that it keeps for an hour, among them."""


def growth(looks: Sequence[Look]) -> list[float]:
    """Return how the memory without the pictures that are kept grows in each third of the time: bytes per minute, by
    least squares."""
    found = []
    for third in np.array_split(np.array(looks), 3):
        found.append(float(np.polyfit(third[:, 0], third[:, 1] - third[:, 2], 1)[0]) if len(third) > 2 else 0.0)
    return found


@contextmanager
def _remembered(server: Server, looks: list[Look]) -> Iterator[None]:
    """Look at the server's memory every few seconds."""
    started, done = time.monotonic(), threading.Event()

    def look() -> None:
        while not done.wait(5):
            memory, kept = (server.metric(name) for name in ("process_resident_memory_bytes", "dalle_result_bytes"))
            looks.append(Look((time.monotonic() - started) / 60, memory, kept))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def drive(server: Server, clients: Sequence[Load | Fuzz], minutes: float) -> dict[str, Any]:
    """Let clients ask for minutes, each again and again; returns what became of it."""
    outcomes: Counter[str] = Counter()
    lost: list[str] = []
    longest = 0.0
    deadline = time.monotonic() + minutes * 60

    def work(client: Load | Fuzz) -> None:
        nonlocal longest
        while time.monotonic() < deadline:
            started = time.monotonic()
            try:
                outcomes[" ".join(client.any())] += 1
            except Exception as error:  # whatever it is, it is what this looks for
                lost.append(f"{type(error).__name__}: {error}"[:300])
            longest = max(longest, time.monotonic() - started)

    looks: list[Look] = []
    threads = [threading.Thread(target=work, args=(client,)) for client in clients]
    with _remembered(server, looks):
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            time.sleep(5)
            say(
                f"{sum(outcomes.values())} requests, {len(lost)} lost, {max(0, deadline - time.monotonic()):.0f} s left"
            )
        while server.metric("dalle_running_jobs") or server.metric("dalle_queue_jobs"):
            time.sleep(1)
    return {
        "minutes": minutes,
        "clients": len(clients),
        "requests": sum(outcomes.values()) + len(lost),
        "outcomes": dict(sorted(outcomes.items())),
        "lost": lost,
        "longest_s": longest,
        "jobs_by_end": ended(server),
        "memory_bytes": {"first": looks[0].memory, "last": looks[-1].memory, "most": max(one.memory for one in looks)},
        "kept_bytes": looks[-1].kept,
        "growth_bytes_per_minute": growth(looks),
    }


def main() -> None:
    """Soak, fuzz, print, and write the JSON; exit with 1 if something was lost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, default=Path("runs/demo"))
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--fuzz-minutes", type=float, default=10)
    parser.add_argument("--clients", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS / "soak.json")
    arguments = parser.parse_args()
    record: dict[str, Any] = {"machine": machine(), "versions": versions(), "commit": commit()}
    parts: dict[str, tuple[type[Load] | type[Fuzz], float]] = {
        "soak": (Load, arguments.minutes),
        "fuzz": (Fuzz, arguments.fuzz_minutes),
    }
    n_lost = 0
    for name, (client, minutes) in parts.items():
        if not minutes:
            continue
        with served(arguments.bundle, "--best-of", "4", "--max-candidates", "8", "--queue", "4") as server:
            seeds = range(arguments.seed, arguments.seed + arguments.clients)
            record[name] = drive(server, [client(server.url, seed) for seed in seeds], minutes)
        n_lost += len(record[name]["lost"])
        print(name, json.dumps(record[name]), flush=True)
        arguments.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    raise SystemExit(1 if n_lost else 0)


if __name__ == "__main__":
    main()
