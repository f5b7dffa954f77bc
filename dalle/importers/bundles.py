"""Writes the bundle that an import makes: tokenizer.json, dvae/, dalle/ and clip/, whole or not at all."""

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from dalle.data.bundle import Sized, check_sizes
from dalle.family.tokenizers import TextTokenizer
from rerank import CLIP
from storage.atomic import PARTIAL
from storage.models.directory import directory_hash, save_directory


class Part(Sized, Protocol):
    """A model with its weights, or one whose weights are read while they are written."""

    def save(self, path: Path, metadata: Mapping[str, Any] | None = None) -> None:
        """Write it as a directory."""


@dataclass(frozen=True, kw_only=True)
class StreamedModel:
    """A model that is too large to be held: each weight is read when it is written."""

    kind: str
    """Of its directory, such as "dalle"."""
    config: Any
    state: Mapping[str, Tensor]
    """The weights by name; one is read when it is looked up."""
    like: Mapping[str, Tensor]
    """Tensors of the same names, shapes and types on the meta device, such as a model's `state_dict`."""

    def save(self, path: Path, metadata: Mapping[str, Any] | None = None) -> None:
        """Write it as a directory; ValueError if weights are missing, unexpected or of other shapes."""
        save_directory(path, self.kind, self.config, self.state, metadata=metadata, like=self.like)


def check_free(out: Path, clip: Path) -> None:
    """Fail before hours of reading if the bundle could not be written.

    Args:
        out: the folder of the bundle.
        clip: the directory of a CLIP.

    Raises:
        ValueError: `out` is there already, and not an empty folder; or `clip` is no CLIP, or damaged.
        OSError: nothing can be written there.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is there already, and a bundle is written whole: choose a new or an empty directory")
    CLIP.load(clip)
    out.parent.mkdir(parents=True, exist_ok=True)


def write_bundle(
    out: Path,
    *,
    tokenizer: TextTokenizer,
    codec: Part,
    transformer: Part,
    clip: Path,
    codec_metadata: Mapping[str, Any],
    metadata: Mapping[str, Any],
) -> dict[str, str]:
    """Write a bundle that `Pipeline.load` takes.

    Args:
        out: its folder, which is not there, or empty.
        tokenizer: of the captions.
        codec: turns pictures into tokens and back.
        transformer: with these tokens.
        clip: the directory of a CLIP, which is copied.
        codec_metadata: of the codec: where it is from.
        metadata: of the transformer: where it is from, `sampling` (see `SamplingDefaults`), and
            `null_caption_probability` if it knows the empty caption. Hashes of tokenizer and codec are added.

    Returns:
        Part -> 16 hexadecimal digits that name it.

    Raises:
        ValueError: see `check_free`; or the parts do not fit one another; nothing is written then.
        OSError: it cannot be written; nothing is left behind.
    """
    check_sizes(tokenizer, transformer, codec)
    check_free(out, clip)
    partial = out.with_name(f".{out.name}.{os.getpid()}{PARTIAL}")
    try:
        partial.mkdir(parents=True)
        tokenizer.save(partial / "tokenizer.json")
        codec.save(partial / "dvae", metadata=codec_metadata)
        shutil.copytree(clip, partial / "clip")
        hashes = {"tokenizer": tokenizer.hash, "dvae": directory_hash(partial / "dvae")}
        belongs = {f"{part}_hash": value for part, value in hashes.items()}
        transformer.save(partial / "dalle", metadata={**metadata, **belongs})
        partial.replace(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return {**hashes, **{part: directory_hash(out / part) for part in ("dalle", "clip")}}
