"""The contents of a shard when it was checked, in a file of a manifest, and its samples in the shard as it is now.

The file is an index (`dalle/data/index_file.py`) with the checksums of all members and what was found in them.
"""

import dataclasses
import json
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from dalle.data.index import ShardIndex, checksum, index_shard
from dalle.data.index_file import READING_ERRORS, index_bytes, keep, kept_index, read_index
from dalle.data.shard import State, state_of
from dalle.data.usable import shard_from_json
from storage.atomic import replace_file
from storage.stores.errors import StoreError, WrongBytesError
from storage.stores.files import open_file

FORMAT_VERSION = 2
"""Goes up when older code can no longer read what this code writes."""
_OLDEST_FORMAT = 1

Counts = dict[str, Counter[str]]
"""Counts by subject and value: {"shorter side": {"64 to 127": 12}}; those of several shards add up."""


@dataclass(frozen=True, kw_only=True)
class ShardRecord:
    """The contents of one shard when it was checked."""

    index: ShardIndex
    """All its samples, usable or not, with `has_caption` and `checksums`."""
    changed_ns: int
    """Time of its last change then, in ns: a shard that keeps it and its size is taken to be the same."""
    problems: Mapping[int, str]
    """The problem of each sample that cannot be used as a captioned picture, by row."""
    counts: Counts
    tokenizer: str | None
    """Hash of the tokenizer that counted the captions' tokens; None if they were not counted."""

    def save(self, path: Path) -> None:
        """Write its file.

        Raises:
            OSError: it cannot be written.
        """
        index = dataclasses.replace(self.index, problems=self.problems)
        more = {"path": str(index.path), "counts": self.counts, "tokenizer": self.tokenizer}
        content = index_bytes(index, self.changed_ns, more)
        replace_file(path, lambda partial: partial.write_bytes(content))

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a file of `save`, or one of version 0.1, which ends in .json.

        Raises:
            ValueError: it is something else, of another format or damaged; names it.
            OSError: it cannot be read.
        """
        try:
            if path.suffix == ".json":
                return cls._from_json(path.read_text("utf-8"))
            index, header = read_index(path, Path())
            record = header.record
            if index.checksums is None or index.has_caption is None:
                raise ValueError("it has no checksums or no captions")
            _require_sound(index, record)
            return cls(
                index=dataclasses.replace(index, path=Path(record["path"])),
                changed_ns=header.changed_ns,
                problems=index.problems,
                counts=_counts(record),
                tokenizer=record["tokenizer"],
            )
        except READING_ERRORS as error:
            raise ValueError(f"{path} cannot be used ({error}): make it again with `dalle-train check-data`") from error

    @classmethod
    def _from_json(cls, text: str) -> Self:
        record = json.loads(text)
        require_readable(record)
        path, samples = Path(record["path"]), record["samples"]
        n = len(samples["key"])
        problems = {int(i): str(problem) for i, problem in record["problems"].items()}
        checksums = np.array([[int(one, 16) for one in row] for row in samples["checksums"]], dtype=np.uint64)
        index = ShardIndex(
            path=path,
            n_bytes=int(record["bytes"]),
            tokens=shard_from_json(record, path)[0],
            keys=tuple(map(str, samples["key"])),
            image_names=tuple(map(str, samples["name"])),
            places=np.array(samples["places"], dtype=np.int64).reshape(n, 3, 2),
            n_ignored=int(record["ignored"]),
            n_duplicates=int(record["duplicates"]),
            damage=record["damage"],
            has_caption=np.array(samples["has_caption"], dtype=bool),
            problems=problems,
            checksums=checksums.reshape(n, 3),
        )
        if len(index.image_names) != n or index.has_caption is None or index.has_caption.shape != (n,):
            raise ValueError("its columns differ in length")
        _require_sound(index, record)
        return cls(
            index=index,
            changed_ns=int(record["changed_ns"]),
            problems=problems,
            counts=_counts(record),
            tokenizer=record["tokenizer"],
        )


def _require_sound(index: ShardIndex, record: Mapping[str, Any]) -> None:
    """Check the values of a record; raises ValueError for one that no shard can have."""
    if (index.places < 0).any() or not set(index.problems) <= set(range(len(index.keys))):
        raise ValueError("a place is below 0, or a problem of no sample")
    if not all(text is None or isinstance(text, str) for text in (index.damage, record["tokenizer"])):
        raise ValueError("damage and tokenizer must be texts")
    if not all(_is_count(subject, *one) for subject, found in record["counts"].items() for one in found.items()):
        raise ValueError("its counts are no counts")


def _is_count(subject: str, value: str, number: Any) -> bool:
    """Return whether a count of a record is one, of a length where the subject asks for it."""
    is_length = subject.startswith("caption ") or subject == "shorter side"
    if is_length and not value.partition(" ")[0].isdecimal():
        return False
    return type(number) is int and 0 <= number < 1 << 53


def _counts(record: Mapping[str, Any]) -> Counts:
    return {subject: Counter(values) for subject, values in record["counts"].items()}


def require_readable(record: Mapping[str, Any]) -> None:
    """Check the format of a record or a summary; raises ValueError for one that this version does not read."""
    if not _OLDEST_FORMAT <= record["format"] <= FORMAT_VERSION:
        raise ValueError(f"it is of format {record['format']!r}, and this version reads up to {FORMAT_VERSION}")


def state_if_there(path: Path | None) -> State | None:
    """Return the state of a shard; None if it is missing or cannot be read. Raises StoreError as `located`."""
    try:
        return None if path is None else state_of(path)
    except StoreError:
        raise
    except (OSError, WrongBytesError):
        return None


def located(record: ShardRecord, path: Path | None, state: State | None) -> tuple[ShardIndex, str | None]:
    """Find the samples of a record in the shard as it is now.

    A shard of the same size and time of change is not read: changes in it are noticed when a sample is read. Of any
    other, the headers are read; where they do not lead to a sample, its old place is read, which still holds it if only
    a header was damaged.

    Args:
        record: the contents when the shard was checked.
        path: where it is now; None if it is missing.
        state: what `state_if_there` returns of it.

    Returns:
        The index of the same samples, in the same order, with those that are gone marked as lost; and the damage of the
        shard, None if it is whole.

    Raises:
        StoreError: its store cannot be used.
    """
    index, n = record.index, len(record.index.keys)
    all_lost = np.ones(n, dtype=bool)
    if path is None or state is None:
        return dataclasses.replace(index, n_bytes=0, lost=all_lost), "the shard is missing"
    if state == (index.n_bytes, record.changed_ns):
        return dataclasses.replace(index, path=path, lost=~all_lost), None
    try:
        places, lost, damage = _search(index, path, state)
    except StoreError:
        raise
    except (OSError, WrongBytesError) as error:
        return dataclasses.replace(index, path=path, lost=all_lost), f"cannot be read ({error})"
    if state[0] != index.n_bytes:
        damage = damage or f"it has {state[0]:,} bytes, and had {index.n_bytes:,}"
    elif damage is None and lost.any():
        damage = "it holds other samples"
    return dataclasses.replace(index, path=path, n_bytes=state[0], places=places, lost=lost), damage


def _search(
    index: ShardIndex, path: Path, state: State
) -> tuple[NDArray[np.integer[Any]], NDArray[np.bool_], str | None]:
    """Return the places (n, 3, 2) of an index's samples in a changed shard, which of them are lost, and the damage."""
    assert index.checksums is not None
    places, lost = index.places.astype(np.int64), np.zeros(len(index.keys), dtype=bool)
    rows: dict[str, int] = {}
    places_now: NDArray[np.integer[Any]] = places
    try:
        now = kept_index(path, state)
        if now is None:
            keep(now := index_shard(path), state)
    except ValueError as error:
        damage: str | None = str(error).removeprefix(f"{path} ").partition(":")[0]
    else:
        rows, places_now, damage = {key: row for row, key in enumerate(now.keys)}, now.places, now.damage
    with open_file(path) as file:
        n_bytes = os.fstat(file.fileno()).st_size
        for i, key in enumerate(index.keys):
            row = rows.get(key)
            if row is not None and (places_now[row, :, 1] == places[i, :, 1]).all():
                places[i] = places_now[row]
            else:
                lost[i] = not _are_there(file.fileno(), n_bytes, places[i].tolist(), index.checksums[i].tolist())
    return places, lost, damage


def _are_there(file: int, n_bytes: int, places: list[list[int]], checksums: list[int]) -> bool:
    """Return whether the members of a sample are at these places, byte for byte."""
    for (offset, size), expected in zip(places, checksums, strict=True):
        if size == 0:
            continue
        if offset < 0 or size < 0 or offset + size > n_bytes or checksum(os.pread(file, size, offset)) != expected:
            return False
    return True
