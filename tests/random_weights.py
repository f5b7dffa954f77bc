"""Weights all of which matter, also those that begin at zero."""

from typing import TypeVar

import torch
from torch import nn

Module = TypeVar("Module", bound=nn.Module)


@torch.no_grad()
def with_random_weights(model: Module, seed: int = 0) -> Module:
    """The same model, for use, with weights so large that every layer's output counts."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        drawn = torch.randn(weight.shape, generator=generator)
        if weight.ndim > 1:
            fan_in = weight[0].numel() if weight.ndim != 2 or "positions" not in name else 1
            weight.copy_(drawn * fan_in**-0.5)
        else:
            weight.copy_(1 + 0.2 * drawn if "norm" in name and name.endswith("weight") else 0.2 * drawn)
    return model.eval().requires_grad_(False)
