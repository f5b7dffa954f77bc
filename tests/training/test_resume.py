"""Runs that go on with another number of ranks, and saves that end in the middle."""

import dataclasses
import itertools
import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from support import tiny
from support.checkpoints import Killed, forge_digests, kill_at
from support.engines import Bomb, Objective, config, data, engine_of
from support.modes import MODES, allow_every_precision
from support.ranks import on_ranks
from support.runs import Run, send

import training.loop.loop
from training.config import OptimizerConfig, TrainConfig
from training.data.batches import Batch
from training.engine.checkpoints import UNIVERSAL, read_manifest
from training.ranks.ranks import Ranks, join
from training.ranks.stop import Interrupted
from training.run_files import read_metrics
from training.schedules import WarmupCosine
from training.stages.clip import train_clip
from training.stages.dvae import train_dvae
from training.stages.inputs import Inputs

pytestmark = pytest.mark.slow

STEPS = 9


class Trained(NamedTuple):
    """What a rank saw of a run."""

    losses: dict[int, float]
    keys: list[list[str]]
    """Of the samples of this rank, a list for each micro-batch."""
    said: list[str]
    random: float
    """Drawn from the global generator at the end."""


def colours(**changes: Any) -> TrainConfig:
    """A run whose rates and weight decay are so high that losses show whether every state was restored."""
    settings: dict[str, Any] = {
        "steps": STEPS,
        "micro_batch": 1,  # so that the noise of a sample is the same on any number of ranks
        "learning_rate": WarmupCosine(peak=5e-2, warmup=2, steps=100),
        "optimizer": OptimizerConfig(weight_decay=1.0, gradient_clipping=1.0),
    }
    return tiny.train_config(**{**settings, **changes})


def train_colours(ranks: Ranks, folder: Path, shards: Path, settings: TrainConfig, until: int = STEPS) -> Trained:
    """Train, or go on, until a step; returns what this rank saw."""
    seen: list[list[str]] = []
    batches = training.loop.loop.batches

    def recorded(*args: Any, **kwargs: Any) -> Iterator[Batch]:
        for batch in batches(*args, **kwargs):
            seen.append(list(batch.keys))
            yield batch

    training.loop.loop.batches = recorded
    if ranks.is_first:
        folder.mkdir(exist_ok=True, parents=True)
    run = Run(folder, tiny.open_world(shards), ranks)
    try:
        run(settings, at_step=send(signal.SIGTERM, until - 1) if until < STEPS else None)
    except Interrupted:
        assert until < STEPS
    finally:
        training.loop.loop.batches = batches
    return Trained(run.losses, seen, run.said, float(torch.rand(1)))


def keys_by_step(ranks: list[Trained], first: int) -> dict[int, list[str]]:
    """Return the keys of the samples of every step, in the order of their positions: each rank has a row of them."""
    accumulation = colours().batch_of(len(ranks))[1]
    (n_seen,) = {len(rank.keys) for rank in ranks}
    return {
        first + step: [key for rank in ranks for keys in rank.keys[start : start + accumulation] for key in keys]
        for step, start in enumerate(range(0, n_seen, accumulation))
    }


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> dict[int, list[Trained]]:
    """Two ranks that were not interrupted, for each ZeRO stage."""
    folder = tmp_path_factory.mktemp("straight")
    return {
        stage: on_ranks(folder, train_colours, folder / f"{stage}", shards, colours(zero_stage=stage))
        for stage in range(4)
    }


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("ranks", [(2, 1, 2), (2, 4)], ids=["2-1-2", "2-4"])
def test_a_run_goes_on_with_another_number_of_ranks(
    tmp_path: Path, shards: Path, straight: dict[int, list[Trained]], stage: int, ranks: tuple[int, ...]
) -> None:
    settings = colours(zero_stage=stage)
    expected = keys_by_step(straight[stage], 0)
    start = 0
    for turn, n_ranks in enumerate(ranks):
        until = (3, 6)[turn] if turn + 1 < len(ranks) else STEPS
        parts = on_ranks(tmp_path, train_colours, tmp_path / "run", shards, settings, until, n_ranks=n_ranks)
        assert all(isinstance(part, Trained) for part in parts), parts
        assert keys_by_step(parts, start) == {step: expected[step] for step in range(start, until)}
        converted = [line for line in parts[0].said if "converting it" in line]
        assert len(converted) == (1 if turn and stage else 0)
        start = until
    assert parts[0].losses == pytest.approx(straight[stage][0].losses, abs=1e-5)
    assert sorted(parts[0].losses) == list(range(1, STEPS + 1))
    assert not (tmp_path / "run" / "run" / "checkpoints" / UNIVERSAL).exists()


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_as_many_ranks_go_on_bit_for_bit(
    tmp_path: Path, shards: Path, straight: dict[int, list[Trained]], stage: int
) -> None:
    settings = colours(zero_stage=stage)
    on_ranks(tmp_path, train_colours, tmp_path / "run", shards, settings, 4)
    parts = on_ranks(tmp_path, train_colours, tmp_path / "run", shards, settings)
    for part, whole in zip(parts, straight[stage], strict=True):
        assert part.losses == whole.losses
        assert part.random == whole.random


