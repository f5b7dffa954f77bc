"""The Fréchet distance of two sets of features: |μ − μ′|² + tr(Σ + Σ′ − 2 (ΣΣ′)^½) (Heusel et al. 2017).

Three ways to the trace of the square root agree: eigenvalues of the product, a symmetric form, and, for fewer pictures
than features, a nuclear norm. The distance of finite samples is too large by about a constant over n: compare equal n
alone, beside the floor, or use `extrapolated`.

Letters: N, M pictures  D features
"""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from dalle.evaluation.numbers.moments import Moments, checked_features

logger = logging.getLogger(__name__)

Form = Literal["eigh", "product"]
EXTRAPOLATION_POINTS = 15
"""Sample sizes through which `extrapolated` draws its line (Chong and Forsyth 2020)."""
SMALLEST_PART = 0.25
"""The first of them, as a part of the pictures."""
LEAST_FOR_LINE = 16
"""Samples of which there is a line at all."""


class FrechetReference:
    """A reference, prepared: distances of many sets to it cost one root of its covariance."""

    def __init__(self, moments: Moments) -> None:
        self.moments = moments
        self.root_DD = _root(moments.covariance)
        self._trace = float(moments.covariance.trace())

    def distance(self, features: Tensor) -> float:
        """Return the distance of features (N,D), N at least 2; exact also for N below D.

        With no more pictures than features a warning says so.

        Raises:
            ValueError: the features are no (N,D) of finite numbers, or do not fit the reference.
        """
        features_ND = checked_features(features)
        _warn(min(len(features_ND), self.moments.n), self.moments.dimension)
        return self.distance_of_projected(features_ND, self.project(features_ND))

    def project(self, features_ND: Tensor) -> Tensor:
        """Return the product of float64 features with the root of the covariance, (N,D).

        Raises:
            ValueError: they have another number of features.
        """
        _require_equal(features_ND.shape[1], self.moments.dimension)
        return features_ND @ self.root_DD

    def distance_of_projected(self, features_ND: Tensor, projected_ND: Tensor) -> float:
        """Return the distance of float64 features and what `project` returns of them: rows of both, in draws of many.

        Raises:
            ValueError: there is one picture.
        """
        n = len(features_ND)
        if n < 2:
            raise ValueError("a Fréchet distance needs at least 2 pictures, got 1: give more pictures")
        mean_D = features_ND.mean(dim=0)
        trace = float((features_ND - mean_D).square().sum()) / (n - 1)
        # (Σ′^½ Σ Σ′^½) is the covariance of the projected features, and their Gram matrix has the same eigenvalues
        centred_ND = projected_ND - projected_ND.mean(dim=0)
        square = centred_ND @ centred_ND.T if n < centred_ND.shape[1] else centred_ND.T @ centred_ND
        root_trace = _root_trace(square / (n - 1))
        return _distance(mean_D - self.moments.mean, trace + self._trace, root_trace)


def frechet_distance(first: Moments, second: Moments, *, form: Form = "eigh") -> float:
    """Return the Fréchet distance of two sets by their moments; symmetric, at least 0 but for rounding.

    Below as many pictures as features the covariances are singular: a warning says so.

    Args:
        first: of one set.
        second: of the other.
        form: "eigh" takes the eigenvalues of Σ^½ Σ′ Σ^½, "product" those of ΣΣ′, as torchmetrics does.

    Raises:
        ValueError: the moments have different numbers of features, or are of one picture.
    """
    _require_equal(first.dimension, second.dimension)
    _warn(min(first.n, second.n), first.dimension)
    return _of_moments(first, second, form)


def _of_moments(first: Moments, second: Moments, form: Form = "eigh") -> float:
    if form == "product":
        root_trace = float(torch.linalg.eigvals(first.covariance @ second.covariance).sqrt().real.sum())
    else:
        root_DD = _root(first.covariance)
        root_trace = _root_trace(root_DD @ second.covariance @ root_DD)
    trace = float(first.covariance.trace() + second.covariance.trace())
    return _distance(first.mean - second.mean, trace, root_trace)


