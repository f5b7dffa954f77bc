"""Pictures as CLIP sees them: a square of its size, with its mean and deviation.

Letters: B batch  C channels  H, W pixels
"""

from dataclasses import dataclass
from typing import Literal

import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional as F

from dvae.images import to_image, to_tensor

PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)
MAX_RESIZED_SIDE = 1024
"""Pictures of twice this side and more are reduced by a whole factor before CLIP's own resizing."""


MAX_STRETCH = 16
"""Pictures whose longer side is more than this many times the shorter are not resized as a whole: a strip of 8 × 10
million pixels would take more memory than there is."""

Resize = Literal["square", "shortest", "longest", "squash"]
Interpolation = Literal["bicubic", "bilinear"]
_FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


@dataclass(frozen=True)
class View:
    """How a CLIP sees pictures.

    A square of its size comes about in one of these ways:

    - "square": the centre square is cropped first, then resized in floating point. CLIPs trained here see so.
    - "shortest": Pillow resizes 8-bit pixels until the shorter side has the size, and the centre is cropped.
      OpenAI's and most others see so, and these are their pixels to the bit.
    - "longest": Pillow resizes until the longer side has the size, and what is missing is black.
    - "squash": Pillow resizes both sides to the size.
    """

    size: int
    """Side in pixels."""
    resize: Resize = "square"
    interpolation: Interpolation = "bicubic"
    mean: tuple[float, ...] = PIXEL_MEAN
    std: tuple[float, ...] = PIXEL_STD


def clip_view(image: Image.Image, view: View) -> Tensor:
    """Return an RGB picture as CLIP sees it, float32 (3, size, size) in [0, 1].

    All pictures reach CLIP this way. A picture and the PNG saved of it get the same score where Pillow resizes, else
    nearly the same.
    """
    if view.resize != "square":
        return to_tensor(_resized_by_pillow(image, view))
    side = min(image.size)
    left, top = ((length - side) // 2 for length in image.size)
    square = image.crop((left, top, left + side, top + side))
    # as float32 a picture takes four times its memory, so one far larger than what CLIP sees is reduced first
    factor = side // max(MAX_RESIZED_SIDE, 2 * view.size)
    if factor > 1:
        square = square.reduce(factor)
    return resized_pixels(to_tensor(square)[None], view.size)[0]


def _resized_by_pillow(image: Image.Image, view: View) -> Image.Image:
    """Return an RGB picture of CLIP's size, as the transforms of torchvision and open_clip make it."""
    size, filter_ = view.size, _FILTERS[view.interpolation]
    if view.resize == "squash":
        return image.resize((size, size), filter_)
    if view.resize == "longest":
        ratio = max(image.size) / size
        image = image.resize((max(1, round(image.width / ratio)), max(1, round(image.height / ratio))), filter_)
        missing = size - image.width, size - image.height
        border = (missing[0] // 2, missing[1] // 2, (missing[0] + 1) // 2, (missing[1] + 1) // 2)
        return ImageOps.expand(image, border, fill=0)
    shorter = min(image.size)
    width, height = (int(size * side / shorter) for side in image.size)
    left, top = round((width - size) / 2), round((height - size) / 2)
    if max(width, height) > MAX_STRETCH * size:
        scale_x, scale_y = image.width / width, image.height / height
        box = (left * scale_x, top * scale_y, (left + size) * scale_x, (top + size) * scale_y)
        return image.resize((size, size), filter_, box=box)
    return image.resize((width, height), filter_).crop((left, top, left + size, top + size))


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


def normalised_pixels(images: Tensor, view: View) -> Tensor:
    """Return pictures of any size (B, 3, H, W) in [0, 1] as a CLIP computes with them, float32 (B, 3, size, size).

    Where Pillow resizes, pixels are rounded to 8 bits, and no gradient reaches them.
    """
    if view.resize == "square":
        pixels_BCHW = resized_pixels(images, view.size)
    elif images.shape[2:] == (view.size, view.size):
        pixels_BCHW = (images.float() * 255).round() / 255
    else:
        views = [clip_view(to_image(image), view) for image in images]
        pixels_BCHW = torch.stack(views).to(images.device)
    on_cpu = torch.tensor([view.mean, view.std], dtype=torch.float32, device="cpu")[:, :, None, None]
    mean_and_std_2C11 = on_cpu.to(pixels_BCHW.device, non_blocking=True)
    return (pixels_BCHW - mean_and_std_2C11[0]) / mean_and_std_2C11[1]


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
