"""A manifest: what shards held when they were checked, so that what they lose later is noticed.

`dalle-train check-data` (`training/data/check_data.py`) writes it, a folder:

    summary.json            the shards in order, and what was found in all of them
    shards/NAME-HASH.json   `ShardRecord`: for every sample its key, and the places and checksums of its members
    unusable.jsonl, duplicates.jsonl     samples to look at: {"shard", "key", "reason"}, one a line
    excluded.jsonl          samples that training leaves out, in the same form

Each shard has a file of its own: hundreds of millions of samples are not one file.

A manifest changes nothing about shards that are whole: the samples have the numbers that they have without it, so a run
may begin to use one at any time. When a shard has lost samples, the others keep their numbers, and hence the order of
training stays what it was; `located` finds what is left. Only excluded samples have no number.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import logging
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Self

import numpy as np
from numpy.typing import NDArray

from dalle.data.image_tokens import Description
from dalle.data.index import ShardIndex, index_shard
from storage.atomic import replace_file

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
"""Raised when manifests of this version could no longer be read by the code before it."""
SUMMARY, RECORDS, EXCLUDED = "summary.json", "shards", "excluded.jsonl"

Counts = dict[str, Counter[str]]
"""What was counted, by subject and value: {"shorter side": {"64 to 127": 12}}; those of several shards add up."""


def checksum(data: bytes) -> int:
    """Return 64 bits of BLAKE2b: bytes that differ have different ones, by all that chance allows."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")


