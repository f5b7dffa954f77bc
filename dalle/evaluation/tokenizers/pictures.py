"""Sheets of a comparison: a column for each tokenizer, errors as maps, crops pixel by pixel, and what codes draw."""

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image

from dalle.evaluation.tokenizers.codes import FLAT, SHOWN_CODES, by_frequency, drawn, mosaic
from dalle.evaluation.tokenizers.comparison import Compared, Standing
from dalle.output.sheets import MAX_PAIR_CELL, MIN_CELL, Section, contact_sheet
from dvae.metrics import CodeUsage

WHITE_ERROR = 64
"""Mean error of a pixel's channels, of 255, that is white on an error map."""
LEAST_ENLARGED = 4
"""Times that a crop is enlarged at least."""


def comparison_sheet(shown: Sequence[Compared], names: Sequence[str]) -> Image.Image:
    """Draw pictures in rows: the original, then a column for each tokenizer.

    Raises:
        ValueError: no pictures.
    """
    images, labels = [], []
    for one in shown:
        images += [one.original, *one.images]
        labels += [f"original\n{one.name.rpartition('/')[2]}"]
        labels += [f"{name}\n{m.psnr:.2f} dB" for name, m in zip(names, one.measures, strict=True)]
    title = "original, then by tokenizer"
    return contact_sheet([Section("", images, labels)], title=title, columns=1 + len(names), largest_cell=MAX_PAIR_CELL)


def worst_sheet(worst: Sequence[Compared], names: Sequence[str]) -> Image.Image:
    """Draw pictures three times: whole, where they differ most enlarged pixel by pixel, and the errors as maps.

    Raises:
        ValueError: no pictures.
    """
    sections = [_section(one, names) for one in worst]
    return contact_sheet(sections, title="worst pictures", columns=1 + len(names), largest_cell=MAX_PAIR_CELL)


def _section(one: Compared, names: Sequence[str]) -> Section:
    size = one.original.width
    cell = max(size, MIN_CELL)
    errors = [error_map(one.original, image) for image in one.images]
    side = crop_side(size)
    left, top = worst_place(errors, side)
    box = (left, top, left + side, top + side)
    crops = [image.crop(box).resize((cell, cell), Image.Resampling.NEAREST) for image in (one.original, *one.images)]
    place = f"{side}x{side} pixels at {left}, {top}"
    blank = Image.new("RGB", (size, size), "white")
    images = [one.original, *one.images, *crops, blank, *errors]
    labels = ["original", *(f"{name}\n{m.psnr:.2f} dB" for name, m in zip(names, one.measures, strict=True))]
    labels += [place, *["the same"] * len(names), "", *(f"error of {name}" for name in names)]
    return Section(f"{one.name}: {one.psnr:.2f} dB in the mean", images, labels)


def error_map(original: Image.Image, image: Image.Image) -> Image.Image:
    """Return the mean absolute error of each pixel's channels in grey; `WHITE_ERROR` and more is white."""
    difference = np.abs(np.asarray(original, dtype=np.float32) - np.asarray(image, dtype=np.float32)).mean(axis=2)
    return Image.fromarray((difference * (255 / WHITE_ERROR)).clip(0, 255).astype(np.uint8))


def crop_side(size: int) -> int:
    """Return the side of crops of pictures of a size: a power of two, for whole enlarged pixels."""
    largest = max(size, MIN_CELL) // LEAST_ENLARGED
    return int(2 ** math.floor(math.log2(max(1, min(largest, size)))))


def worst_place(errors: Sequence[Image.Image], side: int) -> tuple[int, int]:
    """Return left and top of the side × side pixels in which maps of one size have the largest error together."""
    total = np.sum([np.asarray(one, dtype=np.float64) for one in errors], axis=0)
    sums = np.pad(total, ((1, 0), (1, 0))).cumsum(axis=0).cumsum(axis=1)
    windows = sums[side:, side:] - sums[:-side, side:] - sums[side:, :-side] + sums[:-side, :-side]
    top, left = np.unravel_index(int(windows.argmax()), windows.shape)
    return int(left), int(top)


def codes_sheet(standing: Standing) -> Image.Image:
    """Draw what each code of a tokenizer draws: alone, and in a flat grid, the most used first."""
    codec = standing.contender.codec
    order_V, counts_V = by_frequency(standing.tokens, codec.config.vocab_size)
    shown = order_V[:SHOWN_CODES]
    n_used = min(standing.rates.usage.used, len(shown))
    panels = [mosaic(drawn(codec, shown, side=side), n_used=n_used) for side in (1, FLAT)]
    of_all = f"the {len(shown):,} most used of {len(order_V):,} codes" if len(shown) < len(order_V) else "all codes"
    labels = [
        f"{of_all}, each decoded alone: one token",
        f"the same, in a flat grid of {FLAT}x{FLAT} such tokens",
    ]
    heading = f"{standing.contender.name}: {usage_line(standing.rates.usage, len(order_V))}; the most used first, "
    heading += f"in rows: the first stands for {float(counts_V[0] / counts_V.sum()):.1%} of the tokens"
    if n_used < len(shown):
        heading += "; those on red are not used"
    return contact_sheet([Section(heading, panels, labels)], columns=2, largest_cell=panels[0].width)


def usage_line(usage: CodeUsage, vocab_size: int) -> str:
    """Return how codes are used, in words."""
    return f"{usage.used:,} of {vocab_size:,} codes used, perplexity {usage.perplexity:.1f}"
