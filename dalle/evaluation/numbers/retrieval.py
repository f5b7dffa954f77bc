"""Whether captions find their pictures among all, and pictures their captions.

Letters: N pairs  E features  R rows of a block
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dalle.evaluation.numbers.moments import checked_features

RANKS = (1, 5, 10)
BLOCK = 1024
"""Rows of which the similarities to all others are held at once."""
TIE = 1e-6
"""Similarities of unit features in float32 that differ by no more than this are equal but for rounding."""
LENGTH_ERROR = 0.01
"""How far lengths of unit features may be from 1: those of half precision are not exactly of length 1."""


@dataclass(frozen=True)
class Retrieval:
    """R@k of one direction over all n: how often the right one is among the k most similar, by k."""

    rates: dict[int, float]
    """By k, 0 … 1."""
    hits: dict[int, Tensor]
    """By k: float64 (N,), of each row, 0 … 1, for intervals over captions."""
    n: int

    def chance(self, k: int) -> float:
        """Return the rate of guessing."""
        return min(1.0, k / self.n)


def retrieval(captions: Tensor, images: Tensor) -> tuple[Retrieval, Retrieval]:
    """Return how well captions find images, and images captions, each among all n, at ranks 1, 5 and 10.

    A tie counts by chance: of t that tie with the right one for the last places, each has an equal part. So one tie
    for the first place counts half, and a model that tells nothing apart scores exactly chance.

    Args:
        captions: unit features (N,E).
        images: unit features (N,E) of the pictures of the captions, in their order.

    Raises:
        ValueError: the shapes differ, or the features are no (N,E) of finite numbers, or not of length 1.
    """
    if captions.shape != images.shape:
        raise ValueError(
            f"features of captions {tuple(captions.shape)} and of images {tuple(images.shape)}; "
            "expected two equal shapes (pairs, features)"
        )
    captions_NE, images_NE = _unit(captions, "the captions' features"), _unit(images, "the images' features")
    return _one_direction(captions_NE, images_NE), _one_direction(images_NE, captions_NE)


def _unit(features: Tensor, name: str) -> Tensor:
    features_NE = checked_features(features, name)
    lengths_N = features_NE.norm(dim=1)
    if ((lengths_N - 1).abs() > LENGTH_ERROR).any():
        raise ValueError(
            f"{name} have lengths from {float(lengths_N.min()):.3g} to {float(lengths_N.max()):.3g}; "
            "expected 1: divide each by its length"
        )
    return features_NE


def _one_direction(queries_NE: Tensor, candidates_NE: Tensor) -> Retrieval:
    better, ties = [], []
    for first, block_RE in zip(range(0, len(queries_NE), BLOCK), torch.split(queries_NE, BLOCK), strict=True):
        similarities_RN = block_RE @ candidates_NE.T
        own_R1 = similarities_RN.diagonal(first).clone()[:, None]
        better.append((similarities_RN > own_R1 + TIE).sum(dim=1))
        ties.append(((similarities_RN - own_R1).abs() <= TIE).sum(dim=1))  # with the right one itself
    better_N, ties_N = torch.cat(better).double(), torch.cat(ties).double()
    hits = {k: ((k - better_N) / ties_N).clamp(0, 1) for k in RANKS}
    rates = {k: float(each.mean()) for k, each in hits.items()}
    return Retrieval(rates=rates, hits=hits, n=len(queries_NE))
