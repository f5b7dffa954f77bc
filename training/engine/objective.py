"""The one module that DeepSpeed runs: a model and the loss that it is trained by."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor, nn

from dalle.model import ScaledLinear

Tensors = dict[str, Tensor]
Loss = Callable[..., tuple[Tensor, Tensors]]
"""Returns a loss and its metrics, 0-d or 1-d tensors."""


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """Samples of one rank for one forward and backward pass."""

    tensors: Tensors
    """Of all samples, stacked."""
    noise_seed: int
    """Seeds what the loss draws; a function of the run's seed and of the samples' place in the sequence."""
    measure: bool
    """Whether the loss also returns the metrics that take time."""

    def to(self, device: torch.device, *, non_blocking: bool = False) -> Self:
        """Return the micro-batch with its tensors on a device."""
        return replace(
            self, tensors={name: t.to(device, non_blocking=non_blocking) for name, t in self.tensors.items()}
        )


def on_device(arguments: Mapping[str, object], device: torch.device) -> dict[str, object]:
    """Return arguments with their tensors and micro-batches on a device."""
    return {
        name: value.to(device, non_blocking=True) if isinstance(value, Tensor | MicroBatch) else value
        for name, value in arguments.items()
    }


class Objective(nn.Module):
    """A loss as a module whose one child is the model: DeepSpeed casts and gathers weights around its forward pass."""

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.model = model
        self._loss = loss

    def forward(self, **arguments: object) -> tuple[Tensor, Tensors]:
        """Return the loss and its metrics."""
        return self._loss(**arguments)


def unfuse_linear_layers(model: nn.Module) -> None:
    """Let the transformer's linear layers call `F.linear`, which ZeRO 3 replaces to free weights between the passes."""
    for module in model.modules():
        if isinstance(module, ScaledLinear):
            module.is_fused = False


def not_finite_throughout(loss: Tensor) -> Tensor:
    """Return the loss; if it is not finite, its gradient is not, either.

    All ranks learn of it through the gradients that they exchange anyway, and nothing is read from the device.
    """
    return loss * torch.where(loss.detach().isfinite(), 1.0, math.nan)
