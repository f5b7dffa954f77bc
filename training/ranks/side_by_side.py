"""Stages as child processes, several at once: the commands that users have, with one output and one end.

1. Every rank of every stage is a `dalle-train STAGE …` of its own, started as a launcher starts it, in a process group
   of its own: Ctrl-C in a terminal reaches this process alone.
2. What they say is passed on line by line, and begins with the stage's name.
3. SIGTERM or Ctrl-C is passed on once, as SIGTERM: all save. When one child fails, the others are stopped so, too, and
   its error is the error of the whole. Children watch this process (`watchdog.py`): when it is gone they save
   and end.
"""

import os
import queue
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from dalle.output.progress import duration
from training.metrics import Report
from training.ranks.stop import Interrupted, StopSignals
from training.ranks.watchdog import PARENT

PROGRAM: tuple[str, ...] = (sys.executable, "-P", "-m", "training.cli")
"""`dalle-train`, by another name."""
POLL_S = 0.2
DRAIN_S = 2.0
"""How long the last lines of a child that has ended may take, if a process that it started holds its output open."""
TOLD_EVERY_S = 60.0
"""Between two lines about the time left in all."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A stage to be run as child processes."""

    stage: str
    """Its name: that of the command, with which the lines about it begin."""
    arguments: tuple[str, ...]
    """Of `dalle-train`."""
    ranks: int = 1
    """Processes, one for each rank."""
    threads: int = 1
    """Of each rank."""


class TimeLeft:
    """About how long everything will still take, from what its parts say of themselves.

    Args:
        phases: one after the other; the lanes of a phase run side by side, the parts of a lane one after the other.
            Of each part the seconds that it was planned to take, of which only the proportions matter.
        now: the clock, in seconds.
    """

    def __init__(
        self, phases: Sequence[Sequence[Mapping[str, float]]], now: Callable[[], float] = time.monotonic
    ) -> None:
        self._now, self._started_at = now, now()
        self._phases = [[[_Part(*part) for part in lane.items()] for lane in lanes] for lanes in phases]

    def begin(self, name: str) -> None:
        """Say that the lane with a part of this name has begun."""
        for lane in self._lanes_with(name):
            lane[0].begin(self._now())

    def end(self, name: str) -> None:
        """Say that a part has ended, and with it those before it in its lane."""
        for lane in self._lanes_with(name):
            for part in lane[: [part.name for part in lane].index(name) + 1]:
                part.end(self._now())

    def hear(self, line: str) -> None:
        """Take what a line of progress says: "clip 50/500  loss …", or "clip: resuming from step 50 of 500"."""
        found = re.match(r"([\w-]+)(?: (\d+)/(\d+)  |: resuming from step (\d+) of (\d+))", line)
        if found is None:
            return
        name, done, steps, gone_on, of = found.groups()
        for lane in self._lanes_with(name):
            number = [part.name for part in lane].index(name)
            for part in lane[:number]:
                part.end(self._now())
            lane[number].advance(int(done or gone_on) / int(steps or of), self._now(), is_first=done is None)

    def left_s(self) -> float:
        """Return the estimated seconds until everything is done."""
        now, slowness = self._now(), self._slowness()
        return sum(
            max((sum(part.left_s(now, slowness) for part in lane) for lane in lanes), default=0.0)
            for lanes in self._phases
        )

    def elapsed_s(self) -> float:
        """Return the seconds since the beginning."""
        return self._now() - self._started_at

    def __str__(self) -> str:
        return f"about {duration(self.left_s())} left in all, {duration(self.elapsed_s())} so far"

    def _lanes_with(self, name: str) -> list[list["_Part"]]:
        return [lane for lanes in self._phases for lane in lanes if any(part.name == name for part in lane)]

    def _parts(self) -> Iterator["_Part"]:
        return (part for lanes in self._phases for lane in lanes for part in lane)

    def _slowness(self) -> float:
        """Return how much slower than planned this machine is; parts that take no time are reused, and say nothing."""
        known = [(part.planned_s, taken) for part in self._parts() if (taken := part.taken_s()) is not None]
        known = [(planned, taken) for planned, taken in known if taken > 0.2 * planned]
        return sum(taken for _, taken in known) / sum(planned for planned, _ in known) if known else 1.0


class _Part:
    """One part: when it began and ended, and how much of it was done when."""

    def __init__(self, name: str, planned_s: float) -> None:
        self.name, self.planned_s = name, planned_s
        self._begun_at: float | None = None
        self._ended_at: float | None = None
        self._gone_on_from = 0.0
        """Fraction that was done before it began."""
        self._marks: list[tuple[float, float]] = []
        """The first and the last (seconds, fraction done)."""

    def begin(self, now: float) -> None:
        if self._begun_at is None:
            self._begun_at = now

    def end(self, now: float) -> None:
        self.begin(now)
        if self._ended_at is None:
            self._ended_at = now

    def advance(self, fraction: float, now: float, *, is_first: bool) -> None:
        self.begin(now)
        if is_first:
            self._gone_on_from = fraction
        self._marks = [(now, fraction)] if is_first else [*self._marks[:1], (now, fraction)]

    def taken_s(self) -> float | None:
        """Return the seconds that all of it takes, as far as that can be told."""
        if self._begun_at is not None and self._ended_at is not None:
            return (self._ended_at - self._begun_at) / max(1 - self._gone_on_from, 1e-9)
        if len(self._marks) < 2 or self._marks[1][1] <= self._marks[0][1]:
            return None
        (since, before), (until, done) = self._marks
        return (until - since) / (done - before)

    def left_s(self, now: float, slowness: float) -> float:
        if self._ended_at is not None:
            return 0.0
        if self._begun_at is None:
            return self.planned_s * slowness
        taken = self.taken_s()
        at, done = self._marks[-1] if self._marks else (self._begun_at, 0.0)
        whole = self.planned_s * slowness if taken is None else taken
        return max(0.0, whole * (1 - done) - (now - at))


