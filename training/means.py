"""Means of metrics over steps, batches and ranks."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from training.world import World, mean_over_ranks


class Means:
    """Running means of metrics that are not all there at every step; nothing is read from the device before `take`."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, metrics: Mapping[str, Tensor], weight: int = 1) -> None:
        """Take metrics, 0-d or 1-d, into account as often as `weight` says; at 0, only their names."""
        for name, value in metrics.items():
            value = weight * value.detach().double() if weight else torch.zeros_like(value, dtype=torch.float64)
            self._sums[name] = self._sums[name] + value if name in self._sums else value
            self._counts[name] = self._counts.get(name, 0) + weight

    def take(self, world: World) -> dict[str, Any]:
        """Return the means over all that was added on all ranks, and start anew: numbers, and lists for 1-d metrics.

        Collective: every rank must have added the same names.
        """
        names = sorted(self._sums)
        if not names:
            return {}
        sums = torch.cat([self._sums[name].to(world.device).flatten() for name in names])
        sizes = [self._sums[name].numel() for name in names]
        counts = [self._counts[name] for name, size in zip(names, sizes, strict=True) for _ in range(size)]
        both = mean_over_ranks(torch.stack([sums, sums.new_tensor(counts)]), world)
        parts = torch.split(both[0] / both[1], sizes)
        means = {
            name: part.tolist() if self._sums[name].ndim else part.item()
            for name, part in zip(names, (part.cpu() for part in parts), strict=True)
        }
        self._sums, self._counts = {}, {}
        return means
