"""Several ranks: two processes forked with everything imported, and the two launchers."""

import dataclasses
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support import tiny
from support.engines import Objective, config, data, engine_of
from support.ranks import launch, losses_of, on_ranks, transformer_command

import training.cli.main
import training.ranks.job
from dalle.pipeline import Pipeline
from dvae import DVAE
from rerank import CLIP
from training.ranks.ranks import Ranks, join, on_first_rank, require_same
from training.ranks.stop import Interrupted
from training.recipes import recipe
from training.run_files import read_metrics
from training.stages.clip import clip_loss, train_clip
from training.stages.encode import EncodeConfig, encode_shards
from training.stages.inputs import Inputs

pytestmark = pytest.mark.slow


# ----------------------------------------------------------------------------------------------------- two ranks


def clip() -> CLIP:
    torch.manual_seed(0)
    return CLIP(dataclasses.replace(tiny.recipe().clip.model, vocab_size=300))


def clip_batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    text = torch.randint(1, 298, (8, 24), generator=generator)
    text[:, -1] = 299
    return {"images": torch.rand(8, 3, 16, 16, generator=generator), "text": text, "n_cut": torch.zeros(8)}


def hard_batch() -> dict[str, torch.Tensor]:
    """The same with two wrong captions for each picture, some of which are missing."""
    generator = torch.Generator().manual_seed(2)
    wrong_text = torch.randint(1, 298, (8, 2, 24), generator=generator)
    wrong_text[..., -1] = 299
    return {**clip_batch(), "wrong_text": wrong_text, "is_wrong": torch.rand(8, 2, generator=generator) < 0.7}


