"""A manifest: the contents of shards when they were checked, so that later losses are noticed.

`dalle-train check-data` (`training/data/check_data.py`) writes it, a folder:

    summary.json            the shards in order, with the counts of each, and what was found in all of them
    shards/NAME-HASH.index  `ShardRecord`: for every sample its key, and the places and checksums of its members
    unusable.jsonl, duplicates.jsonl     samples to look at: {"shard", "key", "reason"}, one a line
    excluded.jsonl          samples that training leaves out, in the same form

Each shard has a file of its own, which is read when one of its samples is: a run of hundreds of millions of samples
starts with the summary alone, where the shards have not changed and no list leaves samples of them out. (Records of
version 0.1 are JSON, and read at the start.)

A manifest changes nothing about whole shards: the samples have the numbers that they have without it, so a run may
begin to use one at any time. When a shard has lost samples, the others keep their numbers, and hence the order of
training stays the same; `located` finds the samples that are left. Only excluded samples have no number.

Order of the file: a shard in the summary, the folder, the data opened with it. `record.py` has the records.
"""

import dataclasses
import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from dalle.data.image_tokens import Description
from dalle.data.index import ShardIndex
from dalle.data.index_file import READING_ERRORS
from dalle.data.names import expand_shards, resolved
from dalle.data.reader import ShardData
from dalle.data.shard import Shard, State, in_threads, state_of
from dalle.data.usable import (
    DataReport,
    Part,
    fingerprint,
    parts_of,
    refuse_tokens,
    shard_from_json,
    shard_to_json,
    usable_part,
)
from storage.atomic import replace_text
from storage.exclusions import Excluded
from storage.stores.files import lasting_name, local_folder, warn_if_more_than_cache
from training.data.check_report import DUPLICATES, UNUSABLE
from training.data.record import FORMAT_VERSION, ShardRecord, located, require_readable, state_if_there

logger = logging.getLogger(__name__)

SUMMARY, RECORDS, EXCLUDED = "summary.json", "shards", "excluded.jsonl"
NEW_RECORDS = f"{RECORDS}/*.index"
FILES = (SUMMARY, EXCLUDED, UNUSABLE, DUPLICATES, NEW_RECORDS, f"{RECORDS}/*.json")
"""Patterns of the files of a manifest; other files may lie beside them."""

_NAMED_IN_LOG = 20  # shards that are logged by name


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
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
    state: State | None = None
    """Its size and time of change when it was checked; None in a summary of version 0.1, which has no parts either."""
    tokens: Description | None = None
    parts: Mapping[bool, Part] = field(default_factory=dict)
    """Its usable samples with captions (True) and without, those counted that a list leaves out."""

    @classmethod
    def of(cls, name: str, path: Path, record_file: str, record: ShardRecord) -> Self:
        """Return the entry of a record."""
        index = record.index
        return cls(
            name=name,
            path=lasting_name(path.resolve()),
            record=record_file,
            n_samples=len(index.keys),
            state=(index.n_bytes, record.changed_ns),
            tokens=index.tokens,
            parts=parts_of(index),
        )

    def to_json(self) -> dict[str, Any]:
        """Return its part of the summary."""
        return {
            **{name: getattr(self, name) for name in ("name", "path", "record", "n_samples", "state")},
            **shard_to_json(self.tokens, self.parts),
        }

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Self:
        """Read what `to_json` returns, or version 0.1 wrote; raises ValueError, KeyError or TypeError for others."""
        if not all(isinstance(row[name], str) for name in ("name", "path", "record")):
            raise ValueError("name, path and record of a shard must be texts")
        state, path = row.get("state"), row["path"]
        tokens, parts = shard_from_json(row, Path(path))
        if PurePosixPath(row["record"]).name != row["record"]:
            raise ValueError("a record lies in another folder")
        return cls(
            name=row["name"],
            path=path,
            record=row["record"],
            n_samples=int(row["n_samples"]),
            state=None if state is None else (int(state[0]), int(state[1])),
            tokens=tokens,
            parts=parts,
        )


def write_summary(folder: Path, entries: Sequence[Mapping[str, Any]], found: Mapping[str, Any]) -> None:
    """Write the summary of a manifest.

    Args:
        folder: of the manifest.
        entries: of the shards, in order, as `Entry.to_json` returns them.
        found: what was found in all of them.

    Raises:
        OSError: it cannot be written.
    """
    made = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    text = json.dumps({"format": FORMAT_VERSION, "made": made, "found": found, "shards": entries}, indent=1)
    replace_text(folder / SUMMARY, text + "\n")


