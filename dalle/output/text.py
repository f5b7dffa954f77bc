"""Text for people: aligned tables, durations, other people's text that is safe to print, and where a line is said."""

import sys
from collections.abc import Callable, Sequence

Say = Callable[[str], None]
"""Shows a line to whoever watches."""


def to_stderr(line: str) -> None:
    """Print a line on stderr."""
    print(printable(line), file=sys.stderr, flush=True)


GIB = 1 << 30
"""Bytes of a GiB."""


def aligned(rows: Sequence[Sequence[str]], columns: str = "<", *, indent: int = 0) -> str:
    """Return rows of cells as lines with aligned columns, two spaces apart, without spaces at their ends.

    Args:
        rows: cells of one line each; a short row leaves its last columns empty.
        columns: "<" (left) or ">" (right) for each column; the last one holds for all further columns.
        indent: spaces before each line.
    """
    n_columns = max((len(row) for row in rows), default=0)
    columns = columns.ljust(n_columns, columns[-1])
    widths = [max((len(row[i]) for row in rows if i < len(row)), default=0) for i in range(n_columns)]
    lines = ("  ".join(f"{cell:{columns[i]}{widths[i]}}" for i, cell in enumerate(row)) for row in rows)
    return "\n".join(f"{' ' * indent}{line}".rstrip() for line in lines)


def counted(n: int, noun: str) -> str:
    """Return a number with its noun: "1 picture", "2,000 pictures"."""
    return f"{n:,} {noun}" if n == 1 else f"{n:,} {noun}s"


def duration(seconds: float) -> str:
    """Return a duration for people: "42 s", "3:05", "2:14:09"."""
    minutes, s = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minutes:02}:{s:02}"
    return f"{minutes}:{s:02}" if minutes else f"{s} s"


def printable(text: str) -> str:
    """Return a text with its control characters, which could steer a terminal, escaped as in Python; newlines stay.

    Names and captions in data are other people's.
    """
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


def printable_line(text: str) -> str:
    """Return a text in one line that is safe to print."""
    return printable(" ".join(text.split()))
