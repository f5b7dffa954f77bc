"""Pictures as vectors of a codebook: what a decoder may draw in place of pixels.

A discrete VAE makes a grid of tokens of a picture, and its decoder begins with a vector for each token. These vectors,
turned so that their coordinates are independent and of one deviation, are what noise is added to; what is drawn is the
nearest token at each place. Latent diffusion (Rombach et al. 2022, arXiv 2112.10752) does so with what its autoencoder
makes of a picture.

Letters: B batch  V tokens in the codebook  C numbers of a code  H,W picture in pixels  Y,X grid
"""

from typing import Protocol

import torch
from torch import Tensor


class Codec(Protocol):
    """What turns pictures into tokens and back."""

    def encode(self, images: Tensor) -> Tensor:
        """Return tokens int64 (B, Y, X) of pictures (B, 3, H, W) in [0, 1]."""

    def decode(self, tokens: Tensor) -> Tensor:
        """Return pictures (B, 3, H, W) in [0, 1] of tokens (B, Y, X)."""


def whitened_codebook(codebook: Tensor, tokens: Tensor) -> Tensor:
    """Return a codebook's vectors, shifted, turned and scaled to deviation 1 in each coordinate: float32 (V, C).

    A token counts by the square root of how often it is met: frequent ones, of the background, do not decide alone.

    Args:
        codebook: (V, C).
        tokens: int64 of any shape, of pictures like those that will be drawn.

    Raises:
        ValueError: fewer tokens are met than a code has numbers.
    """
    vectors = codebook.detach().double()
    weights = torch.bincount(tokens.flatten().to(vectors.device), minlength=len(vectors)).double().sqrt()
    if int((weights > 0).sum()) <= vectors.shape[1]:
        raise ValueError(
            f"{int((weights > 0).sum())} tokens are met, of {len(vectors)}; expected more than the "
            f"{vectors.shape[1]} numbers of a code: give more, and more various, pictures"
        )
    weights = (weights / weights.sum())[:, None]
    vectors = vectors - (weights * vectors).sum(dim=0)
    variances, axes = torch.linalg.eigh((vectors * weights).T @ vectors)
    # the sign of an axis is any: that of its largest coordinate is made positive
    axes = axes * axes.gather(0, axes.abs().argmax(dim=0)[None]).sign()
    whitened: Tensor = vectors @ axes / variances.clamp(min=variances[-1] * 1e-6).sqrt()
    return whitened.float()


def nearest_tokens(vectors: Tensor, x: Tensor) -> Tensor:
    """Return the token whose vector is nearest at each place, int64 (B, Y, X).

    Args:
        vectors: float32 (V, C).
        x: (B, C, Y, X).
    """
    batch, _, rows, columns = x.shape
    places = x.float().flatten(2).transpose(1, 2).flatten(0, 1)
    tokens: Tensor = torch.cdist(places, vectors).argmin(dim=1)
    return tokens.view(batch, rows, columns)
