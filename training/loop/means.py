"""Means of metrics over steps, batches and ranks."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from training.ranks.world import World, mean_over_ranks


class Means:
    """Running means of metrics that are not all there at every step; nothing is read from the device before `take`."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int | Tensor] = {}

    def add(self, metrics: Mapping[str, Tensor], weight: int | Tensor = 1) -> None:
        """Take metrics, 0-d or 1-d, into account as often as `weight` says; at 0, only their names, even of NaNs.

        A weight on the device, 0-d, is not read either.
        """
        for name, value in metrics.items():
            value = value.detach().double()
            if isinstance(weight, Tensor):
                value = torch.where(weight > 0, weight * value.to(weight.device), 0.0)
            else:
                value = weight * value if weight else torch.zeros_like(value)
            self._sums[name] = self._sums[name] + value if name in self._sums else value
            self._counts[name] = self._counts.get(name, 0) + weight

    def state(self) -> dict[str, Any]:
        """Return what this rank has added so far as plain numbers, for `restore`. Waits for the device."""
        return {name: {"sum": value.tolist(), "count": float(self._counts[name])} for name, value in self._sums.items()}

    def restore(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Go on from what `state` returned."""
        self._sums = {
            name: torch.tensor(part["sum"], dtype=torch.float64, device=device) for name, part in state.items()
        }
        self._counts = {
            name: torch.tensor(part["count"], dtype=torch.float64, device=device) for name, part in state.items()
        }

    def take(self, world: World) -> dict[str, Any]:
        """Return the means over all that was added on all ranks, and start anew: numbers, and lists for 1-d metrics.

        NaN where all that was added had the weight 0. Collective: every rank must have added the same names.
        """
        names = sorted(self._sums)
        if not names:
            return {}
        sizes = [self._sums[name].numel() for name in names]
        sums = torch.cat([self._sums[name].to(world.device).flatten() for name in names])
        counts = torch.cat(
            [
                torch.as_tensor(self._counts[name], dtype=sums.dtype, device=world.device).expand(size)
                for name, size in zip(names, sizes, strict=True)
            ]
        )
        totals, weights = mean_over_ranks(torch.stack([sums, counts]), world)
        parts = torch.split((totals / weights).cpu(), sizes)
        means = {
            name: part.tolist() if self._sums[name].ndim else part.item()
            for name, part in zip(names, parts, strict=True)
        }
        self._sums, self._counts = {}, {}
        return means
