"""Data at the paper's scale, simulated: 25,000 shards of 10,000 samples, 1 to 1,024 ranks.

The shards are sparse files of the right sizes, their samples are zeros; the manifest and its records are real. Measured
are the memory of a rank, the time to its first batch, at the start and at step 300,000, with a shard lost, and the time
of the order; counted are the bytes that the ranks of a host read, and how well windows mix.
"""

import dataclasses
import json
import math
import os
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
import torch

from benchmarks import measure
from benchmarks.measure import Options, PeakMemory, Report
from dalle.data import index_file
from dalle.data.index import ShardIndex, checksum
from dalle.data.index_file import read_header
from dalle.data.order import Order, Shuffle
from dalle.data.reader import ShardData
from training.data.batches import Share, batches
from training.data.manifest import RECORDS, Entry, Manifest, open_with_manifest, write_summary
from training.data.record import ShardRecord

SHARDS, PER_SHARD = 25_000, 10_000
PICTURE, CAPTION = 40_960, 512
"""Bytes of a picture and a caption in the tar; a header of 512 before each."""
SAMPLE = PICTURE + CAPTION + 2 * 512
BATCH, HOST = 1024, 8
"""Samples of a step, and ranks of a host."""
RANKS = (1, 8, 64, 512, 1024)
RESUMED_AT = 300_000


class Found(NamedTuple):
    """What a rank of its own process measured."""

    open_s: float
    first_s: float
    """From nothing to the first batch, `open_s` included."""
    memory: int
    """Bytes, at most, above those of the imports."""
    n_samples: int
    n_bad: int


def make(folder: Path, n_shards: int) -> tuple[Path, Path]:
    """Make the set of shards and its manifest; all records are one file."""
    shards, manifest = folder / "shards", folder / "manifest"
    (manifest / RECORDS).mkdir(parents=True)
    shards.mkdir()
    size = PER_SHARD * SAMPLE + 1024
    places = np.zeros((PER_SHARD, 3, 2), dtype=np.int64)
    starts = np.arange(PER_SHARD) * SAMPLE
    places[:, 0, 0], places[:, 0, 1] = starts + 512, PICTURE
    places[:, 1, 0], places[:, 1, 1] = starts + 1024 + PICTURE, CAPTION
    sums = [checksum(bytes(PICTURE)), checksum(bytes(CAPTION)), 0]
    index = ShardIndex(
        path=shards / "000000.tar",
        n_bytes=size,
        tokens=None,
        keys=[f"{i:09}" for i in range(PER_SHARD)],
        image_names=[f"{i:09}.jpg" for i in range(PER_SHARD)],
        places=places,
        n_ignored=0,
        n_duplicates=0,
        damage=None,
        has_caption=np.ones(PER_SHARD, dtype=bool),
        checksums=np.tile(np.array(sums, dtype=np.uint64), (PER_SHARD, 1)),
    )
    record = ShardRecord(index=index, changed_ns=0, problems={}, counts={}, tokenizer=None)
    record.save(manifest / RECORDS / "000000.index")
    first = Entry.of("000000.tar", index.path, "000000.index", record)
    entries = []
    for number in range(n_shards):
        name, path = f"{number:06}", shards / f"{number:06}.tar"
        path.touch()
        os.truncate(path, size)
        os.utime(path, ns=(0, 0))
        if number:
            os.link(manifest / RECORDS / "000000.index", manifest / RECORDS / f"{name}.index")
        entries.append({**first.to_json(), "name": path.name, "path": str(path), "record": f"{name}.index"})
    write_summary(manifest, entries, {})
    return shards, manifest


def keep_indexes(shards: Path) -> None:
    """Make the index file beside each shard, of which only the header is right: a start reads no more."""
    first = shards / "000000.tar"
    index = dataclasses.replace(
        ShardRecord.load(shards.parent / "manifest" / RECORDS / "000000.index").index, path=first
    )
    path = first.with_name(first.name + index_file.ENDING)
    path.write_bytes(index_file.index_bytes(index, 0, {}))
    header = read_header(path)
    size, text = path.stat().st_size, json.dumps(header.record, separators=(",", ":"))
    for shard in shards.glob("*.tar"):
        named = text.replace(first.name, shard.name).encode()
        other = shard.with_name(shard.name + index_file.ENDING)
        other.write_bytes(index_file.with_prefix(named))
        os.truncate(other, size)


