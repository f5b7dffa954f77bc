"""The data and the folders that every stage is given, and which samples a run was trained on."""

import itertools
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from dalle.data.names import expand_shards
from dalle.data.reader import Sample, ShardData
from storage.stores.errors import StoreError
from storage.stores.files import lasting_name, use_cache
from training.data.manifest import Manifest, open_with_manifest
from training.loop.run_folder import RunSpec, refuse_another_run
from training.ranks.ranks import Ranks, on_first_rank
from training.run_files import CHECKPOINTS, read_data, write_data

logger = logging.getLogger(__name__)
Read = TypeVar("Read")

RUNS, ENCODED = "training", "encoded"
"""Folders of a bundle: the runs behind it, and image tokens for its transformer."""


@dataclass(frozen=True, kw_only=True)
class BundleOptions:
    """Shards to train on, and the bundle to make."""

    data: Sequence[str | Path]
    """Shards to train on: files, folders, globs or brace ranges such as shards/{000000..000099}.tar, also in stores:
    s3://bucket/train/."""
    out: Path
    """Directory of the bundle: tokenizer.json, dvae/, dalle/ and clip/ for use, training/ with the runs behind them."""
    fresh: bool = False
    """Start anew, over what is there; without it, a run resumes from its newest checkpoint."""


@dataclass(frozen=True, kw_only=True)
class CacheOptions:
    """Where copies of shards that are in object stores are kept."""

    cache: Path | None = None
    """Folder on a local disk, which the ranks of a host share, for copies of shards in stores (s3://, https:// …); by
    default $DALLE_CACHE/shards, or ~/.cache/dalle/shards."""
    cache_gb: float | None = None
    """Size of all copies together, in GB; those unused for longest are deleted. By default half of what is free."""

    def use_cache(self) -> None:
        """Keep copies as the options say from now on; raises ValueError for an impossible size."""
        use_cache(self.cache, self.cache_gb)


@dataclass(frozen=True, kw_only=True)
class ShardOptions(CacheOptions):
    """How to read shards that have changed or are damaged."""

    manifest: Path | None = None
    """Folder that `dalle-train check-data --out` wrote about the shards of --data. With it, samples that shards have
    lost and bytes that have changed are noticed, and the order of all other samples stays."""
    skip_damaged_shards: bool = False
    """Use the whole samples of truncated shards instead of stopping."""


@dataclass(frozen=True, kw_only=True)
class ValidationShardOptions:
    """Shards to validate on."""

    validation: Sequence[str | Path] = ()
    """Shards to validate on."""
    validation_manifest: Path | None = None
    """Folder that `dalle-train check-data --out` wrote about the shards of --validation."""


@dataclass(frozen=True, kw_only=True)
class ResumeOptions:
    """The checkpoint to resume from."""

    resume: bool = False
    """Stop unless there is a checkpoint to resume from; without this option, a run that has none begins."""
    resume_from: str | None = None
    """Checkpoint to go back to, such as step00000500; by default the newest. Later ones are deleted when the run saves
    again."""


@dataclass(frozen=True, kw_only=True)
class Inputs(BundleOptions, ShardOptions, ValidationShardOptions, ResumeOptions):
    """What every stage is given."""

    def __post_init__(self) -> None:
        if self.fresh and (self.resume or self.resume_from is not None):
            raise ValueError("--fresh starts anew, --resume and --resume-from do not: give one of them")

    def open(self, *, captions: bool, encoded: bool = False) -> tuple[ShardData, ShardData | None]:
        """Return the training and the validation data.

        Args:
            captions: whether samples need captions.
            encoded: whether image tokens will do in place of pictures.

        Raises:
            FileNotFoundError: there are no shards.
            ValueError: a shard is damaged, has nothing usable in it, or has image tokens in place of pictures; a
                manifest cannot be used.
        """
        train = self._open(self.data, self.manifest, captions=captions, encoded=encoded)
        return train, self.open_validation(captions=captions, encoded=encoded) if self.validation else None

    def open_validation(self, *, captions: bool, encoded: bool = False) -> ShardData:
        """Return the validation data; arguments and errors as those of `open`."""
        return self._open(self.validation, self.validation_manifest, captions=captions, encoded=encoded)

    def _open(
        self, patterns: Sequence[str | Path], manifest: Path | None, *, captions: bool, encoded: bool
    ) -> ShardData:
        self.use_cache()
        patterns = without_made_here(patterns)
        if manifest is not None:
            known = Manifest.open(manifest)
            return open_with_manifest(patterns, known, captions=captions, encoded=encoded)
        return ShardData.open(patterns, captions=captions, encoded=encoded, skip_damaged=self.skip_damaged_shards)

    def run_directory(self, stage: str) -> Path:
        """Return the folder of a stage's run."""
        return self.out / RUNS / stage


