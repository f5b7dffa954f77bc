"""How a command line is run: parsed, on a device, ending in one line if the user caused an error.

Importing it does not import torch, so that commands without models answer at once.
"""

import sys
import traceback
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import tyro

from dalle.cli.terminal import error_line, is_out_of_memory, set_up_logging
from dalle.output.progress import printable

if TYPE_CHECKING:
    import torch


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
        if isinstance(error, RuntimeError) and not is_out_of_memory(error):
            raise
        if debug:
            traceback.print_exc()
        print(f"error: {printable(error_line(error))}", file=sys.stderr)
        return 1
    return 0


def resolve_device(name: str) -> "torch.device":
    """Return the device of a name; "auto" is the GPU if there is one, else the CPU.

    Raises:
        ValueError: there is no such device.
    """
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"there is no device {name!r}: give cpu, cuda, cuda:1 … or auto") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"no device {name} here, there are {torch.cuda.device_count()} CUDA devices: give --device cpu"
        )
    return device
