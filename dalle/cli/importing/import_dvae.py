"""`dalle import-dvae`: turns OpenAI's published weights, or DALLE-pytorch's, into a dVAE directory."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from dalle.cli.options import check_writable
from dalle.importers.dalle_pytorch.bundle import ImportedVAE, import_vae
from dvae.openai import import_openai
from storage.models.directory import directory_hash


@dataclass(frozen=True, kw_only=True)
class ImportDVAE:
    """Turn OpenAI's encoder.pkl and decoder.pkl, or DALLE-pytorch's vae.pt, into a dVAE directory; runs nothing."""

    encoder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="ENCODER")]
    """The published encoder.pkl; or DALLE-pytorch's vae.pt, or its dalle.pt for the VAE in it."""
    decoder: Annotated[
        Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="[DECODER]", help_behavior_hint="(OpenAI's only)")
    ] = None
    """The published decoder.pkl."""
    out: Annotated[
        Path | None,
        tyro.conf.arg(metavar="DIR", help_behavior_hint="(default: runs/openai-dvae, and runs/dvae of a vae.pt)"),
    ] = None
    """The directory to write."""

    def run(self) -> None:
        """Read the files and write the directory."""
        out = self.out or Path("runs/openai-dvae" if self.decoder else "runs/dvae")
        check_writable(out.parent)
        if self.decoder is None:
            imported = self._vae()
            imported.codec.codec.save(out, metadata=imported.metadata)
            print(imported)
        else:
            import_openai(self.encoder, self.decoder).save(out, metadata={"source": "OpenAI's published weights"})
        print(f"dVAE {directory_hash(out)} in {out}")

    def _vae(self) -> ImportedVAE:
        try:
            return import_vae(self.encoder)
        except ValueError as error:
            if "dall_e." in str(error):
                raise ValueError(
                    f"{self.encoder} is one half of OpenAI's dVAE: give encoder.pkl and decoder.pkl"
                ) from None
            raise