def first_readable(
    data: ShardData, count: int, read: Callable[[Sample], Read], *, start: int = 0
) -> list[tuple[Sample, Read]]:
    """Return the readable ones of `count` samples of some data from `start` on, each with what `read` makes of it."""
    found = []
    for index in range(start, min(start + count, len(data))):
        try:
            sample = data.read(index)
            found.append((sample, read(sample)))
        except (ValueError, OSError):
            continue
    return found


def without_made_here(patterns: Sequence[str | Path], out: Path | None = None) -> Sequence[str | Path]:
    """Return shards without those that `dalle-train` made itself below a folder among them: a bundle's image tokens.

    Shards that are named, or whose own folder is, are kept. A warning counts the others.

    Args:
        patterns: what `expand_shards` takes; errors as its.
        out: a folder that is written to, whose shards are left out too.
    """
    kept: list[str | Path] = []
    for pattern in [patterns] if isinstance(patterns, str | Path) else patterns:
        folder = Path(pattern)
        shards = expand_shards([folder], skip_missing=True) if folder.is_dir() else []
        others = [shard for shard in shards if not _is_made_here(shard, folder, out)]
        if others and len(others) < len(shards):
            n_own = len(shards) - len(others)
            logger.warning("left out of %s: %d shards of image tokens that were made here", folder, n_own)
        kept += others if len(others) < len(shards) and others else [pattern]
    return kept


def _is_made_here(shard: Path, below: Path, out: Path | None) -> bool:
    between = itertools.takewhile(lambda folder: folder != below, shard.parents)
    return any(
        (folder.name == ENCODED and (folder.parent / RUNS).is_dir())
        or (out is not None and folder.resolve() == out.resolve())
        for folder in between
    )


def forget_runs(out: Path) -> None:
    """Delete the checkpoints of all stages and the image tokens, so that nothing resumes from them."""
    for made in (*(out / RUNS).glob(f"*/{CHECKPOINTS}"), *out.glob(ENCODED)):
        shutil.rmtree(made)


def all_captions(data: ShardData) -> Iterator[str]:
    """Yield every caption that can be read; training counts the other samples as bad ones."""
    for index in itertools.filterfalse(data.is_lost, range(len(data))):
        try:
            yield from data.captions(index)
        except StoreError:
            raise
        except (ValueError, OSError) as error:
            logger.warning("a caption is left out of the vocabulary: %s", error)


def note_data(spec: RunSpec, data: ShardData, validation: ShardData | None, ranks: Ranks) -> None:
    """Write down which samples a run is trained and validated on; warn if a resumed run has others. Collective.

    Sample order depends on the number of samples and the order of shards. Shards may be moved.
    """
    refuse_another_run(spec)

    def note() -> None:
        counts = dict(zip(map(lasting_name, data.shards), data.counts, strict=True))
        now = {"samples": len(data), "shards": counts, "order": _order_of(data)}
        now["validation"] = None if validation is None else _order_of(validation)
        before = read_data(spec.directory) if spec.has_run else None
        if before is not None:
            _warn_of_another_order(before, now)
            # version 0.1 did not write it
            if before.get("validation") and validation is not None and before["validation"] != now["validation"]:
                logger.warning(
                    "the resumed run is validated on other samples than before: its validation losses cannot be "
                    "compared with those up to now"
                )
        spec.directory.mkdir(parents=True, exist_ok=True)
        write_data(spec.directory, now)

    on_first_rank(note, ranks)


def _order_of(data: ShardData) -> list[list[str]]:
    """Return the name and the fingerprint of each shard."""
    return [[shard.name, data.fingerprint(number)] for number, shard in enumerate(data.shards)]


def _warn_of_another_order(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    if before["samples"] == now["samples"]:
        shards = zip(before.get("order", now["order"]), now["order"], strict=False)  # version 0.1 did not write it
        others = [(old[0], new[0]) for old, new in shards if old != new]
        if others:
            logger.warning(
                "the resumed run has as many samples as it began with, but other shards, or in another order (%s is in "
                "the place of %s): from here on it may see other samples than it would have seen; give the shards it "
                "began with, in their order",
                *reversed(others[0]),
            )
        return
    changed = [
        f"{shard}: {count:,} samples, now {now['shards'].get(shard, 0):,}"
        for shard, count in before["shards"].items()
        if count != now["shards"].get(shard, 0)
    ]
    logger.warning(
        "the run began with %d samples, and resumes with %d (%s): from here on their order is another; with a manifest "
        "of the shards as they were (--manifest), lost samples keep their places",
        before["samples"],
        now["samples"],
        "; ".join(changed[:5]) or "there are more shards",
    )