@dataclass(frozen=True, kw_only=True)
class ShardRecord:
    """What one shard held when it was checked."""

    index: ShardIndex
    """Its samples, with checksums; also those that cannot be used."""
    changed_ns: int
    """Time of its last change then, in ns: a shard that keeps it and its size is taken to be the same."""
    has_caption: NDArray[np.bool_]
    """(n,) whether a sample has a caption that can be read and is not blank."""
    problems: Mapping[int, str]
    """What is wrong with a sample that cannot be used as a captioned picture."""
    counts: Counts
    """What was counted."""
    tokenizer: str | None
    """Hash of the tokenizer that counted the captions' tokens, if one did."""

    def to_json(self) -> str:
        """Return the text of its file."""
        index = self.index
        assert index.checksums is not None
        record = {
            "format": FORMAT_VERSION,
            "path": str(index.path),
            "bytes": index.n_bytes,
            "changed_ns": self.changed_ns,
            "damage": index.damage,
            "tokens": None if index.tokens is None else json.loads(index.tokens.to_json()),
            "tokenizer": self.tokenizer,
            "counts": self.counts,
            "problems": self.problems,
            "ignored": index.n_ignored,
            "duplicates": index.n_duplicates,
            "samples": {
                "key": index.keys,
                "name": index.image_names,
                "places": index.places.tolist(),
                "checksums": [[f"{one:016x}" for one in row] for row in index.checksums.tolist()],
                "has_caption": self.has_caption.astype(int).tolist(),
            },
        }
        # ASCII: names that are not UTF-8 hold halves of surrogate pairs, which a file cannot
        return json.dumps(record, separators=(",", ":")) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what `to_json` made.

        Raises:
            ValueError, KeyError, TypeError, AttributeError, OverflowError: it is something else.
        """
        record = json.loads(text)
        if record["format"] != FORMAT_VERSION:
            raise ValueError(f"it is of format {record['format']!r}, and this version reads {FORMAT_VERSION}")
        path, samples, tokens = Path(record["path"]), record["samples"], record["tokens"]
        n = len(samples["key"])
        places = np.array(samples["places"], dtype=np.int64).reshape(n, 3, 2)
        checksums = np.array([[int(one, 16) for one in row] for row in samples["checksums"]], dtype=np.uint64)
        index = ShardIndex(
            path=path,
            n_bytes=int(record["bytes"]),
            tokens=None if tokens is None else Description.from_json(json.dumps(tokens).encode(), path),
            keys=tuple(map(str, samples["key"])),
            image_names=tuple(map(str, samples["name"])),
            image=places[:, 0],
            text=places[:, 1],
            json=places[:, 2],
            n_ignored=int(record["ignored"]),
            n_duplicates=int(record["duplicates"]),
            damage=record["damage"],
            checksums=checksums.reshape(n, 3),
        )
        if len(index.image_names) != n or len(samples["has_caption"]) != n:
            raise ValueError("its columns differ in length")
        return cls(
            index=index,
            changed_ns=int(record["changed_ns"]),
            has_caption=np.array(samples["has_caption"], dtype=bool),
            problems={int(i): str(problem) for i, problem in record["problems"].items()},
            counts={subject: Counter(values) for subject, values in record["counts"].items()},
            tokenizer=record["tokenizer"],
        )


# -------------------------------------------------------------------------------------------- what became of a shard


def located(record: ShardRecord, path: Path | None) -> tuple[ShardIndex, str | None]:
    """Find the samples of a record in the shard as it is now.

    A shard that has the size and the time of change of then is taken to be the same without being read: what changed
    in it nevertheless is noticed when a sample is read. Of any other, the headers are read; where they do not lead to a
    sample, its old place is read, which still holds it if only a header was damaged.

    Args:
        record: what the shard held.
        path: where it is now; None if it is missing.

    Returns:
        The index of the same samples, in the same order, with those that are not there marked as lost; and what is
        wrong with the shard, None if nothing is.
    """
    index, n = record.index, len(record.index.keys)
    try:
        status = path.stat() if path is not None else None
    except OSError:
        status = None
    if path is None or status is None:
        return dataclasses.replace(index, n_bytes=0, lost=np.ones(n, dtype=bool)), "the shard is missing"
    if (status.st_size, status.st_mtime_ns) == (index.n_bytes, record.changed_ns):
        return dataclasses.replace(index, path=path, lost=np.zeros(n, dtype=bool)), None
    try:
        places, is_lost, damage = _search(index, path)
    except OSError as error:
        return dataclasses.replace(index, path=path, lost=np.ones(n, dtype=bool)), f"cannot be read ({error})"
    if status.st_size != index.n_bytes:
        damage = damage or f"it has {status.st_size:,} bytes, and had {index.n_bytes:,}"
    elif damage is None and is_lost.any():
        damage = "it holds other samples"
    found = dataclasses.replace(
        index,
        path=path,
        n_bytes=status.st_size,
        image=places[:, 0],
        text=places[:, 1],
        json=places[:, 2],
        lost=is_lost,
    )
    return found, damage


def _search(index: ShardIndex, path: Path) -> tuple[NDArray[np.int64], NDArray[np.bool_], str | None]:
    """Return the places (n, 3, 2) of an index's samples in a shard that has changed, which are lost, and the damage."""
    assert index.checksums is not None
    rows: dict[str, int] = {}
    places, is_lost = index.places, np.zeros(len(index.keys), dtype=bool)
    places_now, damage = places, None
    try:
        now = index_shard(path, skip_damaged=True)
    except ValueError as error:
        damage = str(error).removeprefix(f"{path} ").partition(":")[0]
    else:
        rows, places_now, damage = {key: row for row, key in enumerate(now.keys)}, now.places, now.damage
    with path.open("rb", buffering=0) as file:
        n_bytes = os.fstat(file.fileno()).st_size
        for i, key in enumerate(index.keys):
            row = rows.get(key)
            if row is not None and (places_now[row, :, 1] == places[i, :, 1]).all():
                places[i] = places_now[row]
            else:
                is_lost[i] = not _are_there(file.fileno(), n_bytes, places[i].tolist(), index.checksums[i].tolist())
    return places, is_lost, damage


