"""`dalle import-bundle min-dalle` and `dalle import-bundle dalle-mini`."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from dalle.cli.importing.bundle_options import BundleOptions
from dalle.importers.bundles import check_free, write_bundle
from dalle.importers.mini.importing import ImportedMini, import_dalle_mini, import_min_dalle
from dalle.importers.vqgan import import_vqgan


@dataclass(frozen=True, kw_only=True)
class MinDALLE(BundleOptions):
    """DALL·E mini or mega as min-dalle has them: encoder.pt, decoder.pt, vocab.json, merges.txt and detoker.pt."""

    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]
    """Folder of these five files; mini's may be called encoder_mini.pt, vocab_mini.json and so on."""

    def run(self) -> None:
        """Read the files, write the bundle, and tell what was read, left and assumed."""
        _import(self, self.folder / "detoker.pt", lambda n: import_min_dalle(self.folder, image_vocab=n))


@dataclass(frozen=True, kw_only=True)
class DALLEMini(BundleOptions):
    """DALL·E mini or mega as published: flax_model.msgpack, config.json and the tokenizer's files; and a VQGAN."""

    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]
    """Folder of these files."""
    vqgan: Annotated[Path, tyro.conf.arg(metavar="FILE")]
    """The VQGAN's weights: flax_model.msgpack of vqgan_imagenet_f16_16384, or min-dalle's detoker.pt."""

    def run(self) -> None:
        """Read the files, write the bundle, and tell what was read, left and assumed."""
        _import(self, self.vqgan, lambda n: import_dalle_mini(self.folder, image_vocab=n))


def _import(options: BundleOptions, codec_file: Path, read: Callable[[int], ImportedMini]) -> None:
    """Write the bundle of a codec and of the model that is read for so many image tokens."""
    check_free(options.out, options.clip)
    codec = import_vqgan(codec_file)
    imported = read(codec.vqgan.config.vocab_size)
    hashes = write_bundle(
        options.out,
        tokenizer=imported.tokenizer,
        codec=codec.vqgan,
        transformer=imported.model,
        clip=options.clip,
        codec_metadata=codec.metadata,
        metadata=imported.metadata,
    )
    print(f"{codec}\n\n{imported}\n")
    print(f"bundle in {options.out}: " + ", ".join(f"{part} {digest}" for part, digest in hashes.items()))
