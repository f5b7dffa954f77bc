"""`dalle import-clip`: turns a published CLIP into a directory that every command takes."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from dalle.cli.options import check_writable
from dalle.importers.clip import import_clip
from rerank.blocks import Activation
from storage.models.directory import directory_hash


@dataclass(frozen=True, kw_only=True)
class ImportCLIP:
    """Turn a CLIP of OpenAI, open_clip or Hugging Face into a CLIP directory, executing nothing in it."""

    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FILE")]
    """OpenAI's .pt; open_clip's or Hugging Face's weights beside their configuration; or their folder."""
    out: Annotated[Path, tyro.conf.arg(metavar="DIR")] = Path("runs/clip")
    """The directory to write; BUNDLE/clip replaces a bundle's CLIP."""
    vocabulary: Annotated[
        Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="(default: beside the weights)")
    ] = None
    """The tokenizer's merges: OpenAI's bpe_simple_vocab_16e6.txt.gz, or merges.txt."""
    config: Annotated[
        Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="(default: beside the weights)")
    ] = None
    """open_clip_config.json, config.json, or one of open_clip's model_configs."""
    activation: Annotated[
        Activation | None,
        tyro.conf.arg(metavar="{quick_gelu,gelu}", help_behavior_hint="(default: as the configuration says)"),
    ] = None
    """For weights without a configuration, which do not show it."""
    image_size: Annotated[int | None, tyro.conf.arg(metavar="N", help_behavior_hint="(default: the model's)")] = None
    """Side in pixels that pictures shall have; positions are interpolated."""

    def run(self) -> None:
        """Read the files, write the directory, and tell what was read, left and assumed."""
        check_writable(self.out.parent)
        imported = import_clip(
            self.source,
            vocabulary=self.vocabulary,
            config=self.config,
            activation=self.activation,
            image_size=self.image_size,
        )
        imported.clip.save(self.out, metadata=imported.metadata)
        print(imported)
        print(f"CLIP {directory_hash(self.out)} in {self.out}")
