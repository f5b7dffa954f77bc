"""Files of torch.save and of TorchScript: the records in them, and tensors that are read when they are asked for."""

import errno
import math
import mmap
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from storage.checkpoints.pickles import MAX_PICKLE_BYTES, Allowed, Inert, read_pickle

ZIP_MAGIC = b"PK\x03\x04"
"""First bytes of a file that torch.save wrote since version 1.6."""
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
"""First pickle of a file that torch.save wrote before version 1.6."""
_STORAGES = {
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.DoubleStorage": torch.float64,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
}
MAX_ELEMENTS = 2**60
"""Larger tensors are refused, so that no size overflows."""
_PARAMETER, _TENSOR = "torch._utils._rebuild_parameter", "torch._utils._rebuild_tensor_v2"
TENSOR_NAMES = frozenset({"collections.OrderedDict", _PARAMETER, _TENSOR, *_STORAGES})
"""Names in files that hold tensors and parameters."""


@dataclass(frozen=True)
class Values:
    """Numbers that lie in a file one after the other."""

    path: Path
    dtype: torch.dtype
    n_elements: int
    place: int
    """Byte of the file at which they begin."""
    crc: int | None = None
    """Checksum of all of them, if the file has one."""

    def read(self, first: int, count: int) -> Tensor:
        """Return some of them as a flat tensor of their type; all of them are compared with the checksum.

        Raises:
            ValueError: the file is too short, or they are damaged.
        """
        data = torch.empty(count * self.dtype.itemsize, dtype=torch.uint8)
        buffer = data.numpy().data
        with self.path.open("rb") as file:
            file.seek(self.place + first * self.dtype.itemsize)
            n_read = file.readinto(buffer) if count else 0
        if n_read != len(buffer):
            raise ValueError(f"its data end after {n_read:,} of {len(buffer):,} bytes")
        if count == self.n_elements and self.crc is not None and zlib.crc32(buffer) != self.crc:
            raise ValueError("its data are damaged: they do not have their checksum")
        # a byte that is neither 0 nor 1 would be a bool of no defined value
        return data.ne(0) if self.dtype == torch.bool else data.view(self.dtype)


@dataclass(frozen=True)
class Lazy:
    """A tensor of a file, read when it is asked for."""

    values: Sequence[Values]
    """What it is a view of; several are read one after the other."""
    shape: tuple[int, ...]
    offset: int
    strides: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype:
        """The type in the file."""
        return self.values[0].dtype

    def read(self) -> Tensor:
        """Return it in memory of its own, of the file's type; only its part of the file is read.

        Raises:
            ValueError: the file is too short, or damaged.
        """
        if len(self.values) > 1:
            return torch.cat([part.read(0, part.n_elements) for part in self.values]).reshape(self.shape)
        if 0 in self.shape:
            return torch.empty(self.shape, dtype=self.dtype)
        flat = self.values[0].read(self.offset, _extent(self.shape, self.strides))
        view = flat.as_strided(self.shape, self.strides)
        return view if view.is_contiguous() else view.contiguous()


@dataclass(frozen=True)
class TorchFile:
    """The content of a file of torch.save."""

    content: Any
    """Plain containers, numbers, texts and `Inert` records."""
    storages: Mapping[str, Values]
    """The numbers of the tensors, by the keys that the records name."""
    is_script: bool
    """Whether it is a TorchScript archive."""

    def lazy(self, record: Any, name: str) -> Lazy:
        """Return a recorded tensor or parameter, not yet read.

        Args:
            record: in `content`.
            name: of it, for messages.

        Raises:
            ValueError: the record is something else, or does not fit its storage.
        """
        if isinstance(record, Inert) and record.origin == _PARAMETER and record.args:
            record = record.args[0]
        if not is_tensor(record):
            raise ValueError(f"{name} is not a tensor")
        key, offset, shape, strides, *_ = record.args
        is_possible = all(isinstance(number, int) and number >= 0 for number in (offset, *shape, *strides))
        # also of an empty tensor, whose other sides nothing bounds
        if not is_possible or math.prod(max(1, length) for length in shape) > MAX_ELEMENTS:
            raise ValueError(f"{name} has an impossible shape")
        values, shape, strides = self.storages[key], tuple(shape), tuple(strides)
        is_inside = offset + _extent(shape, strides) <= values.n_elements if len(shape) == len(strides) else False
        # strides of 0 would make a large tensor of a small file
        if not is_inside or math.prod(shape) > values.n_elements:
            raise ValueError(f"{name} of shape {shape} does not fit its data")
        return Lazy([values], shape, offset, strides)

    def tensor(self, record: Any, name: str) -> Tensor:
        """Return a recorded tensor or parameter in float32; raises as `lazy` and `Lazy.read`."""
        return self.lazy(record, name).read().float()


def is_tensor(record: object) -> bool:
    """Return whether a record is of a tensor or a parameter."""
    return isinstance(record, Inert) and record.origin in (_PARAMETER, _TENSOR)


