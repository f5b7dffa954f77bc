"""Sizes of a DALL·E mini, and its text ids."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from dalle.stream import Stream


@dataclass(frozen=True, kw_only=True)
class MiniConfig:
    """Sizes of the model; the defaults are DALL·E mini's, see `MEGA` for the larger one's."""

    encoder_layers: int = 12
    decoder_layers: int = 12
    d_model: int = 1024
    """Width of both residual streams."""
    n_heads: int = 16
    """Attention heads; d_model must be a multiple of it."""
    d_glu: int = 2730
    """Width of the gated layers."""
    text_len: int = 64
    """Text positions, start and end of text included."""
    grid: int = 16
    """Rows, and columns, of image tokens."""
    text_vocab: int = 50_264
    """The tokenizer's vocabulary."""
    n_text_ids: int = 50_264
    """Rows of the text embedding; the published ones have more than are used."""
    image_vocab: int = 16_384
    """Image tokens; only these are predicted."""
    n_image_ids: int = 16_385
    """Rows of the image embedding and of the head."""
    start_of_image: int = 16_384
    """The image id that position 0 is fed."""
    start_of_text: int = 0
    """Text id before a caption."""
    pad: int = 1
    """Text id of what is no text: no position attends to it."""
    end_of_text: int = 2
    """Text id behind a caption."""
    norm_scales: bool = False
    """Whether norms before a matrix have a scale of their own, which the matrix could hold."""

    def __post_init__(self) -> None:
        for name in ("encoder_layers", "decoder_layers", "d_model", "n_heads", "d_glu", "text_vocab", "image_vocab"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} ({getattr(self, name)}) must be at least 1")
        if self.d_model % self.n_heads:
            raise ValueError(f"d_model ({self.d_model}) must be a multiple of n_heads ({self.n_heads})")
        if self.text_len < 3:
            raise ValueError(f"text_len ({self.text_len}) must be at least 3: start, one token and end")
        special = (self.start_of_text, self.pad, self.end_of_text)
        if not 0 <= min(special) <= max(special) < self.n_text_ids or len(set(special)) < len(special):
            raise ValueError(f"start, pad and end of text {special} must be three of the {self.n_text_ids} text ids")
        if self.n_text_ids < self.text_vocab:
            raise ValueError(f"n_text_ids ({self.n_text_ids}) must be at least text_vocab ({self.text_vocab})")
        if self.n_image_ids < self.image_vocab or not 0 <= self.start_of_image < self.n_image_ids:
            raise ValueError(
                f"n_image_ids ({self.n_image_ids}) must hold the {self.image_vocab} image tokens and start of image "
                f"({self.start_of_image})"
            )
        Stream(self.text_len, self.grid)  # raises for sizes that make no stream

    @property
    def stream(self) -> Stream:
        """The numbers of positions."""
        return Stream(self.text_len, self.grid)

    @property
    def n_layers(self) -> int:
        """Layers of both."""
        return self.encoder_layers + self.decoder_layers

    @property
    def d_head(self) -> int:
        """Width of one attention head."""
        return self.d_model // self.n_heads

    @property
    def max_caption(self) -> int:
        """Tokens of a caption that are read; the rest is cut."""
        return self.text_len - 2

    def text_rows(self, captions: Sequence[Sequence[int]]) -> Tensor:
        """Return the text ids of the tokens of B captions, int64 (B, T): start, tokens, end, and pads."""
        rows_BT = torch.full((len(captions), self.text_len), self.pad, dtype=torch.int64, device="cpu")
        for row_T, ids in zip(rows_BT, captions, strict=True):
            row = [self.start_of_text, *ids[: self.max_caption], self.end_of_text]
            row_T[: len(row)] = torch.tensor(row, device="cpu")
        return rows_BT

    def null_caption(self) -> Tensor:
        """Return the text ids of "no caption", int64 (T,): start, end, and pads."""
        return self.text_rows([[]])[0]

    def fitted(self, *, text_vocab: int, image_vocab: int, grid: int) -> Self:
        """Return these sizes for a tokenizer without start, pad and end of its own, and for a codec."""
        return replace(
            self,
            text_vocab=text_vocab,
            n_text_ids=text_vocab + 3,
            start_of_text=text_vocab,
            pad=text_vocab + 1,
            end_of_text=text_vocab + 2,
            image_vocab=image_vocab,
            n_image_ids=image_vocab + 1,
            start_of_image=image_vocab,
            grid=grid,
        )


MINI = MiniConfig()
MEGA = MiniConfig(
    encoder_layers=24,
    decoder_layers=24,
    d_model=2048,
    n_heads=32,
    d_glu=4096,
    n_text_ids=50_272,
    n_image_ids=16_416,
)
"""The published sizes (borisdayma/dalle-mini at f0be4de; kuprel/min-dalle at 73621fb, min_dalle/min_dalle.py)."""
