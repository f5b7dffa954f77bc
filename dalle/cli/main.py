"""The command line `dalle`: generate, rank, search, reconstruct, import-dvae.

Results go to files and stdout, messages to stderr. An error that the user caused ends in one line and exit code 1.
"""

from collections.abc import Sequence
from typing import Annotated

from tyro.conf import FlagCreatePairsOff, subcommand

from dalle.cli.command import parse, run_program
from dalle.cli.generate import Generate
from dalle.cli.import_dvae import ImportDVAE
from dalle.cli.rank import Rank
from dalle.cli.reconstruct import Reconstruct
from dalle.cli.search import Search

Commands = (
    Annotated[Generate, subcommand("generate")]
    | Annotated[Rank, subcommand("rank")]
    | Annotated[Search, subcommand("search")]
    | Annotated[Reconstruct, subcommand("reconstruct")]
    | Annotated[ImportDVAE, subcommand("import-dvae")]
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run `dalle`; returns the exit code."""
    description = (
        "Generates pictures from captions; ranks, searches and reconstructs pictures. "
        "Add --debug to see the traceback of an error."
    )
    kinds = FlagCreatePairsOff[Commands]
    return run_program(lambda arguments: parse(kinds, arguments, prog="dalle", description=description), argv)