def read_torch_file(path: Path, allowed: Allowed) -> TorchFile:
    """Read the records of a file of torch.save, of either format, or of a TorchScript archive; no tensor is read.

    Raises:
        RefusedNameError (a ValueError): it names something that is not allowed.
        READING_ERRORS: it is damaged, or something else.
    """
    with path.open("rb") as file:
        is_zip = file.read(len(ZIP_MAGIC)) == ZIP_MAGIC
    try:
        return _read_zip(path, allowed) if is_zip else _read_legacy(path, allowed)
    except OSError as error:
        if error.errno not in (None, errno.EINVAL):
            raise  # the system's
        raise ValueError("it names places outside of itself, or is damaged") from error


def _extent(shape: Sequence[int], strides: Sequence[int]) -> int:
    """Return the number of elements from the first of a view to its last."""
    return 0 if 0 in shape else 1 + sum((length - 1) * stride for length, stride in zip(shape, strides, strict=True))


def _read_zip(path: Path, allowed: Allowed) -> TorchFile:
    """Read the format since torch 1.6, or TorchScript's, which has the class's code beside the same."""
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
        if len(entries) != len(archive.infolist()):
            raise ValueError("two of its parts have the same name")
        roots = [name.removesuffix("data.pkl") for name in entries if name.endswith("/data.pkl")]
        if len(roots) != 1:
            shown = ", ".join(sorted(entries)[:3]) or "nothing"
            raise ValueError(f"torch.save did not write it: it is a zip file that holds {shown}")
        root = roots[0]
        if f"{root}byteorder" in entries and archive.read(_stored(entries[f"{root}byteorder"])) != b"little":
            raise ValueError("its numbers are big-endian")
        if entries[f"{root}data.pkl"].file_size > MAX_PICKLE_BYTES:
            raise ValueError(f"its pickle has more than {MAX_PICKLE_BYTES:,} bytes")
        unpickler = read_pickle(BytesIO(archive.read(_stored(entries[f"{root}data.pkl"]))), allowed)
        content = unpickler.load()
    storages = {}
    for key, (origin, n_elements) in unpickler.storages.items():
        entry, dtype = entries[f"{root}data/{key}"], _STORAGES[origin]
        n_bytes = n_elements * dtype.itemsize
        if entry.file_size != n_bytes:
            raise ValueError(f"storage {key} has {entry.file_size} bytes instead of {n_bytes}")
        storages[key] = Values(path, dtype, n_elements, _place(path, _stored(entry)), entry.CRC)
    return TorchFile(content, storages, f"{root}constants.pkl" in entries)


def _stored(entry: zipfile.ZipInfo) -> zipfile.ZipInfo:
    """Return an entry that is not compressed; data that would unpack to more than the file holds are refused unread."""
    if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
        raise ValueError(f"{entry.filename} is compressed, which torch.save never does")
    return entry


def _place(path: Path, entry: zipfile.ZipInfo) -> int:
    """Return where the data of an entry begin: behind a header with the name and padding."""
    with path.open("rb") as file:
        file.seek(entry.header_offset)
        header = file.read(30)
    if not header.startswith(ZIP_MAGIC) or len(header) < 30:
        raise ValueError(f"{entry.filename} is not where its directory says")
    place = entry.header_offset + 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    if place + entry.file_size > path.stat().st_size:
        raise ValueError(f"{entry.filename} reaches beyond the end of the file")
    return place


def _read_legacy(path: Path, allowed: Allowed) -> TorchFile:
    """Read the format before torch 1.6.

    It has five pickles (magic number, version, machine, object, keys of storages), then the length and the
    data of every storage.
    """
    with path.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as file:
        if read_pickle(file, allowed).load() != _LEGACY_MAGIC:
            raise ValueError("torch.save did not write it")
        _version, machine = (read_pickle(file, allowed).load() for _ in range(2))
        if not isinstance(machine, dict) or machine.get("little_endian") is not True:
            raise ValueError("its numbers are big-endian")
        unpickler = read_pickle(file, allowed)
        content = unpickler.load()
        keys = read_pickle(file, allowed).load()
        storages = dict(_legacy_storages(path, file, keys, unpickler.storages))
    return TorchFile(content, storages, is_script=False)


def _legacy_storages(
    path: Path, file: mmap.mmap, keys: Sequence[str], described: Mapping[str, tuple[str, int]]
) -> Iterator[tuple[str, Values]]:
    for key in keys:
        origin, n_elements = described[key]
        dtype = _STORAGES[origin]
        found, place = int.from_bytes(file.read(8), "little"), file.tell()
        n_left, n_bytes = len(file) - place, n_elements * dtype.itemsize
        if found != n_elements or n_bytes > n_left:
            raise ValueError(
                f"storage {key} has {n_left} bytes and {found} elements instead of {n_bytes} and {n_elements}"
            )
        yield key, Values(path, dtype, n_elements, place)
        file.seek(place + n_bytes)
