"""Cross entropy of a linear layer's logits without ever holding all of them.

The logits of a batch are its largest tensor by far: 2 × 1024 positions times 8,192 image tokens are 67 MB in float32,
and the usual way holds several of that size. Here a chunk of rows is multiplied, turned into losses and at once into
gradients, and forgotten.

Legend: N rows  D width  V vocabulary
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from dalle.stream import IGNORED

CPU_CHUNK, GPU_CHUNK = 1 << 22, 1 << 27
"""Logits that exist at a time: small enough for a CPU's cache, large enough to fill a GPU."""


def linear_cross_entropy(h_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
    """Return the sum over rows of the cross entropy of `h @ weight.T`, in nats, a float32 scalar.

    The logits are float32 whatever the inputs are (B.2 and D of the paper). Under autocast, and where the inputs are
    bfloat16, the products of the backward pass are bfloat16, as those of all other layers are.

    Args:
        h_ND: (N, D), float32 or bfloat16.
        weight_VD: (V, D), float32 or bfloat16.
        targets_N: int64, 0 … V-1, or `IGNORED`.
    """
    wants_gradients = torch.is_grad_enabled() and (h_ND.requires_grad or weight_VD.requires_grad)
    device = h_ND.device.type
    product = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else h_ND.dtype
    with torch.autocast(device, enabled=False):
        sums = cast("Callable[..., Tensor]", _LinearCrossEntropy.apply)
        loss = sums(h_ND, weight_VD, targets_N, product if wants_gradients else None)
        return loss


class _LinearCrossEntropy(torch.autograd.Function):
    """Computes the gradients in the forward pass, while a chunk's logits are there; backward only scales them."""

    @staticmethod
    def forward(ctx: Any, h_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, product: torch.dtype | None) -> Tensor:
        """Return the loss; gradients are computed from products of the given type, or not at all."""
        if h_ND.device.type == "cpu":  # elsewhere, counting them would wait for the device
            counted_N = (targets_N != IGNORED).nonzero()[:, 0]
        else:
            counted_N = torch.arange(len(targets_N), device=h_ND.device)
        weight_float_VD = weight_VD.float()
        total = torch.zeros((), device=h_ND.device)
        if product is not None:
            weight_product_VD = weight_VD.to(product)
            dh_ND = torch.zeros_like(h_ND)
            dweight_VD = torch.zeros_like(weight_VD, dtype=torch.float32)
        limit = CPU_CHUNK if h_ND.device.type == "cpu" else GPU_CHUNK
        for rows_M in torch.split(counted_N, max(1, limit // len(weight_VD))):
            h_MD, targets_M = h_ND[rows_M], targets_N[rows_M]
            counts_M1 = (targets_M != IGNORED).float()[:, None]
            index_M1 = targets_M.clamp(min=0)[:, None]
            logits_MV = F.linear(h_MD.float(), weight_float_VD)
            logits_MV -= logits_MV.amax(dim=1, keepdim=True)
            of_target_M1 = logits_MV.gather(1, index_M1)
            sum_M1 = logits_MV.exp_().sum(dim=1, keepdim=True)
            total += ((sum_M1.log() - of_target_M1) * counts_M1).sum()
            if product is None:
                continue
            # softmax minus one-hot, in the place of the logits
            dlogits_MV = logits_MV.mul_(counts_M1 / sum_M1).scatter_add_(1, index_M1, -counts_M1).to(product)
            dh_ND[rows_M] = (dlogits_MV @ weight_product_VD).to(dh_ND.dtype)
            dweight_VD += dlogits_MV.T @ h_MD.to(product)
        if product is not None:
            ctx.save_for_backward(dh_ND, dweight_VD.to(weight_VD.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor, None, None]:
        dh_ND, dweight_VD = ctx.saved_tensors
        return dh_ND * upstream.to(dh_ND.dtype), dweight_VD * upstream.to(dweight_VD.dtype), None, None
