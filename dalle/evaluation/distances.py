"""Distances of sets of pictures to a reference, each with what says how far to trust it.

Letters: R captions  D features  K classes
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dalle.evaluation.numbers.bootstrap import FRECHET_DRAWS, frechet_spreads
from dalle.evaluation.numbers.frechet import Floor, extrapolated, floor, frechet_distance_of_features
from dalle.evaluation.numbers.inception_score import InceptionScore, inception_score
from dalle.evaluation.numbers.kernels import KID, gaussian_mmd, kid
from dalle.evaluation.numbers.moments import Moments
from dalle.evaluation.numbers.neighbours import Neighbours, neighbours

SPLITS = 10
"""Of the Inception Score."""
FEW_DRAWS, MANY_FEATURES = 10, 1024
"""Draws of a spread where each takes seconds: from so many features on."""
LEAST_FOR_LIMIT = 16
"""Pictures that FD∞ needs."""


@dataclass(frozen=True, kw_only=True)
class Reference:
    """Real pictures, at one radius."""

    moments: Moments
    features: Tensor | None
    """float32 (M,D); None where only the moments are known."""
    note: str
    """Where they come from, for people."""


@dataclass(frozen=True, kw_only=True)
class Distances:
    """Of one set of pictures to the reference.

    What needs the reference's features is None where it has moments alone, and what needs more pictures than there are.
    """

    n: int
    """Pictures, one a caption."""
    n_reference: int
    fd: float
    """Fréchet distance."""
    spread: float
    """Its standard deviation over other captions, by bootstrap; an estimate plus or minus, not an interval."""
    floor: Floor | None
    """What as many real pictures score against the rest; against as many others where the reference has too few."""
    limit: float | None
    """FD∞: for endless samples."""
    kid: KID | None
    mmd: float | None
    """Gaussian, unbiased, σ = 10, × 1,000."""
    neighbours: Neighbours | None
    """Precision, recall, density and coverage, with as many pictures of each side."""
    inception_score: InceptionScore | None


def distances(
    features: Mapping[str, Tensor], reference: Reference, logits: Mapping[str, Tensor] | None = None
) -> dict[str, Distances]:
    """Return the distances of several sets of pictures of the same captions to one reference.

    Args:
        features: by name (R,D), row by row of the same captions.
        reference: to compare with.
        logits: by the same names (R,K); None for no Inception Score.

    Raises:
        ValueError: there are fewer than 2 captions, or the features do not fit.
    """
    n = len(next(iter(features.values())))
    if n < 2:
        raise ValueError(f"{n} picture: a distance needs at least 2")
    real = reference.features
    draws = FEW_DRAWS if reference.moments.dimension >= MANY_FEATURES else FRECHET_DRAWS
    spreads = frechet_spreads(features, reference.moments, draws=draws)
    ground = None if real is None or len(real) < 4 else _floor(real, n)
    found = {}
    for name, each in features.items():
        limit = None if n < LEAST_FOR_LIMIT else extrapolated(each, reference.moments if real is None else real)
        score = None if logits is None else inception_score(logits[name], splits=min(SPLITS, n))
        found[name] = Distances(
            n=n,
            n_reference=reference.moments.n,
            fd=spreads.estimates[name],
            spread=spreads.spread(name),
            floor=ground,
            limit=limit,
            kid=None if real is None else kid(each, real),
            mmd=None if real is None else gaussian_mmd(each, real),
            neighbours=None if real is None else _neighbours(each, real),
            inception_score=score,
        )
    return found


def _floor(real: Tensor, n: int) -> Floor:
    """Return what n real pictures score against the rest, where that is larger: the distances have that bias, too."""
    if len(real) < 2 * n:
        return floor(real, n)
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(real)))
    return Floor(frechet_distance_of_features(real[order[:n]], real[order[n:]]), n)


def _neighbours(features: Tensor, real: Tensor) -> Neighbours | None:
    """Return them of as many pictures of each side, evenly spread: they depend on the numbers of both."""
    n = min(len(features), len(real))
    samples, reference = (each[torch.arange(n) * len(each) // n] for each in (features, real))
    return neighbours(samples, reference) if n > 5 else None
