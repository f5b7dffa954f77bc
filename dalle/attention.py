"""Sparse attention over the stream (Ramesh et al. 2021, §2.2, B.1, Fig 11; Child et al. 2019).

An image position may attend to all text positions and to some image positions: those whose raster distance to
it, i - j with i the query and j the key, is among the `offsets` of the layer's kind. Since only the raster
distance counts, every kind wraps around at the border of the grid, as the paper's masks do. W is the grid's
width:

    row      0 … W            the last W + 1 positions, itself included: 33 of a 32×32 grid
    column   0, W, 2W, …      the same column, itself included
    conv     dr·W + dc ≥ 0    the causal half of a centred k×k window, 0 ≤ dr ≤ k//2 and |dc| ≤ k//2: 61 for k = 11
    dense    0, 1, 2, …       everything before, and itself

Text is causal and never sees the image. `mask` draws this for the whole stream and is the truth; `keys` lists
the same for one position and is what decoding reads. `masked_attention` follows the mask literally;
`block_attention` computes the same from the few keys that each row or column of the grid can see.

Legend: B batch  S stream = T+I  T text positions  I image positions  D width  H heads  K head dim
        N blocks: rows or columns of the grid  Q queries of a block  L keys that a block may see
"""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dalle.stream import Stream

Kind = Literal["row", "column", "conv", "dense"]
KINDS: tuple[Kind, ...] = get_args(Kind)

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""How queries meet keys and values: (q, k, v), each (B, H, S, K) -> (B, H, S, K)."""


def layer_kinds(n_layers: int) -> tuple[Kind, ...]:
    """Return the paper's order of attention kinds for a depth: 47 row, 16 column and 1 conv for 64 layers.

    Counted from 1, layer i is a column layer if (i - 2) mod 4 = 0 and else a row layer; the last is the only
    conv layer (B.1).
    """
    if n_layers < 1:
        raise ValueError(f"n_layers ({n_layers}) must be at least 1")
    kinds: list[Kind] = ["column" if (i - 2) % 4 == 0 else "row" for i in range(1, n_layers)]
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


def mask(kind: Kind, text_len: int, grid: int, kernel: int = 11, device: torch.device | str = "cpu") -> Tensor:
    """Return who may attend to whom, bool (S, S): True at [query, key] where attention is allowed."""
    stream = Stream(text_len, grid)
    position_S = torch.arange(stream.length, device=device)
    distance_SS = position_S[:, None] - position_S[None, :]
    allowed_I = torch.zeros(stream.n_image, dtype=torch.bool, device=device)
    allowed_I[list(offsets(kind, grid, kernel))] = True
    key_is_text_S = position_S < text_len
    return (distance_SS >= 0) & (key_is_text_S | allowed_I[distance_SS.clamp(0, stream.n_image - 1)])


@lru_cache(maxsize=32)
def stored_mask(kind: Kind, text_len: int, grid: int, kernel: int, device: torch.device) -> Tensor:
    """Return `mask`, computed once per device and shared by all layers and models. Do not modify it.

    Kept here and not in the modules: a mask is a function of sizes, so it has no place in a state dict and
    must not be lost when a model leaves the meta device.
    """
    # A tensor made in inference mode could not be saved for a later backward pass.
    with torch.inference_mode(False):
        return mask(kind, text_len, grid, kernel, device)


def masked_attention(q_BHSK: Tensor, k_BHSK: Tensor, v_BHSK: Tensor, mask_SS: Tensor) -> Tensor:
    """Attend where the mask allows it: one softmax over text and image keys. O(S²) whatever the mask."""
    return F.scaled_dot_product_attention(q_BHSK, k_BHSK, v_BHSK, attn_mask=mask_SS)


def _look_back(kind: Kind, grid: int, kernel: int) -> int:
    """Return how many blocks before its own a query may look back into."""
    return 0 if kind == "column" else -(-offsets(kind, grid, kernel)[-1] // grid)


@lru_cache(maxsize=32)
def _block_bias(kind: Kind, grid: int, kernel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return what is added to the scores of each block's image keys, (N, Q, L): 0 where allowed, else -inf.

    The keys of block n are the positions of the blocks n - `_look_back` to n, those before the image included.
    """
    with torch.inference_mode(False):
        back = _look_back(kind, grid, kernel) * grid
        position = torch.arange(grid * grid, device=device).view(grid, grid)
        query_NQ = position.T if kind == "column" else position
        key_NL = query_NQ if back == 0 else position[:, :1] - back + torch.arange(back + grid, device=device)
        distance_NQL = query_NQ[:, :, None] - key_NL[:, None, :]
        allowed_NQL = torch.isin(distance_NQL, torch.tensor(offsets(kind, grid, kernel), device=device))
        allowed_NQL &= key_NL[:, None, :] >= 0
        return torch.zeros(allowed_NQL.shape, dtype=dtype, device=device).masked_fill_(~allowed_NQL, -torch.inf)


