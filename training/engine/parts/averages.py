"""Averaged weights at ZeRO stage 3: every rank averages its own part, and no rank ever holds all of them.

Whoever reads them, on the first rank, gets one tensor at a time, which the ranks put together when it is asked for.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor

from storage.models.directory import write_tensors
from training.engine.parts.cutting import bounds, size_of_part, whole_on
from training.engine.parts.ema import AVERAGES, EMA, Averages, Weights
from training.ranks.ranks import Ranks, on_first_rank

Shapes = Mapping[str, torch.Size]
_DONE, _TOGETHER = -1, -2


class AveragesInParts(Averages):
    """The averaged weights of a run, of which each rank holds a part.

    Args:
        weights: returns this rank's parts of the current weights, flat, on the CPU.
        shapes: of the whole weights.
        decay: see `EMA`.
        ranks: the ranks.
    """

    _ema: EMA

    def __init__(self, weights: Callable[[], Weights], shapes: Shapes, decay: float, ranks: Ranks) -> None:
        self._weights, self._shapes, self._ranks = weights, shapes, ranks
        self._ema = EMA(weights(), decay)

    def use(self, action: Callable[[Weights], object], together: Callable[[Any], object] | None = None) -> None:
        """Call `action` with the averages on the first rank, while the others give it their parts. Collective.

        Args:
            action: called with a `WeightsInParts`.
            together: called with the same on the other ranks, when `action` calls `WeightsInParts.call_all`.

        Raises:
            ValueError, OSError: as `on_first_rank`.
        """
        weights = WeightsInParts(self._ema.average, self._shapes, self._ranks)
        if not self._ranks.is_first:
            weights.serve(together or _nothing)
        on_first_rank(lambda: weights.lent_to(action), self._ranks)

    def save(self, folder: Path) -> list[Path]:
        """Write this rank's parts into the folder of a checkpoint; returns the file.

        Raises:
            OSError: it could not be written.
        """
        path = _parts_file(folder, self._ranks.rank)
        write_tensors(path, self._ema.average)
        return [path]

    def load(self, folder: Path, n_ranks: int) -> None:
        """Restore this rank's parts from the folder of a checkpoint that `n_ranks` saved.

        In a checkpoint of version 0.1 they are whole, in one file.

        Raises:
            OSError, ValueError, SafetensorError: a file is missing, damaged, or of another model.
        """
        self._ema.load(_read(folder, n_ranks, self._shapes, self._ranks))


def _nothing(_: object) -> None:
    pass


def _parts_file(folder: Path, rank: int) -> Path:
    return folder / f"ema_{rank:05d}.safetensors"


def _read(folder: Path, n_saved: int, shapes: Shapes, ranks: Ranks) -> dict[str, Tensor]:
    """Return this rank's parts of averaged weights that `n_saved` ranks saved in parts, or one rank whole."""
    is_whole = (folder / AVERAGES).is_file()
    parts: dict[str, Tensor] = {}
    with ExitStack() as stack:
        opened: dict[Path, Any] = {}

        def file(path: Path) -> Any:
            if path not in opened:
                opened[path] = stack.enter_context(safe_open(path, framework="pt"))
            return opened[path]

        names = set(file(folder / AVERAGES if is_whole else _parts_file(folder, 0)).keys())
        if names != set(shapes):
            raise ValueError("the averaged weights of the checkpoint are of another model")
        for name, shape in shapes.items():
            begin, end = bounds(math.prod(shape), ranks)
            if is_whole:
                parts[name] = file(folder / AVERAGES).get_tensor(name).reshape(-1)[begin:end].clone()
                continue
            if begin == end:
                parts[name] = torch.empty(0)
                continue
            size = size_of_part(math.prod(shape), n_saved)
            pieces = [
                file(_parts_file(folder, rank)).get_slice(name)[max(0, begin - rank * size) : end - rank * size]
                for rank in range(begin // size, -(-end // size))
            ]
            parts[name] = torch.cat(pieces)
    return parts


class WeightsInParts(Mapping[str, Tensor]):
    """Weights that the ranks hold in parts, as the first rank reads them: each is put together when it is asked for.

    The first rank calls `lent_to`, the others meanwhile `serve`.

    Args:
        parts: this rank's, flat, by name.
        shapes: of the whole weights.
        ranks: the ranks.
    """

    def __init__(self, parts: Weights, shapes: Shapes, ranks: Ranks) -> None:
        self._parts, self.shapes, self.ranks = parts, shapes, ranks
        self._names = list(shapes)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, name: str) -> Tensor:
        """Return a whole weight on the CPU, of the first rank."""
        if name not in self.shapes:
            raise KeyError(name)
        self._exchange(self._names.index(name))
        whole = self.on(0, name)
        assert whole is not None
        return whole.cpu()

    def on(self, rank: int, name: str) -> Tensor | None:
        """Return a whole weight on one rank's device, and None on the others. Collective."""
        return whole_on(rank, self._parts[name], self.shapes[name], self.ranks)

    def call_all(self) -> None:
        """Let all other ranks call the `together` that they were given, as the first rank will do itself."""
        self._exchange(_TOGETHER)

    def lent_to(self, action: Callable[[Weights], object]) -> None:
        """Call `action` with these weights, and then let the other ranks go, whatever happened."""
        try:
            action(self)
        finally:
            self._exchange(_DONE)

    def serve(self, together: Callable[["WeightsInParts"], object]) -> None:
        """Do what the first rank asks of all, until it wants no more: give it this rank's parts, or call `together`."""
        while (number := self._exchange(_DONE)) != _DONE:
            if number == _TOGETHER:
                together(self)
            else:
                self.on(0, self._names[number])
            self.ranks.watch.touch()

    def _exchange(self, number: int) -> int:
        """Return the number of the weight that the first rank wants, which it says and the others hear."""
        if self.ranks.size == 1:
            return number
        said = torch.tensor(number, device=self.ranks.device)
        dist.broadcast(said, src=0)
        return int(said.item())
