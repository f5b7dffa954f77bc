"""What every command line here does: parse, show messages, end in one line for what a user can cause.

It imports no torch, so that a command that needs none answers at once.
"""

import logging
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import tyro

from dalle.output.progress import CLEAR_LINE, printable

OUR_PACKAGES = ("storage", "dvae", "rerank", "dalle", "training")


def run_program(
    commands: Any,
    run: Callable[[Any], None],
    argv: Sequence[str] | None = None,
    *,
    prog: str,
    description: str,
) -> int:
    """Parse a command line and run the command; `--debug` anywhere shows tracebacks.

    Args:
        commands: a union of dataclasses, one per verb, as tyro reads it.
        run: does what the parsed dataclass says.
        argv: the arguments; by default those of the process.
        prog: the name of the program.
        description: the first lines of its help.

    Returns:
        The exit code: 0, or 1 after any error, also one of usage.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    try:
        command = tyro.cli(
            commands,
            args=arguments,
            prog=prog,
            description=f"{description} Add --debug to see the traceback of an error.",
            config=(tyro.conf.FlagCreatePairsOff,),
        )
    except SystemExit as stop:  # help, or a usage error that tyro has explained on stderr
        return 1 if stop.code else 0
    return run_command(lambda: run(command), debug=debug)


def run_command(function: Callable[[], None], *, debug: bool = False) -> int:
    """Call a function that is a command: messages to stderr, errors of the user as one line.

    Args:
        function: prints results, and raises ValueError or OSError for what a user can cause.
        debug: show the traceback of any error.

    Returns:
        The exit code, 0 or 1.
    """
    set_up_logging()
    try:
        function()
    except (ValueError, OSError, RuntimeError, KeyboardInterrupt) as error:
        if isinstance(error, RuntimeError) and not _is_out_of_memory(error):
            raise
        if debug:
            traceback.print_exc()
        print(f"error: {printable(error_line(error))}", file=sys.stderr)
        return 1
    return 0


def error_line(error: BaseException) -> str:
    """What went wrong, in one line."""
    if isinstance(error, KeyboardInterrupt):
        return "stopped"
    if _is_out_of_memory(error):
        return f"not enough memory on the device, use a smaller batch size ({error})".split(". ")[0]
    if isinstance(error, OSError) and error.strerror is not None:
        return f"{error.strerror}: {error.filename}" if error.filename is not None else error.strerror
    return " ".join(str(error).split()) or type(error).__name__


def _is_out_of_memory(error: BaseException) -> bool:
    """Whether this is torch's error, which nothing can raise that has not imported torch."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(error, torch.OutOfMemoryError)


class _StderrHandler(logging.Handler):
    """One line per message: "warning: …", or "note: …" for what is only good to know."""

    def emit(self, record: logging.LogRecord) -> None:
        prefix = "warning" if record.levelno >= logging.WARNING else "note"
        clear = CLEAR_LINE if sys.stderr.isatty() else ""
        print(f"{clear}{prefix}: {printable(' '.join(record.getMessage().split()))}", file=sys.stderr)


def set_up_logging() -> None:
    """Show warnings of all libraries, and notes of our own packages; calling it again changes nothing."""
    root = logging.getLogger()
    if not any(isinstance(handler, _StderrHandler) for handler in root.handlers):
        root.addHandler(_StderrHandler(logging.INFO))
    for name in OUR_PACKAGES:
        logging.getLogger(name).setLevel(logging.INFO)
