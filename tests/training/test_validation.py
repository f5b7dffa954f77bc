import io
import os
import signal
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support import tiny
from support.ranks import on_ranks
from support.runs import Run
from torch import Tensor

from dalle.data.reader import Sample, ShardData
from training.data.batches import validation_batches
from training.loop.means import Means
from training.loop.throughput import total_peak_flops
from training.ranks.ranks import Ranks, join, max_over_ranks
from training.ranks.stop import Interrupted
from training.run_files import read_metrics
from training.stages.clip import train_clip
from training.stages.inputs import Inputs


def transform(sample: Sample, rng: np.random.Generator) -> dict[str, Tensor]:
    return {"noise": torch.from_numpy(rng.normal(size=1))}


@pytest.fixture
def data(shards: Path) -> ShardData:
    return tiny.open_world(shards)


def keys(data: ShardData, batch_size: int, samples: int | None, world_size: int = 1) -> list[list[str]]:
    """The keys of each rank."""
    return [
        [
            key
            for batch in validation_batches(
                data, transform, batch_size, samples=samples, rank=rank, world_size=world_size
            )
            for key in batch.keys
        ]
        for rank in range(world_size)
    ]


def test_a_part_of_the_samples_is_the_same_part_whatever_the_batches_and_ranks(data: ShardData) -> None:
    (chosen,) = keys(data, 4, 10)
    assert len(set(chosen)) == 10
    assert chosen == [key for key in tiny.all_keys(data) if key in set(chosen)], "in the order of the shards"
    assert keys(data, 3, 10) == [chosen]
    for world_size in (2, 3, 5):
        shared = keys(data, 3, 10, world_size)
        assert sorted(key for rank in shared for key in rank) == sorted(chosen)
    assert chosen != tiny.all_keys(data)[:10], "from all shards"
    assert set(keys(data, 4, 6)[0]) < set(chosen), "the first of one order"
    assert keys(data, 4, 100) == keys(data, 4, None) == [tiny.all_keys(data)]


def validation_lines(run: Run) -> list[dict[str, Any]]:
    lines = read_metrics(run.folder / "run")
    return [line for line in lines if line["split"] == "validation"]


@pytest.fixture
def new_run(tmp_path: Path, data: ShardData) -> Callable[[str], Run]:
    def make(name: str) -> Run:
        (tmp_path / name).mkdir()
        return Run(tmp_path / name, data, join())

    return make


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_validates_on_as_many_samples_as_it_is_told(
    new_run: Callable[[str], Run], data: ShardData, workers: int
) -> None:
    run = new_run("a")
    run(tiny.train_config(steps=2, validate_every=1, validation_samples=7, workers=workers), validation=data)
    lines = validation_lines(run)
    assert [(line["step"], line["samples"]) for line in lines] == [(1, 7), (2, 7)]
    assert lines[0]["brightness"] == lines[1]["brightness"], "the same ones every time"


def test_samples_that_cannot_be_used_are_left_out_of_the_mean(new_run: Callable[[str], Run], tmp_path: Path) -> None:
    """Of batches of two, one has no usable sample."""
    path = tmp_path / "mixed.tar"
    with tarfile.open(path, "w") as tar:
        for number in range(6):
            buffer = io.BytesIO()
            Image.new("RGB", (16, 16), (40 * number,) * 3).save(buffer, "png")
            picture = b"no picture" if number in (0, 1, 3) else buffer.getvalue()
            for name, content in ((f"{number}.png", picture), (f"{number}.txt", b"a caption")):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    run = new_run("a")
    mixed = ShardData.open([path], captions=True)
    run(tiny.train_config(steps=1, global_batch=2, max_bad_fraction=0.9), validation=mixed)
    (line,) = validation_lines(run)
    assert line["samples"] == 3
    assert line["brightness"] == pytest.approx((80 + 160 + 200) / 3 / 255, rel=1e-5)
    with pytest.raises(ValueError, match=r"unusable samples.*--max-bad-fraction 0\.1"):
        new_run("b")(tiny.train_config(steps=1, global_batch=2, max_bad_fraction=0.1), validation=mixed)


