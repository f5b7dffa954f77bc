"""Which positions see which in DALLE-pytorch's transformer: its kinds of attention as masks.

Sources: lucidrains/DALLE-pytorch at 58c1e1a (dalle_pytorch/attention.py) and its history; for sparse layers also
DeepSpeed at 4a0ec44 (deepspeed/ops/sparse_attention).

The sequence is start of text, T text positions, and the first I - 1 image tokens; W is the width of the grid:

    full               everything before, and itself
    axial_row          all text; of the image its own row
    axial_col          all text; of the image its own column
    conv_like          all text; of the image the 5×5 window that ends in its own cell, since version 1.5.0
    conv_like_centred  all text; of the image the 5×5 window around it, cut at the borders, before
    sparse             blocks of 16 positions, of which DeepSpeed drew some at random; a file may hold them

Text is causal and never sees the image; nothing ever sees what comes later.

Legend: S sequence = T+I  T text positions without the start  I image tokens  N blocks  P prompts
"""

from functools import lru_cache
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

Kind = Literal["full", "axial_row", "axial_col", "conv_like", "conv_like_centred", "sparse"]
KINDS: tuple[Kind, ...] = get_args(Kind)
WINDOW = 5
"""Side of the window of conv layers."""
BLOCK = 16
"""Positions in a block of sparse layers."""


@lru_cache(maxsize=32)
def mask(kind: Kind, text_len: int, grid: int, device: torch.device) -> Tensor:
    """Return who sees whom, bool (S, S): True at [query, key]; do not modify it.

    A sparse layer's is that of a full one, of which `blocks_mask` leaves a part.
    """
    with torch.inference_mode(False):
        position_S = torch.arange(text_len + grid * grid, device=device)
        earlier_SS = position_S[:, None] >= position_S
        if kind in ("full", "sparse"):
            return earlier_SS
        cell_S = position_S - text_len - 1
        is_text_S = cell_S < 0
        row_S, column_S = cell_S.div(grid, rounding_mode="floor"), cell_S.remainder(grid)
        up_SS, left_SS = row_S[:, None] - row_S, column_S[:, None] - column_S
        if kind == "axial_row":
            near_SS = up_SS == 0
        elif kind == "axial_col":
            near_SS = left_SS == 0
        elif kind == "conv_like":
            near_SS = (up_SS < WINDOW) & (left_SS >= 0) & (left_SS < WINDOW)
        else:
            near_SS = (up_SS.abs() <= WINDOW // 2) & (left_SS.abs() <= WINDOW // 2)
        return earlier_SS & (is_text_S | near_SS)


def blocks_mask(layout_NN: Tensor, length: int) -> Tensor:
    """Return who sees whom among the blocks of a sparse layer, bool (S, S), for blocks that are not 0 where seen."""
    seen_SS = (layout_NN != 0).repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
    return seen_SS[:length, :length]


def pads_mask(kind: Kind, text_PT: Tensor, length: int) -> Tensor:
    """Return who may be seen before version 0.9.0, when pads were hidden, bool (P, S, S) or (P, 1, S).

    There id 0 is a pad, wherever it is; in all but full layers it is hidden from the image alone.
    """
    is_word_PS = F.pad(F.pad(text_PT, (1, 0), value=1), (0, length - text_PT.shape[1] - 1), value=1) != 0
    if kind == "full":
        return is_word_PS[:, None]
    is_text_S = torch.arange(length, device=text_PT.device) <= text_PT.shape[1]
    return is_word_PS[:, None] | is_text_S[:, None]
