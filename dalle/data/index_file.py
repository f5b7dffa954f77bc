"""The index of a shard in a file: read in no time, and only when one of its samples is.

A file NAME.tar.index lies beside the shard, or under `cache_folder` where nothing can be written there:

    magic, version, size and digest of the header       32 bytes
    header        JSON: the shard's name, size and time of change, counts of its usable samples, and where columns are
    columns       places, checksums, captions, keys, names, problems: little-endian

The header says what `ShardData` needs of a shard at the start of a run, the columns are read when a sample is. A file
is used only if the shard has the size and time of change that it was made of; one that is damaged, of another version
or of another shard is made again. The records of a manifest are such files, too, with more in the header.

Order of the file: writing, reading, where the files are kept.
"""

import hashlib
import io
import json
import logging
import os
import struct
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
from numpy.typing import NDArray

from dalle.data.image_tokens import Description
from dalle.data.index import ShardIndex, Texts, compact_type, joined
from dalle.data.usable import Part, parts_of, shard_from_json, shard_to_json
from storage.atomic import replace_file
from storage.stores.files import cache_folder

logger = logging.getLogger(__name__)

Found = TypeVar("Found")

ENDING = ".index"
MIN_KEPT = 256
"""Samples of a shard whose index is kept: of fewer, the headers are read as soon as an index is."""
SETTLED_S = 2.0
"""Seconds that a shard has not changed for when its index is kept: a change within the clock's tick would not show."""

_MAGIC = b"\x89shard\r\n"
_VERSION = 1
_PREFIX = struct.Struct("<8sII16s")
_MAX_HEADER = 1 << 24
_ALIGNMENT = 8
_TYPES = {"<u4", "<i8", "<u8", "|u1"}
READING_ERRORS = (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError)
"""What reading a record of other code may raise."""


class IndexFileError(ValueError):
    """A file is no index of this version, or damaged; the message says why, and names no file."""


@dataclass(frozen=True, kw_only=True)
class Header:
    """What an index file says of its shard without its columns."""

    path: Path
    """The index file."""
    shard: str
    """Name of the shard."""
    n_bytes: int
    """Its size."""
    changed_ns: int
    """Time of its last change, in ns."""
    tokens: Description | None
    parts: Mapping[bool, Part]
    """Its usable samples with captions (True), unless captions have not been read, and without."""
    record: Mapping[str, Any]
    """All of the header."""

    def is_of(self, shard: Path, state: tuple[int, int]) -> bool:
        """Return whether the index was made of this shard in this state."""
        return (self.shard, self.n_bytes, self.changed_ns) == (shard.name, *state)


# ---------------------------------------------------------------------------------------------------- writing


def index_bytes(index: ShardIndex, changed_ns: int, more: Mapping[str, Any]) -> bytes:
    """Return the content of an index file.

    Args:
        index: of a whole shard.
        changed_ns: time of the shard's last change.
        more: further entries of the header.
    """
    body, columns = bytearray(), {}
    for name, values in _columns(index).items():
        body += bytes(-len(body) % _ALIGNMENT)
        columns[name] = [values.dtype.str, list(values.shape), len(body)]
        body += values.tobytes()
    header = {
        "shard": index.path.name,
        "bytes": index.n_bytes,
        "changed_ns": changed_ns,
        "damage": index.damage,
        **shard_to_json(index.tokens, parts_of(index)),
        "ignored": index.n_ignored,
        "duplicates": index.n_duplicates,
        **more,
        "columns": columns,
        "columns_bytes": len(body),
        "columns_digest": _digest(body).hex(),
    }
    text = json.dumps(header, separators=(",", ":")).encode()  # ASCII: names may hold halves of surrogate pairs
    return with_prefix(text) + bytes(body)


def with_prefix(header: bytes) -> bytes:
    """Return a header as it stands in a file, with what comes before it."""
    text = header + b" " * (-len(header) % _ALIGNMENT)
    return _PREFIX.pack(_MAGIC, _VERSION, len(text), _digest(text)) + text


def _columns(index: ShardIndex) -> dict[str, NDArray[Any]]:
    keys, key_ends = joined(index.keys)
    names, name_ends = joined(index.image_names)
    columns = {"places": index.places.astype(compact_type(index.places)), "key_ends": key_ends, "name_ends": name_ends}
    if index.checksums is not None:
        columns["checksums"] = index.checksums.astype("<u8")
    if index.has_caption is not None:
        columns["has_caption"] = index.has_caption.astype("|u1")
    problems = json.dumps({str(row): problem for row, problem in index.problems.items()}).encode()
    blocks = {"keys": keys, "names": names, "problems": problems}
    return columns | {name: np.frombuffer(bytearray(block), dtype="|u1") for name, block in blocks.items()}


def _digest(data: bytes | bytearray | memoryview) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()


# ---------------------------------------------------------------------------------------------------- reading


