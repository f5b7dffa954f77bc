"""Checking shards: everything in them is read and decoded once; a report and a manifest come out.

1. `check_shard` reads a shard to its end, decodes every picture and caption, and makes its `ShardRecord`.
2. `check_data` does so for many in parallel processes, keeps each record at once, so that an interrupted check goes on,
   and adds up what was found, also what no shard can know by itself: keys and pictures that come twice.
3. `report` says it in words, with what to do.
"""

import dataclasses
import json
import logging
import math
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from dalle.data.image_tokens import Description, unpack
from dalle.data.index import LARGEST_TEXT_BYTES, ShardIndex, captions_of, expand_shards, index_shard
from dalle.output.sheets import slug
from dalle.tokenizer import Tokenizer
from dvae.images import open_image
from storage.atomic import replace_text
from storage.tar import LARGEST_PICTURE_BYTES
from training.data.manifest import (
    EXCLUDED,
    FORMAT_VERSION,
    RECORDS,
    SUMMARY,
    Counts,
    Excluded,
    Manifest,
    ShardRecord,
    checksum,
    listed_names,
    sample_line,
    short_names,
    write_lines,
)

logger = logging.getLogger(__name__)

UNUSABLE, DUPLICATES = "unusable.jsonl", "duplicates.jsonl"
SUBJECTS = (
    *("samples", "unusable pictures", "unusable captions", "caption characters", "caption words", "caption tokens"),
    *("shorter side", "aspect ratio"),
)
ASPECT_RATIOS = ((0.25, "below 1/4"), (0.5, "1/4 to 1/2"), (1.0, "1/2 to 1"), (2.0, "1 to 2"), (4.0, "2 to 4"))
"""Upper ends and names of the ranges that width ÷ height is counted in, besides "above 4"; 1/2 and 2 are inside."""
UNREADABLE = -1
"""In place of the time of the last change of a shard that could not be read: it is tried again."""
_EXACT_LENGTHS = 1000  # longer captions are counted by two digits of their lengths
_NAMED_IN_REPORT = 5
_PARENT_LOOK_S = 1.0  # between two looks of a process at whether its parent is alive
_PICTURE_PROBLEMS = ("is empty", "is not a picture", "is too large", "is too small")


# -------------------------------------------------------------------------------------------------------- one shard


def check_shard(path: Path, tokenizer: Tokenizer | None = None) -> ShardRecord:
    """Read a shard to its end, and decode every picture and every caption in it.

    Args:
        path: the tar file; damage, even of all of it, is part of the record, and so is that it cannot be read.
        tokenizer: counts the captions' tokens.
    """
    try:
        return _read_shard(path, tokenizer)
    except OSError as error:
        return ShardRecord(
            index=_nothing(path, 0, f"cannot be read ({error.strerror or error})"),
            changed_ns=UNREADABLE,
            has_caption=np.zeros(0, dtype=bool),
            problems={},
            counts={},
            tokenizer=None if tokenizer is None else tokenizer.hash,
        )


def _read_shard(path: Path, tokenizer: Tokenizer | None) -> ShardRecord:
    status = path.stat()
    try:
        index = index_shard(path, skip_damaged=True)
    except ValueError as error:
        index = _nothing(path, status.st_size, str(error).removeprefix(f"{path} ").partition("; make it again")[0])
    counts: Counts = {subject: Counter() for subject in SUBJECTS}
    n = len(index.keys)
    checksums, has_caption = np.zeros((n, 3), dtype=np.uint64), np.zeros(n, dtype=bool)
    problems: dict[int, str] = {}
    with path.open("rb", buffering=0) as file:
        for i in range(n):
            problem = _check_picture(index, i, file, checksums, counts)
            problem = _check_caption(index, i, file, checksums, counts, has_caption, tokenizer) or problem
            if problem is not None:
                problems[i] = problem
    has_image = index.image[:, 1] > 0
    has_text = (index.text[:, 1] > 0) | (index.json[:, 1] > 0)
    counts["samples"] = Counter(
        {
            "keys": n,
            "pairs": int((has_image & has_caption).sum()),
            "pictures without a caption": int((has_image & ~has_text).sum()),
            "captions without a picture": int((~has_image & has_text).sum()),
            "members that come twice": index.n_duplicates,
            "links, devices and unsafe names": index.n_ignored,
        }
    )
    return ShardRecord(
        index=dataclasses.replace(index, checksums=checksums),
        changed_ns=status.st_mtime_ns,
        has_caption=has_caption,
        problems=problems,
        counts=counts,
        tokenizer=None if tokenizer is None else tokenizer.hash,
    )


