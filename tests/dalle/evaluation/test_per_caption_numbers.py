import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from dalle.evaluation.numbers import neighbours as neighbours_module
from dalle.evaluation.numbers import retrieval as retrieval_module
from dalle.evaluation.numbers.bootstrap import frechet_spreads, mean_interval, resamples, wilson
from dalle.evaluation.numbers.frechet import FrechetReference, frechet_distance
from dalle.evaluation.numbers.moments import Moments
from dalle.evaluation.numbers.neighbours import neighbours
from dalle.evaluation.numbers.retrieval import retrieval
from dalle.evaluation.numbers.subsets import any_of_subsets, best_of_subsets, subset_weights


def normals(n: int, d: int, seed: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((n, d)))


def test_identical_sets_have_precision_and_recall_1() -> None:
    found = neighbours(normals(60, 8, 0), normals(60, 8, 0))
    assert (found.precision, found.recall, found.coverage) == (1, 1, 1)
    assert found.density == pytest.approx(1, abs=0.3)


def test_neighbours_are_those_of_all_distances(monkeypatch: pytest.MonkeyPatch) -> None:
    samples, reference = 0.8 * normals(37, 4, 1) + 0.3, normals(41, 4, 2)

    def distance(x: Tensor, y: Tensor) -> float:
        return float((x - y).norm())

    def radius(x: Tensor, others: Tensor, k: int) -> float:
        return sorted(distance(x, y) for y in others)[k]  # the first is x itself

    balls = [radius(x, reference, 3) for x in reference]
    sample_balls = [radius(x, samples, 3) for x in samples]
    wide = [radius(x, reference, 5) for x in reference]
    expected = (
        np.mean([any(distance(s, r) <= ball for r, ball in zip(reference, balls, strict=True)) for s in samples]),
        np.mean(
            [any(distance(s, r) <= ball for s, ball in zip(samples, sample_balls, strict=True)) for r in reference]
        ),
        sum(distance(s, r) <= ball for s in samples for r, ball in zip(reference, wide, strict=True)) / (5 * 37),
        np.mean([any(distance(s, r) <= ball for s in samples) for r, ball in zip(reference, wide, strict=True)]),
    )
    assert 0 < expected[3] < 1
    assert (neighbours(samples, reference).n, neighbours(samples, reference).n_reference) == (37, 41)
    for block in (512, 10):
        monkeypatch.setattr(neighbours_module, "BLOCK", block)
        found = neighbours(samples, reference)
        assert (found.precision, found.recall, found.density, found.coverage) == pytest.approx(expected)


def test_far_pictures_have_no_neighbours_and_collapsed_ones_no_recall() -> None:
    reference = normals(50, 4, 0)
    far = neighbours(normals(50, 4, 1) + 100, reference)
    assert (far.precision, far.recall, far.density, far.coverage) == (0, 0, 0, 0)
    collapsed = neighbours(reference[:1] + 1e-3 * normals(50, 4, 1), reference)
    assert collapsed.precision == 1
    assert collapsed.recall <= 1 / 50
    with pytest.raises(ValueError, match="more than 5 pictures"):
        neighbours(reference[:5], reference)
    with pytest.raises(ValueError, match="same network"):
        neighbours(reference[:, :2], reference)


def test_retrieval_is_that_of_sorting_every_row(monkeypatch: pytest.MonkeyPatch) -> None:
    captions = torch.nn.functional.normalize(normals(83, 6, 0), dim=1)
    images = torch.nn.functional.normalize(captions + 0.4 * normals(83, 6, 1), dim=1)
    similarities = (captions @ images.T).numpy()
    for block in (1024, 10):
        monkeypatch.setattr(retrieval_module, "BLOCK", block)
        both = retrieval(captions, images)
        for found, matrix in zip(both, (similarities, similarities.T), strict=True):
            places = [sorted(row, reverse=True).index(row[i]) for i, row in enumerate(matrix)]
            assert found.rates == {k: pytest.approx(np.mean([place < k for place in places])) for k in (1, 5, 10)}
    assert both[0].rates != both[1].rates
    assert both[0].chance(5) == 5 / 83


def test_ties_count_by_chance() -> None:
    one_hot = torch.eye(12)
    images = one_hot.clone()
    images[1] = one_hot[0]  # captions find two equal pictures
    found = retrieval(one_hot, images)[0]
    assert found.hits[1][:3].tolist() == [0.5, pytest.approx(1 / 12), 1]  # caption 1 finds nothing: 12 ties at 0
    assert found.hits[5][0] == 1
    constant = torch.ones(40, 1)
    assert retrieval(constant, constant)[0].rates == {k: pytest.approx(k / 40) for k in (1, 5, 10)}
    with pytest.raises(ValueError, match="two equal shapes"):
        retrieval(one_hot, images[:5])


def test_features_that_would_make_retrieval_look_perfect_are_refused() -> None:
    one_hot = torch.eye(12)
    no_numbers = one_hot.clone()
    no_numbers[3, 0] = float("nan")
    with pytest.raises(ValueError, match="the images' features of picture 3 are not finite"):
        retrieval(one_hot, no_numbers)
    with pytest.raises(ValueError, match="the captions' features have lengths from 1 to 3; expected 1"):
        retrieval(one_hot * torch.tensor([[1.0]] * 11 + [[3.0]]), one_hot)
    assert retrieval(one_hot.half() * 1.001, one_hot)[0].rates[1] == 1