def engine_losses(
    ranks: Ranks, folder: Path, settings: TrainConfig, first: int, last: int, dtype: torch.dtype = torch.float32
) -> list[float]:
    """Take steps with a bare engine, going on from the checkpoint in `folder` if there is one; save in `folder`."""
    engine = engine_of(Objective(), settings, ranks)
    if first:
        engine.load(folder)
    engine.train()
    size = 4 // ranks.size
    losses = []
    for step in range(first, last):
        tensors = {name: tensor[ranks.rank * size : (ranks.rank + 1) * size] for name, tensor in data(step).items()}
        loss = engine.step([{"x": tensors["x"].to(dtype), "y": tensors["y"]}], 1e-2, step)["loss"]
        if ranks.size > 1:
            dist.all_reduce(loss)
        losses.append(loss.item() / ranks.size)
    engine.save(folder, last, {})
    return losses


RESUMED = [mode for mode in MODES if mode[0] != "fp32" or mode[2] != "none"]  # those train through `fit`, above
RESUMED += [("fp16", stage, "none") for stage in (1, 2, 3)]


def run_of(mode: tuple[str, int, str], folder: Path) -> TrainConfig:
    precision, stage, offload = mode
    scale = folder / "fp16.json"  # so low that the first steps are taken, and so hasty that it changes in between
    scale.write_text(json.dumps({"fp16": {"initial_scale_power": 4, "loss_scale_window": 2}}))
    return config(
        precision=precision,
        zero_stage=stage,
        offload=offload,
        deepspeed_config=scale if precision == "fp16" else None,
    )


DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def losses_of_each(ranks: Ranks, folder: Path, runs: dict[str, tuple[TrainConfig, int, int]]) -> dict[str, list[float]]:
    """Take steps with a bare engine for each run, which has a folder of its own."""
    allow_every_precision()
    return {
        name: engine_losses(ranks, folder / name, *run, DTYPES.get(run[0].precision, torch.float32))
        for name, run in runs.items()
    }


def averages(folder: Path) -> dict[str, list[float]]:
    """Return the averages of the float32 weights after step 6: losses of half precision hide small differences."""
    found: dict[str, list[float]] = {}
    for file in sorted((folder / "step00000006").glob("ema*.safetensors")):  # one, or at stage 3 one of each rank
        for name, tensor in load_file(file).items():
            found.setdefault(name, []).extend(tensor.flatten().tolist())
    return found


def test_every_mode_goes_on_bit_for_bit(tmp_path: Path) -> None:
    runs = {"-".join(map(str, mode)): run_of(mode, tmp_path) for mode in RESUMED}
    whole, begun, ended = (
        on_ranks(tmp_path, losses_of_each, tmp_path / name, {run: (settings, *steps) for run, settings in runs.items()})
        for name, steps in (("whole", (0, 6)), ("parts", (0, 3)), ("parts", (3, 6)))
    )
    for rank in range(2):
        assert isinstance(ended[rank], dict), (whole[rank], begun[rank], ended[rank])
        for name in runs:
            assert begun[rank][name] + ended[rank][name] == whole[rank][name], name
            assert len(set(whole[rank][name])) == 6
    for name in runs:
        assert averages(tmp_path / "parts" / name) == averages(tmp_path / "whole" / name), name


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_as_many_ranks_move_between_stages_1_and_2(tmp_path: Path, precision: str, before: int, after: int) -> None:
    first, second = (run_of((precision, stage, "none"), tmp_path) for stage in (before, after))
    whole = on_ranks(tmp_path, losses_of_each, tmp_path / "whole", {"run": (first, 0, 6)})[0]["run"]
    begun = on_ranks(tmp_path, losses_of_each, tmp_path / "parts", {"run": (first, 0, 3)})[0]["run"]
    ended = on_ranks(tmp_path, losses_of_each, tmp_path / "parts", {"run": (second, 3, 6)})[0]
    assert isinstance(ended, dict), ended
    assert begun + ended["run"] == whole
    expected = averages(tmp_path / "whole" / "run")
    for name, values in averages(tmp_path / "parts" / "run").items():
        # in bf16 the stages round differently; weights or moments that were kept in bfloat16 would be far off
        assert values == (pytest.approx(expected[name], abs=1e-6) if precision == "bf16" else expected[name])


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bfloat16_goes_on_with_another_number_of_ranks(tmp_path: Path, stage: int) -> None:
    settings = config(zero_stage=stage, precision="bf16")
    whole = on_ranks(tmp_path, engine_losses, tmp_path / "a", settings, 0, 8, torch.bfloat16)[0]
    begun = on_ranks(tmp_path, engine_losses, tmp_path / "b", settings, 0, 3, torch.bfloat16)[0]
    one = engine_losses(join(), tmp_path / "b", settings, 3, 6, torch.bfloat16)
    two = on_ranks(tmp_path, engine_losses, tmp_path / "b", settings, 6, 8, torch.bfloat16)[0]
    assert begun + one + two == pytest.approx(whole, rel=1e-2)


