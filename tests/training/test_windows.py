"""Every promise about data, for windows of 1, 3 and all shards, read from a folder, over HTTP and from S3.

| promise | its test |
|---|---|
| any number of ranks and micro-batches | `test_ranks_and_micro_batches_share_out_the_same_steps` |
| any number of reading processes | `test_workers_change_nothing` |
| resuming: the same samples | `test_a_run_goes_on_where_it_was` |
| resuming bit for bit: losses and weights | `test_a_run_resumes_bit_for_bit` |
| manifests | `test_a_manifest_changes_nothing` |
| lost shards | `test_all_others_stay_when_a_shard_is_lost` |
"""

import dataclasses
import logging
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from servers import s3
from servers.web import serving
from support import tiny
from support.runs import Run
from support.tiny import all_keys, samples_of, write_tar
from torch import Tensor

import training.data.batches
from dalle.data.order import Shuffle
from dalle.data.reader import Sample, ShardData
from storage.stores import files
from training.data.batches import Share, batches, validation_batches
from training.data.check_data import check_data
from training.data.manifest import Manifest, open_with_manifest
from training.ranks.ranks import join

BATCH = 8
SHUFFLES = {
    "one shard": Shuffle(window=1, streams=2, batch=BATCH),
    "three shards": Shuffle(window=3, streams=4, batch=BATCH),
    "all": Shuffle(),
}
N_SHARDS, PER_SHARD = 8, 5
N = N_SHARDS * PER_SHARD


PLACES = ("folder", "HTTP", "S3")
CASES = [
    # an S3 server takes seconds
    pytest.param((place, window), id=f"{place}, {window}", marks=[pytest.mark.slow] * (place == "S3"))
    for place in PLACES
    for window in SHUFFLES
]


class Place(NamedTuple):
    """Where shards are read."""

    url: str | Path
    """Of their folder."""
    lose: Callable[[str], None]
    """Takes a shard away for good."""

    def open(self) -> ShardData:
        return ShardData.open([self.url], captions=True)

    def open_with(self, manifest: Manifest) -> ShardData:
        return open_with_manifest([self.url], manifest, captions=True)


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[str, str]:
    """A place, and a window."""
    chosen: tuple[str, str] = request.param
    return chosen


@pytest.fixture
def shuffle(case: tuple[str, str]) -> Shuffle:
    return SHUFFLES[case[1]]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_world(tmp_path_factory.mktemp("world"), N, per_shard=PER_SHARD)


@pytest.fixture
def shards(world: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(world, tmp_path / "data"))


@pytest.fixture
def local(shards: Path) -> ShardData:
    return tiny.open_world(shards)


@pytest.fixture
def place(
    case: tuple[str, str], request: pytest.FixtureRequest, shards: Path, own_cache: None, tmp_path: Path
) -> Iterator[Place]:
    kind, _ = case

    def lose(name: str) -> None:
        (shards / name).unlink()
        if kind == "S3":
            s3.delete(f"{prefix}/{name}")
        files.use_cache(tmp_path / "another", 1)

    if kind == "folder":
        yield Place(shards, lose)
        return
    pytest.importorskip("aiohttp", reason="nothing here reads the web: pip install 'dalle[http]'")
    if kind == "HTTP":
        with serving(shards.parent) as web:
            yield Place(f"{web.url}/{shards.name}", lose)
        return
    prefix, bucket = tmp_path.name, request.getfixturevalue("s3_bucket")
    s3.put_folder(shards, prefix)
    yield Place(f"{bucket}/{prefix}", lose)


@pytest.fixture
def manifest(place: Place, tmp_path: Path) -> Manifest:
    check_data([place.url], tmp_path / "manifest")
    return Manifest.open(tmp_path / "manifest")


@pytest.fixture
def new_run(local: ShardData, tmp_path: Path) -> Callable[..., Run]:
    def make(name: str, data: ShardData = local) -> Run:
        (tmp_path / name).mkdir()
        return Run(tmp_path / name, data, join())

    return make


def transform(sample: Sample, rng: np.random.Generator) -> dict[str, Tensor]:
    return {"noise": torch.tensor(rng.random())}


