"""`dalle import-bundle`: turns a published model, with its tokenizer and its pictures' codec, into a bundle."""

from dataclasses import dataclass
from typing import Annotated

from tyro.conf import OmitArgPrefixes, OmitSubcommandPrefixes, subcommand

from dalle.cli.importing.dalle_mini import DALLEMini, MinDALLE
from dalle.cli.importing.dalle_pytorch import DALLEPytorch
from dalle.cli.importing.variants import MinDALLE13B, RuDALLE


@dataclass(frozen=True, kw_only=True)
class ImportBundle:
    """Turn a published model, its tokenizer and its pictures' codec into a bundle, executing nothing in their files."""

    kind: OmitSubcommandPrefixes[
        OmitArgPrefixes[
            Annotated[MinDALLE, subcommand("min-dalle")]  # a line for each kind
            | Annotated[DALLEMini, subcommand("dalle-mini")]
            | Annotated[RuDALLE, subcommand("rudalle")]
            | Annotated[MinDALLE13B, subcommand("mindalle")]
            | Annotated[DALLEPytorch, subcommand("dalle-pytorch")]
        ]
    ]

    def run(self) -> None:
        """Do what the kind does."""
        self.kind.run()
