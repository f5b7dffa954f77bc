"""`dalle import-unclip`: turns a published unCLIP into the directories of a prior, a decoder and an upsampler."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from dalle.cli.options import check_writable
from dalle.importers.unclip.importing import import_unclip
from rerank import CLIP
from storage.models.directory import directory_hash


@dataclass(frozen=True, kw_only=True)
class ImportUnCLIP:
    """Turn an unCLIP as diffusers has it, such as Karlo, into directories of a prior, a decoder and an upsampler."""

    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]
    """With prior/, decoder/, text_proj/, their schedulers, and super_res_first/ and super_res_last/."""
    clip: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """The CLIP that it was trained with, imported by `dalle import-clip`: for Karlo, OpenAI's ViT-L/14."""
    out: Annotated[Path, tyro.conf.arg(metavar="DIR")] = Path("runs/unclip")
    """The folder to write prior/, decoder/ and upsampler-256/ into."""

    def run(self) -> None:
        """Read the folder, write the directories, and tell what was read and assumed."""
        check_writable(self.out.parent)
        imported = import_unclip(self.source, CLIP.load(self.clip))
        imported.save(self.out)
        print(imported)
        for name in imported.parts:
            print(f"{name} {directory_hash(self.out / name)} in {self.out / name}")
