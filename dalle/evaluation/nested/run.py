"""One run from captions to joined measurements: shards are sampled by any number of processes, and joined from files.

Letters: R captions  M candidates of each  J values of N  K kept candidates  I image positions
"""

import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dalle.budget import check_batch_size
from dalle.evaluation.nested.captions import Row, list_hash
from dalle.evaluation.nested.sample import Looks, sample_rows
from dalle.evaluation.nested.settings import NestedSettings
from dalle.evaluation.nested.shards import ShardFolder, is_first_process
from dalle.output.progress import part_of, progress_bar
from dalle.output.text import GIB, Say, counted, duration
from dalle.pipeline import Pipeline

SMALL = ("rows", "scores", "log_likelihoods", "judged", "right", "kept", "caption_features")
"""Tensors of a shard that are held for all captions at once; the others are read when they are needed."""


@dataclass(frozen=True, kw_only=True)
class Nested:
    """All that a run has measured, captions in the order of their numbers."""

    rows: list[Row]
    settings: NestedSettings
    folder: ShardFolder
    scores: Tensor
    """float32 (R,M): the cosines of the CLIP that ranks."""
    log_likelihoods: Tensor
    """float32 (R,M), nats."""
    judged: Tensor | None
    """float32 (R,M): the cosines of the judge; None without one."""
    right: Tensor | None
    """bool (R,M): whether the checker accepts each candidate; None without one."""
    kept: Tensor
    """int32 (R,K): see `sample_rows`."""
    caption_features: Tensor
    """float32 (R,E): of the CLIP that judges."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Of each stage, of all processes together."""
    places: Tensor | None = None
    """int64 (R,): of these captions among those of the shards; None for all."""

    def read(self, name: str, column: int | None = None) -> Tensor:
        """Return a tensor of all captions, such as "features", from the shards.

        Args:
            name: of the tensor.
            column: along its second axis, such as the place of one N, which alone is read; None for all. All features
                of 30,000 captions and ten N are gigabytes.
        """
        shards = range(self.folder.n_shards)
        read = torch.cat([self.folder.read(number, [name], column)[0][name] for number in shards])
        return read if self.places is None else read[self.places]

    def only(self, keep: Tensor) -> "Nested":
        """Return the measurements of the captions where bool (R,) `keep` is True."""
        found: dict[str, Any] = {
            name: None if (value := getattr(self, name)) is None else value[keep] for name in SMALL[1:]
        }
        places = keep.nonzero()[:, 0]
        return replace(self, rows=[self.rows[place] for place in places.tolist()], places=places, **found)


def run_nested(
    pipe: Pipeline,
    rows: Sequence[Row],
    settings: NestedSettings,
    looks: Looks,
    out: Path,
    say: Say,
    *,
    measured: Mapping[str, Any] | None = None,
    fresh: bool = False,
) -> Nested | None:
    """Sample and measure what is not there yet, and join it.

    Args:
        pipe: the bundle.
        rows: the captions, in the order of their numbers.
        settings: what to sample.
        looks: what looks at the candidates.
        out: the folder of the shards.
        say: told what is there, and what is left.
        measured: what looks at the candidates, in words and hashes, as a part of the run's key.
        fresh: forget what is there.

    Returns:
        All measurements in the first process; None in the others of a launcher, once nothing is left to take.

    Raises:
        ValueError: another run is in the folder, or a shard of it is damaged.
        OSError: the folder cannot be written to.
    """
    check_batch_size(settings.batch_size)
    shards = [rows[first : first + settings.shard_rows] for first in range(0, len(rows), settings.shard_rows)]
    identity = settings.identity(list_hash(rows), pipe.hashes, measured or {})
    n_in_shard = min(len(rows), settings.shard_rows)
    guided = settings.sampling.is_guided
    batch_size = settings.batch_size or pipe.default_batch_size(settings.m, n_captions=n_in_shard, guided=guided)
    folder = ShardFolder(out, identity, len(shards), batch_size=batch_size, fresh=fresh)
    if settings.batch_size not in (None, folder.batch_size):
        raise ValueError(
            f"--batch-size is {settings.batch_size}, but the run in {out} began with {folder.batch_size}, and "
            "another size changes last digits: leave --batch-size out, or give --fresh to begin anew there"
        )
    n_there = len(shards) - len(folder.missing())
    if n_there and is_first_process():
        say(f"{n_there} of {counted(len(shards), 'shard')} are there from an earlier start: the run goes on from them")
    _measure_missing(pipe, shards, settings, looks, folder, say)
    return _joined(rows, shards, settings, folder) if is_first_process() else None


def _measure_missing(
    pipe: Pipeline,
    shards: Sequence[Sequence[Row]],
    settings: NestedSettings,
    looks: Looks,
    folder: ShardFolder,
    say: Say,
) -> None:
    """Measure the shards that this process can claim; in the first process, until all are there."""
    total = sum(len(some) for some in shards) * settings.m
    is_first_shard = True
    shown = progress_bar("candidates") if is_first_process() else nullcontext(lambda done, total: None)
    with shown as progress:
        for number in folder.unclaimed(wait=is_first_process()):
            left = sum(len(shards[missing]) for missing in folder.missing())
            begun = time.perf_counter()
            told = part_of(progress, total - left * settings.m, total)
            tensors, seconds = sample_rows(
                pipe, shards[number], settings, looks, batch_size=folder.batch_size, progress=told
            )
            folder.write(number, tensors, {"seconds": seconds})
            left -= len(shards[number])
            if is_first_shard and left:
                per_row = (time.perf_counter() - begun) / len(shards[number])
                size = folder.path(number).stat().st_size / len(shards[number]) * sum(map(len, shards))
                say(
                    f"first shard: {per_row:.3g} s a caption, so {counted(left, 'caption')} take "
                    f"{duration(per_row * left)} by one process; {size / GIB:.2f} GiB of shards in all"
                )
            is_first_shard = False


def _joined(
    rows: Sequence[Row], shards: Sequence[Sequence[Row]], settings: NestedSettings, folder: ShardFolder
) -> Nested:
    """Return what all shards hold.

    Raises:
        ValueError: a shard is damaged, or of another run.
    """
    parts, seconds = [], dict[str, float]()
    for number, some in enumerate(shards):
        tensors, about = folder.read(number, SMALL)
        if tensors["rows"].tolist() != [row.number for row in some]:
            raise ValueError(f"{folder.path(number)} holds other captions: delete it, and run the same command again")
        parts.append(tensors)
        for stage, took_s in about["seconds"].items():
            seconds[stage] = seconds.get(stage, 0.0) + took_s
    joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0] if name != "rows"}
    found: dict[str, Any] = {name: joined.get(name) for name in SMALL[1:]}
    return Nested(rows=list(rows), settings=settings, folder=folder, seconds=seconds, **found)
