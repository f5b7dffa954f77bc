"""How cores are shared among stages, and that the result does not depend on it."""

import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import training.demo.demo
import training.plan.machine
from dalle.pipeline import Pipeline
from training.demo.demo import _world_shards
from training.drawings.drawing import draw_world
from training.plan.machine import MachinePlan, costs, machine_plan, plan_here, seconds_alone
from training.recipes import recipe
from training.run_files import read_metrics

PLENTY_GIB = 64.0


def ranks_of(plan: MachinePlan) -> list[dict[str, int]]:
    return [{share.stage: share.ranks for share in shares} for shares in plan.phases]


def test_one_core_trains_one_stage_at_a_time_and_says_why() -> None:
    plan = machine_plan(1, PLENTY_GIB, recipe("demo"))
    assert plan.phases == ()
    assert plan.reason == "one stage at a time: there is one core"


@pytest.mark.parametrize("n_cores", [2, 3, 4, 8, 64])
@pytest.mark.parametrize("name", ["demo", "icons-cpu", "photos-cpu"])
def test_a_plan_uses_the_cores_and_no_more_and_is_faster_than_one_at_a_time(name: str, n_cores: int) -> None:
    chosen = recipe(name)
    plan = machine_plan(n_cores, PLENTY_GIB, chosen)
    for shares in plan.phases:
        assert sum(share.ranks * share.threads for share in shares if share.stage != "tokenizer") <= n_cores
    stages = [share.stage for shares in plan.phases for share in shares]
    assert sorted(stages) == ["clip", "dvae", "tokenizer", "transformer"]
    assert stages[-1] == "transformer"
    assert len(plan.phases[-1]) == 1
    warmups = {"dvae-warmup", "clip-warmup"} if chosen.clip.warmup else {"dvae-warmup"}
    assert set(plan.seconds) == {"tokenizer", "dvae", "clip", "transformer"} | warmups
    assert plan.seconds["transformer"] < seconds_alone(chosen)["transformer"]


def test_the_ranks_of_a_stage_divide_its_batch_and_the_batch_of_clip_is_not_accumulated() -> None:
    demo = recipe("demo")
    for batch in (16, 12, 7):
        train = dataclasses.replace(demo.transformer.train, global_batch=batch)
        changed = dataclasses.replace(demo, transformer=dataclasses.replace(demo.transformer, train=train))
        assert batch % ranks_of(machine_plan(64, PLENTY_GIB, changed))[-1]["transformer"] == 0
    icons = recipe("icons-cpu")
    train = dataclasses.replace(icons.clip.train, micro_batch=16)
    changed = dataclasses.replace(icons, clip=dataclasses.replace(icons.clip, train=train))
    assert {ranks["clip"] for ranks in ranks_of(machine_plan(8, PLENTY_GIB, changed)) if "clip" in ranks} == {4}


@pytest.mark.parametrize("n_cores", [2, 4, 8])
def test_the_cores_of_a_stage_are_ranks_or_threads_whatever_is_faster(n_cores: int) -> None:
    chosen = recipe("demo")
    plan = machine_plan(n_cores, PLENTY_GIB, chosen)
    (share,) = plan.phases[-1]
    cost = costs(chosen)["transformer"]
    splits = [(1 << n, n_cores >> n) for n in range(n_cores.bit_length())]
    assert cost.seconds(share.ranks, share.threads) == min(cost.seconds(*split) for split in splits)


def test_where_memory_is_short_there_are_fewer_processes_and_then_one() -> None:
    needed = {
        gib: max(sum(ranks.values()) for ranks in ranks_of(machine_plan(16, gib, recipe("demo"))))
        for gib in (64.0, 8.0, 5.0)
    }
    assert needed[64.0] > needed[8.0] > needed[5.0]
    short = machine_plan(8, 1.0, recipe("demo"))
    assert short.phases == ()
    assert "1.0 GiB of memory are available" in short.reason
    assert machine_plan(8, 64.0, recipe("2.8b")).phases == ()


def test_encoding_comes_between_the_dvae_and_the_transformer() -> None:
    plan = machine_plan(4, PLENTY_GIB, recipe("demo"), encodes=True)
    assert ranks_of(plan)[-2] == {"encode": 4}


def test_a_part_that_no_rank_can_share_takes_as_long_on_any_number() -> None:
    for cost in costs(recipe("demo")).values():
        assert cost.seconds(8) >= cost.fixed_s
        assert cost.seconds(2) == pytest.approx(cost.fixed_s + cost.shared_s / 2)
        assert cost.seconds(1) / 4 < cost.seconds(1, threads=4) < cost.seconds(1)


def test_a_launcher_a_supervisor_or_an_option_keep_everything_in_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training.plan.machine, "usable_cores", lambda: 2)
    monkeypatch.setattr(training.plan.machine, "available_gib", lambda: PLENTY_GIB)
    assert plan_here(recipe("demo")).phases
    assert not plan_here(recipe("demo"), one_at_a_time=True).phases
    for name in ("WORLD_SIZE", training.plan.machine.ATTEMPT):
        with monkeypatch.context() as patch:
            patch.setenv(name, "1")
            assert not plan_here(recipe("demo")).phases


