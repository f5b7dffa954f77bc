"""How far a command is: one line on stderr with the speed and the time left."""

import sys
import time
from collections.abc import Callable
from typing import Self, TextIO

TERMINAL_INTERVAL_S = 0.2
"""Least time between two drawings of the line on a terminal."""
LOG_INTERVAL_S = 10.0
"""Least time between two lines in a file or a pipe, where lines stay."""
CLEAR_LINE = "\r\x1b[K"


class Progress:
    """A progress line; use it in a `with` statement, which removes it at the end.

    Args:
        unit: what is counted, in the plural ("candidates").
        stream: where the line goes; stderr by default.
    """

    def __init__(self, unit: str, *, stream: TextIO | None = None) -> None:
        self._unit = unit
        self._stream = stream if stream is not None else sys.stderr
        self._is_terminal = self._stream.isatty()
        self._started_at = time.monotonic()
        # nothing is said about work that ends at once
        self._shown_at = self._started_at
        self._first: tuple[float, float] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._is_terminal:
            self._stream.write(CLEAR_LINE)
            self._stream.flush()

    def elapsed_s(self) -> float:
        """Seconds since the work began."""
        return time.monotonic() - self._started_at

    def after(self, n_before: int, total: int) -> Callable[[float, int], None]:
        """An `update` for a part of the work, before which `n_before` of the `total` units were done."""

        def update(done: float, _: int) -> None:
            self.update(n_before + done, total)

        return update

    def update(self, done: float, total: int) -> None:
        """Say that `done` of `total` units, begun ones in part, are done; drawn only now and then.

        Speed is measured from the first call: preparations, such as compiling, do not count.
        """
        now = time.monotonic()
        if self._first is None:
            self._first = (now, done)
        if now - self._shown_at < (TERMINAL_INTERVAL_S if self._is_terminal else LOG_INTERVAL_S):
            return
        self._shown_at = now
        first_at, before = self._first
        line = progress_line(done, total, self._unit, now - first_at, before=before)
        self._stream.write(f"{CLEAR_LINE}{line}" if self._is_terminal else f"{line}\n")
        self._stream.flush()


def progress_line(done: float, total: int, unit: str, elapsed_s: float, *, before: float = 0.0) -> str:
    """Return the line itself: "12/64 candidates, 3.4 candidates/s, 15 s left".

    Args:
        done: units done.
        total: units there are.
        unit: their name, in the plural.
        elapsed_s: seconds since the clock began.
        before: units done by then.
    """
    line = f"{int(done)}/{total} {unit}"
    if done <= before or elapsed_s <= 0:
        return line
    rate = (done - before) / elapsed_s
    return f"{line}, {rate:.3g} {unit}/s, {duration((total - done) / rate)} left"


def duration(seconds: float) -> str:
    """A duration for people: "42 s", "3:05", "2:14:09"."""
    minutes, s = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minutes:02}:{s:02}"
    return f"{minutes}:{s:02}" if minutes else f"{s} s"


def printable(text: str) -> str:
    """The text with its control characters, which could steer a terminal, written out as in Python; newlines stay.

    Names and captions in data are other people's.
    """
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)
