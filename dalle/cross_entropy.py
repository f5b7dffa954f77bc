"""Cross entropy of a linear layer's logits, of which only a chunk exists at a time.

The logits of a batch are by far its largest tensor: 2 × 1024 positions times 8,192 image tokens are 67 MB in float32,
and the usual way holds several of that size. Here each chunk of rows is multiplied, turned into losses and gradients,
and dropped.

Legend: N rows  M rows of a chunk  R rows that fit the memory of the chunks  D width  V vocabulary
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dalle.stream import IGNORED

CPU_CHUNK, GPU_CHUNK = 1 << 22, 1 << 27
"""Logits that exist at a time: small enough for a CPU's cache, large enough to fill a GPU."""


class Head(nn.Linear):
    """Residual stream to logits, without bias; in float32 whatever the weights or autocast are (B.2, D).

    `Decoder` does not call it: see there for bfloat16.
    """

    def __init__(self, d_model: int, vocab: int) -> None:
        super().__init__(d_model, vocab, bias=False)

    def forward(  # type: ignore[override]  # two tensors, where Linear has one
        self, h_BSD: Tensor, targets_BS: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return logits, float32 (B, S, V), or given targets their cross entropies: the sum, and each, (B, S).

        The second holds only a part of the logits at a time: see `linear_cross_entropy`.
        """
        if targets_BS is not None:
            total, losses_N = linear_cross_entropy(h_BSD.flatten(0, 1), self.weight, targets_BS.flatten())
            return total, losses_N.view(targets_BS.shape)
        with torch.autocast(h_BSD.device.type, enabled=False):
            return F.linear(h_BSD.float(), self.weight.float())


def linear_cross_entropy(h_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
    """Return the cross entropies of `h @ weight.T` in nats: their sum, a float32 scalar, and each, float32 (N,).

    Only the sum has a gradient. The cross entropy of an `IGNORED` row is 0.

    Logits are float32 whatever the inputs are (B.2 and D of the paper). Under autocast, and for bfloat16 inputs, the
    products of the backward pass are bfloat16, as in all other layers.

    Args:
        h_ND: (N, D), float32 or bfloat16.
        weight_VD: (V, D), float32 or bfloat16.
        targets_N: int64, 0 … V-1, or `IGNORED`.
    """
    wants_gradients = torch.is_grad_enabled() and (h_ND.requires_grad or weight_VD.requires_grad)
    device = h_ND.device.type
    product = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else h_ND.dtype
    with torch.autocast(device, enabled=False):
        losses = cast("Callable[..., tuple[Tensor, Tensor]]", _LinearCrossEntropy.apply)
        return losses(h_ND, weight_VD, targets_N, product if wants_gradients else None)


class _LinearCrossEntropy(torch.autograd.Function):
    """Computes the gradients in the forward pass, while a chunk's logits exist; backward only scales them."""

    @staticmethod
    def forward(
        ctx: Any, h_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, product: torch.dtype | None
    ) -> tuple[Tensor, Tensor]:
        """Return the loss and its terms; gradients are computed from products of the given type, or not at all."""
        on_cpu = h_ND.device.type == "cpu"
        if on_cpu:  # elsewhere, counting them would wait for the device
            counted_N = (targets_N != IGNORED).nonzero()[:, 0]
        else:
            counted_N = torch.arange(len(targets_N), device=h_ND.device)
        n_rows = max(1, (CPU_CHUNK if on_cpu else GPU_CHUNK) // len(weight_VD))
        weight_float_DV = weight_VD.float().T
        # one buffer for all chunks: a new allocation would page-fault
        logits_RV = h_ND.new_empty((min(n_rows, len(counted_N)), len(weight_VD)), dtype=torch.float32)
        total = torch.zeros((), device=h_ND.device)
        losses_N = torch.zeros(len(h_ND), device=h_ND.device)
        gradients = None if product is None else _Gradients(h_ND, weight_VD, product)
        for rows_M in torch.split(counted_N, n_rows) if len(counted_N) else ():
            h_MD, targets_M = h_ND[rows_M], targets_N[rows_M]
            counts_M1 = (targets_M != IGNORED).float()[:, None]
            index_M1 = targets_M.clamp(min=0)[:, None]
            logits_MV = torch.mm(h_MD.float(), weight_float_DV, out=logits_RV[: len(rows_M)])
            log_p_MV = torch.log_softmax(logits_MV, dim=1, out=logits_MV)
            log_p_M1 = log_p_MV.gather(1, index_M1) * counts_M1
            total -= log_p_M1.sum()
            losses_N[rows_M] = -log_p_M1[:, 0]
            if gradients is not None:
                # softmax minus one-hot, in the place of the logits
                dlogits_MV = log_p_MV.exp_().scatter_add_(1, index_M1, torch.full_like(counts_M1, -1.0))
                gradients.add(rows_M, h_MD, dlogits_MV if on_cpu else dlogits_MV.mul_(counts_M1))
        if gradients is not None:
            ctx.save_for_backward(gradients.of_h, gradients.of_weight)
        ctx.mark_non_differentiable(losses_N)
        return total, losses_N

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, _of_terms: Tensor | None) -> tuple[Tensor, Tensor, None, None]:
        """Return the gradients, scaled in place: they can be asked for once."""
        if getattr(ctx, "is_used", False):
            raise RuntimeError("the gradients of linear_cross_entropy can be computed once: compute the loss again")
        ctx.is_used = True
        dh_ND, dweight_VD = ctx.saved_tensors
        return dh_ND.mul_(upstream), dweight_VD.mul_(upstream), None, None


class _Gradients:
    """Accumulates the gradients of the sum, chunk by chunk."""

    def __init__(self, h_ND: Tensor, weight_VD: Tensor, product: torch.dtype) -> None:
        self.of_h = torch.zeros_like(h_ND)
        """(N, D), in the dtype of `h`."""
        self._weight_VD = weight_VD
        self._weight_product_VD = weight_VD.to(product)
        self._dweight_VD: Tensor | None = None
        """Float32; None before the first chunk."""

    def add(self, rows_M: Tensor, h_MD: Tensor, dlogits_MV: Tensor) -> None:
        """Add the gradients of some rows; each row is added once."""
        product = self._weight_product_VD.dtype
        dlogits_MV = dlogits_MV.to(product)
        self.of_h[rows_M] = (dlogits_MV @ self._weight_product_VD).to(self.of_h.dtype)
        part_VD = dlogits_MV.T @ h_MD.to(product)
        if self._dweight_VD is None:
            self._dweight_VD = part_VD.float()
        else:
            self._dweight_VD += part_VD

    @property
    def of_weight(self) -> Tensor:
        """(V, D), in the dtype of the weight."""
        if self._dweight_VD is None:
            return torch.zeros_like(self._weight_VD)
        return self._dweight_VD.to(self._weight_VD.dtype)
