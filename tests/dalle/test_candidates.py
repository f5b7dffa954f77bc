import dataclasses
import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dalle.candidates import (
    BatchProgress,
    Best,
    BetterHalf,
    Candidates,
    Sampling,
    SamplingDefaults,
    batches,
    check_request,
    equal_batches,
    rank_order,
)


def candidates_of(numbers, scores, log_likelihoods):
    """Candidates whose tokens and pictures tell which they are."""
    numbers = torch.tensor(numbers)
    images = numbers[:, None, None, None].expand(-1, 3, 2, 2).float()
    return Candidates(numbers, numbers[:, None].repeat(1, 4), log_likelihoods, scores, images)


def best_of(scores, log_likelihoods, *, keep, batch_size, rank):
    best = Best(keep, rank)
    everyone = candidates_of(range(len(scores)), torch.tensor(scores), torch.tensor(log_likelihoods))
    for some in everyone.split(batch_size):
        best.add(some)
    return best.kept()


def coarse(n, seed):
    """Numbers of which many are equal."""
    return (torch.rand(n, generator=torch.Generator().manual_seed(seed)) * 8).floor() / 8


@pytest.mark.parametrize("rank", ["clip", "likelihood", "both"])
@pytest.mark.parametrize("batch_size", [1, 3, 7, 40])
@pytest.mark.parametrize("keep", [1, 3, 40])
def test_the_best_are_the_same_whatever_the_batches(keep, batch_size, rank):
    scores, log_likelihoods = coarse(40, 0), coarse(40, 1)
    order = rank_order(scores, log_likelihoods, rank)[:keep]
    kept = best_of(scores.tolist(), log_likelihoods.tolist(), keep=keep, batch_size=batch_size, rank=rank)
    expected = candidates_of(order.tolist(), scores[order], log_likelihoods[order])
    for name in ("numbers", "tokens", "log_likelihoods", "scores"):
        assert torch.equal(getattr(kept, name), getattr(expected, name)), name
    if rank == "clip":
        assert torch.equal(kept.images, expected.images)
    else:
        assert kept.images is None


def test_of_equal_candidates_the_earlier_stays():
    for rank in ("clip", "likelihood", "both"):
        assert best_of([0.5] * 9, [-1.0] * 9, keep=2, batch_size=2, rank=rank).numbers.tolist() == [0, 1]
    some = [0.1, 0.5, 0.2, 0.5, 0.5]
    assert best_of(some, [0.0] * 5, keep=2, batch_size=2, rank="clip").numbers.tolist() == [1, 3]
    assert best_of([0.0] * 5, some, keep=2, batch_size=2, rank="both").numbers.tolist() == [1, 3]


def test_ranked_by_both_a_candidate_good_in_both_goes_before_the_first_of_either():
    scores = torch.tensor([0.9, 0.8, 0.1, 0.7])
    log_likelihoods = torch.tensor([-900.0, -20.0, -10.0, -30.0])
    assert rank_order(scores, log_likelihoods, "clip").tolist() == [0, 1, 3, 2]
    assert rank_order(scores, log_likelihoods, "likelihood").tolist() == [2, 1, 3, 0]
    # places by CLIP 0 1 3 2, by likelihood 3 1 0 2
    assert rank_order(scores, log_likelihoods, "both").tolist() == [1, 0, 2, 3]
    assert rank_order(None, log_likelihoods, "likelihood").tolist() == [2, 1, 3, 0]
    with pytest.raises(ValueError, match="unknown ranking 'best': give clip or likelihood or both"):
        rank_order(scores, log_likelihoods, "best")


@given(st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=1, max_size=12))
def test_ranking_by_both_is_that_of_the_sum_of_places(pairs):
    scores, log_likelihoods = torch.tensor(pairs, dtype=torch.float32).unbind(1)

    def places(values):
        return [sum(other > value for other in values) for value in values]

    sums = [a + b for a, b in zip(places(scores.tolist()), places(log_likelihoods.tolist()), strict=True)]
    assert rank_order(scores, log_likelihoods, "both").tolist() == sorted(range(len(pairs)), key=lambda i: sums[i])


@pytest.mark.parametrize(("rank", "held"), [("clip", 2), ("likelihood", 2), ("both", 10)])
def test_what_is_held_is_a_copy_and_not_a_view_of_the_batch(rank, held):
    best = Best(2, rank)
    best.add(candidates_of(range(10), torch.arange(10.0), torch.arange(10.0)))
    kept = best.kept()
    assert kept.tokens.untyped_storage().nbytes() == 2 * 4 * 8
    assert best._held.tokens.untyped_storage().nbytes() == held * 4 * 8
    if rank == "clip":
        assert kept.images.untyped_storage().nbytes() == 2 * 3 * 2 * 2 * 4
    else:
        assert best._held.images is None


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


def test_sampling_defaults_are_the_papers_and_come_back_from_json():
    assert SamplingDefaults().sampling(3) == Sampling(seed=3)
    assert SamplingDefaults().rank == "clip"
    assert SamplingDefaults.from_json({}) == SamplingDefaults()
    chosen = SamplingDefaults(temperature=0.5, top_k=7, top_p=0.9, guidance=2.0, rank="both")
    for defaults in (SamplingDefaults(), chosen):
        assert SamplingDefaults.from_json(json.loads(json.dumps(dataclasses.asdict(defaults)))) == defaults
    assert chosen.sampling(3) == Sampling(seed=3, temperature=0.5, top_k=7, top_p=0.9, guidance=2.0)
    assert str(chosen) == "temperature 0.5, top-k 7, top-p 0.9, guidance 2, ranked by CLIP and likelihood"


def test_only_what_is_given_takes_the_place_of_a_default():
    chosen = SamplingDefaults(temperature=0.5, top_p=0.9, rank="both")
    assert chosen.updated() == chosen
    assert chosen.updated(temperature=0.0, top_p=1.0) == SamplingDefaults(temperature=0.0, top_p=1.0, rank="both")
    assert chosen.updated(rank="likelihood", top_k=3, guidance=1.0) == dataclasses.replace(
        chosen, rank="likelihood", top_k=3
    )
    with pytest.raises(ValueError, match="unknown ranking 'best'"):
        chosen.updated(rank="best")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1.0], "expected an object with temperature, top_k, top_p, guidance, rank, got"),
        ({"beam": 3}, "unknown 'beam': expected temperature"),
        ({"temperature": "hot"}, "temperature is 'hot', expected a number"),
        ({"temperature": None}, "temperature is None, expected a number"),
        ({"temperature": True}, "temperature is True"),
        ({"temperature": -1}, r"temperature \(-1\) must be"),
        ({"top_k": 2.5}, r"top_k is 2\.5"),
        ({"rank": 3}, "rank is 3, expected a string"),
        ({"rank": "best"}, "unknown ranking 'best'"),
    ],
)
def test_damaged_sampling_defaults_are_refused_in_words(values, message):
    with pytest.raises(ValueError, match=message):
        SamplingDefaults.from_json(values)


def test_a_request_that_leaves_nothing_to_keep_is_refused():
    check_request(["a"], n=5, keep=3, early_abandon=True)
    check_request(["a"], n=5, keep=5)
    with pytest.raises(ValueError, match="keep 1 to 3"):
        check_request(["a"], n=5, keep=4, early_abandon=True)
    with pytest.raises(ValueError, match="no captions"):
        check_request([], n=5, keep=1)
