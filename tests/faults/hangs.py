"""A rank that sleeps: stopped by a signal, or inside a step."""

import signal
import time
from pathlib import Path
from typing import Any

from jobs import Job, wait_for
from runs import Course, Fault, last_step, require, require_equal

TIMEOUT_S = 10
AT_STEP = 9


def _stacks(bundle: Path) -> dict[str, str]:
    folder = bundle / "training" / "transformer" / "stacks"
    return {path.name: path.read_text() for path in folder.iterdir()} if folder.is_dir() else {}


def _stopped(course: Course, name: str) -> tuple[str, str]:
    bundle = course.bundle(name)
    command = course.command(bundle, "--timeout", TIMEOUT_S)
    with Job(course.scratch / "logs" / name, command) as job:
        wait_for(lambda: last_step(bundle) >= AT_STEP or not job.is_running(), f"step {AT_STEP}")
        job.send(1, signal.SIGSTOP)
        stopped_at = time.monotonic()
        wait_for(lambda: not job.processes[0].is_alive(), "the end of the other rank")
        took_s = time.monotonic() - stopped_at
        said = job.said(0)
        require(job.processes[0].exitcode == 1, f"rank 0 ended with {job.processes[0].exitcode}: {said[-600:]}")
        require("rank 1 (host" in said and "does not answer" in said, f"rank 1 is not named: {said[-600:]}")
        require("rank00000.txt" in _stacks(bundle), "there is no stack of rank 0")
        require("training/loop/loop.py" in _stacks(bundle)["rank00000.txt"], "the stack does not show the loop")
        job.send(1, signal.SIGCONT)
        require(job.wait()[1] == 1, f"the rank that woke up ended with {job.wait()[1]}")
    course.finish(course.command(bundle), f"{name}-end")  # a busy machine draws samples for longer than that
    require_equal(bundle, course.straight())
    return f"after {took_s:.0f} s (--timeout {TIMEOUT_S}) rank 1 was named, with rank 0's stack; both ended", "nothing"


def _fall_asleep(rank: int) -> None:
    """Let the second rank sleep in a step."""
    from training.stages.transformer import TransformerStage

    original = TransformerStage.loss

    def loss(self: TransformerStage, batch: Any, step: int) -> Any:
        if step == AT_STEP and rank == 1:
            time.sleep(3600)
        return original(self, batch, step)

    TransformerStage.loss = loss  # type: ignore[method-assign]


def _asleep(course: Course, name: str) -> tuple[str, str]:
    bundle = course.bundle(name)
    command = course.command(bundle, "--timeout", TIMEOUT_S)
    with Job(course.scratch / "logs" / name, command, inject=_fall_asleep) as job:
        codes = job.wait()
        said = job.said()
    require(codes == [1, 1], f"the ranks ended with {codes}: {said[-600:]}")
    require("1 of 2 ranks fell behind: rank 1 (host" in said, f"rank 1 is not named: {said[-600:]}")
    require(sorted(_stacks(bundle)) == ["rank00000.txt", "rank00001.txt"], "a rank has left no stack")
    require("hangs.py" in _stacks(bundle)["rank00001.txt"], "its stack does not show where rank 1 sleeps")
    course.finish(course.command(bundle), f"{name}-end")  # a busy machine draws samples for longer than that
    require_equal(bundle, course.straight())
    return "rank 1 was named as behind, both ranks left their stacks and ended", "nothing"


FAULTS = [
    Fault(name="a rank asleep (SIGSTOP)", injected=f"rank 1 after step {AT_STEP}", run=_stopped),
    Fault(name="a rank asleep in a step", injected=f"rank 1 in step {AT_STEP + 1}", run=_asleep),
]
