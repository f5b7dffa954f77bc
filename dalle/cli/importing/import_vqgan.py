"""`dalle import-vqgan`: turns a published VQGAN into a directory that every command takes in place of a dVAE."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from dalle.cli.options import check_writable
from dalle.importers.vqgan import IMAGE_SIZE, import_vqgan
from dvae.vqgan import Pixels
from storage.models.directory import directory_hash


@dataclass(frozen=True, kw_only=True)
class ImportVQGAN:
    """Turn a VQGAN of taming-transformers, ruDALLE, minDALL-E or DALL·E mini into a directory that works as a dVAE."""

    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FILE")]
    """The published .ckpt, .pt or .msgpack, or a checkpoint of DALLE-pytorch that holds a VQGAN."""
    out: Annotated[Path, tyro.conf.arg(metavar="DIR")] = Path("runs/vqgan")
    """The directory to write; BUNDLE/dvae for a bundle whose transformer is yet to be trained."""
    image_size: Annotated[int, tyro.conf.arg(metavar="PIXELS")] = IMAGE_SIZE
    """Side of the pictures it is for, which the weights do not show."""
    pixels: Annotated[
        Pixels | None, tyro.conf.arg(metavar="{signed,unit}", help_behavior_hint="(default: as files of its kind)")
    ] = None
    """Range in which the weights are used: signed is [-1, 1], unit is [0, 1] as in DALL·E mini."""
    prefix: Annotated[str | None, tyro.conf.arg(metavar="TEXT", help_behavior_hint="(default: it is found)")] = None
    """What the names of its weights begin with, in a file that holds several models."""

    def run(self) -> None:
        """Read the file, write the directory, and tell what was read, left and assumed."""
        check_writable(self.out.parent)
        imported = import_vqgan(self.source, prefix=self.prefix, pixels=self.pixels, image_size=self.image_size)
        imported.vqgan.save(self.out, metadata=imported.metadata)
        print(imported)
        print(f"VQGAN {directory_hash(self.out)} in {self.out}")