@lru_cache(maxsize=32)
def _causal_bias(text_len: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return what is added to the scores between text positions, (T, T): 0 where allowed, else -inf."""
    with torch.inference_mode(False):
        return torch.full((text_len, text_len), -torch.inf, dtype=dtype, device=device).triu_(1)


def block_attention(
    q_BHSK: Tensor, k_BHSK: Tensor, v_BHSK: Tensor, *, kind: Kind, text_len: int, grid: int, kernel: int
) -> Tensor:
    """Return what `masked_attention` does with the kind's mask, from T + L keys to an image query instead of S.

    A row layer has at most L = 2W keys to a block of W queries, a column layer W, a conv layer (k//2 + 2)·W. The scores
    of text and image keys are two products and share one softmax. In bfloat16 the scores are rounded to it, too.
    """
    T, W, dtype = text_len, grid, q_BHSK.dtype
    to_blocks = partial(_to_blocks, kind=kind, grid=W)
    windows = partial(_windows, back=_look_back(kind, W, kernel))
    with torch.autocast(q_BHSK.device.type, enabled=False):
        q_BHSK = q_BHSK * q_BHSK.shape[-1] ** -0.5
        text_scores_BHST = q_BHSK @ k_BHSK[:, :, :T].transpose(-1, -2)
        p_BHTT = (text_scores_BHST[:, :, :T] + _causal_bias(T, dtype, q_BHSK.device)).softmax(dim=-1)
        text_BHTK = p_BHTT @ v_BHSK[:, :, :T]
        keys_BHNLK, values_BHNLK = (windows(to_blocks(x_BHSK[:, :, T:])) for x_BHSK in (k_BHSK, v_BHSK))
        bias_NQL = _block_bias(kind, W, kernel, dtype, q_BHSK.device)
        scores_BHNQL = to_blocks(q_BHSK[:, :, T:]) @ keys_BHNLK.transpose(-1, -2) + bias_NQL
        p_BHNQX = torch.cat([to_blocks(text_scores_BHST[:, :, T:]), scores_BHNQL], dim=-1).softmax(dim=-1)
        from_text_BHIK = _from_blocks(p_BHNQX[..., :T], kind) @ v_BHSK[:, :, :T]
        from_image_BHIK = _from_blocks(p_BHNQX[..., T:] @ values_BHNLK, kind)
        return torch.cat([text_BHTK, from_text_BHIK + from_image_BHIK], dim=2)


def _to_blocks(x_BHIC: Tensor, kind: Kind, grid: int) -> Tensor:
    """Return image positions as (B, H, N, Q, C): one block for each row of the grid, or for each of its columns."""
    blocks_BHNQC = x_BHIC.view(*x_BHIC.shape[:2], grid, grid, x_BHIC.shape[-1])
    return blocks_BHNQC.transpose(2, 3) if kind == "column" else blocks_BHNQC


def _from_blocks(x_BHNQC: Tensor, kind: Kind) -> Tensor:
    """Return blocks as image positions in raster order, (B, H, I, C)."""
    return (x_BHNQC.transpose(2, 3) if kind == "column" else x_BHNQC).flatten(2, 3)


def _windows(x_BHNQC: Tensor, back: int) -> Tensor:
    """Return each block after the `back` blocks before it, (B, H, N, L, C); zeros stand before the first."""
    if back == 0:
        return x_BHNQC
    n_blocks = x_BHNQC.shape[2]
    padded = F.pad(x_BHNQC, (0, 0, 0, 0, back, 0))
    return torch.cat([padded[:, :, j : j + n_blocks] for j in range(back + 1)], dim=3)


class Attention(nn.Module):
    """Projections to heads and back.

    How queries meet keys is the caller's: training gives a mask, decoding reads a cache.
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
