"""How a command line is run: parsed, on a device, ending in one line if the user caused an error.

Importing it imports neither torch nor tyro, so that commands without models answer at once, and Ctrl-C is heard.
"""

from __future__ import annotations

import dataclasses
import io
import shutil
import sys
import textwrap
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Protocol, get_args, get_origin

from dalle.cli.start import let_commands_stop
from dalle.cli.terminal import discard, flush_output, nobody_reads, print_error, set_up_logging
from storage.errors import is_out_of_memory

if TYPE_CHECKING:
    import torch
    from tyro.constructors import ConstructorRegistry, StructConstructorSpec, StructFieldSpec, StructTypeInfo


MAX_WIDTH = 100
"""Characters of a line of a command's description."""
BROKEN_PIPE_CODE = 128 + 13
"""Exit code when nobody reads the output any more, as in `dalle rank … | head -1`: that of a program that SIGPIPE ends,
as it ends most."""


class Command(Protocol):
    """A command line that was read."""

    def run(self) -> None:
        """Do what it says."""


def run_program(read: Callable[[list[str]], Command], argv: Sequence[str] | None = None) -> int:
    """Read a command line and run its command; `--debug` anywhere shows tracebacks.

    Args:
        read: returns the command that the arguments say, mostly by `parse`.
        argv: the arguments; by default those of the process.

    Returns:
        The exit code: 0, or 1 after any error, also one of usage; see also `BROKEN_PIPE_CODE`.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names that the terminal has no letters for

    def run() -> None:
        try:
            command = read(arguments)
        finally:
            let_commands_stop()
        command.run()

    return run_command(run, debug="--debug" in arguments)


def parse(kind: Any, arguments: Sequence[str], *, prog: str, description: str = "", default: Any = None) -> Any:
    """Return what the arguments say, as an instance of a dataclass or of one of a union of them, one per verb.

    Args:
        kind: the dataclass or union, as tyro reads it.
        arguments: of the command line; --debug is left out.
        prog: the name of the program, with the verb.
        description: the first lines of its help; by default the docstring of the dataclass.
        default: an instance whose values are the defaults; by default those of the dataclass.

    Raises:
        SystemExit: after help, code 0; after an error of usage, which is explained on stderr, code 2.
    """
    import tyro

    return tyro.cli(
        kind,
        args=[argument for argument in arguments if argument != "--debug"],
        prog=prog,
        description=_wrapped(description or kind.__doc__),
        default=tyro.MISSING_NONPROP if default is None else default,
        config=(tyro.conf.DisallowNone,),
        registry=_registry(),
    )


def _wrapped(text: str) -> str:
    """Return a text in lines for the terminal; they begin with a space because tyro joins those that do not."""
    width = min(shutil.get_terminal_size().columns, MAX_WIDTH)
    return textwrap.fill(
        " ".join(text.split()), width, initial_indent=" ", subsequent_indent=" ", break_on_hyphens=False
    )


def _registry() -> ConstructorRegistry:
    """Return tyro's rule for dataclasses with our words: see `_in_our_words`."""
    from tyro.constructors import ConstructorRegistry, StructConstructorSpec

    registry = ConstructorRegistry()
    inside = False

    @registry.struct_rule
    def of_dataclass(info: StructTypeInfo) -> StructConstructorSpec | None:
        nonlocal inside
        if inside or not dataclasses.is_dataclass(info.type):
            return None
        inside = True  # so that tyro's own rule is asked
        try:
            spec = ConstructorRegistry.get_struct_spec(info)
        finally:
            inside = False
        assert isinstance(spec, StructConstructorSpec)
        return dataclasses.replace(spec, fields=tuple(map(_in_our_words, spec.fields)))

    return registry


def _in_our_words(field: StructFieldSpec) -> StructFieldSpec:
    """Return an option whose help is one paragraph, without a default of None, () or False; "PATH ..." for many."""
    import tyro

    kind, *own = get_args(field.type) if get_origin(field.type) is Annotated else [field.type]
    words: dict[str, Any] = {}
    if field.default is None or field.default is False or field.default == ():
        words["help_behavior_hint"] = ""
    if get_origin(kind) in (tuple, Sequence):
        words["metavar"] = "PATH ..."
    if field.default is None:
        kind |= None

    def in_a_paragraph() -> str | None:
        text = field.helptext() if callable(field.helptext) else field.helptext
        return None if text is None else " ".join(text.split())

    # what the field says itself comes last, and goes before
    annotated = Annotated[kind, tyro.conf.arg(**words), *own]  # type: ignore[valid-type]
    return dataclasses.replace(field, type=annotated, helptext=in_a_paragraph)  # type: ignore[arg-type]


def run_command(function: Callable[[], None], *, debug: bool = False) -> int:
    """Call a function that is a command: messages to stderr, errors of the user as one line.

    Args:
        function: prints results, and raises ValueError or OSError for what a user can cause.
        debug: show the traceback of any error.

    Returns:
        The exit code: 0, 1, or `BROKEN_PIPE_CODE`.
    """
    set_up_logging()
    code = 0
    for step in (function, flush_output):
        try:
            step()
        except SystemExit as stop:  # help, or a usage error that tyro has explained on stderr
            code = 1 if stop.code else 0
        except (ValueError, OSError, RuntimeError, MemoryError, KeyboardInterrupt) as error:
            if isinstance(error, RuntimeError) and not is_out_of_memory(error):
                raise
            if isinstance(error, BrokenPipeError) and nobody_reads():
                discard(sys.stdout, sys.stderr)
                return BROKEN_PIPE_CODE
            print_error(error, debug=debug)
            code = 1
    return code


def resolve_device(name: str) -> torch.device:
    """Return the device of a name: see `usable_device`."""
    from dalle.data.bundle import usable_device

    return usable_device(name)
