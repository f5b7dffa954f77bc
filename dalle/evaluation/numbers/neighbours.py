"""Fidelity and variety by nearest neighbours: precision and recall, density and coverage.

Distances are held a block at a time. Both sides need equal numbers of pictures to be comparable.

Letters: N, M pictures  D features  R rows of a block
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dalle.evaluation.numbers.moments import checked_features

BLOCK = 512
"""Rows of which the distances to all others are held at once."""
SAME = 1e-12
"""Squared distances below this part of the squared lengths are rounding, and count as 0."""


@dataclass(frozen=True)
class Neighbours:
    """Measures from balls around pictures, each as large as the distance to the k-th nearest of its own side."""

    precision: float
    """Samples in the ball of some reference picture (Kynkäänniemi et al. 2019), 0 … 1."""
    recall: float
    """Reference pictures in the ball of some sample, 0 … 1."""
    density: float
    """Balls of reference pictures that a sample is in, on average, divided by k (Naeem et al. 2020); 1 for equals."""
    coverage: float
    """Reference pictures whose ball holds some sample, 0 … 1."""
    n: int
    """Samples."""
    n_reference: int
    """Reference pictures."""


def neighbours(samples: Tensor, reference: Tensor, *, k: int = 3, k_density: int = 5) -> Neighbours:
    """Return precision and recall with k, density and coverage with k_density nearest neighbours.

    Args:
        samples: features (N,D).
        reference: features (M,D).
        k: of precision and recall.
        k_density: of density and coverage.

    Raises:
        ValueError: a side has no more pictures than k or k_density, or the features do not fit.
    """
    samples_ND, reference_MD = checked_features(samples), checked_features(reference)
    largest = max(k, k_density)
    if min(k, k_density) < 1 or min(len(samples_ND), len(reference_MD)) <= largest:
        raise ValueError(
            f"{len(samples_ND)} samples and {len(reference_MD)} reference pictures, k {k} and {k_density}; "
            f"expected more than {largest} pictures on both sides, and k of at least 1"
        )
    if samples_ND.shape[1] != reference_MD.shape[1]:
        raise ValueError(
            f"samples have {samples_ND.shape[1]} features and the reference {reference_MD.shape[1]}: "
            "compute both with the same network"
        )
    radii_N = _radii(samples_ND, (k,))[0]
    radii_M, radii_density_M = _radii(reference_MD, (k, k_density))
    precise, within, n_balls = 0, torch.zeros(len(reference_MD), dtype=torch.bool), 0
    covered = torch.zeros(len(reference_MD), dtype=torch.bool)
    first = 0
    for squares_RM in _blocks(samples_ND, reference_MD):
        precise += int((squares_RM <= radii_M).any(dim=1).sum())
        within |= (squares_RM <= radii_N[first : first + len(squares_RM), None]).any(dim=0)
        inside_RM = squares_RM <= radii_density_M
        n_balls += int(inside_RM.sum())
        covered |= inside_RM.any(dim=0)
        first += len(squares_RM)
    n = len(samples_ND)
    return Neighbours(
        precision=precise / n,
        recall=float(within.double().mean()),
        density=n_balls / (k_density * n),
        coverage=float(covered.double().mean()),
        n=n,
        n_reference=len(reference_MD),
    )


def _radii(features_ND: Tensor, ks: tuple[int, ...]) -> list[Tensor]:
    """Return for each k the squared distance of every picture to its k-th nearest other, (N,)."""
    blocks = []
    for squares_RN in _blocks(features_ND, features_ND):
        # the nearest of all is the picture itself, at 0
        nearest_R = torch.topk(squares_RN, max(ks) + 1, dim=1, largest=False).values
        blocks.append(nearest_R[:, list(ks)])
    return list(torch.cat(blocks).T)


def _blocks(first_ND: Tensor, second_MD: Tensor) -> Iterator[Tensor]:
    """Yield the squared distances of R rows of the first at a time, float64 (R,M)."""
    lengths_M = second_MD.square().sum(dim=1)
    for block_RD in first_ND.split(BLOCK):
        lengths_RM = block_RD.square().sum(dim=1, keepdim=True) + lengths_M
        squares_RM = lengths_RM - 2 * (block_RD @ second_MD.T)
        yield torch.where(squares_RM < SAME * lengths_RM, 0.0, squares_RM)
