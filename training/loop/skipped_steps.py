"""Steps that were skipped because a loss or a gradient was not finite: counted, told with their samples, and bounded.

The engine skips them on its own, on the device. Here the host learns of them, a few steps late: it looks when it waits
for the device anyway, at a line of metrics or before a checkpoint.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from training.ranks.world import World

NAMED = 20
"""Samples of a skipped step that are named."""


@dataclass(frozen=True, kw_only=True)
class _Step:
    """A step that nobody has looked at yet."""

    number: int
    """From 0."""
    taken: int | Tensor
    loss: Tensor
    """Mean over this rank's micro-batches."""
    keys: list[str]
    """The first of this rank's samples."""
    n_samples: int
    """How many samples this rank had."""
    is_overflow: bool
    """Whether float16's loss scale was too large, and has been lowered."""


class SkippedSteps:
    """The skipped steps of a run.

    Args:
        limit: how many may follow one another. Overflows of gradients, which only lower the loss scale, do not count.
        world: this process's place.
        report: told of each on the first rank.
        n_before: skipped before the run was resumed.
    """

    def __init__(self, limit: int, world: World, report: Callable[[str], None], *, n_before: int = 0) -> None:
        self.n = n_before
        """How many there were, as far as was looked."""
        self.first_in_row: int | None = None
        """The first of the skipped steps up to the last one that was looked at; None if that one was taken."""
        self._limit, self._world, self._report = limit, world, report
        self.n_in_row = 0
        """How many of the last steps that were looked at were skipped."""
        self._unseen: list[_Step] = []

    def add(
        self, number: int, taken: int | Tensor, loss: Tensor, keys: Sequence[str], *, is_overflow: bool = False
    ) -> None:
        """Remember a step; nothing is read from the device."""
        self._unseen.append(
            _Step(
                number=number,
                taken=taken,
                loss=loss.detach(),
                keys=list(keys[:NAMED]),
                n_samples=len(keys),
                is_overflow=is_overflow,
            )
        )

    @property
    def is_due(self) -> bool:
        """Whether so many steps were not looked at that they may be too many in a row."""
        return len(self._unseen) > self._limit

    def look(self) -> bool:
        """Look at the steps since the last look; returns whether too many in a row were skipped.

        Waits for the device. Collective where a step was skipped, which all ranks know of alike.
        """
        steps, self._unseen = self._unseen, []
        if steps and isinstance(steps[0].taken, Tensor):
            were_taken = torch.stack([torch.as_tensor(step.taken) for step in steps]).tolist()
        else:
            were_taken = [step.taken for step in steps]
        for step, taken in zip(steps, were_taken, strict=True):
            if taken:
                self.n_in_row, self.first_in_row = 0, None
                continue
            self.n += 1
            if self._tell(step) or not step.is_overflow:
                self.n_in_row += 1
                self.first_in_row = step.number if self.first_in_row is None else self.first_in_row
            if self.n_in_row > self._limit:
                return True
        return False

    def _tell(self, step: _Step) -> bool:
        """Report a skipped step; returns whether its loss was not finite on some rank: no scale mends that."""
        parts = self._gathered((step.loss.item(), step.keys, step.n_samples))
        wrong = [part for part in parts if not math.isfinite(part[0])]
        if step.is_overflow and not wrong:
            self._report(f"step {step.number + 1} is skipped: its float16 gradient overflowed, the loss scale falls")
            return False
        reason = f"the loss is {wrong[0][0]}" if wrong else "the gradient is not finite"
        # those of ranks whose loss is not finite first: one of them is to blame
        keys = [key for part in [*wrong, *(part for part in parts if part not in wrong)] for key in part[1]][:NAMED]
        n_more = sum(part[2] for part in parts) - len(keys)
        more = f" and {n_more} more" if n_more else ""
        self._report(f"step {step.number + 1} is skipped, {reason}: its samples are {', '.join(keys)}{more}")
        return bool(wrong)

    def _gathered(self, part: tuple[float, list[str], int]) -> list[tuple[float, list[str], int]]:
        """Return what all ranks give. Collective."""
        if self._world.size == 1:
            return [part]
        parts: list[tuple[float, list[str], int]] = [part] * self._world.size
        dist.all_gather_object(parts, part)
        return parts
