"""Manipulations of embeddings and noise: interpolation on the sphere, monotone paths, text differences, components.

Source: Ramesh et al. 2022 (arXiv 2204.06125), 3 and 4. Pure functions; computed in float64.

Letters: B batch  N embeddings  E embedding  K components
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional as F

_PARALLEL = 1e-4
"""Sine of an angle below which two vectors count as parallel."""
SAME_PLACE = 1e-6
"""Largest difference of the dot products of a picture that is embedded twice, with rounding; measured on a CPU."""


def slerp(start: Tensor, end: Tensor, theta: float) -> Tensor:
    """Return the spherical interpolation of vectors, (…, E) in the dtype of `start`.

    Directions go along the great circle at equal speed, lengths along the line.

    Args:
        start: (…, E), at theta 0.
        end: of the same shape, at theta 1.
        theta: in [0, 1]; a half is half of the angle.

    Raises:
        ValueError: shapes differ, theta is out of range, or two vectors are opposite, between which every way is as
            short as any other.
    """
    if start.shape != end.shape or not 0 <= theta <= 1:
        raise ValueError(
            f"slerp of {tuple(start.shape)} and {tuple(end.shape)} at {theta}: expected equal shapes, [0, 1]"
        )
    a, b = start.double(), end.double()
    lengths = torch.lerp(a.norm(dim=-1, keepdim=True), b.norm(dim=-1, keepdim=True), theta)
    a, b = F.normalize(a, dim=-1), F.normalize(b, dim=-1)
    cosine = (a * b).sum(dim=-1, keepdim=True).clamp(-1, 1)
    angle = cosine.acos()
    sine = angle.sin()
    is_parallel = sine < _PARALLEL
    if bool((is_parallel & (cosine < 0)).any()):
        raise ValueError("two of the vectors are opposite: no way between them is shorter than all others")
    safe = torch.where(is_parallel, 1.0, sine)
    on_circle = (((1 - theta) * angle).sin() * a + (theta * angle).sin() * b) / safe
    direction = torch.where(is_parallel, F.normalize(torch.lerp(a, b, theta), dim=-1), on_circle)
    return (lengths * direction).to(start.dtype)


def slerp_noise(start: Tensor, end: Tensor, theta: float) -> Tensor:
    """Return the spherical interpolation of noise, (B, …): each row is one vector, so its deviation stays 1.

    Arguments and errors are those of `slerp`.
    """
    if start.shape != end.shape:
        raise ValueError(f"noise of the shapes {tuple(start.shape)} and {tuple(end.shape)}; expected equal ones")
    return slerp(start.flatten(1), end.flatten(1), theta).view_as(start)


def monotone_path(candidates: Sequence[Tensor], wanted: Tensor) -> list[int]:
    """Choose one candidate for each place, so that the pictures go from the first to the last with the least return.

    A picture's position is its dot product with the last embedding minus the first. A step to a position that is lower
    by more than `SAME_PLACE` is a return of so much. The choice has the smallest sum of returns, and of those the
    largest sum of cosines with `wanted`.

    Args:
        candidates: for each place, unit embeddings (N, E) of what was drawn there; one at the first place and the last.
        wanted: (places, E), the embedding that each place was drawn of, of any length.

    Returns:
        The number of the candidate of each place.

    Raises:
        ValueError: a place has no candidate, an end has several, or there are more or fewer places in `wanted`.
    """
    counts = [len(some) for some in candidates]
    if len(counts) != len(wanted) or min(counts) < 1 or not counts[0] == counts[-1] == 1:
        raise ValueError(
            f"{counts} candidates for {len(wanted)} places; expected one at the first place and the last, and at least "
            "one at each other"
        )
    direction = candidates[-1][0].double() - candidates[0][0].double()
    # in whole units, in which equal sums of returns are exactly equal
    positions = [(some.double() @ direction / SAME_PLACE).round().tolist() for some in candidates]
    cosines = [
        F.cosine_similarity(some.double(), each.double(), dim=-1).tolist()
        for some, each in zip(candidates, wanted, strict=True)
    ]
    paths = [(0.0, 0.0, [0])]  # the best to each candidate of a place: sum of returns, minus sum of cosines, choices
    for (before, here), fits in zip(itertools.pairwise(positions), cosines[1:], strict=True):
        paths = [
            min(
                (returns + (last - now if last - now > 1 else 0.0), cost - fit, [*chosen, candidate])
                for (returns, cost, chosen), last in zip(paths, before, strict=True)
            )
            for candidate, (now, fit) in enumerate(zip(here, fits, strict=True))
        ]
    return paths[0][2]


def text_difference(before: Tensor, after: Tensor) -> Tensor:
    """Return the direction from one caption to another, z_d: unit vectors (B, E) in the dtype of `after`.

    Args:
        before: (B, E), unit embeddings of captions of what is.
        after: (B, E), of what is wanted.

    Raises:
        ValueError: shapes differ, or two captions have the same embedding.
    """
    if before.shape != after.shape:
        raise ValueError(f"captions of the shapes {tuple(before.shape)} and {tuple(after.shape)}; expected equal ones")
    difference = after.double() - before.double()
    if bool((difference.norm(dim=-1) < _PARALLEL).any()):
        raise ValueError("both captions have the same embedding: there is no direction from one to the other")
    return F.normalize(difference, dim=-1).to(after.dtype)


@dataclass(frozen=True)
class PrincipalComponents:
    """The principal components of embeddings, those of the largest variance first."""

    mean: Tensor
    """(E,) float64."""
    components: Tensor
    """(K, E) float64, orthonormal; of each, the number that is largest without its sign is above 0."""
    variances: Tensor
    """(K,) float64, falling."""

    @classmethod
    def of(cls, embeddings: Tensor) -> Self:
        """Return those of embeddings (N, E), K = min(N - 1, E) of them.

        Raises:
            ValueError: there are fewer than 2.
        """
        if embeddings.ndim != 2 or len(embeddings) < 2:
            raise ValueError(f"embeddings are {tuple(embeddings.shape)}; expected (N, E) of at least 2")
        given = embeddings.double()
        mean = given.mean(dim=0)
        _, singular, components = torch.linalg.svd(given - mean, full_matrices=False)
        count = min(len(given) - 1, given.shape[1])
        components = components[:count]
        largest = components.gather(1, components.abs().argmax(dim=1, keepdim=True))
        return cls(mean, components * largest.sign(), singular[:count].square() / (len(given) - 1))

    def rebuilt(self, embeddings: Tensor, count: int) -> Tensor:
        """Return embeddings (B, E) rebuilt from their first `count` components, in their own dtype.

        Raises:
            ValueError: count is below 0 or above K.
        """
        if not 0 <= count <= len(self.components):
            raise ValueError(f"{count} components; expected 0 to {len(self.components)}")
        chosen = self.components[:count].to(embeddings.device)
        mean = self.mean.to(embeddings.device)
        return (mean + (embeddings.double() - mean) @ chosen.T @ chosen).to(embeddings.dtype)

    def count_for(self, share: float) -> int:
        """Return how many components hold this share of the variance, in (0, 1].

        Raises:
            ValueError: share is out of range.
        """
        if not 0 < share <= 1:
            raise ValueError(f"share of variance ({share}) must be above 0 and at most 1")
        held = self.variances.cumsum(0) / self.variances.sum()
        wanted = share - math.ulp(1.0) * len(held)
        return int((held < wanted).sum()) + 1
