"""`--auto-restart N`: a process beside each rank that starts its training as a child, and again when it fails.

A launcher only sees supervisors, which live on. When one child dies the others end within seconds (`watch.py`), and
all supervisors start theirs again. They agree on the number of the attempt through a store, which the first rank's
supervisor or torchrun's agent holds for as long as the job lasts. The first child to fail advances that number,
whatever the others have noticed. The children of an attempt meet under its number (`ranks.py`).

Errors that would recur are not restarted: any ValueError, and any error in words before the first step.
"""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from training.ranks.environment import ATTEMPT, PIPE
from training.ranks.ranks import job_store
from training.ranks.stop import SignalHandler, exit_text

POLL_S = 0.2
EXIT_S = 60.0
"""Seconds for a child to end by itself after another rank's child has failed."""
VERDICT_S = 3.0
"""Seconds to wait for another rank to report an error that would recur."""
FAREWELL_S = 120.0
"""Seconds for the other ranks to end after this one has ended well."""


def supervise(arguments: Sequence[str], restarts: int) -> int:
    """Run `dalle-train` with these arguments as a child, and again up to `restarts` times while it fails.

    Once a step is done, restarts leave out --fresh and --resume-from, and so resume from the newest checkpoint.

    Returns:
        The exit code of the last child; 128 + the signal that ended it.
    """
    program = [sys.executable, "-P", "-m", "training.cli"]
    code = _Supervisor([*program, *arguments], restarts, [*program, *_without_start(arguments)]).run()
    return code if code >= 0 else 128 - code


def _without_start(arguments: Sequence[str]) -> list[str]:
    """Return the arguments without --fresh and --resume-from, which say where a run starts."""
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


@dataclass(frozen=True, kw_only=True)
class _ChildEnd:
    """How a child ended."""

    code: int
    told: frozenset[str]
    """The words that it has told: see `tell_supervisor`."""

    def __str__(self) -> str:
        return exit_text(self.code)


class _Supervisor:
    """Starts one rank's child, and again.

    Args:
        command: of the first child.
        restarts: the most restarts.
        resuming: of the children after a step is done; None: the same.
    """

    def __init__(self, command: Sequence[str], restarts: int, resuming: Sequence[str] | None = None) -> None:
        self._command, self._restarts = list(command), restarts
        self._resuming = list(command if resuming is None else resuming)
        self._rank, self._n_ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        self._child: subprocess.Popen[bytes] | None = None
        self._n_stops = 0
        self._has_started = False
        self._resumes = False

    def run(self) -> int:
        """Return the exit code of the last child, negative for a signal."""
        with SignalHandler(self._forward):
            agreement = _Agreement(self._rank)
            attempt = agreement.attempt()
            while True:
                end = self._run_child(attempt, agreement)
                next_attempt = self._next_attempt(attempt, end, agreement)
                if next_attempt is None:
                    return end.code
                self._say(f"the training of rank {self._rank} {end}: restart {next_attempt} of {self._restarts}")
                attempt = next_attempt
                self._resumes = agreement.resumes(attempt)
                if agreement.is_over():
                    return end.code

    def _forward(self, number: int) -> None:
        """Forward a signal to the child: the first as SIGTERM, because a terminal sends the child SIGINT too.

        A second SIGINT lets it end at once.
        """
        self._n_stops += 1
        if self._child is not None:
            if self._n_stops == 1:
                self._child.terminate()
            else:
                self._child.send_signal(number)

    def _run_child(self, attempt: int, agreement: "_Agreement") -> _ChildEnd:
        """Start the child, and wait for its end."""
        reader, writer = os.pipe()
        os.set_blocking(reader, False)
        package = str(Path(__file__).parents[2])
        path = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {**os.environ, ATTEMPT: str(attempt), PIPE: str(writer), "PYTHONPATH": path}
        try:
            command = self._resuming if self._resumes else self._command
            self._child = subprocess.Popen(command, env=environment, pass_fds=[writer])
            os.close(writer)
            if self._n_stops:  # it came before there was a child
                self._child.terminate()
            told = self._wait(self._child, reader, attempt, agreement)
            return _ChildEnd(code=self._child.wait(), told=told)
        finally:
            os.close(reader)
            if self._child is not None and self._child.poll() is None:
                self._child.kill()
            self._child = None

    def _wait(
        self, child: "subprocess.Popen[bytes]", reader: int, attempt: int, agreement: "_Agreement"
    ) -> frozenset[str]:
        """Wait for a child's end; kill it if another rank's child failed `EXIT_S` ago.

        Returns:
            The words that it has told. The other supervisors hear of them at once: their children may end before.
        """
        failed_at: float | None = None
        told: set[str] = set()
        while True:
            has_ended = child.poll() is not None
            words = set(_written(reader).split())
            told |= words
            if "started" in words:
                self._has_started = True
                agreement.note_first_step()
            if "final" in words:
                agreement.give_up()
            if has_ended:
                return frozenset(told)
            time.sleep(POLL_S)
            if failed_at is None and "final" not in told and (agreement.attempt() > attempt or agreement.is_over()):
                failed_at = time.monotonic()
            if failed_at is not None and time.monotonic() - failed_at > EXIT_S:
                child.kill()

    def _next_attempt(self, attempt: int, end: _ChildEnd, agreement: "_Agreement") -> int | None:
        """Return the number of the next attempt; None if there is none."""
        if end.code == 0:
            return agreement.finish(attempt, self._n_ranks)
        if "lost" in end.told:
            agreement.wait_for_verdict(attempt)
        is_overtaken = agreement.attempt() > attempt
        may_succeed = is_overtaken or end.code < 0 or "lost" in end.told or self._has_started
        if self._n_stops or agreement.is_over() or "final" in end.told or not may_succeed:
            agreement.give_up()
            return None
        next_attempt = agreement.advance(attempt)
        if next_attempt > self._restarts:
            agreement.give_up()
            self._say(f"the training of rank {self._rank} {end}, after {self._restarts} restarts: no more of them")
            return None
        return next_attempt

    def _say(self, line: str) -> None:
        with contextlib.suppress(OSError):
            print(f"supervisor: {line}", file=sys.stderr, flush=True)


