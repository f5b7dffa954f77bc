"""`dalle import-bundle rudalle` and `dalle import-bundle mindalle`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from dalle.cli.importing.bundle_options import BundleOptions
from dalle.family.texts.charbpe import CharBPE
from dalle.family.texts.yttm import YouTokenToMe
from dalle.importers.bundles import check_free, write_bundle
from dalle.importers.mindalle import MERGES, STAGE_1, STAGE_2, VOCABULARY, import_mindalle, mindalle_files
from dalle.importers.rudalle import Version, import_rudalle
from dalle.importers.variants import ImportedVariant
from dalle.importers.vqgan import ImportedVQGAN, import_vqgan


@dataclass(frozen=True, kw_only=True)
class RuDALLE(BundleOptions):
    """ruDALLE: Malevich, Emojich, Surrealist XL or Kandinsky."""

    weights: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FILE")]
    """The transformer: pytorch_model.bin, or Malevich's pytorch_model_v3.bin or pytorch_model_v2.bin."""
    tokenizer: Annotated[Path, tyro.conf.arg(metavar="FILE")]
    """The tokenizer: bpe.model of rudalle-utils."""
    vqgan: Annotated[Path, tyro.conf.arg(metavar="FILE")]
    """The VQGAN: vqgan.gumbelf8-sber.model.ckpt of rudalle-utils."""
    version: Annotated[
        Version | None, tyro.conf.arg(metavar="{v2,v3}", help_behavior_hint="(default: as the masks in the file say)")
    ] = None
    """Of the code that the weights are for; only for a file without masks."""
    heads: Annotated[int | None, tyro.conf.arg(metavar="N", help_behavior_hint="(default: as published)")] = None
    """Attention heads; only for a model of another width than the published ones."""

    def run(self) -> None:
        """Read the files, write the bundle, and tell what was read, left and assumed."""
        check_free(self.out, self.clip)
        tokenizer = YouTokenToMe.read(self.tokenizer)
        imported = import_rudalle(self.weights, version=self.version, heads=self.heads)
        _write(self, tokenizer, import_vqgan(self.vqgan), imported)


@dataclass(frozen=True, kw_only=True)
class MinDALLE13B(BundleOptions):
    """minDALL-E of Kakao Brain: 1.3B.tar.gz; not to be confused with min-dalle, which is DALL·E mini."""

    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FILE")]
    """1.3B.tar.gz, which is unpacked beside the bundle for as long as it is read; or a folder of its content."""

    def run(self) -> None:
        """Read the files, write the bundle, and tell what was read, left and assumed."""
        check_free(self.out, self.clip)
        with mindalle_files(self.source, self.out.parent) as files:
            tokenizer = CharBPE.read(files[VOCABULARY], files[MERGES])
            imported = import_mindalle(files[STAGE_2], tokenizer)
            _write(self, tokenizer, import_vqgan(files[STAGE_1]), imported)


def _write(
    options: BundleOptions, tokenizer: YouTokenToMe | CharBPE, codec: ImportedVQGAN, imported: ImportedVariant
) -> None:
    hashes = write_bundle(
        options.out,
        tokenizer=tokenizer,
        codec=codec.vqgan,
        transformer=imported.model,
        clip=options.clip,
        codec_metadata=codec.metadata,
        metadata=imported.metadata,
    )
    print(f"{codec}\n\n{imported}\n")
    print(f"bundle in {options.out}: " + ", ".join(f"{part} {digest}" for part, digest in hashes.items()))