def frechet_distance_of_features(first: Tensor, second: Tensor) -> float:
    """Return the Fréchet distance of features (N,D) and (M,D), by the nuclear norm where a side has N below D.

    With no more pictures than features a warning says so.

    Raises:
        ValueError: the features do not fit, are not finite, or a side has one picture.
    """
    first_ND, second_MD = checked_features(first), checked_features(second)
    _warn(min(len(first_ND), len(second_MD)), first_ND.shape[1])
    return _of_features(first_ND, second_MD)


def _of_features(first_ND: Tensor, second_MD: Tensor) -> float:
    _require_equal(first_ND.shape[1], second_MD.shape[1])
    if min(len(first_ND), len(second_MD)) < first_ND.shape[1]:
        return nuclear_distance(first_ND, second_MD)
    return _of_moments(Moments.of(first_ND), Moments.of(second_MD))


def nuclear_distance(first: Tensor, second: Tensor) -> float:
    """Return the Fréchet distance of features (N,D) and (M,D), with tr (ΣΣ′)^½ as the nuclear norm of X X′ᵀ.

    X and X′ are centred and divided by √(n − 1), so that Σ = XᵀX. Cheap and exact for few pictures.

    Raises:
        ValueError: as `frechet_distance_of_features`.
    """
    first_ND, second_MD = checked_features(first), checked_features(second)
    _require_equal(first_ND.shape[1], second_MD.shape[1])
    if min(len(first_ND), len(second_MD)) < 2:
        raise ValueError(f"{len(first_ND)} and {len(second_MD)} pictures; expected at least 2 on both sides")
    means = first_ND.mean(dim=0), second_MD.mean(dim=0)
    first_ND = (first_ND - means[0]) / math.sqrt(len(first_ND) - 1)
    second_MD = (second_MD - means[1]) / math.sqrt(len(second_MD) - 1)
    trace = float(first_ND.square().sum() + second_MD.square().sum())
    root_trace = float(torch.linalg.svdvals(_reduced(first_ND) @ _reduced(second_MD).T).sum())
    return _distance(means[0] - means[1], trace, root_trace)


def singular_note(n: int, dimension: int) -> str | None:
    """Return what must be said of n pictures that are no more than the features; None of enough."""
    if n > dimension:
        return None
    return f"covariance is singular (n={n}, {dimension} features): compare only equal n"


def least_for_limit(dimension: int) -> int:
    """Return how many pictures FD∞ needs of each side that is cut, so that its smallest part has more than features."""
    return max(LEAST_FOR_LINE, math.ceil((dimension + 1) / SMALLEST_PART))


@dataclass(frozen=True)
class Floor:
    """What real pictures score against real pictures."""

    distance: float
    n: int
    """Pictures of the smaller side."""


def floor(reference: Tensor, n: int | None = None, *, seed: int = 0) -> Floor:
    """Return the distance of n pictures of a reference (M,D), drawn at random, to all others of it.

    A perfect model scores about as much with n pictures: samples are compared with all of a reference, too.

    Args:
        reference: features of the reference.
        n: pictures that are drawn; half of the reference if it is None or more than that.
        seed: of the draw.

    Raises:
        ValueError: there are fewer than 4 pictures, n is below 2, or the features are no (M,D) of finite numbers.
    """
    reference_MD = checked_features(reference)
    half = len(reference_MD) // 2
    n = half if n is None else min(n, half)
    if n < 2:
        raise ValueError(f"a floor needs two parts of at least 2 pictures, got {len(reference_MD)} pictures, n {n}")
    order_M = torch.from_numpy(np.random.default_rng(seed).permutation(len(reference_MD)))
    return Floor(_of_features(reference_MD[order_M[:n]], reference_MD[order_M[n:]]), n)