def _are_there(file: int, n_bytes: int, places: list[list[int]], checksums: list[int]) -> bool:
    """Whether the members of a sample are at these places, byte for byte."""
    for (offset, size), expected in zip(places, checksums, strict=True):
        if size == 0:
            continue
        if offset < 0 or size < 0 or offset + size > n_bytes or checksum(os.pread(file, size, offset)) != expected:
            return False
    return True


# ------------------------------------------------------------------------------------------------------ the folder


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A shard as the summary lists it."""

    name: str
    """Its path below the folder that all shards of the manifest are in."""
    path: str
    """Where it was."""
    record: str
    """Name of the file of its record."""
    n_samples: int
    """Keys in it."""


class Manifest:
    """The records of a folder, read one at a time."""

    def __init__(self, folder: Path, entries: Sequence[Entry], excluded: "Excluded") -> None:
        """Take what the folder's files say; `Manifest.open` reads them."""
        self.folder, self.entries, self.excluded = folder, tuple(entries), excluded

    @classmethod
    def open(cls, folder: Path) -> "Manifest":
        """Read the summary of a folder that `dalle-train check-data` wrote.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is damaged or of another version.
        """
        path = folder / SUMMARY
        if not path.is_file():
            raise FileNotFoundError(
                f"no manifest in {folder}: expected {SUMMARY} in it; make one with `dalle-train check-data`"
            )
        try:
            summary = json.loads(path.read_text("utf-8"))
            if summary["format"] != FORMAT_VERSION:
                raise ValueError(f"it is of format {summary['format']!r}, and this version reads {FORMAT_VERSION}")
            entries = [Entry(**{**row, "n_samples": int(row["n_samples"])}) for row in summary["shards"]]
            if any(PurePosixPath(entry.record).name != entry.record for entry in entries):
                raise ValueError("a record lies in another folder")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"{path} cannot be used ({error}): make it again with `dalle-train check-data`") from None
        excluded = folder / EXCLUDED
        return cls(folder, entries, Excluded.read([excluded] if excluded.exists() else []))

    def record(self, entry: Entry) -> ShardRecord:
        """Read what a shard held.

        Raises:
            ValueError: its file is damaged.
            OSError: it cannot be read.
        """
        path = self.folder / RECORDS / entry.record
        try:
            return ShardRecord.from_json(path.read_text("utf-8"))
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise ValueError(f"{path} cannot be used ({error}): make it again with `dalle-train check-data`") from None

    def match(self, paths: Sequence[Path]) -> tuple[list[tuple[Entry, Path | None]], list[Path]]:
        """Find the shards of the manifest among some paths: where they were, or by their names if they were moved.

        Returns:
            Every shard of the manifest, in its order, with the path that it has now, None if it is missing; and the
            paths that the manifest does not know.
        """
        by_path = {entry.path: entry for entry in self.entries}
        by_name = {PurePosixPath(entry.name).parts: entry for entry in self.entries}
        depths = sorted({len(parts) for parts in by_name}, reverse=True)
        found: dict[Entry, Path] = {}
        moved, unknown = [], []
        for path in paths:
            entry = by_path.get(str(path.resolve()))
            if entry is None:
                moved.append(path)
            else:
                found[entry] = path
        for path in moved:
            parts = path.resolve().parts
            names = (by_name.get(parts[-depth:]) for depth in depths)
            entry = next((entry for entry in names if entry is not None and entry not in found), None)
            if entry is None:
                unknown.append(path)
            else:
                found[entry] = path
        return [(entry, found.get(entry)) for entry in self.entries], unknown

    def part(self, paths: Sequence[Path]) -> "Manifest":
        """Return the manifest of some of its shards."""
        matches, _ = self.match(paths)
        return Manifest(self.folder, [entry for entry, path in matches if path is not None], self.excluded)


