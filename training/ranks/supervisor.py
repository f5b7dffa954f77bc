"""`--auto-restart N`: a process that does not train but starts the training as a child, and again when it fails.

Every rank has a supervisor of its own, so a launcher sees ranks that live. When one child dies the others end within
seconds (`watchdog.py`), and all supervisors start theirs again. They agree through a store that the first
rank's supervisor, or torchrun's agent, holds for as long as the job lasts: on the number of the attempt, which
the first child to fail advances by one, whatever the others have noticed; it names the place where the children meet.

Not restarted is what a restart would not mend: an error in words before the first step, and a ValueError at any time.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch.distributed as dist

from training.ranks.watchdog import ATTEMPT, PIPE
from training.ranks.world import job_store

POLL_S = 0.2
EXIT_S = 60.0
"""What a child has to end by itself after that of another rank has failed."""
VERDICT_S = 3.0
"""What another rank's child has to say that a restart would not mend what this one only suffers from."""
FAREWELL_S = 120.0
"""What the other ranks have to end after this one."""


def is_supervised() -> bool:
    """Return whether this process is the child of a supervisor."""
    return ATTEMPT in os.environ


def supervise(arguments: Sequence[str], restarts: int) -> int:
    """Run `dalle-train` with these arguments as a child, again and again up to `restarts` times while it fails.

    What says where the first one starts, --fresh and --resume-from, is left out once a step is done: the next one
    goes on.

    Returns:
        The exit code of the last child; 128 + the signal that ended it.
    """
    program = [sys.executable, "-P", "-m", "training.cli"]
    code = _Supervisor([*program, *arguments], restarts, [*program, *_going_on(arguments)]).run()
    return code if code >= 0 else 128 - code


@dataclass(frozen=True, kw_only=True)
class _End:
    """How a child ended."""

    code: int
    words: frozenset[str]
    """What it has told: see `tell_supervisor`."""

    def __str__(self) -> str:
        if self.code >= 0:
            return f"ended with code {self.code}"
        return f"was ended by {signal.Signals(-self.code).name}"


