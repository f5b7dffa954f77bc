"""Checkpoints of flax: msgpack, a binary JSON that holds no code; arrays are read when they are asked for.

The maintained package `msgpack` reads a file as a whole, 10 GB for the largest published one. Here only names, shapes
and places are read, and every length is compared with what is left of the file before anything is made of it.

Sources: the msgpack specification (github.com/msgpack/msgpack/blob/master/spec.md), flax/serialization.py.
"""

import math
import mmap
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from storage.checkpoints.torch_files import MAX_ELEMENTS, Lazy, Values

_ARRAY, _SCALAR = 1, 3
"""Flax's extension types that hold (shape, name of the type, bytes)."""
_CHUNKED = "__msgpack_chunked_array__"
"""Key that flax puts into the map by which it writes an array above 1 GiB: its shape, and flat pieces of it."""
_DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
    "int8": torch.int8,
    "int16": torch.int16,
    "int32": torch.int32,
    "int64": torch.int64,
    "uint8": torch.uint8,
    "uint32": torch.uint32,
    "bool": torch.bool,
}
_NUMBERS = {
    0xCA: ">f",
    0xCB: ">d",
    0xCC: ">B",
    0xCD: ">H",
    0xCE: ">I",
    0xCF: ">Q",
    0xD0: ">b",
    0xD1: ">h",
    0xD2: ">i",
    0xD3: ">q",
}
"""Formats of numbers by their first byte."""
_LENGTHS = {
    **dict.fromkeys((0xC4, 0xD9, 0xC7), 1),
    **dict.fromkeys((0xC5, 0xDA, 0xC8, 0xDC, 0xDE), 2),
    **dict.fromkeys((0xC6, 0xDB, 0xC9, 0xDD, 0xDF), 4),
}
"""Bytes of the length that follows a first byte."""
MAX_DEPTH = 32
"""Maps in maps; deeper ones are refused."""
MAX_ITEMS = 1_000_000
"""Names and values in a file; more are refused."""


def is_msgpack(start: bytes) -> bool:
    """Return whether a file that starts so can be a map in msgpack with something in it."""
    return start[:1] in (b"\xde", b"\xdf") or b"\x81" <= start[:1] <= b"\x8f"


def read_flax_file(path: Path) -> Any:
    """Return the maps of a file, in which arrays are `Lazy`.

    Raises:
        ValueError: it is cut off, damaged, or something else.
    """
    with path.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
        reader = _Reader(path, data, 0, len(data))
        content = reader.value()
        if reader.place != len(data):
            raise ValueError(f"{len(data) - reader.place:,} bytes follow its end")
    return content


