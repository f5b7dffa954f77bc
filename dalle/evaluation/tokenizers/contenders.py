"""The tokenizers that are compared: any model that `load_codec` reads, alone or in a bundle with its transformer."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from dalle.data.bundle import check_sizes, matching_transformer
from dalle.family.tokenizers import TextTokenizer, load_tokenizer
from dalle.family.transformers import Transformer
from dvae.codec import Codec, load_codec
from dvae.vqgan import VQGAN
from storage.models.directory import CONFIG_FILE, directory_hash


@dataclass(frozen=True, kw_only=True)
class Prior:
    """A transformer over a tokenizer's tokens, with what reads its captions."""

    tokenizer: TextTokenizer
    transformer: Transformer


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A tokenizer of pictures, and the size at which it reads them."""

    name: str
    """Tells it from the others: the shortest end of its path that does."""
    codec: Codec
    hash: str
    """Of its directory."""
    size: int
    """Side in pixels of the pictures that it encodes."""
    prior: Prior | None = None
    """Of its bundle, where the grid is the one that it was trained with."""

    @property
    def n_tokens(self) -> int:
        """Tokens of a picture."""
        return (self.size // self.codec.config.downsampling) ** 2

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return next(self.codec.parameters()).device


def load_contenders(paths: Sequence[Path], *, device: torch.device, size: int | None = None) -> list[Contender]:
    """Read tokenizers; what cannot be compared is refused before any picture is read.

    Args:
        paths: directories of models or of bundles; of a bundle its transformer is read, too, if it has one.
        device: where to compute.
        size: side in pixels at which all encode; by default each at the size that it was trained on.

    Raises:
        FileNotFoundError: there is none at a path.
        ValueError: there are no paths, or one twice; one holds something else, is damaged, cannot encode, or not at
            this size; or a bundle's parts do not belong together.
    """
    if not paths:
        raise ValueError("no tokenizers: give at least one directory of a dVAE, a VQGAN or a bundle")
    twice = [path for path, count in Counter(path.resolve() for path in paths).items() if count > 1]
    if twice:
        raise ValueError(f"{twice[0]} is given twice: give each tokenizer once")
    names = _names(paths)
    return [_load(path, name, device, size) for path, name in zip(paths, names, strict=True)]


def model_directory(path: Path, part: str) -> Path:
    """Return the directory of a model: the path itself, or the part of the bundle that is there."""
    is_bundle = (path / part).is_dir() and not (path / CONFIG_FILE).exists()
    return path / part if is_bundle else path


def _load(path: Path, name: str, device: torch.device, size: int | None) -> Contender:
    directory = model_directory(path, "dvae")
    codec = load_codec(directory, device)
    config = codec.config
    if isinstance(codec, VQGAN) and not codec.config.has_encoder:
        raise ValueError(f"{path} is a decoder alone, it cannot read pictures: import one with both halves")
    chosen = config.image_size if size is None else size
    if chosen < 1 or chosen % config.downsampling:
        raise ValueError(
            f"the size is {chosen}; it must be a multiple of {config.downsampling}, "
            f"the pixels per side that one token of {path} stands for"
        )
    model_hash = directory_hash(directory)
    prior = None
    has_prior = directory != path and all((path / part).exists() for part in ("tokenizer.json", "dalle"))
    if has_prior and chosen == config.image_size:
        tokenizer = load_tokenizer(path / "tokenizer.json")
        transformer = matching_transformer(path, tokenizer, model_hash)
        check_sizes(tokenizer, transformer, codec)
        prior = Prior(tokenizer=tokenizer, transformer=transformer.to(device).eval())
    return Contender(name=name, codec=codec, hash=model_hash, size=chosen, prior=prior)


def _names(paths: Sequence[Path]) -> list[str]:
    """Return the shortest ends of paths that tell them apart, without a last "dvae" that says nothing."""
    parts = [path.resolve().parts for path in paths]
    parts = [each[:-1] if each[-1] == "dvae" and len(each) > 2 else each for each in parts]
    names: list[str] = []
    for each, path in zip(parts, paths, strict=True):
        others = [other for other in parts if other is not each]
        depth = next((n for n in range(1, len(each)) if all(other[-n:] != each[-n:] for other in others)), None)
        names.append(str(path) if depth is None else "/".join(each[-depth:]))
    return names
