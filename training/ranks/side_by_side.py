"""Stages as child processes, several at once: the same commands that users run, with one output and one end.

1. Every rank of every stage is a `dalle-train STAGE …` of its own, started as a launcher starts it, in a process group
   of its own: Ctrl-C in a terminal reaches this process alone.
2. What they say is passed on line by line, and begins with the stage's name.
3. SIGTERM or Ctrl-C is passed on once, as SIGTERM: all save. When one child fails, the others are stopped likewise,
   and its error is the error of the whole. Children watch this process (`watch.py`): when it is gone they save and end.
4. This process holds the store in which the ranks of a stage meet, as torchrun's agent does. So the system chooses its
   port, and nobody else can take it before the first rank starts.
"""

import os
import queue
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from torch.distributed import Store, TCPStore  # type: ignore[attr-defined]  # public, but torch hides it from mypy

from dalle.output.text import Say, duration
from training.ranks.environment import AGENT_STORE, PARENT
from training.ranks.stop import STOPPED_CODES, Interrupted, StopSignals, exit_text, kill_group

PROGRAM: tuple[str, ...] = (sys.executable, "-P", "-m", "training.cli")
"""The command line of `dalle-train`."""
POLL_S = 0.2
DRAIN_S = 2.0
"""Seconds to wait for the last lines of a child that has ended: a process that it started may hold its output open."""
REPORT_EVERY_S = 60.0
"""Seconds between two lines about the time left in all."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A stage to be run as child processes."""

    stage: str
    """Its name, with which its lines begin."""
    arguments: tuple[str, ...]
    """Arguments of `dalle-train`."""
    ranks: int = 1
    """Processes, one for each rank."""
    threads: int = 1
    """Threads of each rank."""


class TimeLeft:
    """Estimates the time left for several stages from their lines of progress.

    Args:
        phases: run one after the other; the lanes of a phase run side by side, the parts of a lane one after the
            other. A lane maps the names of its parts to their planned seconds, of which only the proportions matter.
        now: returns the time, in seconds.
    """

    def __init__(
        self, phases: Sequence[Sequence[Mapping[str, float]]], now: Callable[[], float] = time.monotonic
    ) -> None:
        self._now, self._started_at = now, now()
        self._phases = [[[_Part(*part) for part in lane.items()] for lane in lanes] for lanes in phases]

    def begin(self, name: str) -> None:
        """Note that the lane with a part of this name has begun."""
        for lane in self._lanes_with(name):
            lane[0].begin(self._now())

    def end(self, name: str) -> None:
        """Note that a part has ended, and the parts before it in its lane."""
        for lane in self._lanes_with(name):
            for part in lane[: [part.name for part in lane].index(name) + 1]:
                part.end(self._now())

    def hear(self, line: str) -> None:
        """Read a line of progress: "clip 50/500  loss …", or "clip: resuming from step 50 of 500"."""
        found = re.match(r"([\w-]+)(?: (\d+)/(\d+)  |: resuming from step (\d+) of (\d+))", line)
        if found is None:
            return
        name, done, steps, start, of = found.groups()
        for lane in self._lanes_with(name):
            number = [part.name for part in lane].index(name)
            for part in lane[:number]:
                part.end(self._now())
            lane[number].advance(int(done or start) / int(steps or of), self._now(), is_first=done is None)

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
        """Return the ratio of measured to planned seconds. Parts that take no time are reused, and do not count."""
        known = [(part.planned_s, taken) for part in self._parts() if (taken := part.taken_s()) is not None]
        known = [(planned, taken) for planned, taken in known if taken > 0.2 * planned]
        return sum(taken for _, taken in known) / sum(planned for planned, _ in known) if known else 1.0