def test_openmp_says_how_many_cores_may_be_used_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert training.plan.machine.usable_cores() == 1
    monkeypatch.setenv("OMP_NUM_THREADS", "1000")
    assert 1 <= training.plan.machine.usable_cores() <= (os.cpu_count() or 1)
    assert training.plan.machine.available_gib() > 0


def test_two_processes_draw_the_samples_of_one_in_their_order() -> None:
    one, two = (list(draw_world(250, 3, size=32, share_of_three=0.1, processes=processes)) for processes in (1, 2))
    assert len(one) == 250
    assert one == two


@pytest.mark.slow
def test_the_shards_of_the_world_are_the_same_bytes_by_one_and_two_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training.demo.demo, "N_TRAIN", 230)
    monkeypatch.setattr(training.demo.demo, "N_VALIDATION", 8)
    drawn = []
    for cores in (1, 2):
        monkeypatch.setattr(training.demo.demo, "usable_cores", lambda cores=cores: cores)
        folders = _world_shards(tmp_path / str(cores), 32, fresh=False, say=lambda line: None)
        drawn.append([shard.read_bytes() for folder in folders for shard in sorted(folder.glob("*.tar"))])
    assert drawn[0] == drawn[1]


# ------------------------------------------------------------------------------------------------- end to end


def start_all(shards: Path, out: Path, *options: str, n_cores: int) -> "subprocess.Popen[str]":
    environment = {**os.environ, "OMP_NUM_THREADS": str(n_cores)}
    program = [sys.executable, str(Path(__file__).parent / "support" / "tiny_cli.py")]
    command = [*program, "all", "tiny", "--data", str(shards), "--out", str(out), *options]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def train_all(shards: Path, out: Path, *options: str, n_cores: int) -> str:
    with start_all(shards, out, *options, n_cores=n_cores) as process:
        _, output = process.communicate(timeout=600)
    assert process.returncode == 0, output
    return output


def losses_of(bundle: Path) -> dict[str, list[float]]:
    stages = ("dvae-warmup", "dvae", "clip", "transformer")
    return {s: [line["loss"] for line in read_metrics(bundle / "training" / s)] for s in stages}


needs_two_cores = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="side by side needs two cores")


@pytest.mark.slow
@needs_two_cores
def test_the_error_of_a_stage_is_the_one_error_of_the_command(tmp_path: Path) -> None:
    with start_all(tmp_path / "nothing", tmp_path / "out", n_cores=2) as process:
        _, output = process.communicate(timeout=600)
    assert process.returncode == 1
    assert "Traceback" not in output
    errors = [line for line in output.splitlines() if "error: " in line]
    assert errors == output.splitlines()[-1:]
    assert "nothing" in errors[0]


@pytest.mark.slow
@needs_two_cores
def test_an_interrupted_command_ends_with_0_and_goes_on_with_another_plan(tmp_path: Path, shards: Path) -> None:
    with start_all(shards, tmp_path, n_cores=2) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("clip: global batch"):
                break
        process.terminate()
        _, output = process.communicate(timeout=600)
    assert process.returncode == 0, output
    assert "the same command without --fresh resumes from there" in output.splitlines()[-1]
    assert "transformer" not in output
    train_all(shards, tmp_path, "--one-at-a-time", n_cores=1)
    assert [len(losses) for losses in losses_of(tmp_path).values()] == [4, 4, 4, 4]


@pytest.mark.slow
@needs_two_cores
@pytest.mark.parametrize("encoding", [(), ("--encode-crops", "2")])
def test_stages_side_by_side_train_what_one_after_the_other_does(
    tmp_path: Path, shards: Path, encoding: tuple[str, ...]
) -> None:
    beside, alone = tmp_path / "beside", tmp_path / "alone"
    output = train_all(shards, beside, *encoding, n_cores=2)
    assert "clip by 1 process, beside" in output or "beside clip by 1 process" in output
    assert "transformer by 1 process of 2 threads" in output
    assert "left in all" in output
    train_all(shards, alone, *encoding, "--one-at-a-time", n_cores=1)
    hashes = [Pipeline.load(bundle).hashes for bundle in (beside, alone)]
    for part in ("tokenizer", "dvae", "clip"):  # one rank each: the same bits
        assert hashes[0][part] == hashes[1][part]
    assert losses_of(beside)["transformer"] == pytest.approx(losses_of(alone)["transformer"], abs=1e-5)
    if encoding:
        return
    shutil.rmtree(beside / "training" / "clip" / "checkpoints")
    again = train_all(shards, beside, n_cores=2)
    assert "clip 4/4" in again
    assert "dvae 4/4" not in again
    assert "transformer: the 4 steps" in again
