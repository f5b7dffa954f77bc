import dataclasses
import math

import pytest
import torch

from dalle.candidates import BatchProgress, Best, BetterHalf, Sampling, batches, check_request, equal_batches


def rows(candidates):
    """Tokens and pictures that tell which candidates they are of."""
    numbers = torch.tensor(candidates)
    return numbers[:, None].repeat(1, 4), numbers[:, None, None, None].expand(-1, 3, 2, 2).float()


def best_of(scores, keep, batch_size):
    best = Best(keep)
    for first in range(0, len(scores), batch_size):
        candidates = list(range(len(scores)))[first : first + batch_size]
        best.add(candidates, *rows(candidates), torch.tensor(scores[first : first + batch_size]))
    return best.result("a caption")


@pytest.mark.parametrize("batch_size", [1, 2, 3, 7, 40])
@pytest.mark.parametrize("keep", [1, 3, 40])
def test_the_best_are_the_same_whatever_the_batches(keep, batch_size):
    scores = (torch.rand(40, generator=torch.Generator().manual_seed(0)) * 8).floor() / 8  # many are equal
    order = scores.argsort(descending=True, stable=True)[:keep]
    result = best_of(scores.tolist(), keep, batch_size)
    assert result.candidates == tuple(order.tolist())
    assert torch.equal(result.scores, scores[order])
    tokens, images = rows(order.tolist())
    assert torch.equal(result.tokens, tokens)
    assert torch.equal(result.images, images)


def test_of_equal_candidates_the_earlier_stays():
    assert best_of([0.5] * 9, keep=2, batch_size=2).candidates == (0, 1)
    assert best_of([0.1, 0.5, 0.2, 0.5, 0.5], keep=2, batch_size=2).candidates == (1, 3)


def test_what_is_held_is_a_copy_and_not_a_view_of_the_batch():
    best = Best(2)
    tokens, images = rows(list(range(10)))
    best.add(range(10), tokens, images, torch.arange(10.0))
    result = best.result("a caption")
    assert result.images.untyped_storage().nbytes() == 2 * 3 * 2 * 2 * 4
    assert result.tokens.untyped_storage().nbytes() == 2 * 4 * 8


def test_the_better_half_goes_on_in_ascending_order():
    halfway = BetterHalf(lambda tokens: tokens[:, 0].float())
    kept = halfway(torch.tensor([[3], [9], [1], [5], [7]]))
    assert kept.tolist() == halfway.kept == [1, 3, 4]
    assert halfway(torch.tensor([[2], [2], [2], [2]])).tolist() == [0, 1]
    assert halfway(torch.tensor([[2]])).tolist() == [0]


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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, r"temperature \(-0.1\)"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"top_k": 0}, r"top_k \(0\)"),
        ({"top_p": 0.0}, r"top_p \(0.0\)"),
        ({"top_p": 1.5}, "top_p"),
        ({"guidance": -1.0}, "guidance"),
        ({"guidance": float("inf")}, "guidance"),
    ],
)
def test_sampling_is_valid_once_built(options, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**options)


def test_sampling_does_as_the_paper_unless_told():
    assert dataclasses.asdict(Sampling()) == {
        "seed": 0, "temperature": 1.0, "top_k": None, "top_p": None, "guidance": 1.0
    }  # fmt: skip
    assert not Sampling().is_guided
    assert Sampling(guidance=0.0).is_guided


def test_a_request_that_leaves_nothing_to_keep_is_refused():
    check_request(["a"], n=5, keep=3, early_abandon=True)
    check_request(["a"], n=5, keep=5)
    with pytest.raises(ValueError, match="keep 1 to 3"):
        check_request(["a"], n=5, keep=4, early_abandon=True)
    with pytest.raises(ValueError, match="no captions"):
        check_request([], n=5, keep=1)
