"""Computes the bytes of a run's checkpoints and exports, and how long it takes to write, check and convert them.

Bytes are those of DeepSpeed's files and of ours beside them (engine/engine.py), held to real files by
tests/training/test_checkpoint_costs.py. Seconds are of work done one after the other: a process packs its tensors, the
disk takes them, the process reads them back and digests them. All ranks share the disk. benchmarks/costs.py has them
beside real ones.
"""

import hashlib
import io
import math
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from storage.disk import nearest_folder
from training.config import TrainConfig
from training.plan.activations import FLOAT, widths
from training.plan.state import Mode

GB = 1e9
"""Bytes, as disks are sold."""
_MEASURED = 128 << 20
"""Bytes that are written to measure a disk."""


@dataclass(frozen=True, kw_only=True)
class Speeds:
    """Bytes a second."""

    write: float = 2 * GB
    """That the disk takes, from all ranks together."""
    read: float = 2 * GB
    """That the disk gives, to all ranks together."""
    pack: float = 1 * GB
    """That a process turns into files, or files into tensors."""
    digest: float = 0.75 * GB
    """That a process reads back and digests."""
    source: Literal["assumed", "measured", "given"] = "assumed"
    """Of the disk's speeds."""


def measured_speeds(folder: Path) -> Speeds:
    """Measure the disk of a folder, or of the nearest one above it that exists, and this processor; takes seconds.

    Raises:
        OSError: nothing can be written there.
    """
    there = nearest_folder(folder)
    content = bytearray(os.urandom(1 << 20)) * (_MEASURED >> 20)
    tensor = torch.frombuffer(content, dtype=torch.uint8)
    pack_s = _seconds(lambda: torch.save(tensor, io.BytesIO()))
    digest_s = _seconds(lambda: hashlib.blake2b(content).digest())
    with tempfile.TemporaryFile(dir=there) as file:

        def write() -> None:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())

        write_s = _seconds(write)
        if hasattr(os, "posix_fadvise"):  # so that the disk is read, not what is left of it in memory
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        read_s = _seconds(file.read)
    return Speeds(
        write=_MEASURED / write_s,
        read=_MEASURED / read_s,
        pack=_MEASURED / pack_s,
        digest=_MEASURED / digest_s,
        source="measured",
    )


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


@dataclass(frozen=True, kw_only=True)
class Saved:
    """Numbers of a model's parameters, by what a checkpoint holds of them."""

    total: int
    by_muon: int = 0
    """That have one moment in place of two."""
    compressed: int = 0
    """Of matrices for which every rank keeps what PowerSGD has not sent yet."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """One checkpoint and one export: bytes, and seconds."""

    first: float
    """Of the first rank, which below stage 3 writes the averaged weights and the weights, too."""
    other: float
    """Of each other rank, if there is one."""
    total: float
    """Of all ranks."""
    export: float
    """Of the model for use, in float32, which the first rank writes."""
    converted: float
    """That a conversion to another number of ranks adds for a while; 0 at stage 0, which needs none."""
    kept: float
    """Of all that a run keeps on the disk at its fullest: checkpoints, the one being written, the export twice."""
    save_s: float
    """From the first byte until it is read back, digested and named."""
    verify_s: float
    """To digest it before a run resumes from it."""
    export_s: float
    convert_s: float
    """By as many ranks as saved it, together."""


def checkpoint_of(saved: Saved, mode: Mode, ranks: int, train: TrainConfig, speeds: Speeds) -> Checkpoint:
    """Return what the checkpoints of a run take.

    Args:
        saved: the model.
        mode: stage and precision.
        ranks: that save.
        train: how often, and how many are kept.
        speeds: of disk and processes.
    """
    n, stage = float(saved.total), mode.zero_stage
    moments, averages = 2 * FLOAT * n - FLOAT * saved.by_muon, FLOAT * n
    weights = widths(mode.precision).weight
    if stage == 0:
        own, of_first = 0.0, weights * n + moments
    else:
        own = (FLOAT * n + moments) / ranks
        of_first = 0.0 if stage == 3 else weights * n
    own += FLOAT * saved.compressed
    if stage == 3:
        own, averages_of_first = own + averages / ranks, 0.0
    else:
        averages_of_first = averages
    first = own + of_first + averages_of_first
    total = first + (ranks - 1) * own
    # what DeepSpeed copies as it is: the weights; at stage 3 all of the first rank's share of the optimizer
    copied = weights * n if stage < 3 else (FLOAT * n + moments) / ranks
    # pieces of float32 weights and both moments, these joined, and the copies
    converted = 2 * 3 * FLOAT * n + copied if stage else 0.0
    export = FLOAT * n
    return Checkpoint(
        first=first,
        other=own if ranks > 1 else 0.0,
        total=total,
        export=export,
        converted=converted,
        kept=_n_kept(train) * total + 2 * export,
        save_s=total / speeds.write + first * (1 / speeds.pack + 1 / speeds.digest),
        verify_s=total / speeds.read + max(total / ranks, of_first, averages_of_first) / speeds.digest,
        export_s=export * (1 / speeds.write + 1 / speeds.pack + 1 / speeds.digest),
        convert_s=converted * (1 / speeds.write + 2 / speeds.pack / ranks) + converted / 2 / speeds.read,
    )


def _n_kept(train: TrainConfig) -> int:
    """Return the most checkpoints at once: the newest, those kept for good, and one that is being written."""
    n_saved = math.ceil(train.steps / train.checkpoint_every)
    every = math.lcm(train.checkpoint_every, train.keep_every) if train.keep_every else 0
    return min(n_saved, train.keep_last + 1 + (train.steps // every if every else 0))
