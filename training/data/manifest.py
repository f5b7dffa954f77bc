"""A manifest: the contents of shards when they were checked, so that later losses are noticed.

`dalle-train check-data` (`training/data/check_data.py`) writes it, a folder:

    summary.json            the shards in order, and the counts of all of them
    shards/NAME-HASH.json   `ShardRecord`: for every sample its key, and the places and checksums of its members
    unusable.jsonl, duplicates.jsonl     samples to look at: {"shard", "key", "reason"}, one a line
    excluded.jsonl          samples that training leaves out, in the same form

Each shard has a file of its own: hundreds of millions of samples are not one file.

A manifest changes nothing about whole shards: the samples have the numbers that they have without it, so a run may
begin to use one at any time. When a shard has lost samples, the others keep their numbers, and hence the order of
training stays the same; `located` finds the samples that are left. Only excluded samples have no number.

Order of the file: the record of a shard, its samples in the shard as it is now, the folder, the data opened with it.
"""

import dataclasses
import json
import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from dalle.data.image_tokens import Description
from dalle.data.index import ShardIndex, checksum, index_shard
from dalle.data.names import expand_shards
from dalle.data.reader import ShardData
from dalle.data.usable import DataReport, usable_part
from training.data.exclusions import Excluded

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
"""Raised when manifests of this version could no longer be read by the code before it."""
SUMMARY, RECORDS, EXCLUDED = "summary.json", "shards", "excluded.jsonl"

Counts = dict[str, Counter[str]]
"""Counts by subject and value: {"shorter side": {"64 to 127": 12}}; those of several shards add up."""

_NAMED_IN_LOG = 20  # shards that are logged by name
_READING_ERRORS = (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)


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

    def to_json(self) -> str:
        """Return the text of its file."""
        index = self.index
        assert index.checksums is not None
        assert index.has_caption is not None
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
                "has_caption": index.has_caption.astype(int).tolist(),
            },
        }
        # ASCII: names that are not UTF-8 hold halves of surrogate pairs, which a file cannot
        return json.dumps(record, separators=(",", ":")) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read the text of `to_json`.

        Raises:
            ValueError: it is something else, of another format or damaged.
        """
        try:
            return cls._from_json(text)
        except _READING_ERRORS as error:
            raise ValueError(str(error)) from error

    @classmethod
    def _from_json(cls, text: str) -> Self:
        record = json.loads(text)
        if record["format"] != FORMAT_VERSION:
            raise ValueError(f"it is of format {record['format']!r}, and this version reads {FORMAT_VERSION}")
        path, samples, tokens = Path(record["path"]), record["samples"], record["tokens"]
        n = len(samples["key"])
        problems = {int(i): str(problem) for i, problem in record["problems"].items()}
        checksums = np.array([[int(one, 16) for one in row] for row in samples["checksums"]], dtype=np.uint64)
        index = ShardIndex(
            path=path,
            n_bytes=int(record["bytes"]),
            tokens=None if tokens is None else Description.from_json(json.dumps(tokens).encode(), path),
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
        if (index.places < 0).any() or not set(problems) <= set(range(n)):
            raise ValueError("a place is below 0, or a problem of no sample")
        if not all(text is None or isinstance(text, str) for text in (index.damage, record["tokenizer"])):
            raise ValueError("damage and tokenizer must be texts")
        if not all(_is_count(subject, *one) for subject, found in record["counts"].items() for one in found.items()):
            raise ValueError("its counts are no counts")
        return cls(
            index=index,
            changed_ns=int(record["changed_ns"]),
            problems=problems,
            counts={subject: Counter(values) for subject, values in record["counts"].items()},
            tokenizer=record["tokenizer"],
        )


def _is_count(subject: str, value: str, number: Any) -> bool:
    """Return whether a count of a record is one, of a length where the subject asks for it."""
    is_length = subject.startswith("caption ") or subject == "shorter side"
    if is_length and not value.partition(" ")[0].isdecimal():
        return False
    return type(number) is int and 0 <= number < 1 << 53


def located(record: ShardRecord, path: Path | None) -> tuple[ShardIndex, str | None]:
    """Find the samples of a record in the shard as it is now.

    A shard of the same size and time of change is not read: changes in it are noticed when a sample is read. Of any
    other, the headers are read; where they do not lead to a sample, its old place is read, which still holds it if only
    a header was damaged.

    Args:
        record: the contents when the shard was checked.
        path: where it is now; None if it is missing.

    Returns:
        The index of the same samples, in the same order, with those that are gone marked as lost; and the damage of the
        shard, None if it is whole.
    """
    index, n = record.index, len(record.index.keys)
    all_lost = np.ones(n, dtype=bool)
    try:
        status = path.stat() if path is not None else None
    except OSError:
        status = None
    if path is None or status is None:
        return dataclasses.replace(index, n_bytes=0, lost=all_lost), "the shard is missing"
    if (status.st_size, status.st_mtime_ns) == (index.n_bytes, record.changed_ns):
        return dataclasses.replace(index, path=path, lost=~all_lost), None
    try:
        places, lost, damage = _search(index, path)
    except OSError as error:
        return dataclasses.replace(index, path=path, lost=all_lost), f"cannot be read ({error})"
    if status.st_size != index.n_bytes:
        damage = damage or f"it has {status.st_size:,} bytes, and had {index.n_bytes:,}"
    elif damage is None and lost.any():
        damage = "it holds other samples"
    return dataclasses.replace(index, path=path, n_bytes=status.st_size, places=places, lost=lost), damage


def _search(index: ShardIndex, path: Path) -> tuple[NDArray[np.int64], NDArray[np.bool_], str | None]:
    """Return the places (n, 3, 2) of an index's samples in a changed shard, which of them are lost, and the damage."""
    assert index.checksums is not None
    places, lost = index.places.copy(), np.zeros(len(index.keys), dtype=bool)
    rows: dict[str, int] = {}
    places_now = places
    try:
        now = index_shard(path)
    except ValueError as error:
        damage: str | None = str(error).removeprefix(f"{path} ").partition(":")[0]
    else:
        rows, places_now, damage = {key: row for row, key in enumerate(now.keys)}, now.places, now.damage
    with path.open("rb", buffering=0) as file:
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


