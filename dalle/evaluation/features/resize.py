"""Pictures of bytes to 299 × 299, exactly as three programs do: a number is of its resize as much as of its network.

Letters: B batch  H, W pixels  S side of the result
"""

from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

Resize = Literal["tf1", "pil-bilinear", "pil-bicubic-float"]
SIDE = 299
"""Pixels per side that Inception v3 reads."""


def resized(images: Tensor, resize: Resize, side: int = SIDE) -> Tensor:
    """Resize pictures to a square as float32 (B,3,S,S) in 0 … 255.

    - "tf1": bilinear without antialiasing, on TensorFlow 1's grid, whose pixel 0 is at the corner of the picture. That
      of the original network, and of torch-fidelity.
    - "pil-bilinear": Pillow's, antialiased, rounded to bytes. That of DM-GAN's two scripts.
    - "pil-bicubic-float": Pillow's bicubic of each channel, antialiased, in floating point. That of clean-fid.

    Args:
        images: uint8 (B,3,H,W).
        resize: which.
        side: S.

    Raises:
        ValueError: the images are no uint8 (B,3,H,W).
    """
    check_bytes(images)
    if resize == "tf1":
        return _tf1(images, side)
    arrays = images.permute(0, 2, 3, 1).cpu().numpy()
    if resize == "pil-bilinear":
        pixels = [np.asarray(Image.fromarray(each).resize((side, side), Image.Resampling.BILINEAR)) for each in arrays]
    else:
        pixels = [_bicubic(each.astype(np.float32), side) for each in arrays]
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).to(images.device, torch.float32)


def check_bytes(images: Tensor) -> None:
    """Raise ValueError unless images are uint8 (B,3,H,W), B at least 1."""
    if images.ndim != 4 or images.shape[1] != 3 or images.numel() == 0 or images.dtype != torch.uint8:
        raise ValueError(
            f"images are {images.dtype} of shape {tuple(images.shape)}; expected uint8 (B, 3, H, W): "
            "round floats in [0, 1] with to_bytes"
        )


def to_bytes(images: Tensor) -> Tensor:
    """Round float pictures in [0, 1] of any shape to uint8, as a PNG of them holds; values outside are clamped."""
    return (images.detach().float().clamp(0, 1) * 255).round().to(torch.uint8)


def _tf1(images_BCHW: Tensor, side: int) -> Tensor:
    pixels = images_BCHW.float()
    for dim in (3, 2):
        length = pixels.shape[dim]
        # in float32, as the original: which pixels are mixed depends on the rounding
        places_S = torch.arange(side, dtype=torch.float32, device=pixels.device) * torch.tensor(
            length / side, dtype=torch.float32
        )
        low_S = places_S.long()
        part_S = (places_S - low_S).view(-1, *[1] * (3 - dim))
        low = pixels.index_select(dim, low_S)
        high = pixels.index_select(dim, (low_S + 1).clamp(max=length - 1))
        pixels = low + (high - low) * part_S
    return pixels


def _bicubic(picture_HW3: np.ndarray, side: int) -> np.ndarray:
    channels = [
        np.asarray(Image.fromarray(picture_HW3[:, :, c]).resize((side, side), Image.Resampling.BICUBIC))
        for c in range(3)
    ]
    return np.stack(channels, axis=2).clip(0, 255)
