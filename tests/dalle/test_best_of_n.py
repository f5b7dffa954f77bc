import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dalle.best_of_n import Best, BetterHalf, Candidates, Request, rank_order


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


def test_a_request_that_leaves_nothing_to_keep_is_refused():
    Request(caption="a", n=5, keep=3, early_abandon=True)
    Request(caption="a", n=5, keep=5)
    with pytest.raises(ValueError, match="keep 1 to 3"):
        Request(caption="a", n=5, keep=4, early_abandon=True)
    with pytest.raises(ValueError, match="caption is empty"):
        Request(caption=" ", n=5, keep=1)