def train_models(ranks: Ranks, shards: Path, out: Path, stage: int, steps: int) -> dict[str, list[float]]:
    """Train CLIP, which has a scalar among its weights, and a dVAE, whose weights are laid out in another order."""
    small = tiny.recipe(steps=steps, zero_stage=stage)
    fixed = dataclasses.replace(small.dvae.train, micro_batch=2)
    recipe = dataclasses.replace(small, dvae=dataclasses.replace(small.dvae, train=fixed, warmup=None))
    inputs = Inputs(data=[shards], out=out)
    train_clip(recipe, inputs, ranks, lambda line: None)
    train_dvae(recipe, inputs, ranks, lambda line: None)
    runs = {name: inputs.run_directory(name) for name in ("clip", "dvae")}
    return {
        name: [line["loss"] for line in read_metrics(path) if line["split"] == "train"] for name, path in runs.items()
    }


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_models_go_on_with_another_number_of_ranks(tmp_path: Path, shards: Path, stage: int) -> None:
    whole = train_models(join(), shards, tmp_path / "a", 0, 6)
    on_ranks(tmp_path, train_models, shards, tmp_path / "b", stage, 2)
    train_models(join(), shards, tmp_path / "b", stage, 4)
    ended = on_ranks(tmp_path, train_models, shards, tmp_path / "b", stage, 6)[0]
    assert isinstance(ended, dict), ended
    for name, losses in whole.items():
        assert len(losses) == 6
        assert ended[name] == pytest.approx(losses, abs=1e-5)


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
def test_stage_and_ranks_change_at_once(tmp_path: Path, before: int, after: int) -> None:
    whole = on_ranks(tmp_path, engine_losses, tmp_path / "a", config(zero_stage=before), 0, 6)[0]
    begun = on_ranks(tmp_path, engine_losses, tmp_path / "b", config(zero_stage=before), 0, 3)[0]
    ended = engine_losses(join(), tmp_path / "b", config(zero_stage=after), 3, 6)
    assert begun + ended == pytest.approx(whole, rel=1e-5)


@pytest.mark.parametrize("stage", [2, 3])
def test_code_in_a_checkpoint_does_not_run_when_it_is_converted(tmp_path: Path, stage: int) -> None:
    on_ranks(tmp_path, engine_losses, tmp_path / "c", config(zero_stage=stage), 0, 1)
    folder = tmp_path / "c" / "step00000001"
    pickles = [name for name in read_manifest(folder)["files"] if name.endswith(".pt")]
    assert len(pickles) == (4 if stage == 3 else 3)
    for name in pickles:
        good = (folder / name).read_bytes()
        torch.save({"module": Bomb(tmp_path / "ran"), "optimizer_state_dict": Bomb(tmp_path / "ran")}, folder / name)
        forge_digests(folder)
        with pytest.raises(ValueError, match="cannot be loaded"):
            engine_of(Objective(), config(zero_stage=stage), join()).load(tmp_path / "c")
        assert not (tmp_path / "ran").exists()
        assert not (tmp_path / "c" / UNIVERSAL).exists()
        (folder / name).write_bytes(good)
        forge_digests(folder)
    engine_of(Objective(), config(zero_stage=stage), join()).load(tmp_path / "c")


def load_at_stage_2(ranks: Ranks, folder: Path) -> None:
    engine_of(Objective(), config(zero_stage=2), ranks).load(folder)


