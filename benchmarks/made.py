"""Captions and photographs made for measuring, so that a benchmark needs no data: as many words, and as many bytes,
as real ones.

Captions are drawn from 20,000 made-up words as frequent as Zipf's law has it, about ten to a caption; pictures are
smooth noise of several sizes with a grain, about 35 kB as JPEG, like photographs.
"""

import io
from collections.abc import Iterator

import numpy as np
from PIL import Image

N_WORDS = 20_000
SIDE = 256
_SYLLABLES = [consonant + vowel for consonant in "bcdfghjklmnprstvwz" for vowel in "aeiou"]


def captions(n: int, seed: int = 0) -> list[str]:
    """Return captions of 4 to 18 words."""
    rng = np.random.default_rng(seed)
    words = ["".join(rng.choice(_SYLLABLES, rng.integers(1, 5))) for _ in range(N_WORDS)]
    chances = 1 / np.arange(1, N_WORDS + 1)
    drawn = rng.choice(N_WORDS, size=(n, 18), p=chances / chances.sum())
    lengths = rng.integers(4, 19, n)
    return [" ".join(words[i] for i in row[:length]) for row, length in zip(drawn, lengths, strict=True)]


def pictures(n: int, seed: int = 0) -> Iterator[bytes]:
    """Yield JPEG files, 4:3 with a shorter side of 256 pixels, as `--resize_mode keep_ratio` downloads leave them."""
    rng = np.random.default_rng(seed)
    width = SIDE * 4 // 3
    for _ in range(n):
        picture = rng.normal(0, 8, (SIDE, width, 3))
        for size in (4, 16, 64):
            coarse = Image.fromarray(rng.integers(0, 256, (size, size * 4 // 3, 3), dtype=np.uint8))
            picture += (np.asarray(coarse.resize((width, SIDE), Image.Resampling.BICUBIC)) - 128.0) / (size**0.5 / 2)
        file = io.BytesIO()
        Image.fromarray((picture + 128).clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
        yield file.getvalue()