class _Part:
    """A part of a lane: when it began and ended, and its progress."""

    def __init__(self, name: str, planned_s: float) -> None:
        self.name, self.planned_s = name, planned_s
        self._begun_at: float | None = None
        self._ended_at: float | None = None
        self._start = 0.0
        """Fraction that an earlier run had done."""
        self._marks: list[tuple[float, float]] = []
        """The first and the last time of a line of progress, with the fraction done: (seconds, fraction)."""

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
            self._start = fraction
        self._marks = [(now, fraction)] if is_first else [*self._marks[:1], (now, fraction)]

    def taken_s(self) -> float | None:
        """Return the seconds that the whole part takes by its progress; None if there is none yet."""
        if self._begun_at is not None and self._ended_at is not None:
            return (self._ended_at - self._begun_at) / max(1 - self._start, 1e-9)
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
    """A rank of a job, and a thread that reads its output."""

    def __init__(
        self,
        job: Job,
        rank: int,
        environment: Mapping[str, str],
        lines: "queue.Queue[_Line]",
        store: Store | None = None,
    ) -> None:
        self.stage, self.rank = job.stage, rank
        self.store = store
        """Where the ranks of the job meet; lives as long as they do."""
        self.error: str | None = None
        """Its last line that begins with "error: "."""
        self.was_stopped = False
        """Whether it has printed that it was stopped and saved."""
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
        """Return a line as it is passed on; None for an error, which is raised at the end."""
        self.was_stopped |= line.startswith("stopped")
        if line.startswith("error: "):
            self.error = self._named(line.removeprefix("error: "))
            return None
        if line.startswith("supervisor: ") and self.error is not None:
            line += f" ({self.error})"  # a restart follows, so this error is not the end
        return self._named(line)

    def _named(self, line: str) -> str:
        rank = f" rank {self.rank}" if self.rank else ""
        return line if line.startswith(self.stage) and not rank else f"{self.stage}{rank}: {line}"

    def has_failed(self, *, was_asked: bool) -> bool:
        """Return whether its end is a failure. SIGTERM may end a child that was asked to stop before it can save."""
        return self.process.returncode not in ({0} | STOPPED_CODES if was_asked else {0})

    def end_words(self) -> str:
        """Return how it ended, for a child without an error of its own."""
        return self._named(f"its process {exit_text(self.process.returncode)}")


_Line = tuple[_Child, str]


def run_jobs(jobs: Sequence[Job], time_left: TimeLeft, say: Say) -> None:
    """Run jobs side by side, and wait for their ends.

    Args:
        jobs: independent of each other.
        time_left: reads the lines of progress; it is reported every `REPORT_EVERY_S`.
        say: gets the children's lines.

    Raises:
        Interrupted: SIGINT or SIGTERM came, here or to a child; all children have saved and ended.
        KeyboardInterrupt: a second SIGINT came; the children were killed.
        OSError: a child has failed, with its error; the others were stopped, and have saved.
    """
    lines: queue.Queue[_Line] = queue.Queue()
    running: list[_Child] = []
    failed: list[_Child] = []
    was_stopped = was_asked = False
    reported_at = time.monotonic()

    def pass_on(child: _Child, line: str) -> None:
        if not child.rank:
            time_left.hear(line)
        shown = child.hear(line)
        if shown:
            say(shown)

    with StopSignals() as stop:
        try:
            for job in jobs:
                time_left.begin(job.stage)
                running += start_job(job, lines)
            while running:
                with suppress(queue.Empty):
                    pass_on(*lines.get(timeout=POLL_S))
                    for _ in range(lines.qsize()):  # no more: the ends must be seen, too
                        pass_on(*lines.get_nowait())
                ended = [child for child in running if child.process.poll() is not None]
                for child in ended:
                    child.reader.join(DRAIN_S)
                while ended and not lines.empty():
                    pass_on(*lines.get())
                for child in ended:
                    running.remove(child)
                    was_stopped |= child.was_stopped
                    if child.has_failed(was_asked=was_asked):
                        failed.append(child)
                    elif not any(other.stage == child.stage for other in running):
                        time_left.end(child.stage)
                if (stop.raised or was_stopped or failed) and not was_asked:
                    was_asked = True
                    for child in running:
                        child.process.terminate()
                if time.monotonic() - reported_at > REPORT_EVERY_S and running:
                    reported_at = time.monotonic()
                    say(str(time_left))
        finally:
            for child in running:  # after a second Ctrl-C, or an error here
                kill_group(child.process.pid)
                child.process.wait()
    if failed:
        of_stage = [child for child in failed if child.stage == failed[0].stage]
        raise OSError(next((child.error for child in of_stage if child.error), failed[0].end_words()))
    if stop.raised or was_stopped:
        raise Interrupted("stopped: all is saved, and the same command without --fresh resumes from there")


def start_job(job: Job, lines: "queue.Queue[_Line] | None" = None) -> list[_Child]:
    """Start all ranks of a job; their output goes to `lines`."""
    lines = queue.Queue() if lines is None else lines
    common = {**os.environ, PARENT: str(os.getpid()), "PYTHONUNBUFFERED": "1"}
    common |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(job.threads))
    if job.ranks == 1:
        return [_Child(job, 0, common, lines)]
    common |= {"WORLD_SIZE": str(job.ranks), "LOCAL_WORLD_SIZE": str(job.ranks)}
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), AGENT_STORE: "True"}
    ranks = [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(job.ranks)]
    return [_Child(job, rank, environment, lines, store) for rank, environment in enumerate(ranks)]
