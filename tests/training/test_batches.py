import dataclasses
import gc
import logging
import multiprocessing
import os
import subprocess
import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.tiny import all_keys, samples_of, write_tar
from torch import Tensor

from dalle.data.reader import Sample, ShardData
from training.data.batches import Batch, Share, batches, validation_batches
from training.data.workers import forking


def transform(sample: Sample, rng: np.random.Generator) -> dict[str, Tensor]:
    if len(sample.image_bytes) != 1:
        raise ValueError(f"{sample.source}: not a picture")
    return {"number": torch.tensor(sample.image_bytes[0]), "noise": torch.tensor(rng.random())}


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    write_tar(tmp_path / "data-000000.tar", samples_of(range(0, 6)))
    write_tar(tmp_path / "data-000001.tar", samples_of(range(6, 11)))
    return tmp_path


@pytest.fixture
def data(shards: Path) -> ShardData:
    return ShardData.open([shards], captions=True)


def keys_of(stream: Iterator[Batch], count: int) -> list[str]:
    return [key for batch in islice(stream, count) for key in batch.keys]


def test_the_sequence_does_not_depend_on_workers(data: ShardData) -> None:
    streams = [
        batches(data, transform, Share(seed=3, micro_batch=4, max_steps=9), workers=workers) for workers in (0, 2)
    ]
    alone, shared = (list(stream) for stream in streams)
    assert [batch.keys for batch in alone] == [batch.keys for batch in shared]
    assert len(alone) == 9
    for ours, theirs in zip(alone, shared, strict=True):
        assert torch.equal(ours.tensors["number"], theirs.tensors["number"])
        assert torch.equal(ours.tensors["noise"], theirs.tensors["noise"])


