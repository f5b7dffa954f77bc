"""kill -9 of each rank at random moments: between steps, in saves, at the start and at the end."""

import random
import signal
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from jobs import N_RANKS, Job, wait_for
from runs import (
    CHECKPOINT_EVERY,
    STEPS,
    Course,
    Fault,
    in_a_save,
    last_step,
    latest,
    metrics_stamp,
    require,
    require_equal,
)

MOMENTS, PER_RUN = 20, 5
SURVIVE_S = 30.0
"""Seconds for the other rank to end, on a busy machine."""


@dataclass(frozen=True, kw_only=True, order=True)
class Moment:
    """When to kill."""

    step: int
    """After this step, or while its checkpoint is written."""
    kind: str
    """step, save, start or end."""
    delay_s: float
    """Seconds to wait then."""


def moments(rank: int) -> list[list[Moment]]:
    """Return the moments of one rank, by run; the same every time."""
    rng = random.Random(f"kill rank {rank}")
    drawn: list[Moment] = []
    for number in range(MOMENTS):
        kind = ("step", "save", "step", "save", "start", "step", "save", "step", "save", "end")[number % 10]
        step = rng.randrange(1, STEPS)
        if kind == "save":
            step = max(CHECKPOINT_EVERY, step // CHECKPOINT_EVERY * CHECKPOINT_EVERY)
        if kind == "end":
            step = STEPS
        drawn.append(Moment(step=step, kind=kind, delay_s=rng.uniform(0, 0.02 if kind == "save" else 0.4)))
    rng.shuffle(drawn)
    return [sorted(drawn[first : first + PER_RUN]) for first in range(0, MOMENTS, PER_RUN)]


def _has_come(moment: Moment, job: Job, bundle: Path, before: object, since: float) -> bool:
    if not job.is_running():
        return True
    if metrics_stamp(bundle) == before:  # what is there was written by the runs before
        return False
    if moment.kind == "save":
        return latest(bundle) >= moment.step or (last_step(bundle) >= moment.step and in_a_save(bundle, since))
    return moment.kind == "start" or last_step(bundle) >= moment.step


@dataclass(kw_only=True)
class Tally:
    """Counts the results of kills."""

    n: int = 0
    n_in_saves: int = 0
    n_taken_again: int = 0
    slowest_s: float = 0.0


def kill_once(course: Course, command: list[str], bundle: Path, rank: int, moment: Moment, tally: Tally) -> None:
    """Start a job, kill a rank of it with -9 at a moment, and check that the other one ends and names it.

    Raises:
        FaultError: it does not.
    """
    before, since = metrics_stamp(bundle), time.time()
    with Job(course.scratch / "logs" / f"{bundle.name}-{tally.n}", command) as job:
        wait_for(lambda: _has_come(moment, job, bundle, before, since), f"step {moment.step}", every_s=0.002)
        time.sleep(moment.delay_s)
        was_running, was_saving = job.is_running(), in_a_save(bundle, since)
        job.send(rank, signal.SIGKILL)
        killed_at = time.monotonic()
        codes = job.wait(SURVIVE_S)
        took_s = time.monotonic() - killed_at
        if not was_running or codes[rank] != -signal.SIGKILL:
            return  # it had ended already
        tally.n += 1
        tally.n_in_saves += was_saving
        tally.n_taken_again += max(0, last_step(bundle) - latest(bundle))
        other = 1 - rank
        if codes[other] == 0:  # it had nothing left to do
            return
        said = job.said(other)
        what = f"{moment}, after {took_s:.0f} s: {said[-600:]}"
        require(codes[other] == 1, f"rank {other} ended with {codes[other]}: {what}")
        require(f"rank {rank} (host" in said and "is gone" in said, f"rank {rank} is not named: {what}")
        tag = f"step{latest(bundle):08d}"
        named = f"resumes from {bundle}" in said and tag in said
        require(named or latest(bundle) == 0, f"{tag} is not named: {what}")
        require("Traceback" not in said, f"a traceback: {what}")
        tally.slowest_s = max(tally.slowest_s, took_s)
        wait_for(lambda: not job.left_over(), "the end of the reading processes")


def _kill(course: Course, name: str, *, rank: int) -> tuple[str, str]:
    tally = Tally()
    for number, run in enumerate(moments(rank)):
        bundle = course.bundle(f"{name}-{number}")
        command = course.command(bundle)
        for moment in run:
            kill_once(course, command, bundle, rank, moment, tally)
        course.finish(command, f"{name}-{number}-end")
        require_equal(bundle, course.straight())
    happened = (
        f"the other rank named it and ended, at most {tally.slowest_s:.1f} s later; {tally.n_in_saves} of {tally.n} "
        "kills were in a save"
    )
    require(tally.n >= MOMENTS - 4, f"only {tally.n} of {MOMENTS} kills met a running rank")
    require(tally.n_in_saves, "no kill was in a save")
    return happened, f"nothing; {tally.n_taken_again} steps were taken again after {tally.n} kills"


FAULTS = [
    Fault(
        name=f"kill -9 of rank {rank}",
        injected=f"{MOMENTS} random moments in {MOMENTS // PER_RUN} runs",
        run=partial(_kill, rank=rank),
    )
    for rank in range(N_RANKS)
]
