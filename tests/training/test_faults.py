"""Faults: what a stop or a crash leaves behind, and rows of the fault suite as real runs."""

import dataclasses
import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import tiny
from support.runs import MeanColours, Run, send
from support.waiting import wait_for

import training.ranks.news
import training.ranks.ranks
import training.ranks.watch
from training.ranks.processes import this_member
from training.ranks.ranks import join
from training.ranks.stop import Interrupted
from training.run_files import read_metrics

sys.path.append(str(Path(__file__).parents[1] / "faults"))

import jobs
import stops
from hangs import FAULTS as HANGS
from kills import Moment, Tally, kill_once
from runs import Course, inject, last_step, latest, require_equal

# ------------------------------------------------------------------------------------------ the end of a step


def lines_of(run: Run) -> list[tuple[int, str, float]]:
    lines = read_metrics(run.folder / "run")
    return [(line["step"], line["split"], line["loss"]) for line in lines]


def test_a_stop_does_not_lose_the_validation_after_its_step(tmp_path: Path, shards: Path) -> None:
    data, config = tiny.open_world(shards), tiny.train_config(steps=8, validate_every=4)
    straight, stopped = Run(tmp_path / "straight", data, join()), Run(tmp_path / "stopped", data, join())
    straight(config, validation=data)
    with pytest.raises(Interrupted, match="stopped at step 4"):
        stopped(config, validation=data, at_step=send(signal.SIGTERM, 3))
    stopped(config, validation=data)
    assert lines_of(stopped) == lines_of(straight)
    assert [step for step, split, _ in lines_of(stopped) if split == "validation"] == [4, 8]


def test_a_crash_in_the_last_validation_loses_nothing(
    tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(*_: object) -> None:
        raise RuntimeError("power failure")

    data, config = tiny.open_world(shards), tiny.train_config(steps=6, checkpoint_every=2)
    straight, crashed = Run(tmp_path / "straight", data, join()), Run(tmp_path / "crashed", data, join())
    straight(config, validation=data)
    with monkeypatch.context() as patch:
        patch.setattr(MeanColours, "transform_for_validation", crash)
        with pytest.raises(RuntimeError, match="power failure"):
            crashed(config, validation=data)
    crashed(config, validation=data)
    assert lines_of(crashed) == lines_of(straight)
    assert crashed.weights == straight.weights


# --------------------------------------------------------------------------------------------- the fault suite


@pytest.fixture(scope="module")
def course(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Course]:
    scratch = tmp_path_factory.mktemp("course")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH", ""))
        patch.setenv("TMPDIR", os.environ.get("TMPDIR", "/tmp"))
        jobs.prepare_environment(scratch)
        yield Course(scratch)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_killed_in_a_save_is_named_and_nothing_is_lost(course: Course, rank: int) -> None:
    bundle = course.bundle(f"killed{rank}")
    command, tally = course.command(bundle), Tally()
    kill_once(course, command, bundle, rank, Moment(step=8, kind="save", delay_s=0.002), tally)
    assert tally.n == 1
    assert latest(bundle) in (4, 8)
    course.finish(command, f"killed{rank}-end")
    require_equal(bundle, course.straight())


def _on_a_host_of_its_own(rank: int) -> None:
    """Let each rank believe that it alone is on its host, and miss a heartbeat sooner than in earnest."""
    for module in (training.ranks.news, training.ranks.watch):
        module.HEARTBEAT_S, module.MAX_SILENCE_S = 0.5, 8.0
    training.ranks.ranks.this_member = lambda rank: dataclasses.replace(this_member(rank), place=f"host {rank}")


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_killed_on_another_host_is_named_by_the_other_one(course: Course, rank: int) -> None:
    bundle = course.bundle(f"elsewhere{rank}")
    log = course.scratch / "logs" / bundle.name
    with jobs.Job(log, course.command(bundle), inject=_on_a_host_of_its_own) as job:
        jobs.wait_for(lambda: last_step(bundle) >= 5 or not job.is_running(), "step 5")
        job.send(rank, signal.SIGKILL)
        codes = job.wait()
        said = job.said(1 - rank)
    assert codes[1 - rank] == 1, said
    assert f"error: rank {rank} (host " in said
    assert "Traceback" not in said
    if rank == 1:  # the first rank's end is the store's, which is noticed at once
        assert "not heard of for 8 s" in said
        state = json.loads((bundle / "training" / "transformer" / "state.json").read_text())
        assert state["reason"].startswith("rank 1 (host ")


SURVIVED = (
    "SIGTERM to rank 1",
    "SIGTERM to deepspeed",
    "kill -9 of torchrun",
    "a rank asleep (SIGSTOP)",
    "a rank asleep in a step",
    "kill -9 of a rank under deepspeed --auto-restart 2",
)


@pytest.mark.slow
@pytest.mark.parametrize(
    "fault",
    [fault for fault in (*stops.FAULTS, *HANGS) if fault.name in SURVIVED],
    ids=lambda fault: fault.name.replace(" ", "-"),
)
def test_a_fault_is_survived(course: Course, fault: stops.Fault, request: pytest.FixtureRequest) -> None:
    row = inject(fault, course, request.node.callspec.id)
    assert row.passed, row.happened


@pytest.mark.slow
def test_reading_processes_end_with_a_training_process_that_is_killed(course: Course) -> None:
    bundle = course.bundle("reading")
    with jobs.Job(course.scratch / "logs" / "reading", course.command(bundle), ranks=1) as job:
        jobs.wait_for(lambda: last_step(bundle) >= 2 or not job.is_running(), "step 2")
        assert len(job.left_over()) == 2, "the rank and its reading process"
        job.send(0, signal.SIGKILL)
        wait_for(lambda: not job.left_over())


def test_a_fault_that_is_not_survived_is_a_row_that_failed() -> None:
    row = inject(stops.Fault(name="a", injected="b", run=lambda *_: ("c | d", "nothing")), None, "x")  # type: ignore[arg-type]
    assert (row.happened, row.lost, row.passed) == ("c | d", "nothing", True)

    def fail(*_: object) -> tuple[str, str]:
        raise TimeoutError("step 3 did not happen")

    assert inject(stops.Fault(name="a", injected="b", run=fail), None, "x").passed is False  # type: ignore[arg-type]
