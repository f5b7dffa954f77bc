"""What commands print: errors and log messages in one line each on stderr, tables on stdout."""

import logging
import os
import select
import sys
import traceback
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from dalle.output.text import aligned, printable, printable_line
from storage.disk import full_disk_note
from storage.errors import is_out_of_memory, reason_of

logger = logging.getLogger(__name__)

OUR_PACKAGES = ("storage", "dvae", "rerank", "dalle", "training")
SHOWN_REASONS = 5
MAX_REASON = 2000
"""Characters of an error: messages of other programs may quote a whole file."""
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
        return f"{error.strerror}: {error.filename}{full_disk_note(error, path)}"
    reason = reason_of(error)
    return reason if len(reason) <= MAX_REASON else f"{reason[:MAX_REASON]}…"


def print_error(error: BaseException, *, debug: bool) -> None:
    """Print what went wrong on stderr, in one line; with `debug` after its traceback."""
    if isinstance(error, OSError) and error.filename is None:
        try:
            flush_output()
        except OSError as of_output:  # it was what failed
            error = of_output
    with suppress(OSError):  # nobody may read it
        if debug:
            traceback.print_exception(error)
        print(f"error: {printable(error_line(error))}", file=sys.stderr, flush=True)


def flush_output() -> None:
    """Flush stdout.

    Raises:
        BrokenPipeError: nobody reads it.
        OSError: that failed, such as on a full disk; everything further is discarded.
    """
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        discard(sys.stdout)
        raise OSError(error.errno, f"{error.strerror}: standard output") from error


def nobody_reads() -> bool:
    """Return whether stdout or stderr is a pipe or socket whose other end is closed."""
    poll = select.poll()
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, OSError, ValueError):  # there is none, or it is no file
            poll.register(stream.fileno(), 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def discard(*streams: TextIO | None) -> None:
    """Send what streams hold and will be given nowhere, so that Python can flush them at its end."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in streams:
        with suppress(AttributeError, OSError, ValueError):
            os.dup2(nowhere, stream.fileno())  # type: ignore[union-attr]
    os.close(nowhere)


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


def warn_of_skipped(messages: Sequence[str], problems: Counter[str]) -> None:
    """Warn of pictures that were left out: how many, by problem if they are many, and the first messages."""
    n = problems.total()
    if n:
        which = "1 picture was" if n == 1 else f"{n:,} pictures were"
        counts = ", ".join(f"{count:,} × {problem.removeprefix('is ')}" for problem, count in problems.most_common())
        by_problem = f" ({counts})" if n > 1 else ""
        more = "; …" if len(messages) > SHOWN_REASONS else ""
        logger.warning("%s skipped%s: %s%s", which, by_problem, "; ".join(messages[:SHOWN_REASONS]), more)
