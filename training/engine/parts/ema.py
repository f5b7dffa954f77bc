"""Averaged weights: the exponential moving average that is exported.

It is updated after every optimizer step of the dVAE (Ramesh et al. 2021, A.2) and after every 25th of the transformer
(B.2).
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from storage.models.directory import write_tensors
from training.ranks.ranks import Ranks, on_first_rank

Weights = Mapping[str, Tensor]
AVERAGES = "ema.safetensors"
"""File of the averaged weights in a checkpoint, where one rank holds them whole."""


class EMA:
    """An exponential moving average of named tensors, in float32.

    Args:
        weights: the tensors to start from, which are copied.
        decay: weight of the old average in one update, in [0, 1).
    """

    def __init__(self, weights: Mapping[str, Tensor], decay: float) -> None:
        self.decay = decay
        self.average = {name: weight.detach().float().clone() for name, weight in weights.items()}

    @torch.no_grad()
    def update(self, weights: Mapping[str, Tensor], applied: int | Tensor = 1) -> None:
        """Move the average by 1 − decay towards `weights`; leave it as it is if `applied` is 0.

        `applied` may be a 0-d tensor; nothing waits for its device.
        """
        names = list(self.average)
        averages = [self.average[name] for name in names]
        current = [weights[name].detach().to(self.average[name]) for name in names]
        if isinstance(applied, Tensor):
            for average, weight in zip(averages, current, strict=True):
                average.lerp_(weight, (1.0 - self.decay) * applied)
        elif applied:
            torch._foreach_lerp_(averages, current, 1.0 - self.decay)

    def load(self, average: Mapping[str, Tensor]) -> None:
        """Replace the average by a saved one.

        Raises:
            ValueError: the names or shapes are not this model's.
        """
        if {n: t.shape for n, t in average.items()} != {n: t.shape for n, t in self.average.items()}:
            raise ValueError(
                "the averaged weights of the checkpoint are of another model: resume with the recipe it was made with"
            )
        for name, tensor in average.items():
            self.average[name].copy_(tensor)


class Averages:
    """The averaged weights of a run, which the first rank holds whole.

    Args:
        weights: returns the current weights on the first rank; collective.
        decay: see `EMA`.
        ranks: the ranks.
    """

    def __init__(self, weights: Callable[[], Weights], decay: float, ranks: Ranks) -> None:
        self._weights, self._ranks = weights, ranks
        first = weights()
        self._ema = EMA(first, decay) if ranks.is_first else None

    def update(self, applied: int | Tensor) -> None:
        """Move the averages towards the current weights: see `EMA.update`. Collective."""
        weights = self._weights()
        if self._ema is not None:
            self._ema.update(weights, applied)

    def not_finite(self) -> list[str]:
        """Return the names of the averages with values on this rank that are not finite."""
        held = self._ema.average if self._ema is not None else {}
        return [name for name, average in held.items() if not average.isfinite().all()]

    def use(self, action: Callable[[Weights], object], together: Callable[[Any], object] | None = None) -> None:
        """Call `action` with the averages on the first rank, while the others wait. Collective.

        `together` is called only where the ranks hold parts: see `AveragesInParts`.

        Raises:
            ValueError, OSError: as `on_first_rank`.
        """
        on_first_rank(lambda: action(self._ema.average if self._ema is not None else {}), self._ranks)

    def save(self, folder: Path) -> list[Path]:
        """Write this rank's file into the folder of a checkpoint, if it has one; returns it.

        Raises:
            OSError: it could not be written.
        """
        if self._ema is None:
            return []
        write_tensors(folder / AVERAGES, self._ema.average)
        return [folder / AVERAGES]

    def load(self, folder: Path, n_ranks: int) -> None:
        """Restore the averages from the folder of a checkpoint that `n_ranks` saved.

        Raises:
            OSError, ValueError, SafetensorError: a file is missing, damaged, or of another model.
        """
        if self._ema is not None:
            self._ema.load(load_file(folder / AVERAGES))
