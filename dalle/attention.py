"""Sparse attention over the stream (Ramesh et al. 2021, §2.2, B.1, Fig 11; Child et al. 2019).

An image position attends to all text positions and to the image positions whose raster distance i - j, with i the
query and j the key, is among the `offsets` of the layer's kind. Only the raster distance counts, so every kind wraps
around at the border of the grid, as the paper's masks do. W is the grid's width:

    row      0 … W            the last W + 1 positions, itself included: 33 of a 32×32 grid
    column   0, W, 2W, …      the same column, itself included
    conv     dr·W + dc ≥ 0    the causal half of a centred k×k window, 0 ≤ dr ≤ k//2 and |dc| ≤ k//2: 61 for k = 11
    dense    0, 1, 2, …       everything before, and itself

Published models stop the conv window at the border of the grid, or wrap it around in both directions:

    conv cut     what is left of the window within the grid
    conv torus   rows and columns both modulo W: early rows stay visible to late ones

Text is causal and never sees the image. `mask` draws this for the whole stream and is the truth; `keys` lists it for
one position. `masked_attention` follows the mask literally and is the reference for the fast paths: sparse_attention.py
for the whole stream, cache.py for one position at a time.

Legend: B batch  S stream = T+I  T text positions  I image positions  D width  H heads  K head dim
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dalle.stream import Stream

PaperKind = Literal["row", "column", "conv", "dense"]
"""The paper's, and dense."""
Kind = Literal[PaperKind, "conv cut", "conv torus"]
KINDS: tuple[PaperKind, ...] = get_args(PaperKind)

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Attention itself, without projections: (q, k, v), each (B, H, S, K) -> (B, H, S, K)."""


def layer_kinds(n_layers: int) -> tuple[PaperKind, ...]:
    """Return the paper's order of attention kinds for a depth: 47 row, 16 column and 1 conv for 64 layers.

    Counted from 1, layer i is a column layer if (i - 2) mod 4 = 0 and else a row layer; the last is the only
    conv layer (B.1).
    """
    if n_layers < 1:
        raise ValueError(f"n_layers ({n_layers}) must be at least 1")
    kinds: list[PaperKind] = ["column" if (i - 2) % 4 == 0 else "row" for i in range(1, n_layers)]
    return (*kinds, "conv")


@lru_cache(maxsize=64)
def offsets(kind: Kind, grid: int, kernel: int) -> tuple[int, ...]:
    """Return the raster distances i - j at which image position i may attend to j, ascending, from 0.

    Args:
        kind: which attention.
        grid: W, the width and height of the image-token grid.
        kernel: odd width of the conv window; the other kinds do not use it.

    Raises:
        ValueError: for an unknown kind or an even kernel.
    """
    n_image = grid * grid
    if kind == "row":
        distances = set(range(grid + 1))
    elif kind == "column":
        distances = set(range(0, n_image, grid))
    elif kind == "conv":
        if kernel < 1 or kernel % 2 == 0:
            raise ValueError(f"the conv kernel must be odd and positive, got {kernel}")
        half = kernel // 2
        distances = {dr * grid + dc for dr in range(half + 1) for dc in range(-half, half + 1)}
    elif kind == "dense":
        distances = set(range(n_image))
    else:
        raise ValueError(f"unknown attention kind {kind!r}: expected one of {', '.join(KINDS)}")
    return tuple(sorted(d for d in distances if 0 <= d < n_image))


def keys(kind: Kind, position: int, grid: int, kernel: int = 11) -> list[int]:
    """Return the image positions that image position `position` may attend to, ascending, itself last."""
    return [position - d for d in reversed(offsets(kind, grid, kernel)) if d <= position]


def image_mask(kind: Kind, grid: int, kernel: int, device: torch.device | str = "cpu") -> Tensor:
    """Return which image positions may attend to which, bool (I, I): True at [query, key]."""
    position_I = torch.arange(grid * grid, device=device)
    distance_II = position_I[:, None] - position_I
    if kind in ("conv cut", "conv torus"):
        apart_2II = torch.stack([position_I // grid, position_I % grid])
        apart_2II = (apart_2II[:, :, None] - apart_2II[:, None, :]).abs()
        if kind == "conv torus":
            apart_2II = torch.minimum(apart_2II, grid - apart_2II)
        return (distance_II >= 0) & (apart_2II <= kernel // 2).all(dim=0)
    allowed_I = torch.zeros_like(position_I, dtype=torch.bool)
    allowed_I[list(offsets(kind, grid, kernel))] = True
    return (distance_II >= 0) & allowed_I[distance_II.clamp(min=0)]


def mask(kind: Kind, text_len: int, grid: int, kernel: int = 11, device: torch.device | str = "cpu") -> Tensor:
    """Return who may attend to whom, bool (S, S): True at [query, key] where attention is allowed."""
    S = Stream(text_len, grid).length
    mask_SS = torch.ones(S, S, dtype=torch.bool, device=device).tril()
    mask_SS[text_len:, text_len:] = image_mask(kind, grid, kernel, device)
    return mask_SS


@lru_cache(maxsize=32)
def stored_mask(kind: Kind, text_len: int, grid: int, kernel: int, device: torch.device) -> Tensor:
    """Return `mask`, computed once per device and shared by all layers and models. Do not modify it.

    Not a buffer of the modules: a function of sizes does not belong in a state dict, and must survive the move off the
    meta device.
    """
    # A tensor made in inference mode could not be saved for a later backward pass.
    with torch.inference_mode(False):
        return mask(kind, text_len, grid, kernel, device)


def masked_attention(q_BHSK: Tensor, k_BHSK: Tensor, v_BHSK: Tensor, mask_SS: Tensor) -> Tensor:
    """Attend where the mask allows it: one softmax over text and image keys. O(S²) whatever the mask."""
    return F.scaled_dot_product_attention(q_BHSK, k_BHSK, v_BHSK, attn_mask=mask_SS)


class Attention(nn.Module):
    """Projections to heads and back.

    The caller passes the attention itself: training attends sparsely (sparse_attention.py), decoding reads a cache
    (cache.py).
    """

    def __init__(self, d_model: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.qkv = nn.Linear(d_model, 3 * d_model)
        self.out = nn.Linear(d_model, d_model)

    def forward(self, x_BSD: Tensor, attend: Attend) -> Tensor:
        """Return the attention branch, (B, S, D)."""
        qkv_BSD = self.qkv(x_BSD).unflatten(-1, (3, self.n_heads, -1))
        q_BHSK, k_BHSK, v_BHSK = qkv_BSD.permute(2, 0, 3, 1, 4).unbind(0)
        output: Tensor = self.out(attend(q_BHSK, k_BHSK, v_BHSK).transpose(1, 2).flatten(2))
        return output
