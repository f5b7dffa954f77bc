"""Checking shards: everything in them is read and decoded once; a report and a manifest come out.

1. `check_shard` (in its own module) makes the record of one shard.
2. `check_data` does so for many in parallel processes, and keeps each record at once, so that an interrupted check
   continues where it was. It adds up the counts, and finds keys and pictures that come twice in all shards together.
3. `check_report.report` puts them in words.
"""

import itertools
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dalle.data.index import IMAGE, NO_PICTURE, checksum
from dalle.data.names import expand_shards
from dalle.output.sheets import slug
from dalle.tokenizer import Tokenizer
from storage.exclusions import Excluded, listed_names, sample_line, short_names, write_lines
from storage.stores.files import lasting_name
from training.data.check_report import DUPLICATES, NAMED_IN_REPORT, UNUSABLE, Summary
from training.data.check_shard import SUBJECTS, UNREADABLE, check_shard
from training.data.manifest import EXCLUDED, RECORDS, Entry, Manifest, write_summary
from training.data.record import Counts, ShardRecord, state_if_there
from training.data.workers import forking, obey_the_parent_alone

logger = logging.getLogger(__name__)

MAX_WORKERS = 1024
"""Processes that read, at most: all are started at once."""


def check_data(
    shards: Sequence[str | Path],
    out: Path,
    *,
    workers: int = 0,
    tokenizer: Path | None = None,
    exclude: Sequence[Path] = (),
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Summary:
    """Check shards and write their manifest; unchanged shards that it knows are not read again.

    An existing manifest may grow by new shards. Its records stay: a run needs the manifest that it began with when
    shards have been damaged since.

    Args:
        shards: what `expand_shards` takes.
        out: folder of the manifest; made if it is missing.
        workers: processes that read; 0 reads in this one.
        tokenizer: a tokenizer.json, to count the captions' tokens.
        exclude: files of samples that training is to leave out, as `Excluded` reads them.
        overwrite: replace the records of an existing manifest.
        progress: called with (shards checked, shards).

    Raises:
        FileNotFoundError: a shard or file is missing.
        ValueError: an argument is wrong; without `overwrite`, shards that the manifest knows have changed or are gone,
            or others are to be left out than before. Nothing has been written then.
        OSError: something cannot be read or written, or a process was killed.
    """
    if not 0 <= workers <= MAX_WORKERS:
        raise ValueError(f"workers must be 0 to {MAX_WORKERS:,}, got {workers:,}")
    paths = expand_shards(shards)
    excluded = Excluded.read(exclude)
    bpe = None if tokenizer is None else Tokenizer.load(tokenizer)
    records = {path: _record_name(path) for path in paths}
    missing, changed = _not_known(out, records, None if bpe is None else bpe.hash)
    if not overwrite:
        _refuse_to_lose(out, records, changed, excluded)
    (out / RECORDS).mkdir(parents=True, exist_ok=True)
    for path in set(paths).difference(missing):
        if not (out / RECORDS / records[path]).exists() and (known := _known(out, records[path])) is not None:
            known.save(out / RECORDS / records[path])  # a record of version 0.1
    for n_done, (path, record) in enumerate(_checked(missing, workers, bpe), start=1):
        record.save(out / RECORDS / records[path])
        if progress is not None:
            progress(len(paths) - len(missing) + n_done, len(paths))
    rows = zip(short_names(paths), listed_names(paths), records.items(), strict=True)
    listed = [_Listed(name, listed_name, path, out / RECORDS / record) for name, listed_name, (path, record) in rows]
    return _summarise(out, listed, len(missing), excluded)


def _record_name(path: Path) -> str:
    return f"{slug(path.stem, 40)}-{checksum(os.fsencode(lasting_name(path.resolve()))):016x}.index"


def _not_known(out: Path, records: Mapping[Path, str], tokenizer: str | None) -> tuple[list[Path], set[Path]]:
    """Return the shards that have to be read, and those of them that have changed since they were known."""
    missing, changed = [], set()
    for path, name in records.items():
        record = _known(out, name)
        if record is None:
            missing.append(path)
            continue
        if not _is_of(record, path):
            changed.add(path)
        if path in changed or record.tokenizer != tokenizer:
            missing.append(path)
    return missing, changed


def _known(out: Path, name: str) -> ShardRecord | None:
    """Return an existing record, perhaps of version 0.1; None if it cannot be used or its shard could not be read."""
    path = out / RECORDS / name
    try:
        record = ShardRecord.load(path if path.exists() else path.with_suffix(".json"))
    except (OSError, ValueError):
        return None
    return None if record.changed_ns == UNREADABLE else record


def _is_of(record: ShardRecord, path: Path) -> bool:
    """Return whether a shard has the size and the time of change that it had when it was checked."""
    return (record.index.n_bytes, record.changed_ns) == state_if_there(path)


def _refuse_to_lose(out: Path, records: Mapping[Path, str], changed: set[Path], excluded: Excluded) -> None:
    """Check that an existing manifest keeps all that it knows; shards may have been moved.

    Raises:
        ValueError: it would lose something.
    """
    try:
        manifest = Manifest.open(out)
    except (FileNotFoundError, ValueError):  # no run can use it
        return
    matches, new = manifest.match(list(records))
    lost = []
    for entry, path in matches:
        if path is None:
            lost.append(f"{entry.name} is gone")
            continue
        record = (
            None if Path(records[path]).stem == Path(entry.record).stem else _known(out, entry.record)
        )  # of before it was moved
        if path in changed or (record is not None and not _is_of(record, path)):
            lost.append(f"{entry.name} has changed")
    found, added = [path for _, path in matches if path is not None], set(new)
    if found != [path for path in records if path not in added]:
        lost.append("the shards are in another order")
    if sorted(manifest.excluded.lines) != sorted(excluded.lines):
        lost.append(f"{len(excluded.lines):,} samples are to be left out, and {len(manifest.excluded.lines):,} were")
    if lost:
        listed = "; ".join(lost[:NAMED_IN_REPORT]) + ("; …" if len(lost) > NAMED_IN_REPORT else "")
        raise ValueError(
            f"the manifest {out} knows other data ({listed}), and a run that began with it needs it to resume exactly: "
            "give another --out, or --overwrite to replace it"
        )
    if new:
        logger.warning(
            "%s new in the manifest: for new runs only, samples get other numbers",
            "1 shard is" if len(new) == 1 else f"{len(new):,} shards are",
        )


def _check_quietly(path: Path, tokenizer: Tokenizer | None) -> ShardRecord:
    """Check a shard without the libraries' warnings: its record has the problems already."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        return check_shard(path, tokenizer)
    finally:
        logging.disable(before)


def _checked(paths: Sequence[Path], workers: int, tokenizer: Tokenizer | None) -> Iterator[tuple[Path, ShardRecord]]:
    """Yield the records of shards as they are made, by parallel processes if there are workers."""
    if workers == 0:
        yield from ((path, _check_quietly(path, tokenizer)) for path in paths)
        return
    waiting = iter(paths)
    running: dict[Future[ShardRecord], Path] = {}
    # forked, like the loader's: a new interpreter would import torch for seconds, and hear Ctrl-C meanwhile
    workers = min(workers, max(1, len(paths)))
    pool = ProcessPoolExecutor(workers, get_context("fork"), initializer=obey_the_parent_alone, initargs=(os.getpid(),))

    def submit() -> None:
        for path in itertools.islice(waiting, 4 * workers - len(running)):
            running[pool.submit(_check_quietly, path, tokenizer)] = path

    try:
        with forking():  # the first of them forks all workers
            submit()
        while running:
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                yield running.pop(future), future.result()
            submit()
    except BrokenProcessPool:
        raise OSError(
            "a process that checks shards was killed, perhaps for lack of memory: give fewer --workers; the same "
            "command continues with the shards that are left"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


class _Listed(NamedTuple):
    """One shard of the manifest."""

    name: str
    """Its path below the folder that holds all shards."""
    listed_name: str
    """Its name in lists of samples."""
    path: Path
    record: Path
    """File of its record."""

    def read(self) -> ShardRecord:
        return ShardRecord.load(self.record)


class _Totals:
    """Sums over the records of all shards."""

    def __init__(self) -> None:
        self.counts: Counts = {subject: Counter() for subject in SUBJECTS}
        self.entries: list[Entry] = []
        self.damaged: list[str] = []
        self.n_bytes = 0
        self.problems: Counter[str] = Counter()
        self.n_with_neither = 0
        self.without_picture: list[str] = []
        """The first few samples without a picture of which it is known what may have been meant to be it."""
        self.key_hashes: list[NDArray[np.uint64]] = []
        self.picture_hashes: list[NDArray[np.uint64]] = []
        """Of each shard's n samples; 0 for a sample without a picture."""

    @property
    def starts(self) -> NDArray[np.int64]:
        """Numbers of the shards' first samples, through all shards, and the number of all samples."""
        return np.cumsum([0, *map(len, self.key_hashes)])

    def add_all(self, shards: Sequence[_Listed], excluded: Excluded) -> Iterator[str]:
        """Add the records one after the other; yields a line for each sample that cannot be used.

        Raises:
            ValueError: a line of samples to leave out means more than one.
        """
        for shard in shards:
            record = shard.read()
            index = record.index
            assert index.checksums is not None
            self.entries.append(Entry.of(shard.name, shard.path, shard.record.name, record))
            excluded.rows(index.keys, self.entries[-1].path)
            for subject, found in record.counts.items():
                self.counts.setdefault(subject, Counter()).update(found)
            self.n_bytes += index.n_bytes
            if index.damage is not None:
                self.damaged.append(f"{shard.name} {index.damage}")
            hashes = [checksum(key.encode("utf-8", "surrogatepass")) for key in index.keys]
            self.key_hashes.append(np.array(hashes, dtype=np.uint64))
            self.picture_hashes.append(np.where(index.has_image, index.checksums[:, IMAGE], np.uint64(0)))
            self.problems.update(problem.partition(": ")[0] for problem in record.problems.values())
            self.n_with_neither += int((index.places[:, :, 1] == 0).all(axis=1).sum())
            for i, problem in record.problems.items():
                meant = problem.partition(": ")[2] if problem.startswith(NO_PICTURE) else ""
                if meant and len(self.without_picture) < NAMED_IN_REPORT:
                    self.without_picture.append(f"{index.keys[i]} ({meant})")
                yield sample_line(shard.listed_name, index.keys[i], problem)


def _summarise(out: Path, listed: Sequence[_Listed], n_read: int, excluded: Excluded) -> Summary:
    """Add up the records, and write the lists of samples and the summary.

    Raises:
        ValueError: a line of samples to leave out means more than one.
    """
    totals = _Totals()
    write_lines(out / UNUSABLE, totals.add_all(listed, excluded))
    again, _ = _repeated(np.concatenate(totals.key_hashes))
    copies, originals = _repeated(np.concatenate(totals.picture_hashes), ignored=0)
    write_lines(out / DUPLICATES, _copy_lines(listed, totals.starts, copies, originals))
    write_lines(out / EXCLUDED, (f"{line}\n" for line in excluded.lines))
    repeated_keys = _names_at(listed, totals.starts, again[:NAMED_IN_REPORT])
    summary = Summary(
        n_shards=len(listed),
        n_read=n_read,
        n_bytes=totals.n_bytes,
        counts=totals.counts,
        damaged=tuple(totals.damaged),
        n_repeated_keys=len(again),
        repeated_keys=tuple(key for _, (_, key) in repeated_keys),
        n_repeated_pictures=len(copies),
        n_excluded=len(excluded.lines),
        problems=dict(totals.problems.most_common()),
        n_with_neither=totals.n_with_neither,
        without_picture=tuple(totals.without_picture),
    )
    write_summary(out, [entry.to_json() for entry in totals.entries], vars(summary))
    return summary


def _repeated(values: NDArray[np.uint64], ignored: int | None = None) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return where a value comes again, in order, and where it came first."""
    _, first, inverse = np.unique(values, return_index=True, return_inverse=True)
    originals = first[inverse]
    is_again = originals != np.arange(len(values))
    if ignored is not None:
        is_again &= values != ignored
    again = np.flatnonzero(is_again)
    return again, originals[again]


def _names_at(
    shards: Sequence[_Listed], starts: NDArray[np.int64], numbers: Iterable[int]
) -> Iterator[tuple[int, tuple[str, str]]]:
    """Yield (number, (shard, key)) of samples, numbered through all shards, in ascending order."""
    shard, record = -1, None
    for number in sorted({int(number) for number in numbers}):
        found = int(np.searchsorted(starts, number, side="right")) - 1
        if found != shard or record is None:
            shard, record = found, shards[found].read()
        yield number, (shards[shard].listed_name, record.index.keys[number - int(starts[shard])])


def _copy_lines(
    shards: Sequence[_Listed], starts: NDArray[np.int64], copies: NDArray[np.int64], originals: NDArray[np.int64]
) -> Iterator[str]:
    """Yield a line for each picture that comes again, which names the sample that has it first."""
    first = dict(_names_at(shards, starts, originals))
    for (_, name), original in zip(_names_at(shards, starts, copies), originals.tolist(), strict=True):
        original_shard, original_key = first[original]
        yield sample_line(*name, f"the same picture as {original_key} in {original_shard}")
