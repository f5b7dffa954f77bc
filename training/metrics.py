"""A line for whoever watches a run."""

import sys
from collections.abc import Callable

from dalle.output.text import printable

Report = Callable[[str], None]


def to_stderr(line: str) -> None:
    """Print a line where messages belong."""
    print(printable(line), file=sys.stderr, flush=True)
