import numpy as np
import pytest
import torch
from torch import Tensor
from torchmetrics.image.inception import InceptionScore as TorchmetricsIS
from torchmetrics.image.kid import KernelInceptionDistance

from dalle.evaluation.numbers import kernels
from dalle.evaluation.numbers.inception_score import inception_score
from dalle.evaluation.numbers.kernels import gaussian_kernel, gaussian_mmd, kid, polynomial_kernel, squared_mmd


def normals(n: int, d: int, seed: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((n, d)))


class Flat(torch.nn.Module):
    """Pictures of 2 × 4 pixels as 24 numbers."""

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1).float() / 64


def pictures(n: int, high: int, seed: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, high, (n, 3, 2, 4), dtype=np.uint8))


@pytest.mark.parametrize("estimator", ["unbiased", "v-statistic"])
def test_the_discrepancy_is_the_mean_over_pairs_in_blocks_too(estimator, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = normals(30, 3, 1), normals(20, 3, 2) + 0.5
    kernel = gaussian_kernel(1.5)

    def mean(x: Tensor, y: Tensor, same: bool) -> float:
        pairs = [
            float(torch.exp(-(a - b).square().sum() / (2 * 1.5**2)))
            for i, a in enumerate(x)
            for j, b in enumerate(y)
            if not (same and estimator == "unbiased" and i == j)
        ]
        return float(np.mean(pairs))

    expected = mean(first, first, True) + mean(second, second, True) - 2 * mean(first, second, False)
    assert squared_mmd(first, second, kernel, estimator) == pytest.approx(expected, rel=1e-9)
    monkeypatch.setattr(kernels, "BLOCK", 7)
    assert squared_mmd(first, second, kernel, estimator) == pytest.approx(expected, rel=1e-9)


def test_the_biased_estimate_of_a_set_with_itself_is_zero_and_the_unbiased_is_below() -> None:
    features = normals(50, 8, 0)
    assert gaussian_mmd(features, features, estimator="v-statistic") == pytest.approx(0, abs=1e-9)
    assert gaussian_mmd(features, features) < 0


def test_the_unbiased_estimate_is_zero_on_average_for_equal_distributions() -> None:
    values = [kid(normals(100, 16, s), normals(100, 16, 1000 + s)).mean for s in range(40)]
    assert abs(np.mean(values)) < 3 * np.std(values) / np.sqrt(40)
    biased = [gaussian_mmd(normals(100, 16, s), normals(100, 16, 1000 + s), estimator="v-statistic") for s in range(9)]
    assert min(biased) > 0
    moved = squared_mmd(normals(100, 16, 1), normals(100, 16, 2) + 0.5, polynomial_kernel)
    assert moved > 10 * np.std(values)


def test_kid_is_that_of_torchmetrics_with_our_module_and_bytes() -> None:
    real, fake = pictures(120, 256, 0), pictures(90, 200, 1)
    metric = KernelInceptionDistance(feature=Flat(), subsets=7, subset_size=50)
    metric.update(real, real=True)
    metric.update(fake, real=False)
    torch.manual_seed(5)
    mean, std = metric.compute()
    ours = kid(Flat()(fake), Flat()(real), subsets=7, subset_size=50, seed=5)
    assert (ours.mean, ours.std) == (pytest.approx(float(mean), rel=1e-5), pytest.approx(float(std), rel=1e-5))
    assert kid(Flat()(fake), Flat()(real), subsets=2).subset_size == 90  # no more than there are


def test_subsets_that_would_all_be_the_same_are_one_without_a_deviation() -> None:
    several = kid(normals(40, 3, 0), normals(50, 3, 1), subsets=3)
    assert several.subsets == 3
    assert several.std is not None
    assert several.std > 0  # the subsets of the reference differ
    one = kid(normals(40, 3, 0), normals(40, 3, 1), subsets=3)
    assert (one.subsets, one.std) == (1, None)
    assert one.mean == pytest.approx(squared_mmd(normals(40, 3, 0), normals(40, 3, 1), polynomial_kernel))


def test_inception_score_is_that_of_torchmetrics_but_in_order() -> None:
    images = pictures(120, 256, 2)
    metric = TorchmetricsIS(feature=Flat(), splits=4)
    metric.update(images)
    torch.manual_seed(3)
    mean, std = metric.compute()
    torch.manual_seed(3)
    shuffled = Flat()(images)[torch.randperm(120)]
    ours = inception_score(shuffled, splits=4)
    assert ours.mean == pytest.approx(float(mean), rel=1e-5)
    assert ours.std * np.sqrt(4 / 3) == pytest.approx(float(std), rel=1e-4)  # theirs divides by one less
    assert inception_score(Flat()(images), splits=4).mean != pytest.approx(ours.mean, rel=1e-5)


def test_known_inception_scores() -> None:
    assert inception_score(torch.zeros(40, 7)).mean == pytest.approx(1)
    classes = 1000 * torch.eye(5).repeat(20, 1)
    score = inception_score(classes, splits=4)
    assert (score.mean, score.std) == (pytest.approx(5), pytest.approx(0))
    uneven = inception_score(normals(103, 6, 0), splits=10)  # splits of 10 and of 11
    assert 1 < uneven.mean < 6


def test_what_cannot_be_computed_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 2 pictures"):
        squared_mmd(normals(1, 3, 0), normals(5, 3, 0), polynomial_kernel)
    with pytest.raises(ValueError, match="equal numbers of features"):
        squared_mmd(normals(5, 4, 0), normals(5, 3, 0), polynomial_kernel)
    with pytest.raises(ValueError, match="at least 1 subset"):
        kid(normals(5, 3, 0), normals(5, 3, 0), subsets=0)
    with pytest.raises(ValueError, match="above 0"):
        gaussian_mmd(normals(5, 3, 0), normals(5, 3, 0), sigma=0)
    with pytest.raises(ValueError, match="finite number"):
        gaussian_kernel(float("inf"))
    with pytest.raises(ValueError, match="10 splits of 9 pictures"):
        inception_score(normals(9, 3, 0))
