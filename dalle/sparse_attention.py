"""Attention at the cost of the paper's sparsity: what `masked_attention` computes, from the keys a query may see.

An image query sees all text and a thin slice of the image (see attention.py). So its attention has two parts: the
text keys, which all image queries share, and the image keys of its block of the grid. A block is a row of the grid
and the rows that it may look back into, or a column. Nothing of the size S×S is made, and no key is copied per query.

Three ways to the same numbers; `sparse_attention` picks one, and tests hold each to `masked_attention`, forward and
gradient:

    two_part_attention     two fused calls, merged by their log-sum-exps; float32 on a CPU
    block_attention        two products and one softmax, written out; bfloat16 and small grids on a CPU
    block_mask_attention   torch's FlexAttention, which skips the 128×128 blocks that a mask leaves empty; CUDA

Merging: with o, l the output and the log-sum-exp of the scores of each part, l = log(eˡ¹ + eˡ²) and
o = o₁·e^(l₁-l) + o₂·e^(l₂-l). Backward needs no such formula: the gradient of a part's scores is
e^(score-l)·(dp - o·do) with the merged l and o, which is what a fused backward computes when it is fed those.

Legend: B batch  S stream = T+I  T text positions  I image positions  H heads  K head dim
        N blocks: rows or columns of the grid  Q queries of a block  L keys that a block may see  X = T+L  C any
"""

from collections.abc import Iterable
from functools import lru_cache, partial
from typing import Any, TypedDict, cast

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from dalle.attention import Kind, mask, masked_attention, offsets, stored_mask
from dvae.compilation import can_compile

MIN_FUSED = 256
"""Fewest image positions for which two fused calls beat the written-out softmax, in float32 on a CPU."""
MIN_FLEX_HEAD = 16
"""Smallest head dimension of FlexAttention's kernels."""


class _Layout(TypedDict):
    kind: Kind
    text_len: int
    grid: int
    kernel: int


_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def sparse_attention(
    q_BHSK: Tensor, k_BHSK: Tensor, v_BHSK: Tensor, *, kind: Kind, text_len: int, grid: int, kernel: int = 11
) -> Tensor:
    """Return `masked_attention` with the mask of a kind, at the cost of the keys that it lets through.

    Args:
        q_BHSK: queries of the whole stream, float32 or bfloat16; unscaled.
        k_BHSK: keys.
        v_BHSK: values.
        kind: which attention; dense is one causal call.
        text_len: T.
        grid: W, the width of the grid; S must be T + W².
        kernel: of conv, odd.

    Returns:
        (B, H, S, K), in the dtype of the queries.
    """
    if kind == "dense":
        return F.scaled_dot_product_attention(q_BHSK, k_BHSK, v_BHSK, is_causal=True)
    layout: _Layout = {"kind": kind, "text_len": text_len, "grid": grid, "kernel": kernel}
    device = q_BHSK.device
    if device.type == "cpu":
        fused = q_BHSK.dtype == torch.float32 and grid * grid >= MIN_FUSED
        return (two_part_attention if fused else block_attention)(q_BHSK, k_BHSK, v_BHSK, **layout)
    wide_enough = q_BHSK.shape[-1] >= MIN_FLEX_HEAD
    if device.type == "cuda" and wide_enough and (torch.compiler.is_compiling() or can_compile(device)):
        return block_mask_attention(q_BHSK, k_BHSK, v_BHSK, **layout)
    return masked_attention(q_BHSK, k_BHSK, v_BHSK, stored_mask(kind, text_len, grid, kernel, device))


# ------------------------------------------------------------------------------------------ blocks of the grid


_known_windows: dict[tuple[Kind, int, int, torch.dtype, str], tuple[int, Tensor]] = {}
"""Cache of `_window`. A plain dictionary: torch.compile would trace through an lru_cache and recompute it."""
_known_causal_biases: dict[tuple[int, torch.dtype, str], Tensor] = {}


def _window(kind: Kind, grid: int, kernel: int, like: Tensor) -> tuple[int, Tensor]:
    """Return how many earlier blocks a query may look back into, and the bias of the scores.

    The bias is (N, Q, L): 0 for image keys that a query may see, else -inf, in the dtype and on the device of `like`.
    The keys of block n are the positions of blocks n - back to n, those before the image included.
    """
    known = (kind, grid, kernel, like.dtype, str(like.device))
    if known not in _known_windows:
        with torch.inference_mode(False):
            _known_windows[known] = _make_window(kind, grid, kernel, like)
    return _known_windows[known]