class Excluded:
    """Samples that are left out, each by its key, in one shard or in all."""

    def __init__(self, shards_of: Mapping[str, Sequence[tuple[str, ...]]], lines: Sequence[str]) -> None:
        """Take the last parts of the shards' paths for each key, none for all shards; `read` reads them."""
        self._shards_of = shards_of
        self._found_in: dict[tuple[str, tuple[str, ...]], str] = {}
        self.lines = lines
        """As they are in the files."""

    @classmethod
    def read(cls, paths: Iterable[Path]) -> "Excluded":
        """Read files of lines {"shard": "folder/000003.tar", "key": "a"}; without "shard", the key goes in all shards.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: a line is something else.
        """
        shards_of: dict[str, list[tuple[str, ...]]] = {}
        lines = []
        for path in paths:
            if not path.is_file():
                raise FileNotFoundError(f"no file {path}: expected lines such as " + _EXCLUDED_EXAMPLE)
            for number, line in enumerate(_lines(path), start=1):
                try:
                    record = json.loads(line)
                    key, shard = record["key"], record.get("shard", "")
                    if not isinstance(key, str) or not isinstance(shard, str):
                        raise TypeError("key and shard must be texts")
                except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                    raise ValueError(
                        f"{path}, line {number}, cannot be read ({error!r}): expected " + _EXCLUDED_EXAMPLE
                    ) from None
                shards_of.setdefault(key, []).append(PurePosixPath(shard).parts)
                lines.append(line)
        return cls(shards_of, list(dict.fromkeys(lines)))

    def rows(self, index: ShardIndex, path: str) -> NDArray[np.bool_]:
        """Return which samples of a shard are left out, (n,).

        Raises:
            ValueError: a line names a sample of this shard, and one of another shard that was asked about.
        """
        return np.array([self._is_left_out(key, path) for key in index.keys], dtype=bool)

    def _is_left_out(self, key: str, path: str) -> bool:
        parts = PurePosixPath(path).parts
        found = [shard for shard in self._shards_of.get(key, ()) if not shard or parts[-len(shard) :] == shard]
        for shard in filter(None, found):
            other = self._found_in.setdefault((key, shard), path)
            if other != path:
                raise ValueError(
                    f"a line to leave out key {key!r} of shard {'/'.join(shard)!r} means a sample of {other} and one "
                    f"of {path}: name the shard by more of its path"
                )
        return bool(found)


_EXCLUDED_EXAMPLE = '{"shard": "000003.tar", "key": "000003017"}'


def _lines(path: Path) -> list[str]:
    try:
        return [line for line in path.read_text("utf-8").split("\n") if line.strip()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error}): expected lines such as {_EXCLUDED_EXAMPLE}") from None


def short_names(paths: Sequence[Path]) -> list[str]:
    """Return the paths of some shards below the deepest folder that all of them are in: each another name."""
    resolved = [path.resolve() for path in paths]
    folder = os.path.commonpath([path.parent for path in resolved]) if resolved else ""
    return [path.relative_to(folder).as_posix() for path in resolved]


def listed_names(paths: Sequence[Path]) -> list[str]:
    """Return `short_names` below the name of their folder: those of other data with shards of equal names differ."""
    names = short_names(paths)
    return [
        PurePosixPath(*path.resolve().parts[-1 - len(PurePosixPath(name).parts) :]).as_posix()
        for path, name in zip(paths, names, strict=True)
    ]


def sample_line(shard: str, key: str, reason: str) -> str:
    """Return a line of a list of samples, which `Excluded` reads; ASCII, whatever the key holds."""
    return json.dumps({"shard": shard, "key": key, "reason": reason}) + "\n"


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Write a file of lines that end in newlines, whole or not at all; none are no file.

    Raises:
        OSError: it cannot be written.
    """
    iterator = iter(lines)
    first = next(iterator, None)
    if first is None:
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
        return

    def write(partial: Path) -> None:
        with partial.open("w", encoding="utf-8") as file:
            file.writelines(itertools.chain([first], iterator))

    replace_file(path, write)
