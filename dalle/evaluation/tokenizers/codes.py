"""What each code draws, and where codes are used.

Letters: N pictures  Y,X grid of tokens  V vocabulary  K codes
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from dvae.codec import Codec
from dvae.images import to_image

FLAT = 4
"""Tokens along a side of the flat grid that a code is drawn in."""
SHOWN_CODES = 1024
"""Codes on a sheet at most, the most used ones: 32 rows of 32."""
CODES_AT_ONCE = 64
UNUSED = (190, 30, 30)
"""Colour under the tiles of codes that no picture uses."""


def by_frequency(tokens: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
    """Return all codes from the most to the least used (V,), the smaller number first, and their counts (V,)."""
    counts_V = torch.bincount(tokens.flatten(), minlength=vocab_size)
    order_V = torch.argsort(counts_V, descending=True, stable=True)
    return order_V, counts_V[order_V]


@torch.no_grad()
def drawn(codec: Codec, codes: Tensor, *, side: int) -> list[Image.Image]:
    """Return what the decoder makes of grids of side × side tokens that are all the same, one for each of the codes.

    With side 1 a code is decoded alone: what is around it, zeros as at a picture's edge, has its part in the picture.

    Args:
        codec: the model; it computes on the device it is on.
        codes: int64 (K,).
        side: tokens along a side.
    """
    device = next(codec.parameters()).device
    pictures: list[Image.Image] = []
    for some_K in torch.split(codes, CODES_AT_ONCE):
        grids_KYX = some_K[:, None, None].expand(-1, side, side).contiguous().to(device)
        pictures += [to_image(image) for image in codec.decode(grids_KYX)]
    return pictures


def mosaic(tiles: Sequence[Image.Image], *, n_used: int, tile: int = 32, gap: int = 2) -> Image.Image:
    """Return square tiles in rows, as wide as high, each enlarged by whole pixels as far as it fits, or reduced.

    Args:
        tiles: at least one; the first `n_used` are in use, the place of each of the others is coloured.
        n_used: see there.
        tile: side of a place in pixels.
        gap: pixels between places.
    """
    columns = math.ceil(math.sqrt(len(tiles)))
    rows = math.ceil(len(tiles) / columns)
    sheet = Image.new("RGB", (columns * (tile + gap), rows * (tile + gap)), "white")
    for i, image in enumerate(tiles):
        corner = i % columns * (tile + gap), i // columns * (tile + gap)
        if i >= n_used:
            sheet.paste(UNUSED, (*corner, corner[0] + tile + gap, corner[1] + tile + gap))
        fits = tile // max(image.size)
        side = fits * image.width if fits else tile
        way = Image.Resampling.NEAREST if fits else Image.Resampling.LANCZOS
        sheet.paste(image.resize((side, side), way), (corner[0] + (tile - side) // 2, corner[1] + (tile - side) // 2))
    return sheet


def entropy_by_place(tokens: Tensor, vocab_size: int) -> NDArray[np.float64]:
    """Return how many bits the codes at each place of the grid vary over pictures, float64 (Y,X): 0 … log2 N.

    Args:
        tokens: integers (N,Y,X) in 0 … vocab_size - 1.
        vocab_size: V.
    """
    n_pictures, n_rows, n_columns = tokens.shape
    bits_YX = torch.empty(n_rows, n_columns, dtype=torch.float64)
    first_X = torch.arange(n_columns) * vocab_size
    for y in range(n_rows):  # a row at a time: all places at once would be V numbers for each
        counts = torch.bincount((tokens[:, y].long() + first_X).flatten(), minlength=n_columns * vocab_size)
        shares_XV = counts.view(n_columns, vocab_size).double() / n_pictures
        bits_YX[y] = torch.special.entr(shares_XV).sum(1) / math.log(2)
    found: NDArray[np.float64] = bits_YX.numpy()
    return found
