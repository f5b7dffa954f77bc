"""`dalle import-bundle min-dalle` and `dalle import-bundle dalle-mini`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from dalle.cli.importing.bundle_options import BundleOptions


@dataclass(frozen=True, kw_only=True)
class MinDALLE(BundleOptions):
    """DALL·E mini or mega as Kuprel's min-dalle has them: encoder.pt, decoder.pt, vocab.json, merges.txt, detoker.pt."""

    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]
    """Folder of these five files; mini's may be called encoder_mini.pt, vocab_mini.json and so on."""

    def run(self) -> None:
        """Read the files, write the bundle, and tell what was read, left and assumed."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class DALLEMini(BundleOptions):
    """DALL·E mini or mega as published: flax_model.msgpack, config.json, the tokenizer's files, and a VQGAN beside."""

    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]
    """Folder of these files."""
    vqgan: Annotated[Path, tyro.conf.arg(metavar="FILE")]
    """The VQGAN's weights: vqgan_imagenet_f16_16384's flax_model.msgpack, or detoker.pt."""

    def run(self) -> None:
        """Read the files, write the bundle, and tell what was read, left and assumed."""
        raise NotImplementedError