def extrapolated(
    samples: Tensor,
    reference: Tensor | Moments | FrechetReference,
    *,
    points: int = EXTRAPOLATION_POINTS,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> float:
    """Return FD∞, the distance for endless samples: a line through distances over 1/n (Chong and Forsyth 2020).

    Given features of the reference, both sides are cut to the same part of them, which removes the bias of both. Given
    moments, as in the source, the samples alone are: the bias of the finite reference stays.

    Below as many pictures as features distances do not lie on a line over 1/n, and FD∞ is far off, in either direction:
    a warning says so where a side that is cut has fewer pictures than `least_for_limit`.

    Args:
        samples: features (N,D).
        reference: features (M,D), or their moments, prepared or not.
        points: sizes, evenly spread from a quarter to all; the line is by least squares.
        seed: of the order in which pictures are taken: each size has the pictures of the smaller ones.
        progress: called with (points done, points).

    Raises:
        ValueError: there are fewer than 16 samples or 2 points, or the features do not fit.
    """
    samples_ND = checked_features(samples)
    n = len(samples_ND)
    if n < LEAST_FOR_LINE or points < 2:
        raise ValueError(
            f"FD∞ needs at least {LEAST_FOR_LINE} samples and 2 points, got {n} samples and {points} points"
        )
    rng = np.random.default_rng(seed)
    samples_ND = samples_ND[torch.from_numpy(rng.permutation(n))]
    parts = np.linspace(SMALLEST_PART, 1, points)
    sizes = [round(part * n) for part in parts]
    n_cut = n
    if isinstance(reference, Moments):
        reference = FrechetReference(reference)
    if isinstance(reference, FrechetReference):
        whole, projected_ND = reference, reference.project(samples_ND)
        values = (whole.distance_of_projected(samples_ND[:size], projected_ND[:size]) for size in sizes)
    else:
        reference_MD = checked_features(reference, "the reference's features")
        n_cut = min(n, len(reference_MD))
        reference_MD = reference_MD[torch.from_numpy(rng.permutation(len(reference_MD)))]
        others = [max(2, round(part * len(reference_MD))) for part in parts]
        values = (_of_features(samples_ND[:a], reference_MD[:b]) for a, b in zip(sizes, others, strict=True))
    if n_cut < (least := least_for_limit(samples_ND.shape[1])):
        logger.warning(
            "FD∞ is far off: there are %d pictures; for %d features give at least %d", n_cut, samples_ND.shape[1], least
        )
    distances = []
    for value in values:
        distances.append(value)
        if progress is not None:
            progress(len(distances), points)
    _, intercept = np.polyfit(1 / np.array(sizes), distances, 1)
    return float(intercept)


def _require_equal(dimension: int, other: int) -> None:
    if dimension != other:
        raise ValueError(f"the sets have {dimension} and {other} features: compute both with the same network")


def _warn(n: int, dimension: int) -> None:
    note = singular_note(n, dimension)
    if note is not None:
        logger.warning("%s", note)


def _reduced(matrix_ND: Tensor) -> Tensor:
    """Return a matrix with the same MᵀM and no more than D rows."""
    n, dimension = matrix_ND.shape
    reduced: Tensor = torch.linalg.qr(matrix_ND, mode="r").R if n > dimension else matrix_ND
    return reduced


def _root(matrix_DD: Tensor) -> Tensor:
    """Return the symmetric root of a positive semidefinite matrix."""
    values_D, vectors_DD = torch.linalg.eigh(matrix_DD)
    root_DD: Tensor = (vectors_DD * values_D.clamp(min=0).sqrt()) @ vectors_DD.T
    return root_DD


def _root_trace(matrix: Tensor) -> float:
    """Return the trace of the root of a positive semidefinite matrix."""
    return float(torch.linalg.eigvalsh((matrix + matrix.T) / 2).clamp(min=0).sqrt().sum())


def _distance(step_D: Tensor, trace: float, root_trace: float) -> float:
    return float(step_D.square().sum()) + trace - 2 * root_trace
