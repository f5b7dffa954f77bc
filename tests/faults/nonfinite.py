"""NaN in the loss of one rank: in one step, and in all steps from one on."""

import re
import shutil
import signal
from functools import partial
from pathlib import Path
from typing import Any

from jobs import Job, wait_for
from runs import Course, Fault, checkpoints, last_step, latest, metrics, require, require_equal

AT_STEP = 10


def _spoil(rank: int, *, for_ever: bool) -> None:
    """Let the second rank's loss be NaN in one step, or from it on."""
    from training.stages.transformer import TransformerStage

    original = TransformerStage.loss

    def spoilt(self: TransformerStage, batch: Any, step: int) -> Any:
        loss, values = original(self, batch, step)
        is_spoilt = rank == 1 and (step >= AT_STEP if for_ever else step == AT_STEP)
        return (loss * float("nan") if is_spoilt else loss), values

    TransformerStage.loss = spoilt  # type: ignore[method-assign]


def _run(course: Course, bundle: Path, name: str, *, stop_at: int | None) -> None:
    """Run a job with NaN in one step, to its end or until SIGTERM after a step."""
    with Job(course.scratch / "logs" / name, course.command(bundle), inject=partial(_spoil, for_ever=False)) as job:
        if stop_at is not None:
            wait_for(lambda: last_step(bundle) >= stop_at or not job.is_running(), f"step {stop_at}")
            job.send(1, signal.SIGTERM)
        codes = job.wait()
        require(codes == [0, 0], f"the ranks ended with {codes}: {job.said()[-800:]}")


def _once(course: Course, name: str) -> tuple[str, str]:
    straight, stopped = course.bundle(f"{name}-straight"), course.bundle(name)
    _run(course, straight, f"{name}-straight", stop_at=None)
    counted = [line["step"] for line in metrics(straight) if line.get("skipped_steps") == 1]
    require(counted and counted[0] == AT_STEP + 1, f"step {AT_STEP + 1} is not counted as skipped: {counted}")
    for number, stop_at in enumerate((AT_STEP - 2, AT_STEP + 4, None)):
        _run(course, stopped, f"{name}-{number}", stop_at=stop_at)
    require_equal(stopped, straight)
    return f"step {AT_STEP + 1} was left out on both ranks and counted; training went on", "that step's update alone"


def _for_ever(course: Course, name: str) -> tuple[str, str]:
    bundle = course.bundle(name)
    command = course.command(bundle, "--max-skipped-steps", 3)
    with Job(course.scratch / "logs" / name, command, inject=partial(_spoil, for_ever=True)) as job:
        codes = job.wait()
        said = job.said()
    require(codes == [1, 1], f"the ranks ended with {codes}: {said[-800:]}")
    require("Traceback" not in said, f"a traceback: {said[-1500:]}")
    errors = " ".join(line for line in said.splitlines() if line.startswith("error: "))
    named = re.search(r"step(\d{8})", errors)
    require(named is not None and int(named[1]) <= AT_STEP, f"no good checkpoint is named: {errors}")
    good = f"step{named[1]}" if named else ""
    for path in checkpoints(bundle).glob("step*"):  # what the message says: go back to that one
        if path.name > good:
            shutil.rmtree(path)
    (checkpoints(bundle) / "latest").write_text(good)
    require(latest(bundle) > 0, "no checkpoint was kept")
    course.finish(command, f"{name}-end")
    require_equal(bundle, course.straight())
    return f"training stopped and named {good} as the one to go back to", "nothing, once the cause was gone"


FAULTS = [
    Fault(name="NaN in one step", injected=f"loss of rank 1 in step {AT_STEP + 1}", run=_once),
    Fault(name="NaN from a step on", injected=f"loss of rank 1 from step {AT_STEP + 1}", run=_for_ever),
]