def test_the_sequence_is_that_of_order(data: ShardData) -> None:
    keys = keys_of(batches(data, transform, Share(seed=3, micro_batch=4)), 9)
    assert keys == [data.key(data.order(3, p // 11)[p % 11]) for p in range(36)]


def test_ranks_and_accumulation_share_out_the_same_global_batches(data: ShardData) -> None:
    whole = keys_of(batches(data, transform, Share(seed=5, micro_batch=4)), 6)
    halves = [
        keys_of(batches(data, transform, Share(seed=5, micro_batch=1, accumulation=2, rank=rank, world_size=2)), 12)
        for rank in range(2)
    ]
    joined = [key for step in range(6) for half in halves for key in half[2 * step : 2 * step + 2]]
    assert joined == whole


def test_an_epoch_shows_every_sample_once(data: ShardData) -> None:
    assert set(Counter(keys_of(batches(data, transform, Share(seed=0, micro_batch=1)), 22)).values()) == {2}


@pytest.mark.parametrize("workers", [0, 2])
def test_resuming_goes_on_exactly(data: ShardData, workers: int) -> None:
    share = Share(seed=7, micro_batch=2, accumulation=2)
    whole = list(islice(batches(data, transform, share), 20))
    rest = list(batches(data, transform, dataclasses.replace(share, start_step=6, max_steps=10), workers=workers))
    assert [batch.keys for batch in rest] == [batch.keys for batch in whole[12:]]
    assert all(torch.equal(a.tensors["noise"], b.tensors["noise"]) for a, b in zip(rest, whole[12:], strict=True))


def test_reading_in_workers_leaves_the_global_generator_alone(data: ShardData) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    next(batches(data, transform, Share(seed=0, micro_batch=2), workers=1))
    assert torch.equal(before, torch.get_rng_state())


def signal_from_elsewhere(name: str, processes: Sequence[BaseProcess]) -> None:
    assert all(process.pid for process in processes)
    subprocess.run(["sh", "-c", f"kill -{name} {' '.join(str(process.pid) for process in processes)}"], check=True)


class Garbage:
    itself: object


def test_a_worker_leaves_the_garbage_of_its_parent_be() -> None:
    gc.disable()  # until it is asked for
    readable, writable = os.pipe()
    try:
        garbage = Garbage()
        garbage.itself = garbage
        os.set_blocking(readable, False)
        weakref.finalize(garbage, os.write, writable, b"ended")
        del garbage
        worker = multiprocessing.get_context("fork").Process(target=gc.collect)
        with forking():
            worker.start()
        worker.join()
        assert worker.exitcode == 0
        with pytest.raises(BlockingIOError):
            os.read(readable, 5)
        gc.collect()
        assert os.read(readable, 5) == b"ended"
    finally:
        os.close(readable)
        os.close(writable)
        gc.enable()


def test_workers_end_when_the_training_process_says_so(data: ShardData) -> None:
    stream = batches(data, transform, Share(seed=0, micro_batch=2), workers=2)
    next(stream)
    for worker in multiprocessing.active_children():
        worker.terminate()
        worker.join(10)
        assert worker.exitcode == 0


def test_workers_survive_an_interrupt_and_end_with_the_stream(data: ShardData) -> None:
    stream = batches(data, transform, Share(seed=0, micro_batch=2), workers=2)
    next(stream)
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    for name in ("INT", "TERM"):
        signal_from_elsewhere(name, workers)
    assert len(list(islice(stream, 30))) == 30
    del stream
    for worker in workers:
        worker.join(10)
        assert worker.exitcode == 0


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_sample_is_replaced_by_the_next_counted_and_logged_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, workers: int
) -> None:
    data = ShardData.open([write_tar(tmp_path / "s.tar", samples_of(range(10), bad=[3, 4]))], captions=True)
    stream = batches(data, transform, Share(seed=1, micro_batch=5), workers=workers, max_bad_fraction=0.2)
    with caplog.at_level(logging.WARNING):
        read = list(islice(stream, 8))
    assert sum(batch.n_bad for batch in read) == 8
    order = data.order(1, 0)
    good = [next(i for i in [*order[p:], *order] if i not in (3, 4)) for p in range(10)]
    assert [key for batch in read[:2] for key in batch.keys] == [data.key(i) for i in good]
    assert caplog.text.count("unusable sample k003") == 1


def test_half_of_a_tiny_set_being_bad_stops_its_first_epoch(tmp_path: Path) -> None:
    write_tar(tmp_path / "good.tar", samples_of(range(10)))
    write_tar(tmp_path / "bad.tar", samples_of(range(10, 20), bad=range(10, 20)))
    data = ShardData.open([tmp_path], captions=True)
    stream = batches(data, transform, Share(seed=0, micro_batch=2), max_bad_fraction=0.25)
    with pytest.raises(
        ValueError, match=r"6 unusable samples after reading \d+ of 20.*--max-bad-fraction 0\.25.*bad\.tar \(6\)"
    ):
        list(islice(stream, 10))


@pytest.mark.parametrize("start_step", [0, 7])
def test_what_is_allowed_to_be_bad_never_stops_a_run_and_one_more_does(tmp_path: Path, start_step: int) -> None:
    data = ShardData.open([write_tar(tmp_path / "s.tar", samples_of(range(20), bad=[0, 5]))], captions=True)
    share = Share(seed=0, micro_batch=1, start_step=start_step)
    assert len(list(islice(batches(data, transform, share, max_bad_fraction=0.1), 70))) == 70
    for too_few in (0.0, 0.05):
        with pytest.raises(ValueError, match="unusable samples after reading"):
            list(islice(batches(data, transform, share, max_bad_fraction=too_few), 60))


def test_many_bad_samples_of_large_data_stop_the_run_early_and_a_few_do_not(tmp_path: Path) -> None:
    numbers = range(200)
    hurt = write_tar(tmp_path / "hurt.tar", samples_of(numbers, bad=range(0, 200, 2)))
    stream = batches(
        ShardData.open([hurt], captions=True), transform, Share(seed=0, micro_batch=1), max_bad_fraction=0.2
    )
    with pytest.raises(ValueError, match=r"unusable samples after reading (1\d|[2-9]\d) of 200"):
        list(islice(stream, 100))


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_usable_is_an_error_whatever_is_allowed(tmp_path: Path, workers: int) -> None:
    data = ShardData.open([write_tar(tmp_path / "s.tar", samples_of(range(5), bad=range(5)))], captions=True)
    with pytest.raises(ValueError, match=r"5 samples in a row are unusable.*not a picture"):
        next(batches(data, transform, Share(seed=0, micro_batch=1), max_bad_fraction=1.0, workers=workers))
    with pytest.raises(ValueError, match="all 5 samples are unusable"):
        list(validation_batches(data, transform, 2, max_bad_fraction=1.0))


@pytest.mark.parametrize(
    "wrong", [{"micro_batch": 0}, {"accumulation": 0}, {"rank": 2, "world_size": 2}, {"seed": -1}, {"start_step": -1}]
)
def test_a_share_out_of_range_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Share(**({"seed": 0, "micro_batch": 1} | wrong))


@pytest.mark.parametrize("wrong", [{"max_bad_fraction": 2.0}, {"workers": -1}])
def test_wrong_arguments_are_refused_at_once(data: ShardData, wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        batches(data, transform, Share(seed=0, micro_batch=1), **wrong)


def test_validation_shows_every_sample_once_the_same_way_each_time(data: ShardData) -> None:
    first, second = (list(validation_batches(data, transform, 4)) for _ in range(2))
    assert [key for batch in first for key in batch.keys] == all_keys(data)
    assert [len(batch.keys) for batch in first] == [4, 4, 3]
    assert all(torch.equal(a.tensors["noise"], b.tensors["noise"]) for a, b in zip(first, second, strict=True))


def test_validation_leaves_bad_samples_out_and_counts_them(tmp_path: Path) -> None:
    data = ShardData.open([write_tar(tmp_path / "s.tar", samples_of(range(9), bad=[0, 1, 5]))], captions=True)
    read = list(validation_batches(data, transform, 2, max_bad_fraction=0.5))
    assert [key for batch in read for key in batch.keys] == [f"k{i:03}" for i in (2, 3, 4, 6, 7, 8)]
    assert sum(batch.n_bad for batch in read) == 3
    with pytest.raises(ValueError, match="2 unusable samples after reading 2 of 9"):
        list(validation_batches(data, transform, 2, max_bad_fraction=0.2))