def _nothing(path: Path, n_bytes: int, damage: str) -> ShardIndex:
    """Return the index of a shard of which nothing can be read."""
    places = np.zeros((0, 2), dtype=np.int64)
    return ShardIndex(
        path=path,
        n_bytes=n_bytes,
        tokens=None,
        keys=(),
        image_names=(),
        image=places,
        text=places,
        json=places,
        n_ignored=0,
        n_duplicates=0,
        damage=damage,
        checksums=np.zeros((0, 3), dtype=np.uint64),
    )


def _check_picture(
    index: ShardIndex, i: int, file: BinaryIO, checksums: NDArray[np.uint64], counts: Counts
) -> str | None:
    """Decode a picture or its tokens; returns what is wrong with it, and adds its checksum and its sizes."""
    offset, size = index.image[i].tolist()
    if size == 0:
        return "no picture"
    if size > LARGEST_PICTURE_BYTES:
        problem: str | None = "is too large"
    else:
        data = os.pread(file.fileno(), size, offset)
        checksums[i, 0] = checksum(data)
        problem = _tokens_problem(data, index.tokens) if index.tokens is not None else _pixels_problem(data, counts)
    if problem is None:
        return None
    counts["unusable pictures"][problem] += 1
    return f"picture {problem}"


def _pixels_problem(data: bytes, counts: Counts) -> str | None:
    try:
        width, height = open_image(data, "picture").size
    except (ValueError, OSError) as error:
        found = str(error).removeprefix("picture ")
        return next((problem for problem in _PICTURE_PROBLEMS if found.startswith(problem)), "is damaged")
    low = 1 << (min(width, height).bit_length() - 1)
    counts["shorter side"][f"{low} to {2 * low - 1}"] += 1
    ratio = width / height
    is_below = (name for end, name in ASPECT_RATIOS if ratio < end or (ratio == end >= 1))
    counts["aspect ratio"][next(is_below, "above 4")] += 1
    return None


def _tokens_problem(data: bytes, description: Description) -> str | None:
    try:
        unpack(data, description.encoding)
    except ValueError:
        return "has damaged image tokens"
    return None


def _check_caption(
    index: ShardIndex,
    i: int,
    file: BinaryIO,
    checksums: NDArray[np.uint64],
    counts: Counts,
    has_caption: NDArray[np.bool_],
    tokenizer: Tokenizer | None,
) -> str | None:
    """Read a sample's captions as training does, from the text or else the JSON; returns what is wrong with them."""
    read: dict[int, bytes] = {}
    for kind, (offset, size) in ((1, index.text[i].tolist()), (2, index.json[i].tolist())):
        if 0 < size <= LARGEST_TEXT_BYTES:
            read[kind] = os.pread(file.fileno(), size, offset)
            checksums[i, kind] = checksum(read[kind])
    kind = 2 if index.text[i, 1] == 0 else 1
    size = int((index.text, index.json)[kind - 1][i, 1])
    if size == 0:
        return "no caption"
    if kind not in read:
        problem: str | None = "is too large"
    else:
        problem = _words_problem(read[kind], kind == 2, counts, tokenizer)
    if problem is not None:
        counts["unusable captions"][problem] += 1
        return f"caption {problem}"
    has_caption[i] = True
    return None