class _Child:
    """A rank of a job, and a thread that reads what it says."""

    def __init__(self, job: Job, rank: int, environment: Mapping[str, str], lines: "queue.Queue[_Line]") -> None:
        self.stage, self.rank = job.stage, rank
        self.error: str | None = None
        """The last error that it has told."""
        self.was_stopped = False
        """Whether it has said that it was stopped, and goes on when it is started again."""
        self._lines = lines
        self.process = subprocess.Popen(
            [*PROGRAM, *job.arguments],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            process_group=0,
        )
        self.reader = threading.Thread(target=self._read, name=f"lines of {job.stage}", daemon=True)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put((self, line.rstrip()))

    def hear(self, line: str) -> str | None:
        """Return a line as it is passed on; None for an error, which is told at the end."""
        self.was_stopped |= line.startswith("stopped")
        if line.startswith("error: "):
            self.error = self._named(line.removeprefix("error: "))
            return None
        if line.startswith("supervisor: ") and self.error is not None:
            line += f" ({self.error})"  # which may not be the last one
        return self._named(line)

    def _named(self, line: str) -> str:
        rank = f" rank {self.rank}" if self.rank else ""
        return line if line.startswith(self.stage) and not rank else f"{self.stage}{rank}: {line}"

    def has_failed(self, *, was_asked: bool) -> bool:
        """Return whether its end is a failure; `was_asked` says that a signal was sent, which may come before it saves.

        A supervisor gives 128 + the number of a signal in place of the signal.
        """
        harmless = {0, -signal.SIGTERM, 128 + signal.SIGTERM} if was_asked else {0}
        return self.process.returncode not in harmless

    def end_words(self) -> str:
        """Return how it ended, where it has not said so itself."""
        code = self.process.returncode
        how = f"ended with code {code}" if code >= 0 else f"was ended by {signal.Signals(-code).name}"
        return self._named(f"its process {how}")


_Line = tuple[_Child, str]


def run_jobs(jobs: Sequence[Job], time_left: TimeLeft, report: Report) -> None:
    """Run jobs side by side, and wait for their ends.

    Args:
        jobs: independent of each other.
        time_left: hears of what is done; now and then, a line says it.
        report: gets the lines.

    Raises:
        Interrupted: SIGINT or SIGTERM came, here or to a child; all children have ended, and what they did is saved.
        KeyboardInterrupt: a second SIGINT came; the children were killed.
        OSError: one has failed, with its error; the others were stopped, and have saved.
    """
    lines: queue.Queue[_Line] = queue.Queue()
    running: list[_Child] = []
    failed: list[_Child] = []
    was_stopped = was_told = False
    told_at = time.monotonic()

    def pass_on(child: _Child, line: str) -> None:
        if not child.rank:
            time_left.hear(line)
        shown = child.hear(line)
        if shown:
            report(shown)

    with StopSignals() as stop:
        try:
            for job in jobs:
                time_left.begin(job.stage)
                running += start_job(job, lines)
            while running:
                with suppress(queue.Empty):
                    pass_on(*lines.get(timeout=POLL_S))
                    for _ in range(lines.qsize()):  # no more: children that never stop talking must be looked at, too
                        pass_on(*lines.get_nowait())
                ended = [child for child in running if child.process.poll() is not None]
                for child in ended:
                    child.reader.join(DRAIN_S)
                while ended and not lines.empty():
                    pass_on(*lines.get())
                for child in ended:
                    running.remove(child)
                    was_stopped |= child.was_stopped
                    if child.has_failed(was_asked=was_told):
                        failed.append(child)
                    elif not any(other.stage == child.stage for other in running):
                        time_left.end(child.stage)
                if (stop.raised or was_stopped or failed) and not was_told:
                    was_told = True
                    for child in running:
                        child.process.send_signal(signal.SIGTERM)
                if time.monotonic() - told_at > TOLD_EVERY_S and running:
                    told_at = time.monotonic()
                    report(str(time_left))
        finally:
            for child in running:  # after a second Ctrl-C, or an error here
                with suppress(ProcessLookupError):
                    os.killpg(child.process.pid, signal.SIGKILL)
                child.process.wait()
    if failed:
        of_stage = [child for child in failed if child.stage == failed[0].stage]
        raise OSError(next((child.error for child in of_stage if child.error), failed[0].end_words()))
    if stop.raised or was_stopped:
        raise Interrupted("stopped: all is saved, and the same command without --fresh goes on from there")


def start_job(job: Job, lines: "queue.Queue[_Line] | None" = None) -> list[_Child]:
    """Start all ranks of a job; what they say comes out of `lines`."""
    lines = queue.Queue() if lines is None else lines
    common = {**os.environ, PARENT: str(os.getpid()), "PYTHONUNBUFFERED": "1"}
    common |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(job.threads))
    if job.ranks == 1:
        return [_Child(job, 0, common, lines)]
    common |= {"WORLD_SIZE": str(job.ranks), "LOCAL_WORLD_SIZE": str(job.ranks)}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    ranks = [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(job.ranks)]
    return [_Child(job, rank, environment, lines) for rank, environment in enumerate(ranks)]


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
