"""The one module that DeepSpeed runs: a model and the loss that it is trained by."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor, nn

from dalle.family.blocks import ScaledLinear

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

    def to(self, device: torch.device) -> Self:
        """Return the micro-batch with its tensors on a device."""
        return replace(self, tensors={name: _sent(tensor, device) for name, tensor in self.tensors.items()})


def on_device(arguments: Mapping[str, object], device: torch.device) -> dict[str, object]:
    """Return arguments with their tensors and micro-batches on a device."""
    sent: dict[str, object] = {}
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            sent[name] = _sent(value, device)
        else:
            sent[name] = value.to(device) if isinstance(value, MicroBatch) else value
    return sent


def _sent(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on a device, without waiting for the device.

    Only pinned memory is copied to a GPU in the background; other memory goes in pieces, after all queued work.
    """
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


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
