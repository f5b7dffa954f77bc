"""What commands print: errors and log messages in one line each on stderr, tables on stdout."""

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from dalle.output.text import aligned, printable, printable_line
from storage.disk import full_disk_text, is_of_full_disk
from storage.errors import reason_of

logger = logging.getLogger(__name__)

OUR_PACKAGES = ("storage", "dvae", "rerank", "dalle", "training")
SHOWN_REASONS = 5
CLEAR_LINE = "\r\x1b[K"
"""Removes a progress line from a terminal."""


def error_line(error: BaseException) -> str:
    """Return what went wrong, in one line."""
    if isinstance(error, KeyboardInterrupt):
        return "stopped"
    if is_out_of_memory(error):
        return f"not enough memory on the device, use a smaller batch size ({error})".split(". ")[0]
    if isinstance(error, OSError) and error.strerror is not None:
        if error.filename is None:
            return error.strerror
        path = Path(error.filename if isinstance(error.filename, str) else "")
        full = f"; {full_disk_text(path)}" if is_of_full_disk(error, path) else ""
        return f"{error.strerror}: {error.filename}{full}"
    return reason_of(error)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether this is torch's error; without importing torch, since only torch raises it."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(error, torch.OutOfMemoryError)


class _StderrHandler(logging.Handler):
    """Prints a line per message: "warning: …", or "note: …" below that level."""

    def emit(self, record: logging.LogRecord) -> None:
        prefix = "warning" if record.levelno >= logging.WARNING else "note"
        clear = CLEAR_LINE if sys.stderr.isatty() else ""
        print(f"{clear}{prefix}: {printable_line(record.getMessage())}", file=sys.stderr)


def set_up_logging() -> None:
    """Show warnings of all libraries, and notes of our own packages; calling it again changes nothing."""
    root = logging.getLogger()
    if not any(isinstance(handler, _StderrHandler) for handler in root.handlers):
        root.addHandler(_StderrHandler(logging.INFO))
    for name in OUR_PACKAGES:
        logging.getLogger(name).setLevel(logging.INFO)


def print_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print columns: numbers to the right, and the last column, which is a name, to the left."""
    cells = [[printable(cell).replace("\n", "\\n") for cell in row] for row in rows]
    print(aligned([heads, *cells], ">" * (len(heads) - 1) + "<"))


def warn_of_skipped(reasons: Sequence[str]) -> None:
    """Warn of pictures that were left out: how many, and the first reasons."""
    if reasons:
        more = f"; and {len(reasons) - SHOWN_REASONS} more" if len(reasons) > SHOWN_REASONS else ""
        logger.warning("%d pictures were skipped: %s%s", len(reasons), "; ".join(reasons[:SHOWN_REASONS]), more)