def _make_window(kind: Kind, grid: int, kernel: int, like: Tensor) -> tuple[int, Tensor]:
    device = like.device
    back = 0 if kind == "column" else -(-offsets(kind, grid, kernel)[-1] // grid)
    position = torch.arange(grid * grid, device=device).view(grid, grid)
    query_NQ = position.T if kind == "column" else position
    reach = back * grid
    key_NL = query_NQ if back == 0 else position[:, :1] - reach + torch.arange(reach + grid, device=device)
    distance_NQL = query_NQ[:, :, None] - key_NL[:, None, :]
    allowed_NQL = torch.isin(distance_NQL, torch.tensor(offsets(kind, grid, kernel), device=device))
    allowed_NQL &= key_NL[:, None, :] >= 0
    return back, torch.zeros_like(allowed_NQL, dtype=like.dtype).masked_fill_(~allowed_NQL, -torch.inf)


def _causal_bias(text_len: int, like: Tensor) -> Tensor:
    """Return the bias of the scores between text positions, (T, T): 0 where allowed, else -inf."""
    known = (text_len, like.dtype, str(like.device))
    if known not in _known_causal_biases:
        with torch.inference_mode(False):
            full_TT = torch.full((text_len, text_len), -torch.inf, dtype=like.dtype, device=like.device)
            _known_causal_biases[known] = full_TT.triu_(1)
    return _known_causal_biases[known]


def prepare_compilation(kinds: Iterable[Kind], text_len: int, grid: int, kernel: int, device: torch.device) -> None:
    """Fill the caches that compiled layers read, so that they are compiled once."""
    if device.type == "cuda":
        for kind in set(kinds) - {"dense"}:
            _block_mask(kind, text_len, grid, kernel, device)
    for dtype in (torch.float32, torch.bfloat16):
        like = torch.empty((), dtype=dtype, device=device)
        _causal_bias(text_len, like)
        for kind in set(kinds) - {"dense"}:
            _window(kind, grid, kernel, like)


def _to_blocks(x_BHIC: Tensor, kind: Kind, grid: int) -> Tensor:
    """Return image positions as (B, H, N, Q, C): one block for each row of the grid, or for each of its columns."""
    blocks_BHNQC = x_BHIC.view(*x_BHIC.shape[:2], grid, grid, x_BHIC.shape[-1])
    return blocks_BHNQC.transpose(2, 3) if kind == "column" else blocks_BHNQC


def _from_blocks(x_BHNQC: Tensor, kind: Kind) -> Tensor:
    """Return blocks as image positions in raster order, (B, H, I, C)."""
    return (x_BHNQC.transpose(2, 3) if kind == "column" else x_BHNQC).flatten(2, 3)


def _windows(x_BHNQC: Tensor, back: int) -> Tensor:
    """Join each block to the `back` blocks before it, (B, H, N, L, C); zeros stand before the first."""
    if back == 0:
        return x_BHNQC
    n_blocks = x_BHNQC.shape[2]
    padded = F.pad(x_BHNQC, (0, 0, 0, 0, back, 0))
    return torch.cat([padded[:, :, j : j + n_blocks] for j in range(back + 1)], dim=3)


# ---------------------------------------------------------------------------------------------- written out


def block_attention(
    q_BHSK: Tensor, k_BHSK: Tensor, v_BHSK: Tensor, *, kind: Kind, text_len: int, grid: int, kernel: int
) -> Tensor:
    """Return `masked_attention` from T + L scores of an image query, in one softmax. Not for dense.

    A row layer has at most L = 2W keys to a block of W queries, a column layer W, a conv layer (k//2 + 2)·W. The scores
    of text and image keys are two products. In bfloat16 the scores are rounded to it, too.
    """
    T, W = text_len, grid
    back, bias_NQL = _window(kind, W, kernel, q_BHSK)
    to_blocks = partial(_to_blocks, kind=kind, grid=W)
    windows = partial(_windows, back=back)
    with torch.autocast(q_BHSK.device.type, enabled=False):
        q_BHSK = q_BHSK * q_BHSK.shape[-1] ** -0.5
        text_scores_BHST = q_BHSK @ k_BHSK[:, :, :T].transpose(-1, -2)
        p_BHTT = (text_scores_BHST[:, :, :T] + _causal_bias(T, q_BHSK)).softmax(dim=-1)
        text_BHTK = p_BHTT @ v_BHSK[:, :, :T]
        keys_BHNLK, values_BHNLK = (windows(to_blocks(x_BHSK[:, :, T:])) for x_BHSK in (k_BHSK, v_BHSK))
        scores_BHNQL = to_blocks(q_BHSK[:, :, T:]) @ keys_BHNLK.transpose(-1, -2) + bias_NQL
        p_BHNQX = torch.cat([to_blocks(text_scores_BHST[:, :, T:]), scores_BHNQL], dim=-1).softmax(dim=-1)
        from_text_BHIK = _from_blocks(p_BHNQX[..., :T], kind) @ v_BHSK[:, :, :T]
        from_image_BHIK = _from_blocks(p_BHNQX[..., T:] @ values_BHNLK, kind)
        return torch.cat([text_BHTK, from_text_BHIK + from_image_BHIK], dim=2)


# ---------------------------------------------------------------------------------------- two fused calls


def two_part_attention(
    q_BHSK: Tensor, k_BHSK: Tensor, v_BHSK: Tensor, *, kind: Kind, text_len: int, grid: int, kernel: int
) -> Tensor:
    """Return `masked_attention` from fused calls on the text keys and on each block's image keys. CPU only; not dense.

    Kept for the backward pass: the inputs, the output and one number per query and head.
    """
    with torch.autocast("cpu", enabled=False):
        output: Tensor = _two_part(q_BHSK, k_BHSK, v_BHSK, kind, text_len, grid, kernel)[0]
        return output


class _ImagePart:
    """Turns the image positions of one sample into the batch of a fused call: a block of queries and its keys each."""

    def __init__(self, kind: Kind, text_len: int, grid: int, kernel: int, like: Tensor) -> None:
        self._kind, self._text_len, self._grid = kind, text_len, grid
        self._back, bias_NQL = _window(kind, grid, kernel, like)
        # a column's own keys are causal; the others need the bias, the same for all heads
        self.hidden: dict[str, Any] = {"is_causal": True}
        if kind != "column":
            self.hidden = {"is_causal": False, "attn_mask": bias_NQL[:, None]}
        """Arguments of a fused call that hide the keys a query may not see."""

    def blocks(self, x_HSC: Tensor) -> Tensor:
        """Return the image positions, (N, H, Q, C). A view."""
        blocks_HNQC = x_HSC[:, self._text_len :].view(len(x_HSC), self._grid, self._grid, x_HSC.shape[-1])
        return blocks_HNQC.permute(2, 0, 1, 3) if self._kind == "column" else blocks_HNQC.transpose(0, 1)

    def windows(self, x_HSC: Tensor) -> Tensor:
        """Return the keys that each block may see, (N, H, L, C); a view if enough text stands before the image.

        A window that reaches back before the image holds text, which is hidden.
        """
        if self._back == 0:
            return self.blocks(x_HSC)
        reach = self._back * self._grid
        missing = max(0, reach - self._text_len)
        x_HSC = F.pad(x_HSC, (0, 0, missing, 0)) if missing else x_HSC
        start = self._text_len + missing - reach
        return x_HSC[:, start:].unfold(1, reach + self._grid, self._grid).permute(1, 0, 3, 2)

    def add_windows(self, total_HSC: Tensor, windows_NHLC: Tensor) -> None:
        """Write, for each image position, the sum over the windows that hold it: the transpose of `windows`."""
        total_NHQC = self.blocks(total_HSC)
        own_and_before = windows_NHLC.chunk(self._back + 1, dim=2)
        total_NHQC.copy_(own_and_before[self._back])
        for before in range(1, min(self._back, self._grid - 1) + 1):
            total_NHQC[:-before] += own_and_before[self._back - before][before:]


def _empty_like_heads(x_BHSK: Tensor) -> Tensor:
    """Allocate (B, H, S, K) with a position's heads side by side, as the output projection reads them."""
    B, H, S, K = x_BHSK.shape
    return x_BHSK.new_empty((B, S, H, K)).transpose(1, 2)


def _empty_lse(q_BHSK: Tensor) -> Tensor:
    return q_BHSK.new_empty(q_BHSK.shape[:3], dtype=torch.promote_types(q_BHSK.dtype, torch.float32))


@torch.library.custom_op("dalle::two_part_attention", mutates_args=(), device_types="cpu")
def _two_part(
    q: Tensor, k: Tensor, v: Tensor, kind: str, text_len: int, grid: int, kernel: int
) -> tuple[Tensor, Tensor]:
    """Return the output (B, H, S, K) and the log-sum-exp of every query's scores, float32 (B, H, S)."""
    T, image = text_len, _ImagePart(cast(Kind, kind), text_len, grid, kernel, q)
    out, lse = _empty_like_heads(q), _empty_lse(q)
    k_text, v_text = k[:, :, :T], v[:, :, :T]
    out[:, :, :T], lse[:, :, :T] = _flash(q[:, :, :T], k_text, v_text, 0.0, True)
    o1_BHIK, l1_BHI = _flash(q[:, :, T:], k_text, v_text, 0.0, False)
    for b in range(len(q)):
        q_NHQK = image.blocks(q[b])
        k_NHLK, v_NHLK = (image.windows(x[b]) for x in (k, v))
        o2_NHQK, l2_NHQ = _flash(q_NHQK, k_NHLK, v_NHLK, 0.0, **image.hidden)
        image.blocks(out[b]).copy_(o2_NHQK)
        image.blocks(lse[b, ..., None]).copy_(l2_NHQ[..., None])
    # in place: out and lse hold the second part so far
    lse[:, :, T:] = torch.logaddexp(l1_BHI, lse[:, :, T:])
    share_BHI1 = (l1_BHI - lse[:, :, T:]).exp_()[..., None].to(q.dtype)
    out[:, :, T:].lerp_(o1_BHIK, share_BHI1)
    return out, lse


@_two_part.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, kind: str, text_len: int, grid: int, kernel: int) -> tuple[Tensor, Tensor]:
    return _empty_like_heads(q), _empty_lse(q)


