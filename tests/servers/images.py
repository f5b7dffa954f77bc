"""`dalle serve` on a thread of this process, on any free port of loopback."""

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from typing import Any, Self

import httpx2
from openai import OpenAI

from dalle.best_of_n import Result
from dalle.pipeline import Pipeline
from dalle.server.queueing.batch import Watch, Work, draw
from dalle.server.queueing.engine import Engine
from dalle.server.queueing.jobs import Queue
from dalle.server.security import Rules
from dalle.server.serving import Process, listen, make_server, make_state
from dalle.server.state import Settings
from dalle.unclip.pipeline import UnCLIP

LONG_S = 60.0
"""Before a test gives up."""


class SlowDraw:
    """Draws as the engine does, but a token takes as long as it is told, until `go` is set; remembers what it drew."""

    def __init__(self, token_s: float = 0.0) -> None:
        self.token_s = token_s
        self.go = threading.Event()
        self.drawn: list[tuple[Work, ...]] = []
        self.ended = 0

    def __call__(self, pipe: Pipeline, works: Sequence[Work], watch: Watch) -> dict[Work, Result]:
        self.drawn.append(tuple(works))
        slow = self

        class Slowed:
            def begun(self, work: Work, judge: Any) -> None:
                watch.begun(work, judge)

            def sampled(self, tokens: Any) -> Any:
                slow.go.wait(slow.token_s)
                return watch.sampled(tokens)

            def judged(self, work: Work) -> None:
                watch.judged(work)

        try:
            return draw(pipe, works, Slowed())
        finally:
            self.ended += 1


class NoObserver:
    def batch_done(self, times: object) -> None:
        pass


def engine_of(pipe: Pipeline, slow: SlowDraw | None = None, **limits: Any) -> Engine:
    """A running engine whose bundle is loaded, with a queue of its own."""
    queue = Queue(**{"max_jobs": 32, "max_candidates": 4096, **limits})
    engine = Engine(lambda: pipe, queue, NoObserver(), slow or SlowDraw())
    engine.start()
    wait_until(lambda: engine.pipe is not None)
    return engine


def wait_until(condition: Callable[[], object]) -> None:
    """Wait until something holds."""
    deadline = time.monotonic() + LONG_S
    while not condition():
        assert time.monotonic() < deadline, "it never held"
        time.sleep(0.005)


class LiveServer:
    """A server that listens; a context.

    Args:
        load: returns the bundle.
        slow: draws for it.
        rules: as for `Rules`.
        process: as for `Process`.
        load_unclip: returns the bundle's DALL·E 2.
        settings: as for `Settings`.
    """

    def __init__(
        self,
        load: Callable[[], Pipeline],
        *,
        slow: SlowDraw | None = None,
        rules: dict[str, Any] | None = None,
        process: dict[str, Any] | None = None,
        load_unclip: Callable[[], UnCLIP] | None = None,
        **settings: Any,
    ) -> None:
        self.slow = slow or SlowDraw()
        chosen = Process(**{"grace_s": 5.0, **(process or {})})
        told = Settings(**{"models": ("tiny",), "best_of": 4, **settings})
        self.state = make_state(load, told, chosen, load_unclip)
        self.state.engine._draw = self.slow
        self.server = make_server(self.state, Rules(**(rules or {})), chosen)
        self._socket = listen("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self._client = httpx2.Client(base_url=self.url, timeout=LONG_S)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self._socket]}, daemon=True)

    def __enter__(self) -> Self:
        self.thread.start()
        wait_until(lambda: self.server.started)
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()
        self.server.stop_soon()
        self.thread.join(LONG_S)
        assert not self.thread.is_alive()

    def ready(self) -> Self:
        """Wait until requests are taken."""
        wait_until(lambda: self.state.is_ready)
        return self

    def client(self, key: str = "any", **options: Any) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key=key, **options)

    def ask(self, method: str, path: str, **options: Any) -> httpx2.Response:
        """Ask without the official client."""
        return self._client.request(method, path, **options)

    def metric(self, line: str) -> float:
        """A number in the metrics."""
        found = [text for text in self.ask("GET", "/metrics").text.splitlines() if text.startswith(line)]
        return float(found[0].rsplit(" ", 1)[1]) if found else 0.0


@contextmanager
def running(server: LiveServer):
    with server:
        yield server.ready()
