"""SIGTERM and SIGINT to ranks and launchers, kill -9 of launchers, and restarts by `--auto-restart`."""

import os
import signal
import time
from collections.abc import Callable, Sequence
from functools import partial

from jobs import Job, Launched, free_port, wait_for
from runs import Course, Fault, last_step, latest, require, require_equal

AT_STEP = 6
Strike = Callable[[Launched], None]


def _launcher(name: str) -> list[object]:
    """Return the words before the arguments of `dalle-train`."""
    port = free_port()
    if name == "deepspeed":
        return ["deepspeed", "--num_gpus", 2, "--no_python", "--no_local_rank", "--master_port", port, "dalle-train"]
    if name == "torchrun":
        return ["torchrun", "--nproc_per_node", 2, "--no-python", "--master_port", port, "dalle-train"]
    return ["dalle-train"]


def _ranks_of(name: str) -> int:
    return 1 if name == "dalle-train" else 2


def _signal_ranks(course: Course, name: str, *, number: int, ranks: Sequence[int]) -> tuple[str, str]:
    bundle = course.bundle(name)
    command = course.command(bundle)
    with Job(course.scratch / "logs" / name, command) as job:
        wait_for(lambda: last_step(bundle) >= AT_STEP or not job.is_running(), f"step {AT_STEP}")
        for rank in ranks:
            job.send(rank, number)
        codes = job.wait()
        said = job.said(0)
        require(codes == [0, 0], f"the ranks ended with {codes}: {job.said()[-600:]}")
        require("the same command resumes from there" in said, f"nobody said how to resume: {said[-600:]}")
        require(not job.left_over(), "processes are left")
    stopped_at, known = latest(bundle), last_step(bundle)
    require(stopped_at == known, f"step {known} was done, but step {stopped_at} is saved")
    course.finish(command, f"{name}-end")
    require_equal(bundle, course.straight())
    return f"both ranks saved step {stopped_at} and ended with 0", "nothing; no step was taken again"


def _strike_launcher(
    course: Course, name: str, *, launcher: str, strike: Strike, codes: Sequence[int]
) -> tuple[str, str]:
    bundle = course.bundle(name)
    command = course.command(bundle)
    with Launched(course.scratch / "logs" / name, _launcher(launcher), command) as job:
        wait_for(lambda: last_step(bundle) >= AT_STEP or job.process.poll() is not None, f"step {AT_STEP}")
        require(job.process.poll() is None, f"the launcher ended by itself: {job.said()[-600:]}")
        struck_at = time.monotonic()
        strike(job)
        left = job.wait_until_gone(60.0)
        took_s = time.monotonic() - struck_at
        code = job.process.wait(60)
        said = job.said()
        require(not left, f"processes are left: {left}: {said[-600:]}")
        require(code in codes, f"the launcher ended with {code}: {said[-600:]}")
        require("the same command resumes from there" in said, f"nobody said how to resume: {said[-600:]}")
    stopped_at, known = latest(bundle), last_step(bundle)
    require(stopped_at == known, f"step {known} was done, but step {stopped_at} is saved")
    course.finish(command, f"{name}-end", ranks=_ranks_of(launcher))
    require_equal(bundle, course.straight(ranks=_ranks_of(launcher)))
    happened = f"step {stopped_at} was saved; no process was left {took_s:.1f} s later; the launcher's code: {code}"
    return happened, "nothing; no step was taken again"


def _signal_launcher(job: Launched, *, number: int) -> None:
    job.process.send_signal(number)


def _interrupt_terminal(job: Launched) -> None:
    os.killpg(job.process.pid, signal.SIGINT)


def _kill_inner_launcher(job: Launched) -> None:
    os.kill(job.named("deepspeed.launcher.launch")[0], signal.SIGKILL)


def _restart(course: Course, name: str, *, launcher: str) -> tuple[str, str]:
    bundle = course.bundle(name)
    command = course.command(bundle, "--auto-restart", 2)
    n_ranks = _ranks_of(launcher)
    with Launched(course.scratch / "logs" / name, _launcher(launcher), command) as job:
        for n_restarts, step in enumerate((AT_STEP, AT_STEP + 6)):
            wait_for(
                lambda step=step: last_step(bundle) >= step or job.process.poll() is not None,  # type: ignore[misc]
                f"step {step}",
            )
            require(job.process.poll() is None, f"the job ended by itself: {job.said()[-600:]}")
            trained_by = job.supervised()
            require(len(trained_by) == n_ranks, f"{len(trained_by)} processes train for a supervisor")
            os.kill(trained_by[-1], signal.SIGKILL)
            wait_for(lambda n=n_restarts: f"restart {n + 1} of 2" in job.said(), "a restart")  # type: ignore[misc]
        code = job.process.wait(180)
        require(code == 0, f"the job ended with {code}: {job.said()[-800:]}")
        require(not job.wait_until_gone(20.0), "processes are left")
    require_equal(bundle, course.straight(ranks=n_ranks))
    return "the ranks met again after each kill, resumed, and the job ended with 0", "nothing; steps were taken again"


FAULTS = [
    *(
        Fault(
            name=f"{signal.Signals(number).name} to {who}",
            injected=f"after step {AT_STEP}",
            run=partial(_signal_ranks, number=number, ranks=ranks),
        )
        for number, ranks, who in (
            (signal.SIGTERM, [0], "rank 0"),
            (signal.SIGTERM, [1], "rank 1"),
            (signal.SIGINT, [0, 1], "both ranks"),
        )
    ),
    *(
        Fault(
            name=f"{what} {launcher}",
            injected=f"after step {AT_STEP}",
            run=partial(_strike_launcher, launcher=launcher, strike=strike, codes=codes),
        )
        for what, launcher, strike, codes in (
            ("SIGTERM to", "deepspeed", partial(_signal_launcher, number=signal.SIGTERM), (143, -15)),
            ("SIGTERM to", "torchrun", partial(_signal_launcher, number=signal.SIGTERM), (0, 1, -15)),
            ("SIGTERM to", "dalle-train", partial(_signal_launcher, number=signal.SIGTERM), (0,)),
            ("SIGINT to the terminal of", "deepspeed", _interrupt_terminal, (0, 1, 130, -2)),
            ("kill -9 of", "torchrun", partial(_signal_launcher, number=signal.SIGKILL), (-9,)),
            ("kill -9 of launch.py below", "deepspeed", _kill_inner_launcher, (0, 1, 247, -9)),
        )
    ),
    *(
        Fault(
            name=f"kill -9 of a rank under {launcher} --auto-restart 2",
            injected="twice",
            run=partial(_restart, launcher=launcher),
        )
        for launcher in ("deepspeed", "torchrun", "dalle-train")
    ),
]