@torch.library.custom_op("dalle::two_part_attention_backward", mutates_args=(), device_types="cpu")
def _two_part_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    kind: str,
    text_len: int,
    grid: int,
    kernel: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v: each part's, given the merged output and log-sum-exp, then summed."""
    T, image = text_len, _ImagePart(cast(Kind, kind), text_len, grid, kernel, q)
    dq, dk, dv = (_empty_like_heads(x) for x in (q, k, v))
    for b in range(len(q)):
        g_NHQK, q_NHQK, out_NHQK = (image.blocks(x[b]) for x in (grad, q, out))
        lse_NHQ = image.blocks(lse[b, ..., None])[..., 0].contiguous()
        k_NHLK, v_NHLK = (image.windows(x[b]) for x in (k, v))
        grads = _flash_backward(g_NHQK, q_NHQK, k_NHLK, v_NHLK, out_NHQK, lse_NHQ, 0.0, **image.hidden)
        image.blocks(dq[b]).copy_(grads[0])
        image.add_windows(dk[b], grads[1])
        image.add_windows(dv[b], grads[2])
    k_text, v_text = k[:, :, :T], v[:, :, :T]
    of_text, of_image = ([x[:, :, part] for x in (grad, q, out, lse)] for part in (slice(None, T), slice(T, None)))
    g, q_part, out_part, lse_part = of_text
    grads = _flash_backward(g, q_part, k_text, v_text, out_part, lse_part, 0.0, True)
    dq[:, :, :T], dk[:, :, :T], dv[:, :, :T] = grads
    g, q_part, out_part, lse_part = of_image
    grads = _flash_backward(g, q_part, k_text, v_text, out_part, lse_part, 0.0, False)
    dq[:, :, T:] += grads[0]
    dk[:, :, :T] += grads[1]
    dv[:, :, :T] += grads[2]
    return dq, dk, dv