def _words_problem(text: bytes, is_json: bool, counts: Counts, tokenizer: Tokenizer | None) -> str | None:
    try:
        captions = captions_of(text, is_json, "")
    except ValueError:
        return "is in JSON that cannot be read" if is_json else "is not UTF-8"
    for caption in captions:
        counts["caption characters"][_length(len(caption))] += 1
        counts["caption words"][_length(len(caption.split()))] += 1
        if tokenizer is not None:
            counts["caption tokens"][_length(len(tokenizer.encode(caption)))] += 1
    return None if captions else "is blank"


def _length(n: int) -> str:
    """Return the number that a length is counted as: itself, or rounded down to two digits."""
    if n < _EXACT_LENGTHS:
        return str(n)
    unit = 10 ** (len(str(n)) - 2)
    return str(n // unit * unit)


# -------------------------------------------------------------------------------------------------------- all shards


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What was found in all shards."""

    n_shards: int
    """How many there are."""
    n_read: int
    """How many of them were read now; the others were known."""
    n_bytes: int
    """Their size."""
    counts: Counts
    """What was counted."""
    damaged: tuple[str, ...]
    """Shards that cannot be read to their end, with the reason."""
    n_repeated_keys: int
    """Samples whose key another sample before them has."""
    repeated_keys: tuple[str, ...]
    """The first few of those keys."""
    n_repeated_pictures: int
    """Samples whose picture is, byte for byte, that of another sample before them."""
    n_excluded: int
    """Lines of samples to leave out."""


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
    """Check shards and write their manifest; shards that it knows and that have not changed are not read again.

    A manifest that is there may grow by new shards. What it knows stays: a run needs the manifest that it began with
    when shards have been damaged since.

    Args:
        shards: what `expand_shards` takes.
        out: folder of the manifest; made if it is missing.
        workers: processes that read; 0 reads in this one.
        tokenizer: a tokenizer.json, to count the captions' tokens.
        exclude: files of samples that training is to leave out, as `Excluded` reads them.
        overwrite: replace what a manifest that is there knows.
        progress: called with (shards checked, shards).

    Raises:
        FileNotFoundError: a shard or file is missing.
        ValueError: an argument is wrong; without `overwrite`, shards that the manifest knows have changed or are gone,
            or others are to be left out than before. Nothing has been written then.
        OSError: something cannot be read or written, or a process was killed.
    """
    if workers < 0:
        raise ValueError(f"workers must be at least 0, got {workers}")
    paths = expand_shards(shards)
    excluded = Excluded.read(exclude)
    bpe = None if tokenizer is None else Tokenizer.load(tokenizer)
    names = short_names(paths)
    records = {path: _record_name(path) for path in paths}
    missing, changed = _not_known(out, records, None if bpe is None else bpe.hash)
    if not overwrite:
        _refuse_to_lose(out, records, changed, excluded)
    (out / RECORDS).mkdir(parents=True, exist_ok=True)
    for n_done, (path, record) in enumerate(_checked(missing, workers, bpe), start=1):
        replace_text(out / RECORDS / records[path], record.to_json())
        if progress is not None:
            progress(len(paths) - len(missing) + n_done, len(paths))
    files = [records[path] for path in paths]
    summary, sizes = _summarise(out, paths, names, files, len(missing), excluded)
    write_lines(out / EXCLUDED, (f"{line}\n" for line in excluded.lines))
    rows = zip(names, (str(path.resolve()) for path in paths), files, sizes, strict=True)
    listed = [dict(zip(("name", "path", "record", "n_samples"), row, strict=True)) for row in rows]
    made = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    text = json.dumps({"format": FORMAT_VERSION, "made": made, "found": vars(summary), "shards": listed}, indent=1)
    replace_text(out / SUMMARY, text + "\n")
    return summary


def _record_name(path: Path) -> str:
    return f"{slug(path.stem, 40)}-{checksum(os.fsencode(path.resolve())):016x}.json"


def _not_known(out: Path, records: Mapping[Path, str], tokenizer: str | None) -> tuple[list[Path], set[Path]]:
    """Return the shards that have to be read, and those of them that were known when they were others."""
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
    """Return a record that is there, None if it cannot be used or is of a shard that could not be read."""
    try:
        record = ShardRecord.from_json((out / RECORDS / name).read_text("utf-8"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        return None
    return None if record.changed_ns == UNREADABLE else record


def _is_of(record: ShardRecord, path: Path) -> bool:
    """Whether a shard has the size and the time of change that it had when it was checked."""
    status = path.stat()
    return (record.index.n_bytes, record.changed_ns) == (status.st_size, status.st_mtime_ns)


def _refuse_to_lose(out: Path, records: Mapping[Path, str], changed: set[Path], excluded: Excluded) -> None:
    """Check that what a manifest that is there knows stays as it is; shards may have been moved.

    Raises:
        ValueError: it would not.
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
        record = None if records[path] == entry.record else _known(out, entry.record)  # of before it was moved
        if path in changed or (record is not None and not _is_of(record, path)):
            lost.append(f"{entry.name} has changed")
    found, added = [path for _, path in matches if path is not None], set(new)
    if found != [path for path in records if path not in added]:
        lost.append("the shards are in another order")
    if sorted(manifest.excluded.lines) != sorted(excluded.lines):
        lost.append(f"{len(excluded.lines):,} samples are to be left out, and {len(manifest.excluded.lines):,} were")
    if lost:
        listed = "; ".join(lost[:_NAMED_IN_REPORT]) + ("; …" if len(lost) > _NAMED_IN_REPORT else "")
        raise ValueError(
            f"the manifest {out} knows other data ({listed}), and a run that began with it needs it to go on exactly: "
            "give another --out, or --overwrite to replace it"
        )
    if new:
        logger.warning("%d shards are new in the manifest: for new runs only, samples get other numbers", len(new))


def _obey_the_parent_alone(parent: int) -> None:
    """Leave Ctrl-C to the parent process, and end when it does, however that is."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_PARENT_LOOK_S)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _check_quietly(path: Path, tokenizer: Tokenizer | None) -> ShardRecord:
    """Check a shard; what the libraries say of its pictures is in the record already."""
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
    pool = ProcessPoolExecutor(
        workers, get_context("fork"), initializer=_obey_the_parent_alone, initargs=(os.getpid(),)
    )
    try:
        while True:
            for path in waiting:
                running[pool.submit(_check_quietly, path, tokenizer)] = path
                if len(running) == 4 * workers:
                    break
            if not running:
                return
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                yield running.pop(future), future.result()
    except BrokenProcessPool:
        raise OSError(
            "a process that checks shards was killed, perhaps for lack of memory: give fewer --workers; the same "
            "command goes on where it was"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _summarise(
    out: Path, paths: Sequence[Path], names: Sequence[str], records: Sequence[str], n_read: int, excluded: Excluded
) -> tuple[Summary, list[int]]:
    """Add up the records, and return how many samples each shard has.

    Writes the lists of samples that cannot be used and of pictures that come twice.

    Raises:
        ValueError: a line of samples to leave out means more than one.
    """
    listed = listed_names(paths)
    counts: Counts = {subject: Counter() for subject in SUBJECTS}
    damaged: list[str] = []
    n_bytes = 0
    hashes: list[NDArray[np.uint64]] = []
    pictures: list[NDArray[np.uint64]] = []

    def unusable() -> Iterator[str]:
        nonlocal n_bytes
        for path, name, listed_name, file in zip(paths, names, listed, records, strict=True):
            record = ShardRecord.from_json((out / RECORDS / file).read_text("utf-8"))
            excluded.rows(record.index, str(path.resolve()))
            assert record.index.checksums is not None
            for subject, found in record.counts.items():
                counts.setdefault(subject, Counter()).update(found)
            n_bytes += record.index.n_bytes
            if record.index.damage is not None:
                damaged.append(f"{name} {record.index.damage}")
            hashes.append(np.array([checksum(_bytes(key)) for key in record.index.keys], dtype=np.uint64))
            pictures.append(np.where(record.index.image[:, 1] > 0, record.index.checksums[:, 0], np.uint64(0)))
            for i, problem in record.problems.items():
                yield sample_line(listed_name, record.index.keys[i], problem)

    write_lines(out / UNUSABLE, unusable())
    starts = np.cumsum([0, *map(len, hashes)])
    again, _ = _repeated(np.concatenate(hashes))
    keys = dict(_keys_at(out, names, records, starts, again[:_NAMED_IN_REPORT]))
    copies, originals = _repeated(np.concatenate(pictures), ignored=0)
    write_lines(out / DUPLICATES, _copy_lines(out, listed, records, starts, copies, originals))
    summary = Summary(
        n_shards=len(paths),
        n_read=n_read,
        n_bytes=n_bytes,
        counts=counts,
        damaged=tuple(damaged),
        n_repeated_keys=len(again),
        repeated_keys=tuple(key for _, key in keys.values()),
        n_repeated_pictures=len(copies),
        n_excluded=len(excluded.lines),
    )
    return summary, [len(found) for found in hashes]


def _bytes(key: str) -> bytes:
    return key.encode("utf-8", "surrogatepass")


def _repeated(values: NDArray[np.uint64], ignored: int | None = None) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return where a value comes again, in order, and where it came first."""
    _, first, inverse = np.unique(values, return_index=True, return_inverse=True)
    originals = first[inverse]
    is_again = originals != np.arange(len(values))
    if ignored is not None:
        is_again &= values != ignored
    again = np.flatnonzero(is_again)
    return again, originals[again]


def _keys_at(
    out: Path, names: Sequence[str], records: Sequence[str], starts: NDArray[np.int64], numbers: Iterable[int]
) -> Iterator[tuple[int, tuple[str, str]]]:
    """Yield (number, (shard, key)) of samples, numbered through all shards, in ascending order."""
    shard, record = -1, None
    for number in sorted({int(number) for number in numbers}):
        found = int(np.searchsorted(starts, number, side="right")) - 1
        if found != shard or record is None:
            shard, record = found, ShardRecord.from_json((out / RECORDS / records[found]).read_text("utf-8"))
        yield number, (names[shard], record.index.keys[number - int(starts[shard])])


def _copy_lines(
    out: Path,
    names: Sequence[str],
    records: Sequence[str],
    starts: NDArray[np.int64],
    copies: NDArray[np.int64],
    originals: NDArray[np.int64],
) -> Iterator[str]:
    """Yield a line for each picture that comes again, which names the sample that has it first."""
    first = dict(_keys_at(out, names, records, starts, originals.tolist()))
    for (_, (shard, key)), original in zip(
        _keys_at(out, names, records, starts, copies.tolist()), originals.tolist(), strict=True
    ):
        original_shard, original_key = first[original]
        yield sample_line(shard, key, f"the same picture as {original_key} in {original_shard}")


# -------------------------------------------------------------------------------------------------------- the report


def report(summary: Summary, out: Path | None) -> str:
    """Return what was found as lines of text, findings with what to do.

    Args:
        summary: what was found.
        out: folder of the manifest, if it is kept.
    """
    samples = summary.counts["samples"]
    rows = [
        ("shards", summary.n_shards, f"{summary.n_bytes / 1e9:,.2f} GB; {summary.n_read:,} of them read now"),
        ("samples", samples["keys"], ""),
        ("pictures with a caption", samples["pairs"], ""),
    ]
    width = max(len(name) for name, _, _ in rows)
    lines = [f"{name:<{width}}  {count:>13,}  {note}".rstrip() for name, count, note in rows]
    for subject in ("caption characters", "caption words", "caption tokens"):
        if summary.counts[subject]:
            lines.append(f"{subject}: {_quantiles(summary.counts[subject])}")
    for subject in ("shorter side", "aspect ratio"):
        if summary.counts[subject]:
            lines.append(f"{subject}: {_shares(summary.counts[subject], subject)}")
    found = _findings(summary, out)
    lines += ["", "found:" if found else "nothing is wrong", *(f"  {line}" for line in found)]
    if out is not None:
        lines += ["", f"the manifest is {out}: give it to the training commands as --manifest {out}"]
    return "\n".join(lines)


def _quantiles(lengths: Counter[str]) -> str:
    values = sorted((int(length), count) for length, count in lengths.items())
    total = sum(count for _, count in values)
    ends = np.cumsum([count for _, count in values])
    shown = [("least", 0.0), ("5%", 0.05), ("median", 0.5), ("95%", 0.95), ("most", 1.0)]
    at = [
        values[min(int(np.searchsorted(ends, max(1, math.ceil(share * total)))), len(values) - 1)] for _, share in shown
    ]
    return ", ".join(f"{name} {value}" for (name, _), (value, _) in zip(shown, at, strict=True))


def _shares(found: Counter[str], subject: str) -> str:
    order = [name for _, name in ASPECT_RATIOS] if subject == "aspect ratio" else sorted(found, key=_first_number)
    names = [name for name in [*order, "above 4"] if found[name]]
    return ", ".join(f"{name}: {found[name]:,} ({found[name] / found.total():.1%})" for name in names)


def _first_number(name: str) -> int:
    return int(name.split()[0])


def _findings(summary: Summary, out: Path | None) -> list[str]:
    """Return a line for each kind of thing that is wrong."""
    samples, found = summary.counts["samples"], []

    def list_of(name: str) -> str:
        return f" ({out / name} lists them)" if out is not None else ""

    for shard in summary.damaged[:_NAMED_IN_REPORT]:
        found.append(f"damaged: {' '.join(shard.split())}; copy or make it again, or train with --skip-damaged-shards")
    if len(summary.damaged) > _NAMED_IN_REPORT:
        found.append(f"damaged: {len(summary.damaged) - _NAMED_IN_REPORT:,} more shards")
    for subject, what in (("unusable pictures", "picture"), ("unusable captions", "caption")):
        for problem, count in summary.counts[subject].most_common():
            found.append(f"{count:,} × {what} {problem}{list_of(UNUSABLE)}")
    if summary.counts["unusable pictures"]:
        share = summary.counts["unusable pictures"].total() / max(1, samples["keys"])
        found.append(f"{share:.2%} of the pictures cannot be used: training replaces them, up to --max-bad-fraction")
    for name in ("pictures without a caption", "captions without a picture"):
        if samples[name]:
            found.append(f"{samples[name]:,} {name}{list_of(UNUSABLE)}: left out where captions are needed")
    if samples["members that come twice"]:
        found.append(f"{samples['members that come twice']:,} members that their sample has already: the first counts")
    if samples["links, devices and unsafe names"]:
        found.append(f"{samples['links, devices and unsafe names']:,} links, devices and unsafe names: never looked at")
    if summary.n_repeated_keys:
        keys = ", ".join(map(repr, summary.repeated_keys))
        found.append(
            f"{summary.n_repeated_keys:,} keys that another shard has too, such as {keys}: they draw the same crops; "
            "rename them, or leave the copies out"
        )
    if summary.n_repeated_pictures:
        found.append(
            f"{summary.n_repeated_pictures:,} pictures that come again byte for byte{list_of(DUPLICATES)}: to "
            "leave them out, give that list to --exclude-keys, with --overwrite"
        )
    elongated = sum(summary.counts["aspect ratio"][name] for name in ("below 1/4", "1/4 to 1/2", "2 to 4", "above 4"))
    if elongated:
        found.append(
            f"{elongated:,} pictures outside 1/2 … 2, of which a square crop shows little; the paper drops them"
        )
    if summary.n_excluded:
        found.append(f"{summary.n_excluded:,} lines of samples to leave out are kept")
    return found
