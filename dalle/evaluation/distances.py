"""Distances of sets of pictures to a reference, each with what says how far to trust it.

Letters: R captions  D features  K classes
"""

from dataclasses import dataclass, field
from functools import cached_property, partial

import torch
from torch import Tensor

from dalle.evaluation.numbers.bootstrap import FRECHET_DRAWS, frechet_spreads
from dalle.evaluation.numbers.frechet import (
    Floor,
    FrechetReference,
    extrapolated,
    floor,
    least_for_limit,
    singular_note,
)
from dalle.evaluation.numbers.inception_score import InceptionScore, inception_score
from dalle.evaluation.numbers.kernels import KID, gaussian_mmd, kid
from dalle.evaluation.numbers.moments import Moments
from dalle.evaluation.numbers.neighbours import Neighbours, neighbours
from dalle.output.progress import OnProgress
from dalle.output.text import counted

SPLITS = 10
"""Of the Inception Score."""
FEW_DRAWS, MANY_FEATURES = 10, 1024
"""Draws of a spread where each takes seconds: from so many features on."""
LEAST_FOR_SCORE = 100 * SPLITS
"""Pictures that an Inception Score needs: that of a split is at most the number of its pictures."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Reference:
    """Real pictures, at one radius. What is computed of them alone is computed once."""

    moments: Moments
    features: Tensor | None
    """float32 (M,D); None where only the moments are known."""
    note: str
    """Where they come from, for people."""
    _floors: dict[int, Floor] = field(default_factory=dict, init=False)

    @cached_property
    def prepared(self) -> FrechetReference:
        """The moments, with the root of their covariance."""
        return FrechetReference(self.moments)

    def floor(self, n: int) -> Floor | None:
        """Return what n of the pictures score against the rest; None without features, or of fewer than 4 pictures."""
        if self.features is None or len(self.features) < 4:
            return None
        if n not in self._floors:
            self._floors[n] = floor(self.features, n)
        return self._floors[n]


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
    """What as many real pictures score against the rest, at most half of the reference."""
    limit: float | None
    """FD∞: for endless samples."""
    kid: KID | None
    mmd: float | None
    """Gaussian, unbiased, σ = 10, × 1,000."""
    neighbours: Neighbours | None
    """Precision, recall, density and coverage, with as many pictures of each side."""
    inception_score: InceptionScore | None
    notes: tuple[str, ...] = ()
    """What must be said of these numbers, and which are left out."""


def distances(
    features: Tensor,
    reference: Reference,
    logits: Tensor | None = None,
    *,
    progress: OnProgress = lambda done, total: None,
) -> Distances:
    """Return the distances of pictures to a reference.

    The draws of a spread are a function of the number of captions: they are the same for every set of the same ones.

    Args:
        features: (R,D).
        reference: to compare with.
        logits: (R,K), of the same pictures; None for no Inception Score.
        progress: called with (share done, 1).

    Raises:
        ValueError: there are fewer than 2 pictures, or the features do not fit.
    """
    n, real, dimension = len(features), reference.features, reference.moments.dimension
    if n < 2:
        raise ValueError(f"{counted(n, 'picture')}: a distance needs at least 2")
    n_reference = reference.moments.n
    n_cut = n if real is None else min(n, n_reference)
    notes = [singular_note(min(n, n_reference), dimension)]
    draws = FEW_DRAWS if dimension >= MANY_FEATURES else FRECHET_DRAWS
    spreads = frechet_spreads({"": features}, reference.prepared, draws=draws, progress=partial(_told, progress, 0))
    limit = score = None
    if n_cut >= (least := least_for_limit(dimension)):
        others = reference.prepared if real is None else real
        limit = extrapolated(features, others, progress=partial(_told, progress, 1))
    else:
        of_each = "" if real is None else " of each side"
        notes.append(f"no FD∞, which needs {least:,} pictures{of_each} for {dimension:,} features")
    if logits is not None and n >= LEAST_FOR_SCORE:
        score = inception_score(logits, splits=SPLITS)
    elif logits is not None:
        notes.append(f"no IS, which needs {LEAST_FOR_SCORE:,} pictures: a split's is at most its number of pictures")
    found = Distances(
        n=n,
        n_reference=n_reference,
        fd=spreads.estimates[""],
        spread=spreads.spread(""),
        floor=reference.floor(n),
        limit=limit,
        kid=None if real is None else kid(features, real),
        mmd=None if real is None else gaussian_mmd(features, real),
        neighbours=None if real is None else _neighbours(features, real),
        inception_score=score,
        notes=tuple(filter(None, notes)),
    )
    progress(1, 1)
    return found


def _told(progress: OnProgress, n_before: int, done: int, total: int) -> None:
    """Tell how far one of three parts is: draws of the spread, the line of FD∞, and the rest."""
    progress((n_before + done / total) / 3, 1)


def _neighbours(features: Tensor, real: Tensor) -> Neighbours | None:
    """Return them of as many pictures of each side, evenly spread: they depend on the numbers of both."""
    n = min(len(features), len(real))
    samples, reference = (each[torch.arange(n) * len(each) // n] for each in (features, real))
    return neighbours(samples, reference) if n > 5 else None
