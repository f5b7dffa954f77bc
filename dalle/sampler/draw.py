"""One token for each row of logits: ruled out by top-k and top-p, guided, drawn with a given random number.

Legend: B rows  I image positions  V image vocabulary  X blocks of tokens  Y tokens of a block
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

DRAW_BLOCK = 128
"""Tokens whose probabilities are summed at a time when one is drawn."""


def uniforms(seeds: Sequence[int], n_image: int) -> Tensor:
    """Return the random numbers of candidates, float64 in [0, 1), (B, I): row b depends on seeds[b] alone."""
    return torch.from_numpy(np.stack([np.random.default_rng(seed).random(n_image) for seed in seeds]))


def filter_logits(logits: Tensor, top_k: int | None = None, top_p: float | None = None) -> Tensor:
    """Return the logits with -inf where a token is ruled out.

    Args:
        logits: float (B, V).
        top_k: keep the k likeliest tokens; of equally likely ones those with the lower id. None keeps all, as does the
            size of the vocabulary.
        top_p: keep the fewest likeliest tokens whose probability reaches p (Holtzman et al. 2020), at least
            one; applied to what top_k leaves. None keeps all, as does 1.
    """
    if top_k is not None and top_k < logits.shape[-1]:
        kth_B1 = logits.topk(top_k, dim=-1).values[:, -1:]
        n_likelier_B1 = (logits > kth_B1).sum(-1, keepdim=True)
        is_kth_BV = logits == kth_B1
        is_late_BV = is_kth_BV & (is_kth_BV.cumsum(-1) > top_k - n_likelier_B1)
        logits = logits.masked_fill((logits < kth_B1) | is_late_BV, -torch.inf)
    if top_p is not None and top_p < 1:
        sorted_BV, order_BV = logits.sort(dim=-1, descending=True, stable=True)
        probabilities_BV = sorted_BV.double().softmax(-1)
        likelier_BV = probabilities_BV.cumsum(-1) - probabilities_BV
        likelier_BV[:, 0] = 0.0  # exactly, so that the likeliest token always stays
        sorted_BV = sorted_BV.masked_fill(likelier_BV >= top_p, -torch.inf)
        logits = torch.empty_like(logits).scatter(-1, order_BV, sorted_BV)
    return logits


def draw(logits: Tensor, uniforms_B: Tensor) -> Tensor:
    """Return one token per row by inverting the cumulative distribution.

    Args:
        logits: float (B, V); tokens at -inf are never drawn.
        uniforms_B: float64 (B,) in [0, 1).

    Returns:
        int64 (B,).
    """
    # In two steps, over blocks of tokens and within the block. A float32 sum of a block is exact to its last bits; over
    # all 8,192 tokens its rounding would be larger than rare tokens' probabilities, so those sums are float64.
    weights_BV = (logits - logits.amax(dim=-1, keepdim=True)).exp_()
    if missing := -weights_BV.shape[1] % DRAW_BLOCK:
        weights_BV = F.pad(weights_BV, (0, missing))
    weights_BXY = weights_BV.view(len(logits), -1, DRAW_BLOCK)
    up_to_BX = weights_BXY.sum(dim=-1).double().cumsum(-1)
    # At most 1 - 2^-53 times the total, which rounds to less than the total: some block is always past it.
    threshold_B1 = uniforms_B[:, None] * up_to_BX[:, -1:]
    block_B1 = torch.searchsorted(up_to_BX, threshold_B1, right=True)
    rest_B1 = threshold_B1 - F.pad(up_to_BX, (1, 0)).gather(1, block_B1)
    within_BY = weights_BXY.take_along_dim(block_B1[:, :, None], dim=1)[:, 0].double().cumsum(-1)
    # The block's sum and the last of its cumulative ones may differ in their last bits.
    rest_B1 = torch.minimum(rest_B1, within_BY[:, -1:].nextafter(torch.zeros_like(rest_B1)))
    tokens_B1 = block_B1 * DRAW_BLOCK + torch.searchsorted(within_BY, rest_B1, right=True)
    return tokens_B1[:, 0]


def guide(logits: Tensor, guidance: float) -> Tensor:
    """Return guided logits (B, V) from those of B conditional rows and then B unconditional ones, (2B, V)."""
    conditional_BV, unconditional_BV = logits.chunk(2)
    return unconditional_BV + guidance * (conditional_BV - unconditional_BV)
