"""How far numbers would move with other captions: bootstraps over captions, and intervals of rates.

The sample size is the number of captions, however many pictures each has.

Letters: N captions  D features  K draws
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

import numpy as np
import torch
from torch import Tensor

from dalle.evaluation.numbers.frechet import FrechetReference
from dalle.evaluation.numbers.moments import Moments, checked_features

DRAWS = 1000
"""Draws of an interval."""
FRECHET_DRAWS = 50
"""Draws of a spread of Fréchet distances; at 2,048 features each takes seconds."""


@dataclass(frozen=True)
class Interval:
    """A mean over captions and its interval."""

    mean: float
    low: float
    high: float


def wilson(successes: int, n: int, *, confidence: float = 0.95) -> tuple[float, float]:
    """Return Wilson's interval of a rate (Wilson 1927), in [0, 1], also right at 0 and n successes.

    Raises:
        ValueError: n is below 1, successes are not in 0 … n, or confidence is not between 0 and 1.
    """
    if n < 1 or not 0 <= successes <= n or not 0 < confidence < 1:
        raise ValueError(f"{successes} successes of {n} at confidence {confidence}: expected 0 … n of n ≥ 1, and 0 … 1")
    z2 = NormalDist().inv_cdf((1 + confidence) / 2) ** 2
    rate = successes / n
    centre = (rate + z2 / (2 * n)) / (1 + z2 / n)
    half = math.sqrt(z2 * (rate * (1 - rate) / n + z2 / (4 * n * n))) / (1 + z2 / n)
    return max(0.0, centre - half), min(1.0, centre + half)


def mean_interval(values: Tensor, *, draws: int = DRAWS, confidence: float = 0.95, seed: int = 0) -> Interval:
    """Return the mean of one value per caption (N,), and the percentile interval of its bootstrap over captions.

    Equal values have an interval of width 0, which claims too much of few captions: give rates `wilson`'s beside it.

    Raises:
        ValueError: there are fewer than 2 values, they are of another shape or not finite, draws is below 1, or
            confidence is not between 0 and 1.
    """
    if values.ndim != 1 or len(values) < 2 or not values.double().isfinite().all():
        raise ValueError(f"values of shape {tuple(values.shape)}; expected (captions,) finite numbers, at least 2")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}; expected a number between 0 and 1, such as 0.95")
    values_N = values.detach().double().cpu()
    means_K = torch.stack([values_N[rows_N].mean() for rows_N in _all_resamples(len(values_N), draws, seed)])
    tails = torch.tensor([(1 - confidence) / 2, (1 + confidence) / 2], dtype=torch.float64)
    low, high = torch.quantile(means_K, tails).tolist()
    return Interval(float(values_N.mean()), low, high)


@dataclass(frozen=True)
class Spreads:
    """Estimates of several models with the same captions, and how far they would move with others.

    A bootstrap of a Fréchet distance lies above the estimate: repeated pictures cost it. So its percentiles are no
    interval of the estimate, which need not even be in them; its standard deviation around the estimate is.
    """

    estimates: Mapping[str, float]
    """By model: the distance of all its pictures."""
    draws: Mapping[str, Tensor]
    """By model: float64 (K,), the distances of the draws; draw k has the same captions for all."""

    def spread(self, model: str) -> float:
        """Return the standard deviation of a model's distance."""
        return float(self.draws[model].std())

    def difference(self, model: str, other: str) -> tuple[float, float]:
        """Return the difference of two distances, and its standard deviation over the same captions."""
        differences_K = self.draws[model] - self.draws[other]
        return self.estimates[model] - self.estimates[other], float(differences_K.std())


def frechet_spreads(
    features: Mapping[str, Tensor],
    reference: Moments | FrechetReference,
    *,
    draws: int = FRECHET_DRAWS,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Spreads:
    """Bootstrap the Fréchet distances of several models, or of several N, to one reference.

    Captions are drawn jointly: each draw takes the same ones for every model.

    Args:
        features: by model (N,D); row i of each is of the same caption.
        reference: kept as it is.
        draws: K, at least 2.
        seed: of the draws.
        progress: called with (draws done, draws).

    Raises:
        ValueError: the features have different numbers of rows, or do not fit the reference.
    """
    if isinstance(reference, Moments):
        reference = FrechetReference(reference)
    checked = {model: checked_features(each, f"the features of {model}") for model, each in features.items()}
    rows = {model: len(each) for model, each in checked.items()}
    if len(set(rows.values())) != 1 or draws < 2:
        raise ValueError(f"rows of features {rows} and {draws} draws; expected equal rows, one a caption, and 2 draws")
    projected = {model: reference.project(each) for model, each in checked.items()}
    distances: dict[str, list[float]] = {model: [] for model in checked}
    for done, rows_N in enumerate(resamples(next(iter(rows.values())), draws, seed), 1):
        for model, each in checked.items():
            distances[model].append(reference.distance_of_projected(each[rows_N], projected[model][rows_N]))
        if progress is not None:
            progress(done, draws)
    return Spreads(
        estimates={m: reference.distance_of_projected(checked[m], projected[m]) for m in checked},
        draws={model: torch.tensor(each, dtype=torch.float64) for model, each in distances.items()},
    )


def resamples(n: int, draws: int, seed: int) -> Iterator[Tensor]:
    """Yield `draws` times n rows out of n with replacement, int64 (n,), a function of (n, seed, draw)."""
    if n < 1 or draws < 1:
        raise ValueError(f"{draws} draws of {n} captions; expected at least 1 of each")
    for draw in range(draws):
        yield torch.from_numpy(np.random.default_rng([seed, draw]).integers(0, n, n))


@lru_cache(maxsize=2)  # of all captions, and of those that --without leaves: a table asks for hundreds of intervals
def _all_resamples(n: int, draws: int, seed: int) -> Tensor:
    """Return all rows of `resamples`, int32 (K,n)."""
    return torch.stack([rows_N.int() for rows_N in resamples(n, draws, seed)])
