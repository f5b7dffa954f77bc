import math

import pytest
import torch

from dalle import budget
from dalle.budget import BatchProgress, batches, equal_batches
from dalle.cache import bytes_per_candidate


def test_batches_are_few_and_if_possible_equal():
    assert [equal_batches(n, 64) for n in (1, 64, 100, 512)] == [1, 64, 50, 64]
    assert equal_batches(512, 183) == 128
    assert equal_batches(100, 40) == 25  # four of 25 rather than 34, 34 and 32
    assert [len(ks) for _, ks in batches(1, 127, equal_batches(127, 64))] == [64, 63]  # a prime number of them
    assert equal_batches(9, 0) == equal_batches(9, -3) == 1


@pytest.mark.parametrize("largest", [1, 3, 10, 64])
def test_batches_fit_and_are_at_most_half_as_many_again_as_needed(largest):
    for n in range(1, 200):
        size = equal_batches(n, largest)
        assert 1 <= size <= largest
        assert math.ceil(n / size) <= 1.5 * math.ceil(n / largest)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 100])
def test_batches_have_every_candidate_of_every_caption_once(size):
    found = [(row, k) for rows, ks in batches(3, 5, size) for row in rows for k in ks]
    assert sorted(found) == [(row, k) for row in range(3) for k in range(5)]
    assert max(len(rows) * len(ks) for rows, ks in batches(3, 5, size)) <= size
    assert size < 5 or {len(ks) for _, ks in batches(3, 5, size)} == {5}  # a caption is read once where it can be


def test_progress_counts_sampling_as_its_share_and_ends_exactly():
    told = []
    for before in (0, 3):
        done = BatchProgress(lambda *call: told.append(call), before=before, n=3, total=6, sampling_share=0.7)
        for step in (1, 2):
            done.sampled(step, 2)
        for n_judged in (1, 2, 3):
            done.judged(n_judged, 3)
    assert [total for _, total in told] == [6] * 10
    assert [n for n, _ in told] == pytest.approx([1.05, 2.1, 2.4, 2.7, 3, 4.05, 5.1, 5.4, 5.7, 6])
    assert [told[4][0], told[-1][0]] == [3, 6]


def test_the_default_batch_size_fits_the_memory_in_equal_batches(pipe, monkeypatch):
    assert pipe.default_batch_size(1_000) == 1_000  # no other limit: 2 GiB are plenty for these models
    # the keys and values of a caption, and the fourfold width of one layer three times, are there once in each batch
    caption = 2 * 3 * 24 * 32 * 4 + 3 * 4 * 32 * 24 * 4
    each = bytes_per_candidate(pipe.dalle.config, torch.float32) + budget.DRAWING_BYTES * 32

    def size(memory: int, n: int, **options) -> int:
        monkeypatch.setattr(budget, "CPU_MEMORY_BUDGET", memory)
        return pipe.default_batch_size(n, **options)

    assert size(caption + 4 * each, 9) == 3
    assert size(caption + 4 * each, 900) == 4
    assert size(caption + 9 * each, 9) == 9
    assert size(caption + 9 * each - 1, 9) == 3
    assert size(2 * caption + 4 * each, 9, guided=True) == 2
    assert size(2 * caption + 4 * each, 9, early_abandon=True) == 2
    assert size(0, 9) == 1


def test_captions_share_batches_as_far_as_memory_lasts(pipe, monkeypatch):
    caption = 2 * 3 * 24 * 32 * 4 + 3 * 4 * 32 * 24 * 4
    each = bytes_per_candidate(pipe.dalle.config, torch.float32) + budget.DRAWING_BYTES * 32
    monkeypatch.setattr(budget, "CPU_MEMORY_BUDGET", 2 * (caption + 5 * each))
    assert pipe.default_batch_size(5, n_captions=4) == 10
    assert pipe.default_batch_size(5, n_captions=2) == 10
    assert pipe.default_batch_size(5, n_captions=3, guided=True) == 5
