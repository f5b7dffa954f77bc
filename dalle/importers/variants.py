"""What importing a variant takes: its weights by our names, each read when it is looked up, and what is told of it."""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dalle.family.variants.config import VariantConfig
from dalle.family.variants.model import KIND, VariantDALLE
from dalle.importers.bundles import StreamedModel
from dalle.sampling import SamplingDefaults
from storage.checkpoints.tensors import Tensors, summary


@dataclass(frozen=True, kw_only=True)
class ImportedVariant:
    """A published transformer whose weights are read while they are written, and what is to be said about it."""

    model: StreamedModel
    files: Mapping[Path, str]
    """The files that were read, and their sha256."""
    format: str
    """Of the weights, in words."""
    assumed: str
    """What the weights do not show."""
    left: Sequence[str]
    """Names of what was not used."""
    licence: str
    """Of the weights, as far as it is known here."""
    sampling: SamplingDefaults
    """As its authors sample."""

    def __str__(self) -> str:
        """Return several lines for people."""
        config = self.model.config
        read = [f"{path}, sha256 {digest[:16]}…" for path, digest in self.files.items()]
        n_parameters = sum(math.prod(weight.shape) for weight in self.model.like.values())
        return "\n".join(
            [
                *(f"{'read:' if number == 0 else '':<10}{line}" for number, line in enumerate(read)),
                f"model:    {config.variant}, {self.format}, {config.n_layers} layers × {config.d_model}, "
                f"{n_parameters:,} parameters, {config.text_len} positions of text, "
                f"{config.grid}×{config.grid} image tokens",
                f"assumed:  {config.n_heads} heads, {self.assumed}; {self.sampling}",
                f"left:     {', '.join(self.left) or 'nothing'}",
                f"licence:  {self.licence}",
            ]
        )

    @property
    def metadata(self) -> dict[str, Any]:
        """Kept beside the weights: where they are from, and how to sample."""
        return {
            "source": self.model.config.variant,
            "source_sha256": {path.name: digest for path, digest in self.files.items()},
            "source_format": self.format,
            "licence": self.licence,
            "sampling": asdict(self.sampling),
        }


@dataclass(frozen=True)
class Source:
    """Where a weight of ours comes from."""

    names: Sequence[str]
    """In the file; several are put one below the other."""
    rows: slice | None = None
    """Those of the result that are taken; None for all."""


class Renamed(Mapping[str, Tensor]):
    """Weights by our names. Looking one up reads it and keeps nothing: look once.

    Args:
        tensors: the checkpoint.
        sources: our names -> where they come from.
        like: tensors of our names and shapes, such as a model's `state_dict` on the meta device.
        what: whose checkpoint is expected, for messages.
        left_out: names in the checkpoint that are not weights, as a regular expression.

    Raises:
        ValueError: a weight is missing, unexpected, or of another shape.
    """

    def __init__(
        self, tensors: Tensors, sources: Mapping[str, Source], like: Mapping[str, Tensor], *, what: str, left_out: str
    ) -> None:
        self._tensors, self._sources = tensors, sources
        used = {name for source in sources.values() for name in source.names}
        if missing := sorted(used - tensors.keys()):
            raise ValueError(
                f"{tensors.path} has no {missing[0]}, and {len(missing)} weights are missing in all: it is cut, or of "
                f"another model; expected {what}"
            )
        for name, source in sources.items():
            if (shape := self._shape(source)) != tuple(like[name].shape):
                raise ValueError(
                    f"{tensors.path}: {' and '.join(source.names)} give {name} the shape {shape} instead of "
                    f"{tuple(like[name].shape)}; expected {what}"
                )
        unknown = [name for name in tensors if name not in used and not re.fullmatch(left_out, name)]
        if unknown:
            raise ValueError(
                f"{tensors.path} has {len(unknown)} tensors that {what} has not: {summary(unknown[:100], depth=2)}; "
                "it is of another model, or of another version of it"
            )

    def _shape(self, source: Source) -> tuple[int, ...]:
        first, *others = [self._tensors.shape(name) for name in source.names]
        if odd := [shape for shape in others if shape[1:] != first[1:]]:
            raise ValueError(f"{self._tensors.path}: {' and '.join(source.names)} have the shapes {first} and {odd[0]}")
        if not first:
            return first
        n_rows = sum(shape[0] for shape in (first, *others))
        return (n_rows if source.rows is None else len(range(n_rows)[source.rows]), *first[1:])

    def __getitem__(self, name: str) -> Tensor:
        source = self._sources[name]
        parts = [self._tensors[part] for part in source.names]
        whole = torch.cat(parts) if len(parts) > 1 else parts[0]
        return whole if source.rows is None else whole[source.rows]

    def __iter__(self) -> Iterator[str]:
        return iter(self._sources)

    def __len__(self) -> int:
        return len(self._sources)


def streamed(
    config: VariantConfig, tensors: Tensors, sources: Callable[[str], Source], *, what: str, left_out: str = "(?!)"
) -> StreamedModel:
    """Return a model whose weights are read when they are written.

    Args:
        config: its sizes.
        tensors: its checkpoint.
        sources: our name of a weight -> where it comes from.
        what: see `Renamed`.
        left_out: see `Renamed`.

    Raises:
        ValueError: see `Renamed`.
    """
    with torch.device("meta"):
        like = VariantDALLE(config).state_dict()
    state = Renamed(tensors, {name: sources(name) for name in like}, like, what=what, left_out=left_out)
    return StreamedModel(kind=KIND, config=config, state=state, like=like)


def renamed(name: str, rules: Sequence[tuple[str, str]]) -> str:
    """Return a name after regular expressions were replaced in it, one after the other."""
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def n_layers(tensors: Tensors, prefix: str) -> int:
    """Return how many numbers follow a prefix in the names, such as 24 for "layers.0." to "layers.23."."""
    pattern = re.compile(re.escape(prefix) + r"(\d+)\.")
    return len({match[1] for name in tensors if (match := pattern.match(name))})