class _Reader:
    """Reads the values of a stretch of a file, one after the other."""

    def __init__(self, path: Path, data: mmap.mmap, place: int, end: int) -> None:
        self._path, self._data, self.place, self._end = path, data, place, end
        self._n_items = 0

    def value(self, depth: int = 0) -> Any:
        """Return the value that begins here."""
        self._n_items += 1
        if depth > MAX_DEPTH or self._n_items > MAX_ITEMS:
            raise ValueError("it nests too deeply, or holds too many values")
        first = self._take(1)[0]
        if first <= 0x7F or first >= 0xE0:
            return first if first <= 0x7F else first - 256
        if first <= 0x8F:
            return self._map(first & 0x0F, depth)
        if first <= 0x9F:
            return self._list(first & 0x0F, depth)
        if first <= 0xBF:
            return self._take(first & 0x1F).decode()
        if first in (0xC0, 0xC2, 0xC3):
            return {0xC0: None, 0xC2: False, 0xC3: True}[first]
        if first in _NUMBERS:
            return struct.unpack(_NUMBERS[first], self._take(struct.calcsize(_NUMBERS[first])))[0]
        if 0xD4 <= first <= 0xD8:
            return self._extension(1 << (first - 0xD4))
        if first not in _LENGTHS:
            raise ValueError(f"byte {self.place - 1:,} is {first:#x}, which begins no value")
        length = int.from_bytes(self._take(_LENGTHS[first]), "big")
        readers: dict[int, Callable[[int], Any]] = {
            **dict.fromkeys((0xC4, 0xC5, 0xC6), self._take),
            **dict.fromkeys((0xC7, 0xC8, 0xC9), self._extension),
            **dict.fromkeys((0xD9, 0xDA, 0xDB), lambda length: self._take(length).decode()),
            **dict.fromkeys((0xDC, 0xDD), lambda length: self._list(length, depth)),
            **dict.fromkeys((0xDE, 0xDF), lambda length: self._map(length, depth)),
        }
        return readers[first](length)

    def _require(self, length: int) -> None:
        left = self._end - self.place
        if length > left:
            raise ValueError(f"at byte {self.place:,} it announces {length:,} more, but has {left:,}: it is cut off")

    def _take(self, length: int) -> bytes:
        self._require(length)
        self.place += length
        return self._data[self.place - length : self.place]

    def _list(self, length: int, depth: int) -> list[Any]:
        self._require(length)
        return [self.value(depth + 1) for _ in range(length)]

    def _map(self, length: int, depth: int) -> Any:
        self._require(2 * length)
        items: dict[str, Any] = {}
        for _ in range(length):
            key = self.value(depth + 1)
            if not isinstance(key, str) or key in items:
                raise ValueError(f"a map has the key {key!r}, which is no text or occurs twice")
            items[key] = self.value(depth + 1)
        return _joined(items) if items.get(_CHUNKED) is True else items

    def _extension(self, length: int) -> Lazy:
        """Return the array that an extension of some bytes holds."""
        kind = self._take(1)[0]
        self._require(length)
        if kind not in (_ARRAY, _SCALAR):
            raise ValueError(f"it has an extension of type {kind}; expected arrays")
        end = self.place + length
        shape, dtype, place = _Reader(self._path, self._data, self.place, end).array()
        self.place = end
        return Lazy([Values(self._path, dtype, math.prod(shape), place)], shape, 0, contiguous_strides(shape))

    def array(self) -> tuple[tuple[int, ...], torch.dtype, int]:
        """Return shape, type and place of the numbers of an array, which fill the rest of the stretch."""
        if self._take(1) != b"\x93":
            raise ValueError("an array is not of shape, type and numbers")
        shape, name = self.value(), self.value()
        name = name.decode() if isinstance(name, bytes) else name
        if not isinstance(shape, list) or not all(type(side) is int and side >= 0 for side in shape):
            raise ValueError(f"an array has the shape {shape!r}")
        if not isinstance(name, str) or name not in _DTYPES:
            raise ValueError(f"an array is of type {name!r}; expected {', '.join(_DTYPES)}")
        first = self._take(1)[0]
        length = int.from_bytes(self._take(_LENGTHS[first] if first in (0xC4, 0xC5, 0xC6) else 0), "big")
        n_bytes = math.prod(shape) * _DTYPES[name].itemsize
        if n_bytes != length or length != self._end - self.place or math.prod(max(1, s) for s in shape) > MAX_ELEMENTS:
            raise ValueError(f"an array of shape {tuple(shape)} and type {name} has {length:,} bytes")
        return tuple(shape), _DTYPES[name], self.place


def _joined(items: dict[str, Any]) -> Lazy:
    """Return the array that flax has written in pieces."""
    sides, pieces = (items[name] for name in ("shape", "chunks"))
    if not isinstance(sides, dict) or not isinstance(pieces, dict):
        raise ValueError("an array in pieces lacks its shape or its pieces")
    shape = tuple(sides[str(i)] for i in range(len(sides)))
    parts = [pieces[str(i)] for i in range(len(pieces))]
    if not all(isinstance(part, Lazy) for part in parts) or not all(type(side) is int and side >= 0 for side in shape):
        raise ValueError("an array in pieces has a wrong shape or a wrong piece")
    values = [part.values[0] for part in parts]
    if sum(part.n_elements for part in values) != math.prod(shape) or len({part.dtype for part in values}) != 1:
        raise ValueError(f"the pieces of an array do not have its shape {shape}")
    return Lazy(values, shape, 0, contiguous_strides(shape))


def contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the strides of a tensor that lies in memory row by row."""
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
