"""Sizes and options of DALLE-pytorch's transformer (lucidrains/DALLE-pytorch at 58c1e1a, dalle_pytorch.py)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dalle.family.dalle_pytorch.attention import BLOCK, KINDS, Kind
from dalle.stream import Stream


@dataclass(frozen=True, kw_only=True)
class DALLEPytorchConfig:
    """Sizes and options of the transformer; what a file does not say is off."""

    n_layers: int
    """Layers, each an attention and an MLP branch."""
    d_model: int
    """Width of the residual stream."""
    n_heads: int
    """Attention heads."""
    d_head: int
    """Width of one head; heads together may be wider or narrower than the stream."""
    text_len: int
    """Text positions, without the start of text."""
    grid: int
    """Rows, and columns, of image tokens."""
    text_vocab: int
    """Ids of the tokenizer."""
    image_vocab: int
    """Image tokens."""
    kinds: tuple[Kind, ...]
    """The attention of each layer."""
    attention_of_layer: tuple[int, ...]
    """For each layer which attention's weights it has: 0, 1, 2 … where none are shared."""
    mlp_of_layer: tuple[int, ...]
    """For each layer which MLP's weights it has."""
    has_own_pads: bool = True
    """Whether each text position has a pad of its own, since version 0.9.0; else id 0 is the pad, and hidden."""
    is_reversible: bool = False
    """Whether the two branches of a layer add to two streams in turn, whose mean is the output."""
    is_stable: bool = False
    """Whether the output is divided by its largest component before the head."""
    shifts_tokens: bool = False
    """Whether parts of the channels come from the position before, of the image also from the row above."""
    rotary: int = 0
    """Components of a head that are rotated by the position; 0 for learnt places."""
    has_sandwich_norms: bool = False
    """Whether a branch's output is normalised, too."""
    has_scales: bool = True
    """Whether a branch's output is scaled by learnt factors, since version 0.8.0."""
    shares_embeddings: bool = False
    """Whether the head's rows are the embeddings."""

    def __post_init__(self) -> None:
        for name in ("n_layers", "d_model", "n_heads", "d_head", "text_len", "text_vocab", "image_vocab"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} ({getattr(self, name)}) must be at least 1")
        for name, values in self._of_layers().items():
            if len(values) != self.n_layers:
                raise ValueError(f"{name} has {len(values)} entries for {self.n_layers} layers")
        if unknown := [kind for kind in self.kinds if kind not in KINDS]:
            raise ValueError(f"unknown attention {unknown[0]!r}: expected {', '.join(KINDS)}")
        for name in ("attention_of_layer", "mlp_of_layer"):
            numbers = getattr(self, name)
            firsts = list(dict.fromkeys(numbers))
            if firsts != list(range(len(firsts))):
                raise ValueError(f"{name} is {numbers}: expected 0, 1, 2 … in the order in which they are first met")
        if len(set(zip(self.attention_of_layer, self.kinds, strict=True))) != len(set(self.attention_of_layer)):
            raise ValueError("layers of different attention share its weights")
        if not 0 <= self.rotary <= self.d_head or self.rotary % 2:
            raise ValueError(f"rotary ({self.rotary}) must be even and at most d_head ({self.d_head})")
        if "sparse" in self.kinds and (self.length % BLOCK or not self.has_own_pads):
            raise ValueError(
                f"sparse attention needs a sequence ({self.length}) of whole blocks of {BLOCK}, and pads of their own"
            )
        _ = self.stream  # raises for sizes that make no stream

    def _of_layers(self) -> dict[str, tuple[object, ...]]:
        names = ("kinds", "attention_of_layer", "mlp_of_layer")
        return {name: getattr(self, name) for name in names}

    @property
    def length(self) -> int:
        """S: start of text, text, and all image tokens but the last."""
        return self.text_len + self.grid**2

    @property
    def stream(self) -> Stream:
        """The layout of what the caller sees: text without its start, and image tokens."""
        return Stream(self.text_len, self.grid)

    @property
    def d_attention(self) -> int:
        """Width of all heads together."""
        return self.n_heads * self.d_head

    @property
    def n_text_ids(self) -> int:
        """Text ids: those of the tokenizer, and the pads."""
        return self.text_vocab + (self.text_len if self.has_own_pads else 0)

    @property
    def max_caption(self) -> int:
        """Tokens of a caption that are read; the rest is cut."""
        return self.text_len

    def text_rows(self, captions: Sequence[Sequence[int]]) -> Tensor:
        """Return the text ids of the tokens of B captions, int64 (B, T).

        Id 0 means two things there: a token of the tokenizer, and no token. It is always read as the latter.
        """
        rows_BT = torch.zeros(len(captions), self.text_len, dtype=torch.int64)
        for row_T, ids in zip(rows_BT, captions, strict=True):
            used = torch.tensor(ids[: self.text_len], dtype=torch.int64)
            row_T[: len(used)] = used
        pads_T = torch.arange(self.text_len) + self.text_vocab
        return torch.where(rows_BT == 0, pads_T, rows_BT) if self.has_own_pads else rows_BT

    def null_caption(self) -> Tensor:
        """Return the text ids of "no caption", int64 (T,)."""
        return self.text_rows([[]])[0]