def test_a_file_of_one_rank_that_holds_something_else_is_an_error_on_both_and_when_converted(tmp_path: Path) -> None:
    on_ranks(tmp_path, engine_losses, tmp_path / "c", config(zero_stage=2), 0, 1)
    folder = tmp_path / "c" / "step00000001"
    torch.save(5, next(folder.glob("*rank_1_*optim_states.pt")))
    forge_digests(folder)
    answers = on_ranks(tmp_path, load_at_stage_2, tmp_path / "c")
    assert all("ValueError: the checkpoint" in answer for answer in answers), answers
    converting = on_ranks(tmp_path, load_at_stage_2, tmp_path / "c", n_ranks=4)
    assert "ValueError: the checkpoint" in converting[0], converting
    assert all("the first rank failed" in answer for answer in converting[1:]), converting


def test_what_an_interrupted_conversion_left_is_not_loaded(tmp_path: Path) -> None:
    whole = on_ranks(tmp_path, engine_losses, tmp_path / "a", config(zero_stage=2), 0, 4)[0]
    on_ranks(tmp_path, engine_losses, tmp_path / "b [c+d]", config(zero_stage=2), 0, 2)
    left = tmp_path / "b [c+d]" / UNIVERSAL / "step00000002" / "zero"
    left.mkdir(parents=True)
    torch.save(Bomb(tmp_path / "ran"), left / "optimizer_state.pt")
    assert engine_losses(join(), tmp_path / "b [c+d]", config(zero_stage=2), 2, 4) == pytest.approx(whole[2:])


def save_until_killed(ranks: Ranks, folder: Path, stage: int, victim: int, moment: int) -> str:
    engine = engine_of(Objective(), config(zero_stage=stage, keep_last=1), ranks)
    engine.save(folder, 1, {"n": 1})
    with pytest.MonkeyPatch.context() as patch:
        if ranks.rank == victim:
            kill_at(patch, moment)
        try:
            engine.save(folder, 2, {"n": 2})
        except Killed:
            dist.destroy_process_group()  # as a dead process does: the other rank's connections break
            return "killed"
        except BaseException:
            dist.destroy_process_group()
            raise
    return "saved"


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_killed_at_any_moment_of_a_save_leaves_a_checkpoint_that_loads(tmp_path: Path, victim: int) -> None:
    outcomes = []
    for moment in itertools.count(0, 3):
        folder = tmp_path / f"{moment}"
        told = on_ranks(tmp_path, save_until_killed, folder, 2, victim, moment)
        outcomes.append(engine_of(Objective(seed=1), config(zero_stage=2), join()).load(folder)["n"])
        if told[victim] != "killed":
            break
    assert told == ["saved", "saved"]
    assert len(outcomes) > 3
    assert outcomes == sorted(outcomes)
    assert set(outcomes) == {1, 2}


def flip_and_load(ranks: Ranks, folder: Path) -> int:
    """Load on two ranks what one of them alone finds damaged."""
    return int(engine_of(Objective(), config(zero_stage=2), ranks).load(folder)["n"])


def save_twice(ranks: Ranks, folder: Path) -> None:
    engine = engine_of(Objective(), config(zero_stage=2), ranks)
    for step in (1, 2):
        engine.save(folder, step, {"n": step})


def test_all_ranks_go_back_from_what_one_of_them_finds_damaged(tmp_path: Path) -> None:
    on_ranks(tmp_path, save_twice, tmp_path / "c")
    folder = tmp_path / "c" / "step00000002"
    for number, name in enumerate(sorted(read_manifest(folder)["files"])):
        copy = shutil.copytree(tmp_path / "c", tmp_path / f"copy{number}")
        os.truncate(copy / "step00000002" / name, 5)
        assert on_ranks(tmp_path, flip_and_load, copy) == [1, 1]


def save_where_only_the_first_rank_sees(ranks: Ranks, folder: Path) -> None:
    """Save to a folder that is another one on the second rank, as on machines without a common file system."""
    engine = engine_of(Objective(), config(zero_stage=2), ranks)
    own = folder / f"{ranks.rank}"
    engine.save(own, 1, {})


def test_ranks_that_do_not_see_the_same_folder_are_told_so(tmp_path: Path) -> None:
    first, second = on_ranks(tmp_path, save_where_only_the_first_rank_sees, tmp_path / "c")
    assert "OSError: could not save the checkpoint" in first
    assert "the folder must be the same on all machines" in first
    assert "OSError: could not save the checkpoint" in second
