"""Pictures as CLIP sees them: a square of its size, with its mean and deviation.

Letters: B batch  C channels  H, W pixels
"""

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from dvae.images import to_tensor

PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)
MAX_RESIZED_SIDE = 1024
"""Pictures of twice this side and more are reduced by a whole factor before CLIP's own resizing."""


def clip_view(image: Image.Image, size: int) -> Tensor:
    """Return the centre square of an RGB picture as CLIP sees it, float32 (3, size, size) in [0, 1].

    All pictures reach CLIP this way, so a PNG has the score of its pixels before rounding to 8 bits, nearly.
    """
    side = min(image.size)
    left, top = ((length - side) // 2 for length in image.size)
    square = image.crop((left, top, left + side, top + side))
    # as float32 a picture takes four times its memory, so one far larger than what CLIP sees is reduced first
    factor = side // max(MAX_RESIZED_SIDE, 2 * size)
    if factor > 1:
        square = square.reduce(factor)
    return resized_pixels(to_tensor(square)[None], size)[0]


def resized_pixels(images: Tensor, size: int) -> Tensor:
    """Resize and crop pictures to CLIP's size: (B, 3, H, W) in [0, 1] to float32 (B, 3, size, size) in [0, 1].

    The shorter side is resized to size (bicubic, antialiased) and the centre is cropped. Bicubic
    interpolation overshoots at edges, so the result is clamped to [0, 1], as 8-bit pictures are. Pictures that
    have the size already stay as they are.
    """
    pixels_BCHW = images.float()
    height, width = images.shape[2:]
    shorter = min(height, width)
    if shorter != size:
        resized = (size * height // shorter, size * width // shorter)
        pixels_BCHW = F.interpolate(pixels_BCHW, resized, mode="bicubic", antialias=True).clamp(0, 1)
    top = round((pixels_BCHW.shape[2] - size) / 2)
    left = round((pixels_BCHW.shape[3] - size) / 2)
    return pixels_BCHW[:, :, top : top + size, left : left + size]


def normalised_pixels(images: Tensor, size: int) -> Tensor:
    """Return `resized_pixels` with CLIP's mean and deviation, (B, 3, size, size)."""
    pixels_BCHW = resized_pixels(images, size)
    on_cpu = torch.tensor([PIXEL_MEAN, PIXEL_STD], device="cpu")[:, :, None, None]
    mean_C11, std_C11 = on_cpu.to(pixels_BCHW.device, non_blocking=True)
    return (pixels_BCHW - mean_C11) / std_C11


def check_images(images: Tensor) -> None:
    """Raise ValueError unless images are float (B, 3, H, W), B at least 1, and, on the CPU, in [0, 1]."""
    if images.ndim != 4 or images.shape[1] != 3 or images.numel() == 0 or not images.is_floating_point():
        raise ValueError(
            f"images are {images.dtype} of shape {tuple(images.shape)}; expected float (B, 3, H, W) in [0, 1]"
        )
    if images.device.type != "cpu":  # looking at the values would wait for all queued work
        return
    low, high = images.detach().aminmax()
    # written so that NaN fails too
    if not (low >= 0 and high <= 1):
        raise ValueError(
            f"images have values from {float(low):.3g} to {float(high):.3g}; expected [0, 1], neither "
            "0 … 255 nor normalised: CLIP's mean and deviation are applied inside"
        )
