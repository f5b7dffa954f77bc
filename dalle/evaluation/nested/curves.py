"""Best of N for every N and every ranking, from one run: what CLIP, a judge and a checker say of the picks.

Two estimates stand side by side. The pick among the first N candidates of each caption is what a run with N candidates
would have. The mean over all subsets of N of the M candidates has the same expectation and less noise, but exists only
for rankings by one number: a place among N is no place among M, which is what ranking by both compares.

Letters: R captions  M candidates of each  J values of N
"""

from dataclasses import dataclass, replace
from typing import get_args

from torch import Tensor

from dalle.evaluation.nested.run import Nested
from dalle.evaluation.nested.sample import picks
from dalle.evaluation.numbers.bootstrap import mean_interval, wilson
from dalle.evaluation.numbers.retrieval import retrieval
from dalle.evaluation.numbers.subsets import any_of_subsets, best_of_subsets
from dalle.sampling import Ranking

RANKINGS: tuple[Ranking, ...] = get_args(Ranking)
ORACLE = "oracle"
"""A ranking that never errs: one right candidate is enough."""
GIVEN = "given"
"""No ranking: pictures that are there."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """The mean of something over captions, with its 95% interval: by bootstrap, of a rate Wilson's."""

    mean: float
    low: float
    high: float
    subsets: float | None = None
    """The mean over all subsets of N candidates; None where there is none."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """The best of N by one ranking."""

    rank: str
    """One of `RANKINGS`, or "oracle"."""
    n: int
    right: Estimate | None = None
    """Rate of pictures that show what the caption says, by the checker."""
    judge: Estimate | None = None
    """Cosine of caption and picture by the judge."""
    clip: Estimate | None = None
    """The same by the CLIP that ranks: where it chose the picture, high by that alone."""


def curve(nested: Nested) -> list[Point]:
    """Return the points of all rankings, N ascending; and the oracle's, if a checker has looked."""
    points = []
    for rank in RANKINGS:
        picked_RJ = picks(nested.scores, nested.log_likelihoods, rank, nested.settings.best_of)
        ranked_by = {"clip": nested.scores, "likelihood": nested.log_likelihoods}.get(rank)
        for n, picked_R in zip(nested.settings.best_of, picked_RJ.T, strict=True):
            points.append(
                Point(
                    rank=rank,
                    n=n,
                    clip=_mean(nested.scores, picked_R, ranked_by, n),
                    judge=None if nested.judged is None else _mean(nested.judged, picked_R, ranked_by, n),
                    right=None if nested.right is None else _rate(nested.right, picked_R, ranked_by, n),
                )
            )
    if nested.right is not None:
        for n in nested.settings.best_of:
            any_R = nested.right[:, :n].any(dim=1)
            subsets = float(any_of_subsets(nested.right, n).mean())
            points.append(Point(rank=ORACLE, n=n, right=rate(any_R, subsets)))
    return points


def _mean(values_RM: Tensor, picked_R: Tensor, ranked_by: Tensor | None, n: int) -> Estimate:
    return replace(_plain(values_RM.gather(1, picked_R[:, None])[:, 0]), subsets=_subsets(values_RM, ranked_by, n))


def _rate(right_RM: Tensor, picked_R: Tensor, ranked_by: Tensor | None, n: int) -> Estimate:
    return rate(right_RM.gather(1, picked_R[:, None])[:, 0], _subsets(right_RM, ranked_by, n))


def _subsets(values_RM: Tensor, ranked_by: Tensor | None, n: int) -> float | None:
    return None if ranked_by is None else float(best_of_subsets(ranked_by, values_RM, n).mean())


def rate(right_R: Tensor, subsets: float | None = None) -> Estimate:
    """Return the rate of bool (R,), with Wilson's interval."""
    n_right = int(right_R.sum())
    low, high = wilson(n_right, len(right_R))
    return Estimate(mean=n_right / len(right_R), low=low, high=high, subsets=subsets)


def cosines(captions_RE: Tensor, images_RE: Tensor) -> Estimate:
    """Return the mean cosine of captions and their pictures, by their unit features."""
    return _plain((captions_RE * images_RE).sum(dim=1))


@dataclass(frozen=True, kw_only=True)
class Recalled:
    """How often the right one of all n is among the k nearest, by the CLIP that judges."""

    n: int
    """Candidates for each caption of which the best was taken."""
    pictures: dict[int, Estimate]
    """By k: a caption's picture among all pictures."""
    captions: dict[int, Estimate]
    """By k: a picture's caption among all captions."""
    chance: dict[int, float]
    """By k."""


def recalled(nested: Nested) -> list[Recalled]:
    """Return the retrieval of the kept picks, for every N."""
    return [
        recall(nested.caption_features, nested.read("clip_features", column), n)
        for column, n in enumerate(nested.settings.best_of)
    ]


def recall(captions_RE: Tensor, images_RE: Tensor, n: int) -> Recalled:
    """Return the retrieval of captions and their pictures by unit features; `n` is only named."""
    of_captions, of_images = retrieval(captions_RE, images_RE)
    return Recalled(
        n=n,
        pictures={k: _plain(of_captions.hits[k]) for k in of_captions.rates},
        captions={k: _plain(of_images.hits[k]) for k in of_images.rates},
        chance={k: of_captions.chance(k) for k in of_captions.rates},
    )


def _plain(values_R: Tensor) -> Estimate:
    if len(values_R) == 1:  # which has no interval: both ends are its value
        return Estimate(mean=float(values_R), low=float(values_R), high=float(values_R))
    found = mean_interval(values_R)
    return Estimate(mean=found.mean, low=found.low, high=found.high)


def best_picks(nested: Nested) -> Tensor:
    """Return the kept pick of M of each caption, int64 (R,)."""
    return nested.kept[:, len(nested.settings.best_of) - 1].long()
