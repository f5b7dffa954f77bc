"""Reconstructions by a dVAE, and how close they are to the pictures.

Letters: B batch  H, W pixels
"""

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass

import torch
from PIL import Image
from torch import Tensor

from dalle.data.pictures import in_batches
from dvae.codec import Codec
from dvae.images import resize_and_crop, to_image, to_tensor
from dvae.metrics import bits_per_pixel, ms_ssim, psnr, ssim

BATCH_SIZE = 8


@dataclass(frozen=True, kw_only=True)
class Measures:
    """Measures of one picture, or the means of several."""

    psnr: float
    """Peak signal-to-noise ratio in dB; higher is closer."""
    ssim: float
    """Structural similarity, at most 1."""
    ms_ssim: float | None
    """The same at several scales; None for pictures too small for it."""
    bits_per_pixel: float
    """Bits of the tokens, log2 of the vocabulary each, per pixel of the pictures that are measured."""
    codes_used: float
    """Different tokens in the picture."""


@dataclass(frozen=True, kw_only=True)
class Reconstruction:
    """A picture beside its reconstruction."""

    name: str
    original: Image.Image
    """Resized and cropped to the size at which it was encoded."""
    image: Image.Image
    """Decoded from the tokens of the original."""
    measures: Measures


def reconstructions(dvae: Codec, pictures: Iterable[tuple[str, Image.Image]], size: int) -> Iterator[Reconstruction]:
    """Encode and decode pictures, a few at a time.

    Args:
        dvae: the model; it computes on the device it is on.
        pictures: names and pictures of any size.
        size: pixels per side to resize and crop to, a multiple of the downsampling.

    Raises:
        ValueError: the size is not such a multiple.
    """
    if size < 1 or size % dvae.config.downsampling:
        raise ValueError(
            f"the size is {size}; it must be a multiple of {dvae.config.downsampling}, "
            "the pixels per side that one token stands for"
        )
    resized = ((name, resize_and_crop(picture, size)) for name, picture in pictures)
    for batch in in_batches(resized, BATCH_SIZE):
        yield from _reconstruct(dvae, batch)


def mean(measures: Iterable[Measures]) -> Measures:
    """Return the mean of each measure; there must be at least one picture."""
    rows = [asdict(one) for one in measures]
    # all are of the same size, so a measure is missing from all or from none
    means = {name: sum(row[name] for row in rows) / len(rows) for name, value in rows[0].items() if value is not None}
    return Measures(**{"ms_ssim": None, **means})


@torch.no_grad()
def _reconstruct(dvae: Codec, batch: list[tuple[str, Image.Image]]) -> Iterator[Reconstruction]:
    device = next(dvae.parameters()).device
    images_BCHW = torch.stack([to_tensor(image) for _, image in batch]).to(device)
    tokens_BYX = dvae.encode(images_BCHW)
    decoded_BCHW = dvae.decode(tokens_BYX)
    bits = bits_per_pixel(tokens_BYX[0].numel(), dvae.config.vocab_size, images_BCHW[0, 0].numel())
    each = measured(images_BCHW, decoded_BCHW, tokens_BYX, bits)
    for (name, original), decoded_CHW, measures in zip(batch, decoded_BCHW, each, strict=True):
        yield Reconstruction(name=name, original=original, image=to_image(decoded_CHW), measures=measures)


def measured(originals: Tensor, decoded: Tensor, tokens: Tensor, bits: float) -> list[Measures]:
    """Measure a batch.

    Args:
        originals: (B,3,H,W) float32 in [0, 1].
        decoded: the same shape and range.
        tokens: integers (B,Y,X).
        bits: per pixel.
    """
    psnr_B, ssim_B = psnr(originals, decoded), ssim(originals, decoded)
    ms_ssim_B = ms_ssim(originals, decoded)
    return [
        Measures(
            psnr=float(psnr_B[i]),
            ssim=float(ssim_B[i]),
            ms_ssim=None if ms_ssim_B is None else float(ms_ssim_B[i]),
            bits_per_pixel=bits,
            codes_used=torch.unique(tokens_YX).numel(),
        )
        for i, tokens_YX in enumerate(tokens)
    ]