def rank(shards: Path, manifest: Path, ranks: int, batch: int, step: int, n: int) -> Found:
    """Read n samples as the first rank of some does, from a step on; in a process of its own."""
    memory, started = PeakMemory(), time.perf_counter()
    data = open_with_manifest([shards], Manifest.open(manifest), captions=False)
    open_s = time.perf_counter() - started
    micro = min(16, batch // ranks)
    share = Share(
        seed=0,
        micro_batch=micro,
        accumulation=batch // (ranks * micro),
        world_size=ranks,
        start_step=step,
    )
    shuffle = Shuffle.of(data.counts, batch)
    stream = batches(data, lambda sample, _: {"x": torch.tensor(len(sample.image_bytes))}, share, shuffle=shuffle)
    n_samples = n_bad = 0
    first_s = 0.0
    while n_samples < n:
        read = next(stream)
        first_s = first_s or time.perf_counter() - started
        n_samples += len(read.numbers)
        n_bad += read.n_bad
    return Found(open_s, first_s, memory.bytes(), n_samples, n_bad)


def apart(shards: Path, manifest: Path, ranks: int, *, batch: int = BATCH, step: int = 0, n: int) -> Found:
    """Return what `rank` finds in a new process."""
    measure.say(f"scale: rank 0 of {ranks:,} from step {step:,}")
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(rank, shards, manifest, ranks, batch, step, n).result()


def ranks(options: Options, report: Report) -> None:
    """Memory and times of a rank."""
    n_shards, n = (250, 400) if options.quick else (SHARDS, 20_000)
    rows: list[list[measure.Cell]] = []
    found: list[Found] = []
    with tempfile.TemporaryDirectory() as temporary:
        shards, manifest = make(Path(temporary), n_shards)
        cases = [(f"{ranks:,} ranks", ranks, BATCH, 0) for ranks in RANKS]
        cases += [(f"{ranks:,} ranks, resumed at step {RESUMED_AT:,}", ranks, BATCH, RESUMED_AT) for ranks in (1, 1024)]
        cases += [(f"1,016 ranks after 1,023, at step {RESUMED_AT:,}", 1016, 1016, RESUMED_AT)]
        for name, ranks, batch, step in cases:
            found.append(apart(shards, manifest, ranks, batch=batch, step=step, n=n))
            rows.append([name, *_cells(found[-1])])
        keep_indexes(shards)
        measure.say("scale: without a manifest")
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            opened = pool.submit(start, shards).result()
        rows.append(["without a manifest, indexes beside the shards", opened.memory / 1e6, opened.open_s, None, 0, 0])
        counts = [PER_SHARD] * n_shards
        lost = Order(counts, 0, Shuffle.of(counts, BATCH)).shards_ahead([0], 1)[0]
        (shards / f"{lost:06}.tar").unlink()
        found.append(apart(shards, manifest, 8, n=n))
        rows.append(["8 ranks, a shard lost", *_cells(found[-1])])
    columns = ["", "MB of a rank", "s to open", "s to the first batch", "samples read", "of them replaced"]
    report.table(f"A rank of {n_shards * PER_SHARD:,} samples in {n_shards:,} shards", columns, rows)
    report.samples["ranks"] = [one._asdict() for one in found]
    report.line("memory of a rank", "the limit", max(one.memory for one in found) / 1e6, 200, at_most=True, unit=" MB")
    report.line("time to the first batch", "the limit", max(one.first_s for one in found), 10, at_most=True, unit=" s")


def start(shards: Path) -> Found:
    """Open the shards by the headers of their indexes; in a process of its own."""
    memory, started = PeakMemory(), time.perf_counter()
    ShardData.open([shards], captions=False)
    return Found(time.perf_counter() - started, 0.0, memory.bytes(), 0, 0)


def _cells(found: Found) -> list[measure.Cell]:
    return [found.memory / 1e6, found.open_s, found.first_s, found.n_samples, found.n_bad]


def order(options: Options, report: Report) -> None:
    """Time of the order, by ranks: while all windows are made, and after that."""
    rows: list[list[measure.Cell]] = []
    counts = [PER_SHARD] * SHARDS
    for ranks in RANKS:
        times: list[list[float]] = [[], []]
        for _ in range(options.n(3)):
            made = Order(counts, 0, Shuffle.of(counts, BATCH))
            per_rank = BATCH // ranks
            n_steps = max(1, (2_000 if options.quick else 100_000) // per_rank)
            for first, found in zip((RESUMED_AT, RESUMED_AT + n_steps), times, strict=True):
                started = time.process_time()
                for step in range(first, first + n_steps):
                    for position in range(step * BATCH, step * BATCH + per_rank):
                        made.number(position)
                found.append((time.process_time() - started) / (n_steps * per_rank) * 1e6)
        rows.append([f"{ranks:,} ranks", *map(median, times)])
    report.table("The order from step 300,000 on, µs a sample", ["", "the first 100,000 samples", "then"], rows)
    report.line("order", "the limit", max(float(row[1] or 0) for row in rows), 20, at_most=True, unit=" µs a sample")


def reading(options: Options, report: Report) -> None:
    """Bytes that the ranks of a host read in an epoch, and how much of it in sequence."""
    rows: list[list[measure.Cell]] = []
    counts = [PER_SHARD] * SHARDS
    n_steps = SHARDS * PER_SHARD // BATCH
    shares = []
    for ranks, streams in ((8, 64), (64, 64), (512, 64), (1024, 64), (1024, 128)):
        made = Order(counts, 0, Shuffle.of(counts, BATCH, streams=streams))
        per_rank = BATCH // ranks
        places = range(min(ranks, HOST) * per_rank)
        read: set[int] = set()
        first = {shard for place in places for shard in made.shards_ahead([place], 1)}
        for step in range(0, n_steps, 2_000 if options.quick else 100):
            for place in places[:: max(1, len(places) // 64)]:
                read.update(made.shards_ahead([step * BATCH + place], 1))
        used = n_steps * len(places) / PER_SHARD
        share = 1 - len(first) / len(read)
        shares.append(share)
        rows.append([f"{ranks:,} ranks, {streams} streams", len(read), len(read) / used, len(first), share])
    columns = ["a host of 8", "shards read", "bytes read ÷ used", "not ahead", "in sequence"]
    report.table("Reading in an epoch, each shard of a window whole", columns, rows)
    report.line("reading in sequence", "all reading", min(shares), 0.95, unit=" of it")


def mixing(options: Options, report: Report) -> None:
    """How well windows mix, against the full shuffle: far moves, shards in a batch, and noise of what shards share."""
    rows: list[list[measure.Cell]] = []
    n_shards, per_shard = 2_000, 1_000
    n, counts = n_shards * per_shard, [per_shard] * n_shards
    shared = np.random.default_rng(0).normal(size=n_shards)
    for window, streams in ((0, 1), (1, 1), (8, 1), (8, 8), (8, 64), (32, 16), (64, 64)):
        made = Order(counts, 0, Shuffle(window=window, streams=streams, batch=BATCH))
        steps = np.linspace(0, n // BATCH - 2, 20 if options.quick else 200).astype(int).tolist()
        numbers = np.array([[made.number(step * BATCH + i) for i in range(2 * BATCH)] for step in steps])
        shards = numbers // per_shard
        places = np.array(steps)[:, None] * BATCH + np.arange(2 * BATCH)
        values = shared[shards]
        means = values.reshape(len(steps), 2, BATCH).mean(axis=2)
        expected = math.sqrt(1 / BATCH)
        rows.append(
            [
                "all" if window == 0 else f"{window} shards, {streams} streams",
                float(np.abs(numbers - places).mean() / n),
                float(np.mean([len(set(row[:BATCH])) for row in shards.tolist()])),
                float((shards[:, 1:] == shards[:, :-1]).mean()),
                float(means.std() / expected),
                float(np.corrcoef(means.T)[0, 1]),
            ]
        )
    columns = [
        "window",
        "moves by, of all",
        "shards in a batch",
        "neighbours of one shard",
        "noise of a batch's mean ÷ chance",
        "correlation with the next batch",
    ]
    report.table(f"Mixing of {n:,} samples in {n_shards:,} shards, batches of {BATCH:,}", columns, rows)
    report.notes.append("mixing: what all samples of a shard share, and no other shard's; the worst case")


if __name__ == "__main__":
    measure.main("scale", __doc__, {"ranks": ranks, "order": order, "reading": reading, "mixing": mixing})
