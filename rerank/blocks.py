"""The transformer block of both towers.

Letters: B batch  S positions  D width  H heads  K head dim
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def quick_gelu(x: Tensor) -> Tensor:
    """Return CLIP's approximation of GELU, x · sigmoid(1.702 x)."""
    return x * torch.sigmoid(1.702 * x)


Activation = Literal["quick_gelu", "gelu"]
ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {"quick_gelu": quick_gelu, "gelu": F.gelu}
"""By name: OpenAI's, and GELU as it is defined, which most others use."""
MAX_EXPLICIT = 300
"""Positions up to which a CPU holds the scores of all pairs at once."""


class LayerNorm(nn.LayerNorm):
    """LayerNorm computed in float32; the result has the dtype of the input."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalise the last dimension of input (…, D)."""
        weight, bias = self.weight.float(), self.bias.float()
        return F.layer_norm(input.float(), self.normalized_shape, weight, bias, self.eps).to(input.dtype)


def fused_attention(q_BHSK: Tensor, k_BHSK: Tensor, v_BHSK: Tensor, *, is_causal: bool) -> Tensor:
    """Return softmax(q·k / √K)·v, (B, H, S, K)."""
    return F.scaled_dot_product_attention(q_BHSK, k_BHSK, v_BHSK, is_causal=is_causal)


def explicit_attention(q_BHSK: Tensor, k_BHSK: Tensor, v_BHSK: Tensor, *, is_causal: bool) -> Tensor:
    """Return the same from two matrix products: forward and backward are several times faster in bfloat16 on a CPU.

    The scores of all pairs are in memory at once: little for the 77 positions of a text and the 50 to 257 of most
    images.
    """
    with torch.autocast(q_BHSK.device.type, enabled=False):
        scores_BHSS = (q_BHSK * q_BHSK.shape[-1] ** -0.5) @ k_BHSK.transpose(-1, -2)
        if is_causal:
            later_SS = torch.ones(scores_BHSS.shape[-2:], dtype=torch.bool, device=q_BHSK.device).triu(1)
            scores_BHSS = scores_BHSS.masked_fill(later_SS, -torch.inf)
        output: Tensor = scores_BHSS.softmax(dim=-1) @ v_BHSK
        return output


class Attention(nn.Module):
    """Multi-head self-attention, optionally causal."""

    def __init__(self, width: int, n_heads: int, *, is_causal: bool) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.is_causal = is_causal
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, h_BSD: Tensor) -> Tensor:
        """Return (B, S, D) for (B, S, D)."""
        qkv_BSHK = self.qkv(h_BSD).unflatten(-1, (3, self.n_heads, -1)).unbind(2)
        q_BHSK, k_BHSK, v_BHSK = (x_BSHK.transpose(1, 2) for x_BSHK in qkv_BSHK)
        is_explicit = h_BSD.device.type == "cpu" and h_BSD.shape[1] <= MAX_EXPLICIT
        attend = explicit_attention if is_explicit else fused_attention
        out_BHSK = attend(q_BHSK, k_BHSK, v_BHSK, is_causal=self.is_causal)
        output: Tensor = self.out(out_BHSK.transpose(1, 2).flatten(2))
        return output


class Block(nn.Module):
    """Pre-LayerNorm transformer block; its MLP is four times as wide unless `mlp` says otherwise."""

    def __init__(
        self,
        width: int,
        n_heads: int,
        *,
        is_causal: bool,
        mlp: int | None = None,
        activation: Activation = "quick_gelu",
    ) -> None:
        super().__init__()
        mlp = mlp or 4 * width
        self._activate = ACTIVATIONS[activation]
        self.norm1 = LayerNorm(width)
        self.attention = Attention(width, n_heads, is_causal=is_causal)
        self.norm2 = LayerNorm(width)
        self.mlp_in = nn.Linear(width, mlp)
        self.mlp_out = nn.Linear(mlp, width)

    def forward(self, h_BSD: Tensor) -> Tensor:
        """Return (B, S, D) for (B, S, D)."""
        h_BSD = h_BSD + self.attention(self.norm1(h_BSD))
        output: Tensor = h_BSD + self.mlp_out(self._activate(self.mlp_in(self.norm2(h_BSD))))
        return output