def read_header(path: Path) -> Header:
    """Read what an index file says of its shard, without its columns.

    Raises:
        IndexFileError: it is no whole index file of this version.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        return _header(path, file, os.fstat(file.fileno()).st_size)


def _header(path: Path, file: BinaryIO, n_bytes: int) -> Header:
    prefix = file.read(_PREFIX.size)
    if len(prefix) < _PREFIX.size or not prefix.startswith(_MAGIC):
        raise IndexFileError("it is no index file")
    _, version, length, digest = _PREFIX.unpack(prefix)
    if version != _VERSION:
        raise IndexFileError(f"it is of version {version}, and this program reads {_VERSION}")
    if length > min(_MAX_HEADER, n_bytes - _PREFIX.size):
        raise IndexFileError("it was cut off")
    text = file.read(length)
    if _digest(text) != digest:
        raise IndexFileError("its header is damaged")
    try:
        record = json.loads(text)
        tokens, parts = shard_from_json(record, path)
        header = Header(
            path=path,
            shard=str(record["shard"]),
            n_bytes=int(record["bytes"]),
            changed_ns=int(record["changed_ns"]),
            tokens=tokens,
            parts=parts,
            record=record,
        )
        is_whole = n_bytes == _PREFIX.size + length + int(record["columns_bytes"])
    except READING_ERRORS as error:
        raise IndexFileError(f"its header is damaged ({error})") from None
    if not is_whole:
        raise IndexFileError("it was cut off")
    return header


def read_index(path: Path, shard: Path) -> tuple[ShardIndex, Header]:
    """Read an index file, of the shard in the tar file `shard`.

    Raises:
        IndexFileError: it is no whole index file of this version.
        OSError: it cannot be read.
    """
    # not mapped: a mapping ends the process when its file is replaced on a network disk, or cannot be read
    content = path.read_bytes()
    file = io.BytesIO(content)
    header = _header(path, file, len(content))
    columns = memoryview(content)[file.tell() :]
    if _digest(columns).hex() != header.record.get("columns_digest"):
        raise IndexFileError("its columns are damaged")
    try:
        return _index(header, columns, shard), header
    except READING_ERRORS as error:
        raise IndexFileError(f"its columns are damaged ({error})") from None


def _index(header: Header, body: memoryview, shard: Path) -> ShardIndex:
    record = header.record
    columns = {name: _column(body, *place) for name, place in record["columns"].items()}
    places, checksums, has_caption = columns["places"], columns.get("checksums"), columns.get("has_caption")
    keys, names = (
        _texts(columns[ends], columns[block]) for ends, block in (("key_ends", "keys"), ("name_ends", "names"))
    )
    n = len(places)
    shapes = [column.shape for column in (checksums, has_caption) if column is not None]
    if places.shape != (n, 3, 2) or {len(keys), len(names), *(shape[0] for shape in shapes)} != {n}:
        raise ValueError("columns differ in length")
    if n and int(places.min()) < 0:
        raise ValueError("a place is below 0")
    return ShardIndex(
        path=shard,
        n_bytes=header.n_bytes,
        tokens=header.tokens,
        keys=keys,
        image_names=names,
        places=places,
        n_ignored=int(record["ignored"]),
        n_duplicates=int(record["duplicates"]),
        damage=record["damage"],
        has_caption=None if has_caption is None else has_caption.view(np.bool_),
        checksums=checksums,
        problems={int(row): str(problem) for row, problem in json.loads(bytes(columns["problems"])).items()},
    )


def _column(body: memoryview, kind: str, shape: list[int], offset: int) -> NDArray[Any]:
    if kind not in _TYPES or offset < 0 or any(size < 0 for size in shape):
        raise ValueError(f"a column of type {kind!r} and shape {shape} at {offset}")
    return np.frombuffer(body, dtype=kind, count=int(np.prod(shape, dtype=object)), offset=offset).reshape(shape)


def _texts(ends: NDArray[Any], block: NDArray[Any]) -> Texts:
    if ends.size and (int(ends[-1]) != len(block) or (ends[1:] < ends[:-1]).any()):
        raise ValueError("texts outside of their column")
    return Texts.by_ends(ends, block.data)


# ----------------------------------------------------------------------------------- where the files are kept


def _places_of(shard: Path) -> Iterator[Path]:
    """Yield where the index of a shard may be, in order."""
    beside, cache = shard.with_name(shard.name + ENDING), cache_folder()
    yield beside
    if cache is not None:
        folder = hashlib.blake2b(os.fsencode(shard.resolve()), digest_size=8).hexdigest()
        yield cache / "indexes" / folder / beside.name


def kept_header(shard: Path, state: tuple[int, int]) -> Header | None:
    """Return the header of the index that is kept of a shard.

    Args:
        shard: the tar file.
        state: its size, and the time of its last change in ns.

    Returns:
        None if none is kept of the shard as it is now; one that is damaged is told of.
    """
    found = _kept(shard, state, lambda path: (None, read_header(path)))
    return None if found is None else found[1]


def kept_index(shard: Path, state: tuple[int, int]) -> ShardIndex | None:
    """Return the index that is kept of a shard; arguments and result as those of `kept_header`."""
    found = _kept(shard, state, partial(read_index, shard=shard))
    return None if found is None else found[0]


def _kept(
    shard: Path, state: tuple[int, int], read: Callable[[Path], tuple[Found, Header]]
) -> tuple[Found, Header] | None:
    for path in _places_of(shard):
        try:
            found, header = read(path)
        except (FileNotFoundError, NotADirectoryError, PermissionError):
            continue
        except (IndexFileError, OSError) as error:
            logger.warning("%s cannot be used (%s): the shard is indexed again", path, error)
            continue
        if header.is_of(shard, state):
            return found, header
    return None


def keep(index: ShardIndex, state: tuple[int, int]) -> Header | None:
    """Write the index of a whole shard beside it or into the cache; returns its header, None if it is not kept.

    Args:
        index: of the shard.
        state: of the shard before it was indexed, as in `kept_header`.
    """
    settled = time.time() - state[1] / 1e9 >= SETTLED_S
    if index.damage is not None or len(index.keys) < MIN_KEPT or not settled:
        return None
    content = index_bytes(index, state[1], {})
    for path in _places_of(index.path):
        try:
            if path.parent != index.path.parent:
                path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(path, lambda new: new.write_bytes(content))
            return read_header(path)
        except (OSError, IndexFileError) as error:
            logger.debug("%s cannot be kept: %s", path, error)
    return None