@pytest.mark.parametrize("checkpoint_every", [2, 1000])
def test_a_stop_leaves_a_validation_to_the_run_that_resumes(
    new_run: Callable[[str], Run], data: ShardData, checkpoint_every: int
) -> None:
    settings = tiny.train_config(steps=6, validate_every=2, sample_every=2, checkpoint_every=checkpoint_every)
    straight, stopped = new_run("straight"), new_run("stopped")
    straight(settings, validation=data)
    measured: list[int] = []

    def stop_in_the_second_batch(step: int) -> None:
        if not torch.is_grad_enabled():
            measured.append(step)
            if len(measured) % 2 == 0:
                os.kill(os.getpid(), signal.SIGTERM)

    for turn in (1, 2):  # in the validation, and where it comes first
        with pytest.raises(Interrupted, match="stopped at step 2 of 6"):
            stopped(settings, validation=data, at_step=stop_in_the_second_batch)
        assert measured == [2] * 2 * turn
        assert not validation_lines(stopped)
    stopped(settings, validation=data)
    found, expected = ([{**line, "time": 0} for line in validation_lines(run)] for run in (stopped, straight))
    assert found == expected
    assert [line["step"] for line in found] == [2, 4, 6]
    assert stopped.losses == straight.losses
    assert stopped.weights == straight.weights
    sheets = [sorted(path.name for path in (run.folder / "run").rglob("*.png")) for run in (straight, stopped)]
    assert sheets[0] == sheets[1]


# ---------------------------------------------------------------------------------------------------- two ranks


def clip_validation(ranks: Ranks, shards: Path, out: Path, changes: dict[str, Any]) -> list[dict[str, Any]]:
    inputs = Inputs(data=[shards], validation=[shards], out=out)
    train_clip(tiny.recipe(global_batch=8, **changes), inputs, ranks, lambda line: None)
    lines = read_metrics(out / "training" / "clip")
    return [line for line in lines if line["split"] == "validation"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {},  # three batches: a rank has one more than the other
        {"validation_samples": 11, "validate_every": 2},
        {"validation_samples": 8, "zero_stage": 3},  # one batch: a rank has none, and must gather weights all the same
    ],
)
def test_two_ranks_that_share_validation_out_measure_what_one_does(
    tmp_path: Path, shards: Path, changes: dict[str, Any]
) -> None:
    alone = clip_validation(join(), shards, tmp_path / "one", {**changes, "zero_stage": 0})
    assert alone
    for found in on_ranks(tmp_path, clip_validation, shards, tmp_path / "two", changes):
        assert [line["step"] for line in found] == [line["step"] for line in alone]
        for line, expected in zip(found, alone, strict=True):
            assert line["samples"] == expected["samples"]
            for name in ("loss", "accuracy", "captions_cut"):
                assert line[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-6), name


def validation_with_bad_samples_on_one_rank(ranks: Ranks, shards: Path, out: Path, stage: int) -> None:
    from training.stages.clip import CLIPStage

    original = CLIPStage.transform_for_validation

    def refuse(self: CLIPStage, sample: Sample, rng: np.random.Generator) -> dict[str, Tensor]:
        if ranks.rank == 1:
            raise ValueError("not a picture")
        return original(self, sample, rng)

    CLIPStage.transform_for_validation = refuse  # type: ignore[method-assign]
    inputs = Inputs(data=[shards], validation=[shards], out=out)
    train_clip(tiny.recipe(global_batch=8, zero_stage=stage), inputs, ranks, lambda line: None)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 3])
def test_a_rank_whose_validation_fails_does_not_leave_the_other_waiting(
    tmp_path: Path, shards: Path, stage: int
) -> None:
    first, second = on_ranks(tmp_path, validation_with_bad_samples_on_one_rank, shards, tmp_path / "out", stage)
    assert second.startswith("ValueError: ")
    assert "unusable samples" in second
    assert first == "OSError: the validation of another rank failed: see its message"


def a_log_that_cannot_be_written(ranks: Ranks, shards: Path, out: Path) -> None:
    from training.loop.metrics import MetricLog

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    MetricLog.write = full  # type: ignore[method-assign]
    train_clip(tiny.recipe(global_batch=8), Inputs(data=[shards], out=out), ranks, lambda line: None)


@pytest.mark.slow
def test_a_log_that_the_first_rank_cannot_write_stops_both(tmp_path: Path, shards: Path) -> None:
    first, second = on_ranks(tmp_path, a_log_that_cannot_be_written, shards, tmp_path / "out")
    assert "No space left on device" in first
    assert "the first rank failed" in second


def means_and_peak(ranks: Ranks) -> tuple[dict[str, Any], float | None, float]:
    means = Means()
    means.add(
        {"loss": torch.tensor(1.0 + ranks.rank), "rows": torch.tensor([1.0, 2.0]) * ranks.rank}, 1 + 2 * ranks.rank
    )
    peak = total_peak_flops(tiny.train_config(peak_tflops=0.5), ranks)
    return means.take(ranks), peak, max_over_ranks(float(ranks.rank), ranks)


@pytest.mark.slow
def test_two_ranks_weigh_their_means_add_their_peaks_and_name_the_largest(tmp_path: Path) -> None:
    for means, peak, largest in on_ranks(tmp_path, means_and_peak):
        assert means == {"loss": (1 + 3 * 2) / 4, "rows": [3 / 4, 6 / 4]}
        assert peak == 1e12
        assert largest == 1.0
