"""What published decoder-only models do otherwise than the paper's, as data.

Text ids are the tokenizer's; where pads belong to positions, the pad of text position t is the id text_vocab + t.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from dalle.attention import Kind
from dalle.model import DALLEConfig


@dataclass(frozen=True, kw_only=True)
class Variant:
    """How a family of published models is computed.

    In all of them no start of image is fed, and image token i is fed with the place of the token itself. The first
    token is predicted by the last text position, or, `shifted`, by image position 0, which the last text id is fed to.
    """

    shifted: bool = False
    """The start of text stands once more in front of the text, and moves its last id to image position 0."""
    sandwich: bool = False
    """Layer norms at the end of both residual branches, too (CogView, Ding et al. 2021)."""
    gelu: Literal["none", "tanh"] = "none"
    """Approximation of GELU, in torch's words."""
    head_bias: bool = False
    n_final_norms: int = 1
    """Layer norms before the heads."""
    spare_text_places: int = 0
    """Text position embeddings beyond the text."""
    places: Literal["row and column", "table"] = "row and column"
    """Embeddings of the grid's rows and columns, or one for each image position."""
    conv: Kind = "conv"
    """What becomes of the conv window at the border of the grid."""
    pads_of_positions: bool = True
    """Each text position has a pad of its own; else there is one id for all."""
    start: int | None = None
    """Text id before each caption."""
    end: int | None = None
    """Text id after each caption that leaves room for it."""


_RUDALLE_V3 = Variant(
    sandwich=True,
    gelu="tanh",
    head_bias=True,
    n_final_norms=2,
    spare_text_places=1,
    conv="conv cut",
    start=2,
    end=3,
)
VARIANTS: dict[str, Variant] = {
    "ruDALLE v3": _RUDALLE_V3,
    "ruDALLE v2": replace(_RUDALLE_V3, shifted=True, conv="conv torus"),
    "minDALL-E": Variant(places="table", pads_of_positions=False),
}
"""By their names in a configuration: ai-forever/ru-dalle at 0255cec, kakaobrain/minDALL-E at e548007."""


@dataclass(frozen=True, kw_only=True)
class VariantConfig(DALLEConfig):
    """Sizes of a published model, and which it is."""

    variant: str = "ruDALLE v3"
    """One of `VARIANTS`."""
    pad: int = 0
    """Text id of all pads, where positions have none of their own."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.variant not in VARIANTS:
            raise ValueError(f"unknown variant {self.variant!r}: expected {', '.join(VARIANTS)}")
        if not 0 <= self.pad < self.text_vocab:
            raise ValueError(f"pad ({self.pad}) must be a text id, 0 to {self.text_vocab - 1}")

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The attention kind of every layer."""
        conv = VARIANTS[self.variant].conv
        return tuple(conv if kind == "conv" else kind for kind in super().kinds)

    @property
    def n_text_ids(self) -> int:
        """Text ids: the tokenizer's, and the pads of positions."""
        return self.text_vocab + (self.text_len if VARIANTS[self.variant].pads_of_positions else 0)

    @property
    def max_caption(self) -> int:
        """Tokens of a caption that are read; the rest is cut."""
        return self.text_len - (VARIANTS[self.variant].start is not None)

    def text_rows(self, captions: Sequence[Sequence[int]]) -> Tensor:
        """Return the text ids of the tokens of B captions, int64 (B, T)."""
        variant = VARIANTS[self.variant]
        start = [] if variant.start is None else [variant.start]
        end = [] if variant.end is None else [variant.end]
        pads_T = torch.full((self.text_len,), self.pad, device="cpu")
        if variant.pads_of_positions:
            pads_T = torch.arange(self.text_vocab, self.text_vocab + self.text_len, device="cpu")
        rows_BT = pads_T.repeat(len(captions), 1)
        for row_T, ids in zip(rows_BT, captions, strict=True):
            used = [*start, *ids, *end][: self.text_len]
            row_T[: len(used)] = torch.tensor(used, dtype=torch.int64, device="cpu")
        return rows_BT

    def null_caption(self) -> Tensor:
        """Return the text ids of an empty caption, int64 (T,)."""
        return self.text_rows([[]])[0]
