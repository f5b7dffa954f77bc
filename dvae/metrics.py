"""Measures of reconstructions, and of how much of the vocabulary is used.

Shapes: B batch  H,W picture in pixels.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_MS_SSIM_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
"""Weights of the five scales, finest first (Wang, Simoncelli and Bovik 2003)."""
_SSIM_WINDOW = 11
"""Side of SSIM's Gaussian window in pixels (Wang et al. 2004)."""


def psnr(images: Tensor, reconstructions: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio of every picture in dB; infinite for equal pictures.

    Args:
        images: (B,3,H,W) float32 in [0, 1].
        reconstructions: the same shape and range.

    Returns:
        (B,) float32.

    Raises:
        ValueError: the shapes differ or are no batches of pictures.
    """
    from torchmetrics.functional.image import peak_signal_noise_ratio  # slow to import

    _require_pairs(images, reconstructions)
    per_image: Tensor = peak_signal_noise_ratio(
        reconstructions, images, data_range=1.0, reduction="none", dim=(1, 2, 3)
    )
    return per_image


def ssim(images: Tensor, reconstructions: Tensor) -> Tensor:
    """Return the structural similarity of every picture: 1 for equal pictures (Wang et al. 2004, window 11, σ 1.5).

    Args and Raises are those of `psnr`.

    Returns:
        (B,) float32.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure  # slow to import

    _require_pairs(images, reconstructions)
    values = structural_similarity_index_measure(reconstructions, images, data_range=1.0, reduction="none")
    per_image: Tensor = values.reshape(len(images))
    return per_image


def ms_ssim(images: Tensor, reconstructions: Tensor) -> Tensor | None:
    """Return the multi-scale structural similarity of every picture (Wang, Simoncelli and Bovik 2003).

    The standard five scales need a shorter side of 176 pixels. Smaller pictures are compared on the finest
    scales that fit (four from 99, three from 44, two from 22, one from 11), with their weights renormalised to
    sum to 1, so values of different sizes are not comparable.

    Args and Raises are those of `psnr`.

    Returns:
        (B,) float32, or None for pictures too small for one scale.
    """
    from torchmetrics.functional.image import multiscale_structural_similarity_index_measure  # slow to import

    _require_pairs(images, reconstructions)
    n_scales = _n_scales(min(images.shape[2:]))
    if n_scales == 0:
        return None
    weights = _MS_SSIM_WEIGHTS[:n_scales]
    values = multiscale_structural_similarity_index_measure(
        reconstructions,
        images,
        data_range=1.0,
        reduction="none",
        betas=tuple(weight / sum(weights) for weight in weights),
        normalize="relu",
    )
    per_image: Tensor | None = values.reshape(len(images))
    return per_image


@dataclass(frozen=True, kw_only=True)
class CodeUsage:
    """How evenly tokens are used."""

    used: int
    """Number of different tokens seen."""
    perplexity: float
    """exp(entropy): the size of an evenly used vocabulary of the same entropy; 1 … V."""
    entropy: float
    """Entropy of the tokens' frequencies (unigram) in nats: 0 … ln V."""


def code_usage(tokens: Tensor, vocab_size: int) -> CodeUsage:
    """Return how tokens of any shape use a vocabulary.

    Raises:
        ValueError: there are no tokens, or some are not in 0 … vocab_size-1.
    """
    if tokens.numel() == 0:
        raise ValueError("code_usage was given no tokens, expected at least one")
    tokens = tokens.cpu()  # once: every number below would wait for a GPU
    low, high = (int(value) for value in tokens.aminmax())
    if low < 0 or high >= vocab_size:
        raise ValueError(f"code_usage was given tokens from {low} to {high}, expected 0 … {vocab_size - 1}")
    counts = torch.bincount(tokens.flatten(), minlength=vocab_size).double()
    entropy = float(torch.special.entr(counts / counts.sum()).sum())
    return CodeUsage(used=int((counts > 0).sum()), perplexity=math.exp(entropy), entropy=entropy)


def bits_per_pixel(n_tokens: int, vocab_size: int, n_pixels: int) -> float:
    """Return the bits that n_tokens tokens take, each of log2(vocab_size) bits, per pixel: 0.203 in the paper."""
    return n_tokens * math.log2(vocab_size) / n_pixels


def _require_pairs(images: Tensor, reconstructions: Tensor) -> None:
    if images.shape != reconstructions.shape or images.ndim != 4 or images.shape[0] == 0:
        raise ValueError(
            f"the pictures have the shape {tuple(images.shape)} and the reconstructions "
            f"{tuple(reconstructions.shape)}, expected two equal shapes (batch, 3, height, width)"
        )


def _n_scales(side: int) -> int:
    """Return the largest number of scales whose coarsest picture holds a window, and that torchmetrics accepts.

    The coarsest of n has the side side // 2^(n-1); torchmetrics wants side // (n-1)² to hold the window, too.
    """
    counts = range(1, len(_MS_SSIM_WEIGHTS) + 1)
    fitting = [n for n in counts if side // max(2 ** (n - 1), (n - 1) ** 2) >= _SSIM_WINDOW]
    return max(fitting, default=0)
