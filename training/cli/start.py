"""Where `dalle-train` starts: commands that only read are in look.py, all others in main.py, which needs torch."""

import sys
from collections.abc import Sequence

from dalle.cli.command import run_program
from training.cli.look import DESCRIPTION, PROGRAM, Command, read


def main(argv: Sequence[str] | None = None) -> int:
    """Run `dalle-train`; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and arguments[0] in ("status", "report"):
        return run_program(Command, read, arguments, prog=PROGRAM, description=DESCRIPTION)
    from training.cli.main import main as train

    return train(arguments)