def clip_gradients(
    ranks: Ranks, batch: Callable[[], dict[str, torch.Tensor]]
) -> tuple[float, float, dict[str, list[float]]]:
    model = clip()
    own = slice(ranks.rank * 8 // ranks.size, (ranks.rank + 1) * 8 // ranks.size)
    loss, metrics = clip_loss(model, **{name: tensor[own] for name, tensor in batch().items()})
    loss.backward()
    gradients = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        if ranks.size > 1:
            dist.all_reduce(parameter.grad)  # as the engine does
        gradients[name] = (parameter.grad / ranks.size).flatten().tolist()
    return loss.item(), metrics["accuracy"].item(), gradients


@pytest.mark.parametrize("batch", [clip_batch, hard_batch])
def test_the_gathered_loss_of_clip_is_that_of_the_whole_batch(
    tmp_path: Path, batch: Callable[[], dict[str, torch.Tensor]]
) -> None:
    loss, accuracy, gradients = clip_gradients(join(), batch)
    for other_loss, other_accuracy, other in on_ranks(tmp_path, clip_gradients, batch):
        assert other_loss == pytest.approx(loss, rel=1e-5)
        assert other_accuracy == accuracy
        for name, gradient in gradients.items():
            torch.testing.assert_close(torch.tensor(other[name]), torch.tensor(gradient), rtol=1e-4, atol=1e-6)


def clip_losses(ranks: Ranks, shards: Path, out: Path) -> list[float]:
    train_clip(tiny.recipe(global_batch=8), Inputs(data=[shards], out=out), ranks, lambda line: None)
    return [line["loss"] for line in read_metrics(out / "training" / "clip")]


def test_clip_trained_by_two_ranks_is_clip_trained_by_one(tmp_path: Path, shards: Path) -> None:
    expected = clip_losses(join(), shards, tmp_path / "one")
    for losses in on_ranks(tmp_path, clip_losses, shards, tmp_path / "two"):
        assert losses == pytest.approx(expected, rel=1e-5)


def encoded_shards(ranks: Ranks, shards: list[Path], dvae: Path, out: Path) -> tuple[int, int, list[str]]:
    report = encode_shards(shards, out, DVAE.load(dvae), "0" * 16, EncodeConfig(workers=0), ranks)
    return report.n_written, report.n_samples, [path.name for path in report.shards]


@pytest.mark.parametrize("n_shards", [1, 3])
def test_two_ranks_share_out_the_shards_to_encode(tmp_path: Path, shards: Path, n_shards: int) -> None:
    torch.manual_seed(0)
    DVAE(tiny.recipe().dvae.model).save(tmp_path / "dvae")
    given = sorted(shards.iterdir())[:n_shards]
    expected = encoded_shards(join(), given, tmp_path / "dvae", tmp_path / "one")
    assert expected == (n_shards, 8 * n_shards, [path.name for path in given])
    for found in on_ranks(tmp_path, encoded_shards, given, tmp_path / "dvae", tmp_path / "two"):
        assert found == expected
    for path in (tmp_path / "one").iterdir():
        assert (tmp_path / "two" / path.name).read_bytes() == path.read_bytes()
    assert on_ranks(tmp_path, encoded_shards, given, tmp_path / "dvae", tmp_path / "two")[0][0] == 0


def encoding_stopped(ranks: Ranks, shards: Path, dvae: Path, out: Path) -> None:
    def stop(done: int, total: int) -> None:
        if ranks.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    coder = DVAE.load(dvae)
    encode_shards([shards], out, coder, "0" * 16, EncodeConfig(workers=0), ranks, progress=stop)


def test_all_ranks_hear_that_one_of_them_was_asked_to_stop_encoding(tmp_path: Path, shards: Path) -> None:
    torch.manual_seed(0)
    DVAE(tiny.recipe().dvae.model).save(tmp_path / "dvae")
    for told in on_ranks(tmp_path, encoding_stopped, shards, tmp_path / "dvae", tmp_path / "out"):
        assert told.startswith("Interrupted: stopped: 2 of 3 shards are encoded")


def engine_steps(ranks: Ranks, folder: Path, stage: int, first: int, last: int) -> list[float]:
    engine = engine_of(Objective(), config(zero_stage=stage), ranks)
    if first:
        engine.load(folder)
    engine.train()
    own = slice(ranks.rank * 2, ranks.rank * 2 + 2)
    losses = []
    for step in range(first, last):
        tensors = {name: tensor[own] for name, tensor in data(step).items()}
        loss = engine.step([tensors], 1e-2, step)["loss"]
        dist.all_reduce(loss)
        losses.append(loss.item() / ranks.size)
    engine.save(folder, last, {})
    return losses


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_ranks_train_like_one_and_resume_bit_for_bit(tmp_path: Path, stage: int) -> None:
    engine = engine_of(Objective(), config(), join())
    engine.train()
    expected = [engine.step([data(step)], 1e-2, step)["loss"].item() for step in range(4)]
    straight = on_ranks(tmp_path, engine_steps, tmp_path / "a", stage, 0, 4)[0]
    assert straight == pytest.approx(expected, rel=1e-5)
    first = on_ranks(tmp_path, engine_steps, tmp_path / "b", stage, 0, 2)[0]
    assert first + on_ranks(tmp_path, engine_steps, tmp_path / "b", stage, 2, 4)[0] == straight


def save_with_a_full_disk_on(ranks: Ranks, folder: Path, full: int) -> None:
    engine = engine_of(Objective(), config(zero_stage=2), ranks)
    engine.save(folder, 1, {})
    if ranks.rank == full:

        def fail(*args: object, **kwargs: object) -> None:
            raise RuntimeError("file write failed")

        torch.save = fail
    engine.save(folder, 2, {})


@pytest.mark.parametrize("full", [0, 1])
def test_a_full_disk_on_one_rank_is_an_error_on_both(tmp_path: Path, full: int) -> None:
    answers = on_ranks(tmp_path, save_with_a_full_disk_on, tmp_path / "c", full)
    assert all("OSError: could not save the checkpoint" in answer for answer in answers), answers
    assert "file write failed" in answers[full]
    assert "another rank" in answers[1 - full]
    assert (tmp_path / "c" / "latest").read_text() == "step00000001"
    assert not (tmp_path / "c" / "step00000002").exists()


def load_checkpoint(ranks: Ranks, folder: Path) -> None:
    engine_of(Objective(), config(zero_stage=2), ranks).load(folder)


def test_a_part_of_a_checkpoint_that_is_damaged_is_an_error_on_both_ranks(tmp_path: Path) -> None:
    on_ranks(tmp_path, engine_steps, tmp_path / "c", 2, 0, 1)
    part = next((tmp_path / "c").glob("step*/*rank_1_*optim_states.pt"))
    part.write_bytes(part.read_bytes()[:-100])
    answers = on_ranks(tmp_path, load_checkpoint, tmp_path / "c")
    assert all("ValueError: the checkpoint" in answer for answer in answers), answers


def tell_apart(ranks: Ranks) -> None:
    require_same({"seed": 1, "data": ["a"]}, ranks)
    require_same({"seed": 1, "data": ["a", "b"][: ranks.rank + 1]}, ranks)


def test_ranks_that_were_told_different_things_are_refused_in_words(tmp_path: Path) -> None:
    answers = on_ranks(tmp_path, tell_apart)
    assert all(answer.startswith("ValueError: the ranks differ in data: start all") for answer in answers), answers


def fail_on_the_first(ranks: Ranks) -> None:
    def fail() -> None:
        raise FileNotFoundError("no such thing")

    on_first_rank(fail, ranks)


def test_an_error_of_the_first_rank_stops_the_other_one(tmp_path: Path) -> None:
    first, second = on_ranks(tmp_path, fail_on_the_first)
    assert first == "FileNotFoundError: no such thing"
    assert "the first rank failed" in second


def fail_alone(ranks: Ranks, shards: Path, out: Path) -> None:
    from training.stages.clip import CLIPStage

    original = CLIPStage.loss

    def loss(self: CLIPStage, batch: Any, step: int) -> Any:
        if step == 1 and ranks.rank == 1:
            raise ValueError("too many unusable samples")
        return original(self, batch, step)

    CLIPStage.loss = loss  # type: ignore[method-assign]
    with training.ranks.job.joined():
        train_clip(tiny.recipe(global_batch=8), Inputs(data=[shards], out=out), ranks, lambda line: None)


def test_an_error_of_one_rank_alone_does_not_leave_the_other_waiting(tmp_path: Path, shards: Path) -> None:
    first, second = on_ranks(tmp_path, fail_alone, shards, tmp_path / "out")
    assert second == "ValueError: too many unusable samples"
    assert "Error: " in first


def interrupted_rank(ranks: Ranks, shards: Path, out: Path) -> None:
    from training.stages.clip import CLIPStage

    original = CLIPStage.loss

    def loss(self: CLIPStage, batch: Any, step: int) -> Any:
        if step == 1 and ranks.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, batch, step)

    CLIPStage.loss = loss  # type: ignore[method-assign]
    train_clip(tiny.recipe(global_batch=8), Inputs(data=[shards], out=out), ranks, lambda line: None)


