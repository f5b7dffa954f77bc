"""Maximum mean discrepancies of two sets of features: 0 for equal distributions, and, unbiased, without a bias of 1/n.

Letters: N, M pictures  D features  R rows of a block
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from dalle.evaluation.numbers.moments import checked_features

Estimator = Literal["unbiased", "v-statistic"]
Kernel = Callable[[Tensor, Tensor], Tensor]
"""float64 (R,D) and (M,D) to their kernel (R,M)."""

BLOCK = 1024
"""Rows for which a kernel's values are held at once."""


@dataclass(frozen=True)
class KID:
    """Kernel Inception distance: the mean over subsets."""

    mean: float
    std: float | None
    """Standard deviation over the subsets; None of one."""
    subsets: int
    subset_size: int


def polynomial_kernel(x_RD: Tensor, y_MD: Tensor) -> Tensor:
    """Return (xᵀy / D + 1)³, float64 (R,M) (Bińkowski et al. 2018)."""
    return (x_RD @ y_MD.T / x_RD.shape[1] + 1) ** 3


def gaussian_kernel(sigma: float) -> Kernel:
    """Return the kernel exp(−|x − y|² / 2σ²)."""
    if not 0 < sigma < math.inf:
        raise ValueError(f"sigma is {sigma}; expected a finite number above 0")

    def kernel(x_RD: Tensor, y_MD: Tensor) -> Tensor:
        squares_RM = x_RD.square().sum(1, keepdim=True) + y_MD.square().sum(1) - 2 * (x_RD @ y_MD.T)
        return torch.exp(-squares_RM.clamp(min=0) / (2 * sigma * sigma))

    return kernel


def squared_mmd(first: Tensor, second: Tensor, kernel: Kernel, estimator: Estimator = "unbiased") -> float:
    """Return the squared maximum mean discrepancy of features (N,D) and (M,D) (Gretton et al. 2012).

    Args:
        first: of one set.
        second: of the other.
        kernel: positive definite.
        estimator: "unbiased" leaves out the kernel of a picture with itself, and may be below 0; "v-statistic" keeps
            it, is never below 0, and too large by about 1/n.

    Raises:
        ValueError: a side has fewer than 2 pictures, or the features do not fit.
    """
    first_ND, second_MD = checked_features(first), checked_features(second)
    if min(len(first_ND), len(second_MD)) < 2 or first_ND.shape[1] != second_MD.shape[1]:
        raise ValueError(
            f"features of shapes {tuple(first_ND.shape)} and {tuple(second_MD.shape)}; "
            "expected at least 2 pictures on both sides and equal numbers of features"
        )
    within = [_mean_within(each, kernel, estimator) for each in (first_ND, second_MD)]
    between = math.fsum(float(kernel(block, second_MD).sum()) for block in torch.split(first_ND, BLOCK))
    return within[0] + within[1] - 2 * between / (len(first_ND) * len(second_MD))


def kid(samples: Tensor, reference: Tensor, *, subset_size: int = 1000, subsets: int = 100, seed: int = 0) -> KID:
    """Return the kernel Inception distance: the unbiased squared MMD of the polynomial kernel, over random subsets.

    A subset as large as both sides is the same whenever it is drawn: there is one then.

    Args:
        samples: features (N,D).
        reference: features (M,D).
        subset_size: pictures of each side in a subset; at most N and M are taken.
        subsets: their number.
        seed: of the draws, which are those of torchmetrics after torch.manual_seed(seed).

    Raises:
        ValueError: there are fewer than 2 pictures or 1 subset, or the features do not fit.
    """
    samples_ND, reference_MD = checked_features(samples), checked_features(reference)
    size = min(subset_size, len(samples_ND), len(reference_MD))
    if size < 2 or subsets < 1:
        raise ValueError(f"{subsets} subsets of {size} pictures; expected at least 1 subset and 2 pictures")
    if size == max(len(samples_ND), len(reference_MD)):
        subsets = 1
    generator = torch.Generator().manual_seed(seed)
    values = []
    for _ in range(subsets):
        reference_rows = torch.randperm(len(reference_MD), generator=generator)[:size]
        sample_rows = torch.randperm(len(samples_ND), generator=generator)[:size]
        values.append(squared_mmd(samples_ND[sample_rows], reference_MD[reference_rows], polynomial_kernel))
    return KID(float(np.mean(values)), float(np.std(values)) if subsets > 1 else None, subsets, size)


def gaussian_mmd(
    samples: Tensor,
    reference: Tensor,
    *,
    sigma: float = 10.0,
    scale: float = 1000.0,
    estimator: Estimator = "unbiased",
) -> float:
    """Return the squared MMD of a Gaussian kernel, times a scale: what CMMD is of CLIP's unit features.

    Source: Jayasumana et al. 2024 (arXiv 2401.09603), σ = 10, times 1,000. Its published code computes the
    "v-statistic", although the paper calls its estimator unbiased.

    Raises:
        ValueError: as `squared_mmd`, or sigma is not above 0.
    """
    return scale * squared_mmd(samples, reference, gaussian_kernel(sigma), estimator)


def _mean_within(features_ND: Tensor, kernel: Kernel, estimator: Estimator) -> float:
    """Return the mean kernel of pairs of one set."""
    n, total, own = len(features_ND), 0.0, 0.0
    for first, block_RD in zip(range(0, n, BLOCK), torch.split(features_ND, BLOCK), strict=True):
        values_RN = kernel(block_RD, features_ND)
        total += float(values_RN.sum())
        own += float(values_RN.diagonal(first).sum())
    return total / n**2 if estimator == "v-statistic" else (total - own) / (n * (n - 1))