def seen(
    data: ShardData,
    shuffle: Shuffle,
    n_steps: int,
    *,
    start: int = 0,
    ranks: int = 1,
    micro: int = BATCH,
    workers: int = 0,
) -> list[list[tuple[str, float]]]:
    """Key and noise of each sample of some steps."""
    steps: list[list[tuple[str, float]]] = [[] for _ in range(n_steps)]
    accumulation = BATCH // (ranks * micro)
    for rank in range(ranks):
        share = Share(
            seed=3,
            micro_batch=micro,
            accumulation=accumulation,
            rank=rank,
            world_size=ranks,
            start_step=start,
            max_steps=start + n_steps,
        )
        stream = batches(data, transform, share, workers=workers, max_bad_fraction=0.5, shuffle=shuffle)
        for number, batch in enumerate(stream):
            noise = batch.tensors["noise"].tolist()
            steps[number // accumulation] += zip(batch.keys, noise, strict=True)
    return steps


def test_ranks_and_micro_batches_share_out_the_same_steps(place: Place, local: ShardData, shuffle: Shuffle) -> None:
    whole, data = seen(local, shuffle, 12), place.open()
    for ranks, micro in ((1, BATCH), (1, 2), (2, 4), (4, 1), (8, 1)):
        assert seen(data, shuffle, 12, ranks=ranks, micro=micro) == whole
    assert set(Counter(key for step in whole[:10] for key, _ in step).values()) == {2}, "two epochs"


@pytest.mark.parametrize("workers", [1, 4])
def test_workers_change_nothing(place: Place, local: ShardData, shuffle: Shuffle, workers: int) -> None:
    assert seen(place.open(), shuffle, 7, micro=4, workers=workers) == seen(local, shuffle, 7)


def test_a_run_goes_on_where_it_was(place: Place, local: ShardData, shuffle: Shuffle) -> None:
    straight, data = seen(local, shuffle, 10), place.open()
    for start in (1, 5, 6):
        assert seen(data, shuffle, 4, start=start, ranks=2, micro=2) == straight[start : start + 4]


def test_a_run_resumes_bit_for_bit(new_run: Callable[..., Run], place: Place, shuffle: Shuffle) -> None:
    window = shuffle.window
    straight, stopped = new_run("straight"), new_run("stopped", place.open())
    straight(tiny.train_config(steps=14, shuffle_window=window))
    stopped(tiny.train_config(steps=5, shuffle_window=window))
    stopped(tiny.train_config(steps=14))
    assert stopped.losses == straight.losses
    assert stopped.weights == straight.weights
    assert any("windows of" in line for line in stopped.said) == (window > 0)


def test_a_manifest_changes_nothing(place: Place, local: ShardData, manifest: Manifest, shuffle: Shuffle) -> None:
    assert seen(place.open_with(manifest), shuffle, 10) == seen(local, shuffle, 10)


def test_all_others_stay_when_a_shard_is_lost(
    place: Place, local: ShardData, manifest: Manifest, shuffle: Shuffle
) -> None:
    whole = seen(local, shuffle, 10)
    lost = set(all_keys(local)[3 * PER_SHARD : 4 * PER_SHARD])
    place.lose("world-000003.tar")
    data = place.open_with(manifest)
    left = seen(data, shuffle, 10, micro=2)
    for before, after in zip(whole, left, strict=True):
        for (key, noise), found in zip(before, after, strict=True):
            assert found == (key, noise) if key not in lost else found[0] not in lost
    assert seen(data, shuffle, 10, ranks=4, micro=2) == left
    assert seen(data, shuffle, 4, start=6, ranks=2, micro=2) == left[6:]


# ------------------------------------------------------------------------------------------- lost and bad samples


def test_a_lost_shard_as_large_as_its_window_is_replaced_from_others(tmp_path: Path) -> None:
    for shard in range(3):
        write_tar(tmp_path / f"{shard}.tar", samples_of(range(250)))
    check_data([tmp_path], tmp_path / "m")
    (tmp_path / "1.tar").unlink()
    data = open_with_manifest([tmp_path], Manifest.open(tmp_path / "m"), captions=True)
    shuffle = Shuffle(window=1, batch=BATCH)
    assert len([key for step in seen(data, shuffle, 93) for key in step]) == 93 * BATCH


@pytest.mark.parametrize("window", [pytest.param(1, marks=pytest.mark.slow), 3])
@pytest.mark.parametrize("is_lost", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_one_shard_of_many_stops_nothing_and_a_part_of_each_does(tmp_path: Path, window: int, is_lost: bool) -> None:
    for shard in range(20):
        bad = range(50) if shard == 7 and not is_lost else ()
        write_tar(tmp_path / "data" / f"{shard:02}.tar", samples_of(range(50), bad=bad))
    if is_lost:
        check_data([tmp_path / "data"], tmp_path / "m")
        (tmp_path / "data" / "07.tar").unlink()
        data = open_with_manifest([tmp_path / "data"], Manifest.open(tmp_path / "m"), captions=True)
    else:
        data = ShardData.open([tmp_path / "data"], captions=True)

    def refuse(sample: Sample, rng: np.random.Generator) -> dict[str, Tensor]:
        if sample.image_bytes == b"BROKEN":
            raise ValueError("not a picture")
        return transform(sample, rng)

    share, shuffle = Share(seed=0, micro_batch=BATCH, max_steps=260), Shuffle(window=window, batch=BATCH)
    for seed in range(4):
        stream = batches(data, refuse, dataclasses.replace(share, seed=seed), max_bad_fraction=0.06, shuffle=shuffle)
        assert sum(batch.n_bad for batch in stream) >= 50
    for shard in range(20):
        write_tar(tmp_path / "worse" / f"{shard:02}.tar", samples_of(range(50), bad=range(0, 50, 5)))
    stream = batches(
        ShardData.open([tmp_path / "worse"], captions=True), refuse, share, max_bad_fraction=0.06, shuffle=shuffle
    )
    with pytest.raises(ValueError, match="unusable samples after reading"):
        list(stream)


@pytest.mark.parametrize("shuffle", SHUFFLES.values(), ids=SHUFFLES)
def test_shards_are_read_ahead_only_in_windows(shards: Path, shuffle: Shuffle, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted: list[int] = []
    monkeypatch.setattr(ShardData, "read_ahead", lambda _, shards: wanted.extend(shards))
    data = ShardData.open([shards], captions=True)
    seen(data, shuffle, 5)
    assert set(wanted) == (set(range(N_SHARDS)) if shuffle.window else set())


def test_a_choice_of_very_many_samples_is_spread_over_all(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training.data.batches, "MAX_FULL_SHUFFLE", N - 1)
    data = ShardData.open([shards], captions=True)
    chosen = [[key for batch in validation_batches(data, transform, 3, samples=16) for key in batch.keys] for _ in "ab"]
    assert chosen[0] == chosen[1]
    assert len(set(chosen[0])) == 16
    assert {all_keys(data).index(key) // PER_SHARD for key in chosen[0]} == set(range(N_SHARDS))


# ------------------------------------------------------------------------------------------------ whole runs


def test_a_run_keeps_the_window_that_it_began_with(
    new_run: Callable[..., Run], caplog: pytest.LogCaptureFixture
) -> None:
    straight, told = new_run("straight"), new_run("told")
    straight(tiny.train_config(steps=8, shuffle_window=2))
    told(tiny.train_config(steps=4, shuffle_window=2))
    with caplog.at_level(logging.WARNING):
        told(tiny.train_config(steps=8, shuffle_window=1, shuffle_streams=4))
    assert "shuffle_window is 1: the run began with 2, and keeps it" in caplog.text
    assert told.losses == straight.losses


def test_large_data_begin_in_windows_without_being_told(
    new_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dalle.data.order.MAX_FULL_SHUFFLE", 39)
    monkeypatch.setattr("dalle.data.order.WINDOW", 2)
    run = new_run("large")
    run(tiny.train_config(steps=2))
    assert any(line.startswith("colours: samples are shuffled in windows of 2 shards") for line in run.said)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="1 to 4 streams"):
        new_run("more")(tiny.train_config(shuffle_window=1, shuffle_streams=5))
