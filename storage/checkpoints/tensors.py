"""Any checkpoint as a mapping from names to tensors, each read when it is asked for; nothing in it is run.

Formats: torch.save (zip and before 1.6), TorchScript archives, safetensors, flax's msgpack.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from storage.checkpoints.flax import is_msgpack, read_flax_file
from storage.checkpoints.pickles import READING_ERRORS, Allowed, Inert, RefusedNameError
from storage.checkpoints.torch_files import TENSOR_NAMES, ZIP_MAGIC, Lazy, TorchFile, is_tensor, read_torch_file
from storage.checkpoints.wrong_files import wrong_file
from storage.errors import is_out_of_memory, reason_of

_ALLOWED = Allowed(
    names={
        *TENSOR_NAMES,
        # published files of PyTorch Lightning have these beside their weights
        "_codecs.encode",
        "numpy.core.multiarray.scalar",
        "numpy.dtype",
        "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
        # TorchScript: `restore_type_tag` says the type of a list or a dict
        "torch.jit._pickle.build_boollist",
        "torch.jit._pickle.build_doublelist",
        "torch.jit._pickle.build_intlist",
        "torch.jit._pickle.build_tensorlist",
        "torch.jit._pickle.restore_type_tag",
    },
    packages=("__torch__",),
)
_MODULES = "__torch__."
"""Begins the names of the classes in a TorchScript archive."""
MAX_DEPTH = 32
"""Containers in containers; deeper ones are refused, and so is one that holds itself."""
MAX_VALUES = 1_000_000
"""Values in a file; more are refused."""
_SAFE_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}


class Entry(Protocol):
    """A tensor of a file, not yet read."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""

    @property
    def dtype(self) -> torch.dtype:
        """Its type in the file."""

    def read(self) -> Tensor:
        """Return it, in memory of its own."""


class Tensors(Mapping[str, Tensor]):
    """The tensors of a checkpoint by dotted names. Asking for one reads it and keeps nothing: ask once.

    Numbers with a fraction come in float32, all others in the type that they have in the file.
    """

    def __init__(
        self,
        path: Path,
        format: str,
        entries: Mapping[str, Entry],
        plain: Mapping[str, Any] | None = None,
        used: set[str] | None = None,
        prefix: str = "",
    ) -> None:
        self.path = path
        self.format = format
        """In words, such as "safetensors"."""
        self.plain = plain or {}
        """Numbers, texts and bools beside the tensors, by dotted names."""
        self._entries, self._prefix = entries, prefix
        self._used = set() if used is None else used

    def __getitem__(self, name: str) -> Tensor:
        """Read a tensor.

        Raises:
            KeyError: there is none of this name.
            ValueError: it is damaged.
        """
        entry = self._entries[name]
        self._used.add(self._prefix + name)
        try:
            tensor = entry.read()
        except (*READING_ERRORS, SafetensorError) as error:
            if is_out_of_memory(error):
                raise
            reason = reason_of(error, 200)
            raise ValueError(f"{self.path}, {self._prefix}{name}: {reason}; download it again") from error
        return tensor.float() if tensor.is_floating_point() else tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape without reading it; KeyError if there is none of this name."""
        return tuple(self._entries[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        """Return a tensor's type in the file without reading it; KeyError if there is none of this name."""
        return self._entries[name].dtype

    def under(self, prefix: str) -> "Tensors":
        """Return those whose names start with a prefix, without it; what is read of them counts as read here."""
        entries = {name.removeprefix(prefix): entry for name, entry in self._entries.items() if name.startswith(prefix)}
        plain = {name.removeprefix(prefix): value for name, value in self.plain.items() if name.startswith(prefix)}
        return Tensors(self.path, self.format, entries, plain, self._used, self._prefix + prefix)

    def unused(self) -> list[str]:
        """Return the names of those that nobody has read yet, in the file's order."""
        return [name for name in self._entries if self._prefix + name not in self._used]


def summary(names: list[str], *, depth: int = 1) -> str:
    """Return names in words, counted by their first parts: "optimizer (300), loss (12), step"."""
    groups = Counter(".".join(name.split(".")[:depth]) for name in names)
    return ", ".join(f"{group} ({count})" if group not in names else group for group, count in groups.items())


