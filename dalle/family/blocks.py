"""The layers of the paper's transformer: attention and MLP (Ramesh et al. 2021, B.1; Child et al. 2019).

Legend: B batch  S stream  D width
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dalle.attention import Attend, Attention

GELU_SLOPE = 1.702
"""Slope of the sigmoid in GELU's approximation."""


class ScaledLinear(nn.Linear):
    """out_scale · (W · in_scale · x + b), the factors applied within the matrix product, where they cost nothing."""

    def __init__(self, n_in: int, n_out: int, *, in_scale: float = 1.0, out_scale: float = 1.0) -> None:
        super().__init__(n_in, n_out)
        self.in_scale, self.out_scale = in_scale, out_scale
        self.is_fused = True
        """Whether the factors are applied within the matrix product; else around `F.linear`."""

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., n_out) for (..., n_in)."""
        if torch.compiler.is_compiling() or not self.is_fused:  # compilation fuses the factors with what surrounds them
            return F.linear(self.in_scale * x, self.weight, self.bias) * self.out_scale
        scale = self.in_scale * self.out_scale
        flat = torch.addmm(self.bias, x.flatten(0, -2), self.weight.t(), beta=self.out_scale, alpha=scale)
        return flat.view(*x.shape[:-1], -1)


class MLP(nn.Module):
    """Two linear layers, 4·D wide between them, with GELU in its sigmoid form (Child et al. 2019).

    x·σ(1.702x) is silu(1.702x) / 1.702: one fused operation, its two factors left to the linear layers.
    """

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.wide = ScaledLinear(d_model, 4 * d_model, out_scale=GELU_SLOPE)
        self.out = ScaledLinear(4 * d_model, d_model, in_scale=1 / GELU_SLOPE)

    def forward(self, x_BSD: Tensor) -> Tensor:
        """Return the MLP branch, (B, S, D)."""
        output: Tensor = self.out(F.silu(self.wide(x_BSD)))
        return output


class Block(nn.Module):
    """One layer: attention and MLP, each normalised first and added to the residual stream."""

    def __init__(self, d_model: int, n_heads: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(d_model)
        self.attention = Attention(d_model, n_heads)
        self.mlp_norm = nn.LayerNorm(d_model)
        self.mlp = MLP(d_model)

    def forward(self, h_BSD: Tensor, attend: Attend) -> Tensor:
        """Return the residual stream after this layer, (B, S, D)."""
        h_BSD = h_BSD + self.attention_branch(h_BSD, attend)
        return h_BSD + self.mlp_branch(h_BSD)

    def attention_branch(self, h_BSD: Tensor, attend: Attend) -> Tensor:
        """Return the attention's part of the residual stream, (B, S, D)."""
        output: Tensor = self.attention(self.attention_norm(h_BSD), attend)
        return output

    def mlp_branch(self, h_BSD: Tensor) -> Tensor:
        """Return the MLP's part of the residual stream, (B, S, D)."""
        output: Tensor = self.mlp(self.mlp_norm(h_BSD))
        return output
