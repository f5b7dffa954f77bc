"""`dalle import-bundle dalle-pytorch`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from dalle.cli.importing.bundle_options import BundleOptions
from dalle.importers.bundles import check_free, write_bundle
from dalle.importers.dalle_pytorch.bundle import import_dalle


@dataclass(frozen=True, kw_only=True)
class DALLEPytorch(BundleOptions):
    """A dalle.pt that DALLE-pytorch's training script saved, with the VAE that is in it."""

    file: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FILE")]
    """The dalle.pt."""
    tokenizer: Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="(default: CLIP's)")] = None
    """The tokenizer that it was trained with: the JSON of a Hugging Face tokenizer, or YouTokenToMe's model."""
    vocabulary: Annotated[
        Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="(default: beside the file)")
    ] = None
    """The merges of CLIP's tokenizer: bpe_simple_vocab_16e6.txt, as OpenAI or DALLE-pytorch has it."""
    sparse_as_dense: bool = False
    """Let sparse layers whose blocks are not in the file see everything: pictures are not those of the model, as nobody
    can make them without the blocks."""

    def run(self) -> None:
        """Read the files, write the bundle, and tell what was read, left and assumed."""
        check_free(self.out, self.clip)
        imported = import_dalle(
            self.file,
            tokenizer=self.tokenizer,
            vocabulary=self.vocabulary,
            sparse_as_dense=self.sparse_as_dense,
        )
        hashes = write_bundle(
            self.out,
            tokenizer=imported.tokenizer,
            codec=imported.codec.codec,
            transformer=imported.transformer.model,
            clip=self.clip,
            codec_metadata=imported.metadata,
            metadata=imported.transformer_metadata,
        )
        print(imported)
        print(f"bundle of {', '.join(f'{part} {value}' for part, value in hashes.items())} in {self.out}")