def sha256(path: Path) -> str:
    """Return the sha256 of a file in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def open_tensors(path: Path | str) -> Tensors:
    """Open a checkpoint of any of the formats; its contents tell which, not its name.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is something else, which the message names, is cut off or damaged, or names code.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no file {path}: expected a checkpoint, such as .pt, .bin, .safetensors or .msgpack")
    if (fault := wrong_file(path)) is not None:
        raise ValueError(f"{path} {fault}")
    try:
        return _open(path)
    except RefusedNameError as error:
        name = reason_of(error, 200)
        raise ValueError(
            f"{path} would run code: it names {name}, which weights have no need of; refused, nothing was run"
        ) from None
    except (*READING_ERRORS, SafetensorError) as error:
        if is_out_of_memory(error):
            raise
        reason = reason_of(error, 200)
        raise ValueError(f"{path} cannot be read: {reason}; expected a checkpoint; download it again") from error


def _open(path: Path) -> Tensors:
    with path.open("rb") as file:
        start = file.read(9)
    if not start.startswith(ZIP_MAGIC) and start[8:] == b"{":
        return Tensors(path, "safetensors", _safe_entries(path))
    if is_msgpack(start):
        entries, plain = _walk(read_flax_file(path), None)
        return Tensors(path, "flax msgpack", entries, plain)
    file_ = read_torch_file(path, _ALLOWED)
    entries, plain = _walk(file_.content, file_)
    kind = "TorchScript" if file_.is_script else "torch.save" if start.startswith(ZIP_MAGIC) else "torch.save (legacy)"
    return Tensors(path, kind, entries, plain)


class _SafeEntry:
    """A tensor of a safetensors file."""

    def __init__(self, path: Path, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.shape, self.dtype = shape, dtype
        self._path, self._name = path, name

    def read(self) -> Tensor:
        with safe_open(self._path, framework="pt") as file:
            # what the library gives is a part of the mapped file, which must not be kept open
            tensor: Tensor = file.get_tensor(self._name).clone()
        return tensor


def _safe_entries(path: Path) -> dict[str, Entry]:
    entries: dict[str, Entry] = {}
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118  # it is no mapping
            part = file.get_slice(name)
            if part.get_dtype() not in _SAFE_DTYPES:
                raise ValueError(f"{name} is of type {part.get_dtype()}; expected {', '.join(_SAFE_DTYPES)}")
            entries[name] = _SafeEntry(path, name, tuple(part.get_shape()), _SAFE_DTYPES[part.get_dtype()])
    return entries


def _walk(content: Any, file: TorchFile | None) -> tuple[dict[str, Entry], dict[str, Any]]:
    """Return the tensors and the plain values of nested containers and recorded modules, by dotted names."""
    entries: dict[str, Entry] = {}
    plain: dict[str, Any] = {}
    left: list[tuple[str, Any, int]] = [("", content, 0)]
    n_values = 0
    while left:
        name, value, depth = left.pop()
        n_values += 1
        if depth > MAX_DEPTH or n_values > MAX_VALUES:
            raise ValueError("it nests too deeply, or holds too many values")
        if name in entries:
            raise ValueError(f"it has two tensors of the name {name}")
        if isinstance(value, Lazy):
            entries[name] = value
        elif file is not None and is_tensor(value):
            entries[name] = file.lazy(value, name)
        elif isinstance(value, str | int | float):
            plain[name] = value
        else:
            dot = f"{name}." if name else ""
            left += [(f"{dot}{key}", inner, depth + 1) for key, inner in reversed(_children(value))]
    return entries, plain


def _children(value: Any) -> list[tuple[Any, Any]]:
    """Return what a container or a recorded module holds, by names or numbers; nothing of anything else."""
    if isinstance(value, Inert):
        is_module = value.origin.startswith(_MODULES)
        value = value.state if is_module else value.items
    if isinstance(value, dict):
        # a class, as PyTorch Lightning had them for keys, by its name
        return [(key.__name__ if isinstance(key, type) else key, inner) for key, inner in value.items()]
    return list(enumerate(value)) if isinstance(value, list | tuple) else []
