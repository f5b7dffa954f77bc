"""The process: it listens, loads, serves, and ends without losing what is under way."""

import asyncio
import errno
import logging
import os
import signal
import socket
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import Any

import python_multipart
import uvicorn

from dalle.pipeline import Pipeline
from dalle.server.app import make_app
from dalle.server.metrics import Metrics
from dalle.server.queueing.engine import Engine
from dalle.server.queueing.jobs import Queue
from dalle.server.security import LOOPBACK, Rules
from dalle.server.state import Settings, State
from dalle.unclip.pipeline import UnCLIP

logger = logging.getLogger(__name__)

FLUSH_S = 0.3
"""For answers that are on their way when the last job has ended."""
KEEP_ALIVE_S = 75
"""That an idle connection is kept. Clients close theirs after less (httpx, and so OpenAI's client, after 5 s, which is
uvicorn's default, too): where both let go at the same moment, a request meets a closed connection."""
MULTIPART_FROM = (0, 0, 27)
"""Earlier ones can be kept busy by small forms (CVE-2026-42561)."""


@dataclass(frozen=True, kw_only=True)
class Process:
    """How the process runs."""

    port: int = 8000
    """0 for any that is free."""
    max_jobs: int = 32
    max_waiting_candidates: int = 8192
    grace_s: float = 30.0
    """For what is under way when the server is told to end."""


class DrainingServer(uvicorn.Server):
    """Ends in turn: accepts no more jobs, finishes those that are left, and tells the others.

    Uvicorn's own end waits for streams that never close, and runs the application's end after that.

    Args:
        config: uvicorn's.
        state: of the application.
        grace_s: seconds for what is under way.
    """

    def __init__(self, config: uvicorn.Config, state: State, grace_s: float) -> None:
        super().__init__(config)
        self._state, self._grace_s = state, grace_s
        self._loop: asyncio.AbstractEventLoop | None = None
        self._draining: asyncio.Task[None] | None = None

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until told to end."""
        self._loop = asyncio.get_running_loop()
        self._state.engine.on_failure = self.stop_soon
        self._state.engine.start()
        await super().serve(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """End in turn; a second time at once."""
        if self._state.is_draining:
            self.force_exit = self.should_exit = True
        else:
            logger.info("%s: finishing what is under way, for up to %g s", signal.Signals(sig).name, self._grace_s)
            self.stop_soon()

    def stop_soon(self) -> None:
        """End in turn; may be called on any thread."""
        self._state.is_draining = True
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._begin_to_drain)

    def _begin_to_drain(self) -> None:
        if self._draining is None:
            self._draining = asyncio.ensure_future(self._drain())

    async def _drain(self) -> None:
        queue = self._state.engine.queue
        queue.close()
        deadline = asyncio.get_running_loop().time() + self._grace_s
        while not queue.is_idle and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.05)
        queue.end_all()
        await asyncio.sleep(FLUSH_S)
        self.should_exit = True


def make_state(
    load: Callable[[], Pipeline],
    settings: Settings,
    process: Process,
    load_unclip: Callable[[], UnCLIP] | None = None,
) -> State:
    """Return what serves a bundle, not yet started."""
    metrics = Metrics()
    queue = Queue(max_jobs=process.max_jobs, max_candidates=process.max_waiting_candidates, on_ended=metrics.job_ended)
    return State(Engine(load, queue, metrics, load_unclip=load_unclip), metrics, settings)


def make_server(state: State, rules: Rules, process: Process) -> DrainingServer:
    """Return the server of a state."""
    config = uvicorn.Config(
        make_app(state, rules),
        http="h11",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=int(process.grace_s) + 2,
    )
    return DrainingServer(config, state, process.grace_s)


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens.

    Raises:
        OSError: the address is in use, or not of this machine.
    """
    try:
        family = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][0]
    except OSError as error:
        raise OSError(f"there is no address {host!r} ({error.strerror or error}): give another --host") from None
    try:
        return socket.create_server((host, port), family=family, backlog=128)
    except OSError as error:
        other = "--port" if error.errno in (errno.EADDRINUSE, errno.EACCES) else "--host"
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise OSError(f"cannot listen on {host} port {port} ({reason}): give another {other}") from None


def check_safe(rules: Rules, *, no_auth: bool) -> None:
    """Raise ValueError where anybody could use the server unasked: other addresses need a key."""
    if rules.host not in LOOPBACK and not rules.keys and not no_auth:
        raise ValueError(
            f"the address {rules.host} can be reached from other machines: give --api-key-file or DALLE_API_KEY, "
            "or say --no-auth"
        )


def run(
    load: Callable[[], Pipeline],
    settings: Settings,
    rules: Rules,
    process: Process,
    load_unclip: Callable[[], UnCLIP] | None = None,
) -> None:
    """Serve until told to end.

    Args:
        load: returns the bundle.
        settings: how requests are answered.
        rules: what they must fulfil.
        process: how the process runs.
        load_unclip: returns the bundle's DALL·E 2; None if it has none.

    Raises:
        ValueError: the bundle cannot be loaded.
        OSError: the bundle is not there, or the address is in use.
    """
    _check_multipart()
    listening = listen(rules.host, process.port)
    state = make_state(load, settings, process, load_unclip)
    server = make_server(state, rules, process)
    host = f"[{rules.host}]" if ":" in rules.host else rules.host
    address = f"http://{host}:{listening.getsockname()[1]}"
    logger.info("%s: the page; for clients of OpenAI's Images API the base URL is %s/v1", address, address)
    server.run(sockets=[listening])
    if state.engine.failure is not None:
        raise state.engine.failure
    state.engine.join(1.0)


def _check_multipart() -> None:
    version: Any = tuple(int(part) for part in python_multipart.__version__.split(".")[:3] if part.isdigit())
    if version < MULTIPART_FROM:
        needed = ".".join(map(str, MULTIPART_FROM))
        raise ValueError(f"python-multipart {python_multipart.__version__} is too old: install {needed} or later")
