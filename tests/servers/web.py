"""A web server on loopback that serves a folder, and fails as it is told: stands for stores in tests and faults."""

import contextlib
import email.utils
import hashlib
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

HTML = b"<!DOCTYPE html><html><body>Please log in.</body></html>"
DRIP_BYTES, DRIP_S = 16, 0.02


class Web(ThreadingHTTPServer):
    """Serves the files of a folder.

    Args:
        folder: with the files.
        ranges: whether it knows ranges of bytes.
        like_s3: whether it says that its ETags are MD5 sums, as S3 does.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, folder: Path, *, ranges: bool = True, like_s3: bool = False) -> None:
        self.folder, self.ranges, self.like_s3 = folder, ranges, like_s3
        self.faults: dict[str, list[str]] = {}
        """By the name of a file, or "" for all, what happens to its next requests: words of `Handler.fail`."""
        self.dated = True
        """Whether it tells times of change."""
        self.always = ""
        """What happens to all requests."""
        self.seen: list[tuple[str, str, str | None]] = []
        """Method, name and range of every request."""
        self.released = threading.Event()
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def gets(self, ending: str = ".tar") -> Counter[str]:
        """Return how often each file was asked for."""
        return Counter(name for method, name, _ in self.seen if method == "GET" and name.endswith(ending))

    def ranges_of(self, name: str) -> list[str | None]:
        """Return the ranges that were asked of a file, None for all of it."""
        return [range_ for method, found, range_ in self.seen if (method, found) == ("GET", name)]

    def next_fault(self, name: str) -> str:
        waiting = self.faults.get(name) or self.faults.get("") or []
        return waiting.pop(0) if waiting else self.always

    def handle_error(self, *_: object) -> None:
        pass  # clients that give up


class Handler(SimpleHTTPRequestHandler):
    server: Web
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *arguments: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        self.close_connection = True
        path = self.server.folder / self.path.partition("?")[0].lstrip("/").removeprefix("moved/")
        self.server.seen.append((self.command, path.name, self.headers.get("Range")))
        if path.is_dir():
            links = "".join(f'<a href="{one.name}{"/" * one.is_dir()}">x</a>' for one in sorted(path.iterdir()))
            return self._send(200, f"<html>{links}</html>".encode(), body=body, kind="text/html")
        fault = self.server.next_fault(path.name) if body else self.server.always.replace("cut", "")
        if not path.is_file():
            return self._send(404, b"", body=body)
        if not fault.startswith("moved") and self.fail(fault, body=body):
            return None
        if fault == "moved":
            return self._send(302, b"", body=body, more={"Location": f"/moved{self.path}"})
        data = path.read_bytes()
        if fault == "wrong":
            data = data[:700] + bytes([data[700] ^ 1]) + data[701:]
        elif fault == "html":
            data = HTML
        tag = f'"{hashlib.md5(path.read_bytes()).hexdigest()}"'
        more = {"ETag": tag}
        if self.server.dated:
            more["Last-Modified"] = email.utils.formatdate(path.stat().st_mtime, usegmt=True)
        more |= {"X-Amz-Request-Id": "1"} if self.server.like_s3 else {}
        first = 0
        wanted = self.headers.get("Range")
        if self.server.ranges and wanted and self.headers.get("If-Range", tag) == tag:
            first = int(wanted.removeprefix("bytes=").partition("-")[0])
            more["Content-Range"] = f"bytes {first}-{len(data) - 1}/{len(data)}"
        self._send(206 if first else 200, data[first:], body=body, more=more, fault=fault)

    def fail(self, fault: str, *, body: bool) -> bool:
        """Answer with an error; returns whether this was one."""
        if fault.isdigit():
            self._send(int(fault), b"<Error>no</Error>", body=body)
        elif fault == "hang":
            self.server.released.wait(60)
        elif fault == "closed":
            self.connection.close()
        else:
            return False
        return True

    def _send(
        self, code: int, data: bytes, *, body: bool, kind: str = "", more: dict[str, str] | None = None, fault: str = ""
    ) -> None:
        self.send_response(code)
        for name, value in {"Content-Type": kind or "application/x-tar", **(more or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Connection", "close")
        self.end_headers()
        if not body:
            return
        if fault in ("drip", "slow"):
            size = DRIP_BYTES if fault == "drip" else max(1, len(data) // 40)
            for start in range(0, len(data), size):
                self.wfile.write(data[start : start + size])
                time.sleep(DRIP_S if fault == "drip" else 0.1)
        elif fault == "cut":
            self.wfile.write(data[: len(data) // 2])
            time.sleep(0.2)  # until it was read
        else:
            self.wfile.write(data)


@contextlib.contextmanager
def serving(folder: Path, *, ranges: bool = True, like_s3: bool = False, faults: Sequence[str] = ()) -> Iterator[Web]:
    """Serve a folder while the context lasts; the first requests of bodies fail as `faults` say."""
    server = Web(folder, ranges=ranges, like_s3=like_s3)
    server.faults[""] = list(faults)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.released.set()
        server.shutdown()
        server.server_close()
