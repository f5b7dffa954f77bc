"""Embeddings as tokens, and back: principal components, each cut into buckets.

Source: Ramesh et al. 2022 (arXiv 2204.06125), 2.2: 319 of 1,024 components, in the order of their eigenvalues, lose
less than 1% of the squared error; each is cut into 1,024 buckets, and so is the dot product with the caption's
embedding. How the buckets are cut is not said. Here they are of equal width, from the smallest to the largest number
that was met among the embeddings of training pictures; what lies outside goes into the first or the last one.

Letters: B batch  N embeddings  E embedding  K dimensions  V buckets
"""

from typing import NamedTuple, Self

import torch
from torch import Tensor

from unclip.latents import PrincipalComponents

UPPER_HALF = 0.5
"""Share of the training's dot products below those that are asked for when sampling."""


class Buckets(NamedTuple):
    """What turns embeddings into tokens; all tensors are float32 on one device."""

    mean: Tensor
    """(E,), subtracted from embeddings."""
    components: Tensor
    """(K, E), orthonormal, those of the largest variance first."""
    low: Tensor
    """(1+K,), lower end of the first bucket: of the dot product, then of each component."""
    high: Tensor
    """(1+K,), upper end of the last bucket."""
    counts: Tensor
    """(V,), how many of the dot products that were met lie in each bucket."""

    @classmethod
    def of(cls, embeddings: Tensor, features: Tensor, dimensions: int, buckets: int) -> Self:
        """Return the buckets for embeddings of pictures.

        Args:
            embeddings: (N, E), of pictures that a prior is trained on.
            features: (N, E), z_t of a caption of each.
            dimensions: K, components that are kept.
            buckets: V.

        Raises:
            ValueError: N is not above K, or 1.
        """
        if len(embeddings) <= max(1, dimensions):
            raise ValueError(f"{len(embeddings)} embeddings have no {dimensions} principal components: give more")
        found = PrincipalComponents.of(embeddings)
        mean, components = found.mean.float(), found.components[:dimensions].float()
        numbers = _numbers(embeddings, features, mean, components)
        low, high = numbers.amin(dim=0), numbers.amax(dim=0)
        high = torch.where(high > low, high, low + 1)  # where all are equal
        self = cls(mean, components, low, high, torch.zeros(buckets, device=mean.device))
        dots = self.tokens(embeddings, features)[:, 0]
        return self._replace(counts=torch.bincount(dots, minlength=buckets).float())

    def tokens(self, embeddings: Tensor, features: Tensor) -> Tensor:
        """Return tokens int64 (B, 1+K), each in [0, V): of the dot product z_i·z_t, then of the components of z_i.

        Args:
            embeddings: (B, E), z_i.
            features: (B, E), z_t.
        """
        numbers = _numbers(embeddings, features, self.mean, self.components)
        places = (numbers - self.low) / (self.high - self.low) * len(self.counts)
        return places.long().clamp(0, len(self.counts) - 1)

    def embeddings(self, tokens: Tensor) -> Tensor:
        """Return embeddings float32 (B, E) of the components' tokens (B, K): each at the middle of its bucket."""
        width = (self.high - self.low)[1:] / len(self.counts)
        middles = self.low[1:] + (tokens + 0.5) * width
        return middles @ self.components + self.mean

    def dot_tokens(self, uniform: Tensor) -> Tensor:
        """Return tokens int64 (B,) of dot products drawn from the upper half of those that were met.

        Args:
            uniform: (B,), in [0, 1): 0 is the median's bucket.
        """
        return drawn_tokens(self.counts.expand(len(uniform), -1), UPPER_HALF + (1 - UPPER_HALF) * uniform.double())


def drawn_tokens(weights: Tensor, uniform: Tensor) -> Tensor:
    """Return tokens int64 (B,), token v with the probability of its weight, by inverting their distribution.

    Args:
        weights: (B, V), at least 0, and not all 0.
        uniform: (B,), in [0, 1), one for each token.
    """
    summed = weights.double().cumsum(dim=-1)
    places = torch.searchsorted(summed, uniform.double()[:, None] * summed[:, -1:], right=True)[:, 0]
    return places.clamp(max=weights.shape[-1] - 1)


def _numbers(embeddings: Tensor, features: Tensor, mean: Tensor, components: Tensor) -> Tensor:
    """Return the numbers that are cut into buckets, float32 (B, 1+K)."""
    with torch.autocast(embeddings.device.type, enabled=False):
        given = embeddings.float()
        dots = (given * features.float()).sum(dim=-1, keepdim=True)
        return torch.cat([dots, (given - mean) @ components.T], dim=-1)
