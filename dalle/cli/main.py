"""The command line `dalle`: pictures from captions and pictures, captions, ranking, evaluation, a server, imports.

Results go to files and stdout, messages to stderr. An error that the user caused ends in one line and exit code 1.
"""

import sys

from dalle.cli.start import begin

TYPE_CHECKING = False  # as in dalle/__init__.py
if TYPE_CHECKING:
    from collections.abc import Sequence

    from dalle.cli.command import Command


def main(argv: "Sequence[str] | None" = None) -> int:
    """Run `dalle`; returns the exit code."""
    begin()
    from dalle.cli.command import run_program

    return run_program(read, argv)


def read(arguments: "Sequence[str]") -> "Command":
    """Return the command that the arguments say.

    Raises:
        SystemExit: as `dalle.cli.command.parse`.
    """
    from typing import Annotated

    from tyro.conf import FlagCreatePairsOff, subcommand

    from dalle.cli.captions.complete import CompleteCaption
    from dalle.cli.captions.rank import RankCaptions
    from dalle.cli.command import parse
    from dalle.cli.editing.edit import Edit
    from dalle.cli.editing.score import Score
    from dalle.cli.editing.variations import Variations
    from dalle.cli.evaluation.evaluate import Evaluate
    from dalle.cli.evaluation.study import Study
    from dalle.cli.generate import Generate
    from dalle.cli.importing.import_bundle import ImportBundle
    from dalle.cli.importing.import_clip import ImportCLIP
    from dalle.cli.importing.import_dvae import ImportDVAE
    from dalle.cli.importing.import_unclip import ImportUnCLIP
    from dalle.cli.importing.import_vqgan import ImportVQGAN
    from dalle.cli.rank import Rank
    from dalle.cli.reconstructing.reconstruct import Reconstruct
    from dalle.cli.search import Search
    from dalle.cli.serve import Serve
    from dalle.cli.unclip.blend import Blend
    from dalle.cli.unclip.diff import Diff
    from dalle.cli.unclip.vary import Vary

    kinds = FlagCreatePairsOff[
        Annotated[Generate, subcommand("generate")]
        | Annotated[Edit, subcommand("edit")]
        | Annotated[Variations, subcommand("variations")]
        | Annotated[Vary, subcommand("vary")]
        | Annotated[Blend, subcommand("blend")]
        | Annotated[Diff, subcommand("diff")]
        | Annotated[RankCaptions, subcommand("caption")]
        | Annotated[CompleteCaption, subcommand("complete-caption")]
        | Annotated[Rank, subcommand("rank")]
        | Annotated[Score, subcommand("score")]
        | Annotated[Search, subcommand("search")]
        | Annotated[Reconstruct, subcommand("reconstruct")]
        | Annotated[Evaluate, subcommand("evaluate")]
        | Annotated[Study, subcommand("study")]
        | Annotated[Serve, subcommand("serve")]
        | Annotated[ImportDVAE, subcommand("import-dvae")]
        | Annotated[ImportCLIP, subcommand("import-clip")]
        | Annotated[ImportVQGAN, subcommand("import-vqgan")]
        | Annotated[ImportUnCLIP, subcommand("import-unclip")]
        | Annotated[ImportBundle, subcommand("import-bundle")]
    ]
    description = (
        "Generates pictures from captions; edits, varies and blends pictures; ranks and completes captions; ranks, "
        "searches, reconstructs and evaluates pictures; serves an API. Add --debug to see the traceback of an error."
    )
    command: Command = parse(kinds, arguments, prog="dalle", description=description)
    return command


if __name__ == "__main__":
    sys.exit(main())
