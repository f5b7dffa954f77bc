"""Steps that were skipped because a loss or a gradient was not finite: counted, reported with their samples, bounded.

The engine skips them on the device. The host learns of them a few steps late: it asks when it waits for the device
anyway, at a line of metrics or before a checkpoint.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dalle.output.text import Say
from training.ranks.ranks import Ranks, from_all_ranks

MAX_NAMED = 20
"""Samples of a skipped step whose keys are reported."""


@dataclass(frozen=True, kw_only=True)
class _Step:
    """A step of which the host does not know yet whether it was applied."""

    number: int
    """From 0."""
    applied: int | Tensor
    loss: Tensor
    """Mean over this rank's micro-batches."""
    keys: list[str]
    """The first of this rank's samples."""
    n_samples: int
    """Number of samples of this rank."""
    overflowed: bool
    """Whether float16's loss scale was too large, and has been lowered."""


class SkippedSteps:
    """The skipped steps of a run.

    Args:
        limit: skipped steps in a row that are allowed. Overflows that only lower a float16 loss scale do not count.
        ranks: the ranks of the run.
        say: told of each skipped step on the first rank.
    """

    def __init__(self, limit: int, ranks: Ranks, say: Say) -> None:
        self.n = 0
        """Skipped steps up to the last `check`."""
        self.n_in_row = 0
        """Skipped steps in a row up to the last one that was checked."""
        self.first_in_row: int | None = None
        """The first of them; None if the last step that was checked was applied."""
        self._limit, self._ranks, self._say = limit, ranks, say
        self._unchecked: list[_Step] = []

    def add(
        self, number: int, applied: int | Tensor, loss: Tensor, keys: Sequence[str], *, overflowed: bool = False
    ) -> None:
        """Add step `number`; reads nothing from the device."""
        self._unchecked.append(
            _Step(
                number=number,
                applied=applied,
                loss=loss.detach(),
                keys=list(keys[:MAX_NAMED]),
                n_samples=len(keys),
                overflowed=overflowed,
            )
        )

    @property
    def is_check_due(self) -> bool:
        """Whether the unchecked steps may be too many in a row."""
        return len(self._unchecked) > self._limit

    def check(self) -> bool:
        """Check the steps since the last check; returns whether too many in a row were skipped.

        Waits for the device. Collective where a step was skipped, which all ranks know alike.
        """
        steps, self._unchecked = self._unchecked, []
        if steps and isinstance(steps[0].applied, Tensor):
            were_applied = torch.stack([torch.as_tensor(step.applied) for step in steps]).tolist()
        else:
            were_applied = [step.applied for step in steps]
        for step, applied in zip(steps, were_applied, strict=True):
            if applied:
                self.n_in_row, self.first_in_row = 0, None
                continue
            self.n += 1
            if self._report(step) or not step.overflowed:
                self.n_in_row += 1
                self.first_in_row = step.number if self.first_in_row is None else self.first_in_row
            if self.n_in_row > self._limit:
                return True
        return False

    def _report(self, step: _Step) -> bool:
        """Report a skipped step; returns whether its loss was not finite on some rank, which no loss scale mends."""
        parts = from_all_ranks((step.loss.item(), step.keys, step.n_samples), self._ranks)
        wrong = [part for part in parts if not math.isfinite(part[0])]
        if step.overflowed and not wrong:
            self._say(f"step {step.number + 1} is skipped: its float16 gradient overflowed, the loss scale falls")
            return False
        reason = f"the loss is {wrong[0][0]}" if wrong else "the gradient is not finite"
        # ranks whose loss is not finite come first: one of their samples is the cause
        keys = [key for part in [*wrong, *(part for part in parts if part not in wrong)] for key in part[1]][:MAX_NAMED]
        n_more = sum(part[2] for part in parts) - len(keys)
        more = f" and {n_more} more" if n_more else ""
        self._say(f"step {step.number + 1} is skipped, {reason}: its samples are {', '.join(keys)}{more}")
        return bool(wrong)