@_two_part_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_like_heads(q), _empty_like_heads(k), _empty_like_heads(v)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, *ctx.sizes = inputs
    ctx.save_for_backward(q, k, v, *output)


def _backward(ctx: Any, grad: Tensor, _grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    return (*_two_part_backward(grad, *ctx.saved_tensors, *ctx.sizes), None, None, None, None)


_two_part.register_autograd(_backward, setup_context=_save_for_backward)


# ------------------------------------------------------------------------------------------------ FlexAttention


_known_block_masks: dict[tuple[Kind, int, int, int, str], BlockMask] = {}


def _block_mask(kind: Kind, text_len: int, grid: int, kernel: int, device: torch.device) -> BlockMask:
    """Return which blocks of the mask are empty, full or mixed."""
    known = (kind, text_len, grid, kernel, str(device))
    if known not in _known_block_masks:
        with torch.inference_mode(False):
            allowed_SS = mask(kind, text_len, grid, kernel, device)

        def is_allowed(_b: Tensor, _h: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return allowed_SS[query, key]

        S = len(allowed_SS)
        _known_block_masks[known] = create_block_mask(is_allowed, None, None, S, S, device=str(device))
    return _known_block_masks[known]


@lru_cache(maxsize=1)
def _compiled_flex_attention() -> Any:
    """Return FlexAttention compiled to a kernel; uncompiled, it would make all S×S scores."""
    return torch.compile(flex_attention, dynamic=False)


def block_mask_attention(
    q_BHSK: Tensor, k_BHSK: Tensor, v_BHSK: Tensor, *, kind: Kind, text_len: int, grid: int, kernel: int
) -> Tensor:
    """Return `masked_attention` from a kernel that skips empty blocks of the mask.

    On a CPU FlexAttention has no compiled backward: slow there, and used by tests only.
    """
    attend = _compiled_flex_attention() if q_BHSK.is_cuda else flex_attention
    block_mask = _block_mask(kind, text_len, grid, kernel, q_BHSK.device)
    output: Tensor = attend(q_BHSK, k_BHSK, v_BHSK, block_mask=block_mask)
    return output