class _Supervisor:
    """Starts one rank's child."""

    def __init__(self, command: Sequence[str], restarts: int, to_go_on: Sequence[str] | None = None) -> None:
        self._command, self._restarts = list(command), restarts
        self._to_go_on = list(command if to_go_on is None else to_go_on)
        self._rank, self._n_ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        self._child: subprocess.Popen[bytes] | None = None
        self._n_stops = 0
        self._has_started = False
        self._goes_on = False

    def run(self) -> int:
        """Return the code of the last child."""
        handlers = {number: signal.signal(number, self._forward) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            board = _Board(self._rank)
            attempt = board.attempt()
            while True:
                end = self._attempt(attempt, board)
                following = self._following(attempt, end, board)
                if following is None:
                    return end.code
                self._say(f"the training of rank {self._rank} {end}: restart {following} of {self._restarts}")
                attempt = following
                self._goes_on = board.goes_on(attempt)
                if board.is_over():
                    return end.code
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def _forward(self, number: int, _frame: FrameType | None) -> None:
        """Pass a signal on. A terminal sends SIGINT to the child too, for which a second one means to end at once."""
        self._n_stops += 1
        if self._child is not None:
            self._child.send_signal(signal.SIGTERM if self._n_stops == 1 else number)

    def _attempt(self, attempt: int, board: "_Board") -> _End:
        """Start the child, and wait for its end."""
        reader, writer = os.pipe()
        os.set_blocking(reader, False)
        package = str(Path(__file__).parents[2])
        path = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {**os.environ, ATTEMPT: str(attempt), PIPE: str(writer), "PYTHONPATH": path}
        try:
            command = self._to_go_on if self._goes_on else self._command
            self._child = subprocess.Popen(command, env=environment, pass_fds=[writer])
            os.close(writer)
            if self._n_stops:  # it came before there was a child
                self._child.send_signal(signal.SIGTERM)
            words = self._wait(self._child, reader, attempt, board)
            return _End(code=self._child.wait(), words=words)
        finally:
            os.close(reader)
            if self._child is not None and self._child.poll() is None:
                self._child.kill()
            self._child = None

    def _wait(self, child: "subprocess.Popen[bytes]", reader: int, attempt: int, board: "_Board") -> frozenset[str]:
        """Wait for a child's end, and end it where it does not notice that another rank's has failed.

        Returns:
            What it has told. The other supervisors hear of it at once: their children may end before this one does.
        """
        failed_at: float | None = None
        words: set[str] = set()
        while True:
            has_ended = child.poll() is not None
            words |= self._heed(set(_written(reader).split()), board)
            if has_ended:
                return frozenset(words)
            time.sleep(POLL_S)
            if failed_at is None and "final" not in words and (board.attempt() > attempt or board.is_over()):
                failed_at = time.monotonic()
            if failed_at is not None and time.monotonic() - failed_at > EXIT_S:
                child.kill()

    def _heed(self, words: set[str], board: "_Board") -> set[str]:
        """Do what words of the child ask for; returns them."""
        if "started" in words:
            self._has_started = True
            board.start()
        if "final" in words:
            board.end()
        return words

    def _following(self, attempt: int, end: _End, board: "_Board") -> int | None:
        """Return the number of the next attempt; None if there is none."""
        if end.code == 0:
            return board.finish(attempt, self._n_ranks)
        if "lost" in end.words:
            board.wait_for_verdict(attempt)
        overtaken = board.attempt() > attempt
        may_mend = overtaken or end.code < 0 or "lost" in end.words or self._has_started
        if self._n_stops or board.is_over() or "final" in end.words or not may_mend:
            board.end()
            return None
        following = board.advance(attempt)
        if following > self._restarts:
            board.end()
            self._say(f"the training of rank {self._rank} {end}, after {self._restarts} restarts: no more of them")
            return None
        return following

    def _say(self, line: str) -> None:
        with contextlib.suppress(OSError):
            print(f"supervisor: {line}", file=sys.stderr, flush=True)


def _going_on(arguments: Sequence[str]) -> list[str]:
    """Return a command's arguments without those that say where it starts."""
    left, kept = iter(arguments), []
    for argument in left:
        name, equals, _ = argument.partition("=")
        name = name.replace("_", "-")  # both spellings are accepted
        if name == "--resume-from":
            if not equals:
                next(left, None)
        elif name != "--fresh":
            kept.append(argument)
    return kept


def _written(reader: int) -> str:
    """Return what is in a pipe."""
    with contextlib.suppress(BlockingIOError):
        return os.read(reader, 65536).decode()
    return ""


class _Board:
    """What the supervisors of a job agree on. Where the store is gone, the job is over."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
            self._store = job_store("supervisors", host=rank == 0)
        else:
            self._store = dist.HashStore()  # type: ignore[attr-defined]  # public, but torch does not say so to mypy
        self._is_over = False
        self._last_attempt = 0
        self.advance(-1)

    def attempt(self) -> int:
        """Return the number of the attempt that is under way."""
        with self._until_it_is_gone():
            self._last_attempt = int(self._store.get("attempt"))
        return self._last_attempt

    def advance(self, attempt: int) -> int:
        """Begin the attempt after the given one, unless another rank has; returns the one that is under way."""
        with self._until_it_is_gone():
            before = str(attempt) if attempt >= 0 else ""
            self._last_attempt = int(self._store.compare_set("attempt", before, str(attempt + 1)))
        return self._last_attempt

    def start(self) -> None:
        """Let all ranks know that a step is done."""
        with self._until_it_is_gone():
            self._store.set("started", "1")

    def goes_on(self, attempt: int) -> bool:
        """Return whether a step was done before this attempt; the first rank to ask decides it for all."""
        with self._until_it_is_gone():
            has_started = str(int(self._store.check(["started"])))
            return bool(int(self._store.compare_set(f"goes on/{attempt}", "", has_started)))
        return False

    def wait_for_verdict(self, attempt: int) -> None:
        """Wait a little for another rank to give up, or to begin the next attempt."""
        deadline = time.monotonic() + VERDICT_S
        while not self.is_over() and self.attempt() <= attempt and time.monotonic() < deadline:
            time.sleep(POLL_S)

    def is_over(self) -> bool:
        """Return whether a supervisor has given up."""
        with self._until_it_is_gone():
            self._is_over = self._is_over or self._store.check(["over"])
        return self._is_over

    def end(self) -> None:
        """Give up, for all ranks."""
        with self._until_it_is_gone():
            self._store.set("over", "1")

    def finish(self, attempt: int, n_ranks: int) -> int | None:
        """Wait until all ranks have ended well; returns the attempt that is under way if one of them has not."""
        deadline = time.monotonic() + FAREWELL_S
        with self._until_it_is_gone():
            self._store.add(f"finished/{attempt}", 1)
            while self._store.add(f"finished/{attempt}", 0) < n_ranks and time.monotonic() < deadline:
                if self.is_over():
                    return None
                if self.attempt() > attempt:
                    return self._last_attempt
                time.sleep(POLL_S)
            if self._rank == 0:  # whose end is the store's
                time.sleep(5 * POLL_S)
        return None

    @contextlib.contextmanager
    def _until_it_is_gone(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError:
            self._is_over = True
