"""Progress of a command on stderr, by tqdm: how much is done, the time left and the speed."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

from tqdm.std import tqdm

OnProgress = Callable[[float, int], None]
"""To call with (units done, begun ones in part; units there are)."""

TERMINAL_INTERVAL_S = 0.2
"""Shortest time between two drawings of the line on a terminal."""
LOG_INTERVAL_S = 10.0
"""Shortest time between two lines in a file or a pipe, where lines stay."""


@contextmanager
def progress_bar(unit: str, *, stream: TextIO | None = None) -> Iterator[OnProgress]:
    """Yield a function that shows progress: a line that is removed at the end, or in a file a line now and then.

    Work that ends at once shows nothing. Speed is measured from the first call: preparations, such as compiling, do not
    count.

    Args:
        unit: what is counted, in the plural ("candidates").
        stream: where the line goes; stderr by default.
    """
    bar: _Bar | None = None

    def show(done: float, total: int) -> None:
        nonlocal bar
        if bar is None:
            bar = _Bar(unit, done, total, sys.stderr if stream is None else stream)
        bar.update(done - bar.n)

    try:
        yield show
    finally:
        if bar is not None:
            bar.close()


def part_of(progress: OnProgress, n_before: int, total: int) -> OnProgress:
    """Return the function to call in a part of the work, before which `n_before` of the `total` units were done."""
    return lambda done, _: progress(n_before + done, total)


class _Bar(tqdm):  # type: ignore[misc]  # tqdm says no types
    monitor_interval = 0
    """No thread of tqdm's: processes are forked while a bar is shown."""

    def __init__(self, unit: str, done: float, total: int, stream: TextIO) -> None:
        self._is_terminal = stream.isatty()
        interval_s = TERMINAL_INTERVAL_S if self._is_terminal else LOG_INTERVAL_S
        line = "{n:.0f}/{total}{unit}, {remaining} left, {rate_noinv_fmt}"
        super().__init__(
            total=total,
            initial=done,
            unit=f" {unit}",
            file=stream,
            leave=False,
            delay=interval_s,
            mininterval=interval_s,
            miniters=0,
            smoothing=0,
            dynamic_ncols=self._is_terminal,
            bar_format="{bar:20} " + line if self._is_terminal else line,
        )

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        """Draw the line in its place; where that is no terminal, below the last one."""
        if self._is_terminal:
            return bool(super().display(msg, pos))
        if msg is None:
            print(self, file=self.fp, flush=True)
        return False
