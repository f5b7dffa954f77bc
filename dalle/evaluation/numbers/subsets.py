"""Best of N from M candidates, N at most M, as the mean over all subsets of N: no drawing, and little noise.

The candidate that is ranked r-th of M is the best of C(M − r, N − 1) of the C(M, N) subsets.

Letters: C captions  M candidates
"""

from fractions import Fraction
from math import comb

import torch
from torch import Tensor


def subset_weights(m: int, n: int) -> Tensor:
    """Return the probabilities that the r-th best of m is the best of a random subset of n, float64 (m,), r = 1 … m.

    Raises:
        ValueError: n is not in 1 … m.
    """
    if not 1 <= n <= m:
        raise ValueError(f"best of {n} from {m} candidates: expected 1 … {m}")
    total = comb(m, n)
    return torch.tensor([float(Fraction(comb(m - r, n - 1), total)) for r in range(1, m + 1)], dtype=torch.float64)


def best_of_subsets(scores: Tensor, values: Tensor, n: int) -> Tensor:
    """Return the mean over all subsets of n candidates of the value of the one with the highest score.

    Unbiased for the best of n new candidates. At n = M it is the value of the best of all, at n = 1 the plain mean.

    Args:
        scores: (C,M); of equal ones the earlier counts as the better.
        values: (C,M), what is measured of each candidate; the scores themselves, or others.
        n: candidates in a subset.

    Returns:
        float64 (C,)

    Raises:
        ValueError: the shapes differ, or are no (C,M), a score is NaN, or n is not in 1 … M.
    """
    if scores.shape != values.shape or scores.ndim != 2:
        raise ValueError(
            f"scores {tuple(scores.shape)} and values {tuple(values.shape)}; "
            "expected two equal shapes (captions, candidates)"
        )
    if scores.isnan().any():  # a NaN would be sorted as the best
        caption, candidate = scores.isnan().nonzero()[0].tolist()
        raise ValueError(f"the score of candidate {candidate} of caption {caption} is NaN: it cannot be ranked")
    weights_M = subset_weights(scores.shape[1], n)
    order_CM = torch.sort(scores.cpu(), dim=1, descending=True, stable=True).indices
    return values.cpu().double().gather(1, order_CM) @ weights_M


def any_of_subsets(right: Tensor, n: int) -> Tensor:
    """Return the part of all subsets of n candidates that have a right one: the oracle, float64 (C,).

    Args:
        right: bool (C,M).
        n: candidates in a subset.

    Raises:
        ValueError: right is no bool (C,M), or n is not in 1 … M.
    """
    if right.ndim != 2 or right.dtype != torch.bool:
        raise ValueError(f"{right.dtype} of shape {tuple(right.shape)}; expected bool (captions, candidates)")
    return best_of_subsets(right.to(torch.uint8), right, n)