def _written(reader: int) -> str:
    """Return what a pipe holds, without waiting."""
    with contextlib.suppress(BlockingIOError):
        return os.read(reader, 65536).decode()
    return ""


class _Agreement:
    """What the supervisors of a job agree on, in a store. When the store is gone, the job is over."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
            restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # by torchrun, of supervisors that failed
            self._store = job_store(f"supervisors/{restarts}", host=rank == 0)
        else:
            self._store = dist.HashStore()  # type: ignore[attr-defined]  # public, but torch does not say so to mypy
        self._is_over = False
        self._last_attempt = 0
        self.advance(-1)

    def attempt(self) -> int:
        """Return the number of the current attempt."""
        with self._unless_gone():
            self._last_attempt = int(self._store.get("attempt"))
        return self._last_attempt

    def advance(self, attempt: int) -> int:
        """Begin the attempt after this one, unless another rank has; return the current one."""
        with self._unless_gone():
            before = str(attempt) if attempt >= 0 else ""
            self._last_attempt = int(self._store.compare_set("attempt", before, str(attempt + 1)))
        return self._last_attempt

    def note_first_step(self) -> None:
        """Let all ranks know that a step is done."""
        with self._unless_gone():
            self._store.set("started", "1")

    def resumes(self, attempt: int) -> bool:
        """Return whether a step was done before this attempt; the first rank to ask decides for all."""
        with self._unless_gone():
            has_started = str(int(self._store.check(["started"])))
            return bool(int(self._store.compare_set(f"resumes/{attempt}", "", has_started)))
        return False

    def wait_for_verdict(self, attempt: int) -> None:
        """Wait up to `VERDICT_S` for another rank to give up, or to begin the next attempt."""
        deadline = time.monotonic() + VERDICT_S
        while not self.is_over() and self.attempt() <= attempt and time.monotonic() < deadline:
            time.sleep(POLL_S)

    def is_over(self) -> bool:
        """Return whether a supervisor has given up."""
        with self._unless_gone():
            self._is_over = self._is_over or self._store.check(["over"])
        return self._is_over

    def give_up(self) -> None:
        """End the job: no rank is restarted any more."""
        with self._unless_gone():
            self._store.set("over", "1")

    def finish(self, attempt: int, n_ranks: int) -> int | None:
        """Wait until all ranks have ended well; return the current attempt if one of them has not, otherwise None."""
        deadline = time.monotonic() + FAREWELL_S
        with self._unless_gone():
            self._store.add(f"finished/{attempt}", 1)
            while self._store.add(f"finished/{attempt}", 0) < n_ranks and time.monotonic() < deadline:
                if self.is_over():
                    return None
                if self.attempt() > attempt:
                    return self._last_attempt
                time.sleep(POLL_S)
            if self._rank == 0:  # with which the store ends: let the others read it
                time.sleep(5 * POLL_S)
        return None

    @contextlib.contextmanager
    def _unless_gone(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError:
            self._is_over = True