def test_a_signal_to_one_rank_stops_both_after_the_same_step(tmp_path: Path, shards: Path) -> None:
    answers = on_ranks(tmp_path, interrupted_rank, shards, tmp_path / "out")
    assert all(answer.startswith(f"{Interrupted.__name__}: stopped at step 2 of 4") for answer in answers), answers


# ----------------------------------------------------------------------------------------------------- launchers


@pytest.fixture(scope="module")
def losses_of_one(untrained: Path) -> list[float]:
    bundle = shutil.copytree(untrained / "bundle", untrained / "one")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training.ranks.job, "leave", lambda **_: None)
        assert training.cli.main.main(transformer_command(untrained, bundle, 0)) == 0
    return losses_of(bundle)


@pytest.mark.parametrize(
    ("launcher", "stage", "port"),
    [("deepspeed", 0, 29611), ("deepspeed", 2, 29612), ("torchrun", 0, 29613), ("torchrun", 2, 29614)],
)
def test_two_launched_ranks_train_the_same_bundle_as_one_process(
    tmp_path: Path, untrained: Path, losses_of_one: list[float], launcher: str, stage: int, port: int
) -> None:
    bundle = shutil.copytree(untrained / "bundle", tmp_path / "bundle")
    code, output = launch(launcher, port, transformer_command(untrained, bundle, stage))
    assert code == 0, output
    assert losses_of(bundle) == pytest.approx(losses_of_one, abs=1e-5)
    record = json.loads((bundle / "training" / "transformer" / "config.json").read_text())
    assert record["ranks"] == 2
    assert output.count("transformer 3/3") == 1, "only the first rank reports"
    result = Pipeline.load(bundle).generate("a small red circle", n=2, keep=1)
    size = recipe("demo").dvae.model.image_size
    assert result.images.shape == (1, 3, size, size)


@pytest.mark.parametrize(("launcher", "port"), [("deepspeed", 29615), ("torchrun", 29616)])
def test_an_error_on_all_ranks_ends_the_launcher_without_a_traceback(
    tmp_path: Path, untrained: Path, launcher: str, port: int
) -> None:
    bundle = tmp_path / "bundle"
    code, output = launch(launcher, port, transformer_command(untrained, bundle, 0))
    assert code != 0
    assert "error: " in output
    assert "training/stages/" not in output