@dataclass(frozen=True)
class Manifest:
    """The records of a folder, read one at a time."""

    folder: Path
    entries: Sequence[Entry]
    excluded: Excluded

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
            if not all(isinstance(text, str) for entry in entries for text in (entry.name, entry.path, entry.record)):
                raise ValueError("name, path and record of a shard must be texts")
            if any(PurePosixPath(entry.record).name != entry.record for entry in entries):
                raise ValueError("a record lies in another folder")
        except _READING_ERRORS as error:
            raise ValueError(f"{path} cannot be used ({error}): make it again with `dalle-train check-data`") from None
        excluded = folder / EXCLUDED
        return cls(folder, entries, Excluded.read([excluded] if excluded.exists() else []))

    def record(self, entry: Entry) -> ShardRecord:
        """Read the record of a shard.

        Raises:
            ValueError: its file is damaged.
            OSError: it cannot be read.
        """
        path = self.folder / RECORDS / entry.record
        try:
            return ShardRecord.from_json(path.read_text("utf-8"))
        except ValueError as error:
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
        return dataclasses.replace(self, entries=[entry for entry, path in matches if path is not None])


def open_with_manifest(
    shards: Sequence[str | Path],
    manifest: Manifest,
    *,
    captions: bool,
    encoded: bool = False,
) -> ShardData:
    """Open the samples that a manifest knows, with the numbers that they had when it was made.

    Samples that are gone are marked as lost, and shards that the manifest does not know are left out; both are logged.

    Args:
        shards: what `expand_shards` takes; missing and damaged ones are no errors.
        manifest: of these shards.
        captions: whether samples need captions; those without are left out and counted.
        encoded: whether shards of image tokens will do, which hold no pictures.

    Raises:
        ValueError: the manifest is damaged, or none of its samples is there; the shards hold image tokens where
            pictures are needed, or tokens that were made in several ways.
    """
    matches, unknown = manifest.match(expand_shards(shards, skip_missing=True))
    used: list[ShardIndex] = []
    report = DataReport()
    for entry, path in matches:
        index, damage = located(manifest.record(entry), path)
        excluded = manifest.excluded.rows(index.keys, entry.path)
        part, found = usable_part(index, captions=captions, encoded=encoded, excluded=excluded)
        report += found
        if damage is not None:
            left = f"{found.n_samples - found.n_lost:,} of {found.n_samples:,} samples are left ({damage})"
            report += DataReport(damaged_shards=(f"{entry.name}: {left}",))
        if part.keys:
            used.append(part)
    _log_some("shard", report.damaged_shards)
    _log_some("shard", [f"{path} is left out: the manifest in {manifest.folder} does not know it" for path in unknown])
    if report.n_lost == report.n_samples:
        listed = "; ".join(report.damaged_shards[:3])
        raise ValueError(
            f"nothing that the manifest {manifest.folder} knows is left: "
            f"{listed or f'it knows {len(manifest.entries):,} shards and no usable sample'}; check --data, or make a "
            "manifest of these shards with `dalle-train check-data`"
        )
    report.log()
    return ShardData(used, report, captions=captions)


def _log_some(prefix: str, lines: Sequence[str]) -> None:
    for line in lines[:_NAMED_IN_LOG]:
        logger.warning("%s %s", prefix, line)
    if len(lines) > _NAMED_IN_LOG:
        logger.warning("and %d more", len(lines) - _NAMED_IN_LOG)