@pytest.mark.parametrize(
    ("successes", "n", "interval"),
    # R's prop.test(…, correct = FALSE)
    [(0, 10, (0, 0.2775)), (10, 10, (0.7225, 1)), (900, 1000, (0.8799, 0.9171)), (1, 2, (0.0945, 0.9055))],
)
def test_intervals_of_rates(successes: int, n: int, interval: tuple[float, float]) -> None:
    assert wilson(successes, n) == pytest.approx(interval, abs=1e-4)


def test_the_interval_of_a_mean_has_the_width_of_its_standard_error() -> None:
    values = normals(400, 1, 0)[:, 0] + 3
    found = mean_interval(values)
    assert found.mean == pytest.approx(float(values.mean()))
    assert found.high - found.low == pytest.approx(2 * 1.96 * float(values.std()) / 20, rel=0.1)
    assert found.low < found.mean < found.high
    assert mean_interval(values) == found
    assert mean_interval(values, seed=1) != found
    # of one caption, or of a confidence above 1, there is no interval
    for wrong in (lambda: mean_interval(values[:1]), lambda: mean_interval(values, confidence=1.5)):
        with pytest.raises(ValueError, match="expected"):
            wrong()
    for wrong in (lambda: mean_interval(values[:0]), lambda: wilson(3, 2), lambda: next(resamples(0, 1, 0))):
        with pytest.raises(ValueError, match="expected"):
            wrong()


def test_the_spread_of_a_difference_over_the_same_captions_is_the_smaller_one() -> None:
    reference = Moments.of(normals(2000, 12, 0))
    first = normals(300, 12, 1) + 0.2
    second = first + 0.05 * normals(300, 12, 2) + 0.02
    spreads = frechet_spreads({"a": first, "b": second}, reference, draws=30)
    assert spreads.estimates["a"] == pytest.approx(frechet_distance(Moments.of(first), reference), rel=1e-9)
    difference, spread = spreads.difference("b", "a")
    assert difference == pytest.approx(spreads.estimates["b"] - spreads.estimates["a"])
    assert spread < 0.5 * spreads.spread("a")
    rows = next(resamples(300, 1, 0))
    assert float(spreads.draws["b"][0]) == pytest.approx(FrechetReference(reference).distance(second[rows]), rel=1e-9)
    with pytest.raises(ValueError, match="equal rows"):
        frechet_spreads({"a": first, "b": second[:5]}, reference)


def test_a_bootstrap_of_a_distance_lies_above_its_estimate_which_its_spread_is_around() -> None:
    reference = FrechetReference(Moments.of(normals(5000, 24, 0)))
    spreads = frechet_spreads({"a": normals(400, 24, 1)}, reference, draws=60)
    assert spreads.draws["a"].min() > spreads.estimates["a"]  # no percentile of it is below the estimate
    fresh = torch.tensor([reference.distance(normals(400, 24, 100 + seed)) for seed in range(60)])
    assert spreads.spread("a") == pytest.approx(float(fresh.std()), rel=0.75)


def test_the_mean_over_all_subsets_is_that_of_drawing_each() -> None:
    scores, values = normals(3, 7, 0), normals(3, 7, 1)
    scores[0, 2] = scores[0, 4] = scores[0].max() + 1  # a tie: the earlier one is better
    for n in range(1, 8):
        expected = [
            np.mean(
                [
                    float(v[max(chosen, key=lambda i: (float(s[i]), -i))])
                    for chosen in itertools.combinations(range(7), n)
                ]
            )
            for s, v in zip(scores, values, strict=True)
        ]
        assert best_of_subsets(scores, values, n).tolist() == pytest.approx(expected)
    assert best_of_subsets(scores, values, 1).tolist() == pytest.approx(values.mean(1).tolist())
    assert best_of_subsets(scores, scores, 7).tolist() == pytest.approx(scores.max(1).values.tolist())


def test_the_oracle_counts_subsets_with_a_right_one_and_is_at_least_the_best() -> None:
    right = normals(5, 6, 2) > 0.5
    for n in range(1, 7):
        subsets = list(itertools.combinations(range(6), n))
        expected = [np.mean([any(row[i] for i in chosen) for chosen in subsets]) for row in right.tolist()]
        oracle = any_of_subsets(right, n)
        assert oracle.tolist() == pytest.approx(expected)
        assert (oracle >= best_of_subsets(normals(5, 6, 3), right, n) - 1e-12).all()


def test_weights_of_many_candidates_sum_to_1() -> None:
    for n in (1, 32, 511, 512):
        assert float(subset_weights(512, n).sum()) == pytest.approx(1, abs=1e-12)
    assert subset_weights(512, 512).tolist()[:2] == [1, 0]
    for n in (0, 8):
        with pytest.raises(ValueError, match="expected 1 … 7"):
            subset_weights(7, n)
    with pytest.raises(ValueError, match="two equal shapes"):
        best_of_subsets(torch.zeros(2, 3), torch.zeros(2, 4), 1)
    with pytest.raises(ValueError, match="score of candidate 2 of caption 1 is NaN"):
        best_of_subsets(torch.tensor([[3.0, 2, 1], [1, 2, float("nan")]]), torch.zeros(2, 3), 2)
    with pytest.raises(ValueError, match="expected bool"):
        any_of_subsets(torch.zeros(2, 3), 1)
