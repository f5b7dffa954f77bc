"""Means of metrics over steps, batches and ranks."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from training.ranks.ranks import Ranks, mean_over_ranks


class Means:
    """Weighted means of metrics that need not be there at every step; reads nothing from the device before `take`."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int | Tensor] = {}

    def add(self, metrics: Mapping[str, Tensor], weight: int | Tensor = 1) -> None:
        """Add metrics, 0-d or 1-d, with a weight. Weight 0 registers the names and ignores the values, NaN included.

        A weight that is a 0-d tensor stays on its device.
        """
        for name, value in metrics.items():
            value = value.detach().double()
            if isinstance(weight, Tensor):
                value = torch.where(weight > 0, weight * value.to(weight.device, non_blocking=True), 0.0)
            else:
                value = weight * value if weight else torch.zeros_like(value)
            self._sums[name] = self._sums[name] + value if name in self._sums else value
            self._counts[name] = self._counts.get(name, 0) + weight

    def state(self) -> dict[str, Any]:
        """Return the sums and counts of this rank as plain numbers, for `restore`. Waits for the device."""
        return {name: {"sum": value.tolist(), "count": float(self._counts[name])} for name, value in self._sums.items()}

    def restore(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Replace the sums and counts by those that `state` returned."""
        self._sums = {
            name: torch.tensor(part["sum"], dtype=torch.float64, device=device) for name, part in state.items()
        }
        self._counts = {
            name: torch.tensor(part["count"], dtype=torch.float64, device=device) for name, part in state.items()
        }

    def take(self, ranks: Ranks) -> dict[str, Any]:
        """Return the means over all ranks and start again from nothing: numbers, and lists for 1-d metrics.

        A metric whose weights are all 0 is NaN. Collective: every rank must have added the same names.
        """
        names = sorted(self._sums)
        if not names:
            return {}
        sizes = [self._sums[name].numel() for name in names]

        def there(value: float | Tensor) -> Tensor:
            return torch.as_tensor(value, dtype=torch.float64).to(ranks.device, non_blocking=True)

        sums = torch.cat([there(self._sums[name]).flatten() for name in names])
        counts = torch.cat([there(self._counts[name]).expand(size) for name, size in zip(names, sizes, strict=True)])
        totals, weights = mean_over_ranks(torch.stack([sums, counts]), ranks)
        parts = torch.split((totals / weights).cpu(), sizes)
        means = {
            name: part.tolist() if self._sums[name].ndim else part.item()
            for name, part in zip(names, parts, strict=True)
        }
        self._sums, self._counts = {}, {}
        return means