@dataclass(frozen=True)
class Manifest:
    """The records of a folder, read one at a time."""

    folder: Path
    entries: Sequence[Entry]
    excluded: Excluded

    @classmethod
    def open(cls, folder: Path) -> "Manifest":
        """Read the summary of a folder that `dalle-train check-data` wrote.

        Args:
            folder: on the disk, or a store's, given as a URL.

        Raises:
            StoreError: the store cannot be used.
            FileNotFoundError: there is none.
            ValueError: it is damaged or of another version.
        """
        folder = local_folder(folder, FILES, made=NEW_RECORDS)
        path = folder / SUMMARY
        if not path.is_file():
            raise FileNotFoundError(
                f"no manifest in {folder}: expected {SUMMARY} in it; make one with `dalle-train check-data`"
            )
        try:
            summary = json.loads(path.read_text("utf-8"))
            require_readable(summary)
            entries = [Entry.from_json(row) for row in summary["shards"]]
        except READING_ERRORS as error:
            raise ValueError(f"{path} cannot be used ({error}): make it again with `dalle-train check-data`") from None
        excluded = folder / EXCLUDED
        return cls(folder, entries, Excluded.read([excluded] if excluded.exists() else []))

    def record(self, entry: Entry) -> ShardRecord:
        """Read the record of a shard; errors as those of `ShardRecord.load`."""
        return ShardRecord.load(self.folder / RECORDS / entry.record)

    def match(self, paths: Sequence[Path]) -> tuple[list[tuple[Entry, Path | None]], list[Path]]:
        """Find the shards of the manifest among some paths: where they were, or by their names if they were moved.

        Returns:
            Every shard of the manifest, in its order, with the path that it has now, None if it is missing; and the
            paths that the manifest does not know.
        """
        by_path = {entry.path: entry for entry in self.entries}
        by_name = {PurePosixPath(entry.name).parts: entry for entry in self.entries}
        depths = sorted({len(parts) for parts in by_name}, reverse=True)
        folders: dict[Path, Path] = {}
        found: dict[Entry, Path] = {}
        moved, unknown = [], []
        for path in paths:
            entry = by_path.get(lasting_name(resolved(path, folders)))
            if entry is None:
                moved.append(path)
            else:
                found[entry] = path
        for path in moved:
            parts = resolved(path, folders).parts
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
    look = partial(_look_at, manifest, captions=captions, encoded=encoded)
    used: list[Shard] = []
    reports: list[DataReport] = []
    for (entry, _), (shard, found, damage) in zip(matches, in_threads(look, matches), strict=True):
        reports.append(found)
        if damage is not None:
            left = f"{found.n_samples - found.n_lost:,} of {found.n_samples:,} samples are left ({damage})"
            reports.append(DataReport(damaged_shards=(f"{entry.name}: {left}",)))
        if shard is not None:
            used.append(shard)
    report = DataReport.total(reports)
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
    warn_if_more_than_cache([path for _, path in matches if path is not None])
    return ShardData(used, report, captions=captions)


def _look_at(
    manifest: Manifest, match: tuple[Entry, Path | None], *, captions: bool, encoded: bool
) -> tuple[Shard | None, DataReport, str | None]:
    """Return a shard of a manifest, None if it has no usable sample, its counts, and its damage.

    Only the summary is asked about a shard that has not changed, and of which no sample is left out.

    Raises:
        ValueError: its record is damaged; it holds image tokens where pictures are needed.
    """
    entry, path = match
    part, state = entry.parts.get(captions), state_if_there(path)
    if path and part and state and state == entry.state and not manifest.excluded.names(entry.path):
        if not encoded:
            refuse_tokens(path, entry.tokens)
        shard = Shard(
            path=path,
            n_bytes=state[0],
            n_samples=part.report.n_samples,
            tokens=entry.tokens,
            load=partial(_load, manifest, entry, path, captions),
            fingerprint=part.fingerprint,
        )
        return shard if part.report.n_samples else None, part.report, None
    record = manifest.record(entry)
    index, damage = located(record, path, state)
    excluded = manifest.excluded.rows(index.keys, entry.path)
    used, report = usable_part(index, captions=captions, encoded=encoded, excluded=excluded)
    if not used.keys:
        return None, report, damage
    shard = Shard.held(used)
    if part is not None and not report.n_lost and (index.places == record.index.places).all():
        load = partial(_load, manifest, entry, path or Path(), captions, np.flatnonzero(excluded))
        shard = dataclasses.replace(shard, index=None, load=load, fingerprint=fingerprint(used))
    return shard, report, damage


def _load(
    manifest: Manifest, entry: Entry, path: Path, captions: bool, left_out: NDArray[np.int64] | None = None
) -> ShardIndex:
    """Return the index of the usable samples of a shard whose record is right; raises as `Manifest.record`.

    Args:
        manifest: which knows it.
        entry: of it.
        path: where it is now.
        captions: whether samples need captions.
        left_out: rows of samples that a list names, none by default.
    """
    index = manifest.record(entry).index
    excluded = None if left_out is None else np.isin(np.arange(len(index.keys)), left_out)
    index = dataclasses.replace(index, path=path, n_bytes=state_of(path)[0])
    return usable_part(index, captions=captions, encoded=True, excluded=excluded)[0]


def _log_some(prefix: str, lines: Sequence[str]) -> None:
    for line in lines[:_NAMED_IN_LOG]:
        logger.warning("%s %s", prefix, line)
    if len(lines) > _NAMED_IN_LOG:
        logger.warning("and %d more", len(lines) - _NAMED_IN_LOG)
