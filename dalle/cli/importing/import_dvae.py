"""`dalle import-dvae`: turns OpenAI's published weights into a dVAE directory."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from dalle.cli.options import check_writable
from dvae.openai import import_openai
from storage.model_directory import directory_hash


@dataclass(frozen=True, kw_only=True)
class ImportDVAE:
    """Turn OpenAI's published encoder.pkl and decoder.pkl into a dVAE directory, executing nothing in them."""

    encoder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="ENCODER")]
    """The published encoder.pkl."""
    decoder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DECODER")]
    """The published decoder.pkl."""
    out: Annotated[Path, tyro.conf.arg(metavar="DIR")] = Path("runs/openai-dvae")
    """The directory to write."""

    def run(self) -> None:
        """Read both files and write the directory."""
        check_writable(self.out.parent)
        import_openai(self.encoder, self.decoder).save(self.out, metadata={"source": "OpenAI's published weights"})
        print(f"dVAE {directory_hash(self.out)} in {self.out}")
