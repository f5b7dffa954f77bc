"""Stopping on request: SIGINT and SIGTERM end the step under way instead of the process."""

import signal
from types import FrameType


class Interrupted(Exception):  # noqa: N818  # not an error
    """The program was asked to stop; what is done is saved, and the same command goes on from it."""


class StopSignals:
    """While it lasts, SIGINT and SIGTERM only raise a flag: the step under way ends, and a checkpoint is saved.

    A second SIGINT is a KeyboardInterrupt. SIGTERM may come any number of times: from a launcher, and from the watch
    that finds the launcher gone.
    """

    def __init__(self) -> None:
        self.raised = False
        """Whether one has come."""
        self._n_interrupts = 0

    def __enter__(self) -> "StopSignals":
        self._handlers = {number: signal.signal(number, self._raise_flag) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _raise_flag(self, number: int, _frame: FrameType | None) -> None:
        self._n_interrupts += number == signal.SIGINT
        if self._n_interrupts > 1:
            raise KeyboardInterrupt
        self.raised = True
