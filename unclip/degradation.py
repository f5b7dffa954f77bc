"""Small pictures as upsamplers are trained on: resized, and made worse, so that a decoder's faults are no surprise.

Sources: Ramesh et al. 2022 (arXiv 2204.06125), 2.1 and C: a Gaussian blur of 64² pictures (Saharia et al. 2021, SR3:
kernel 3, σ 0.6), BSR of 256² ones; Zhang et al. 2021 (BSRGAN, arXiv 2103.14006) for the latter: blurs, resizing, noise
and JPEG in random order.

Deviation: here BSR is made of what Pillow has. Its blurs are Gaussian, along the axes, and it resizes twice; the
original also has blurs at other angles, camera noise, and a wider range of everything. Which variant the paper used is
not told; ranges here are those of the mild one.
"""

import io
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageFilter
from torch import Tensor

from dvae.images import to_tensor

_BLURRED = 0.5
"""Share of pictures that are blurred, where blur is all that is done to them."""
_SIGMA, _KERNEL = 0.6, 3
_JPEG_QUALITY = (80, 95)
_NOISE = (1.0, 8.0)
"""Standard deviation, of 255."""
_BLUR_SIGMA = (0.1, 1.2)
_RESIZING = (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC, Image.Resampling.BOX)

Degrading = Callable[[Image.Image, np.random.Generator], Image.Image]


def small_picture(picture: Image.Image, size: int, degradation: str, rng: np.random.Generator) -> Image.Image:
    """Return a square picture in small, degraded.

    Args:
        picture: RGB, square, not smaller than `size`.
        size: side of the result in pixels.
        degradation: one of `KINDS`.
        rng: every choice comes from it.
    """
    if degradation == "bsr":
        picture = _bsr(picture, size, rng)
    return KINDS[degradation](shrunk(picture, size), rng)


def shrunk(picture: Image.Image, size: int) -> Image.Image:
    """Return a square picture in `size` pixels a side, each the mean of the pixels that it stands for."""
    return picture.resize((size, size), Image.Resampling.BOX)


def crop_pair(
    large: Image.Image, small: Image.Image, crop: int, rng: np.random.Generator | None
) -> tuple[Tensor, Tensor]:
    """Return the same crop of a large picture and of a small one, float32 (3, H, W) and (3, h, w) in [0, 1].

    Args:
        large: RGB, square.
        small: the same picture in small; its side divides that of the large one.
        crop: side of the crop of the large picture in pixels, a multiple of how many times larger it is.
        rng: of the place; None for the centre.
    """
    factor = large.width // small.width
    places = (small.width - crop // factor) + 1
    left, top = (places // 2, places // 2) if rng is None else (int(place) for place in rng.integers(places, size=2))
    side = crop // factor
    cut_small = small.crop((left, top, left + side, top + side))
    cut_large = large.crop((left * factor, top * factor, left * factor + crop, top * factor + crop))
    return to_tensor(cut_large), to_tensor(cut_small)


def _nothing(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    return picture


def _half_blurred(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    if rng.random() >= _BLURRED:
        return picture
    places = np.arange(_KERNEL) - _KERNEL // 2
    weights = np.exp(-(places**2) / (2 * _SIGMA**2))
    kernel = np.outer(weights, weights).flatten()
    # Pillow's kernels leave a border as it is: it is blurred beyond the picture's edge, and cut off
    padded = Image.fromarray(np.pad(np.asarray(picture), ((2, 2), (2, 2), (0, 0)), mode="edge"))
    blurred = padded.filter(ImageFilter.Kernel((_KERNEL, _KERNEL), kernel.tolist(), scale=float(kernel.sum())))
    return blurred.crop((2, 2, picture.width + 2, picture.height + 2))


def _bsr(picture: Image.Image, size: int, rng: np.random.Generator) -> Image.Image:
    """Return a picture between its own size and `size`, after blurs, resizing, noise and JPEG in random order."""

    def blurred(image: Image.Image) -> Image.Image:
        return image.filter(
            ImageFilter.GaussianBlur(tuple(float(sigma) for sigma in rng.uniform(*_BLUR_SIGMA, size=2)))
        )

    def resized(image: Image.Image) -> Image.Image:
        side = int(rng.integers(size, max(size, picture.width), endpoint=True))
        return image.resize((side, side), _RESIZING[int(rng.integers(len(_RESIZING)))])

    steps: list[Callable[[Image.Image], Image.Image]] = [
        blurred,
        blurred,
        resized,
        resized,
        lambda image: _noisy(image, rng),
        lambda image: _jpeg(image, rng),
    ]
    for step in rng.permutation(len(steps)):
        picture = steps[int(step)](picture)
    return picture


def _noisy(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Return a picture with Gaussian noise, half of the time the same for red, green and blue."""
    pixels = np.asarray(picture).astype(np.float32)
    shape = pixels.shape if rng.random() < 0.5 else (*pixels.shape[:2], 1)
    noisy = pixels + rng.normal(0, rng.uniform(*_NOISE), shape)
    return Image.fromarray(noisy.round().clip(0, 255).astype(np.uint8))


def _jpeg(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=int(rng.integers(*_JPEG_QUALITY, endpoint=True)))
    with Image.open(file, formats=["JPEG"]) as opened:
        return opened.convert("RGB")


KINDS: dict[str, Degrading] = {"none": _nothing, "blur": _half_blurred, "bsr": _nothing}
"""What is done to small pictures: nothing; a blur of half of them; BSR, which is done before they are small."""
