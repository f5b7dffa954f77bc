"""One shard of many, known by its counts: found at the start of a run, its index read when one of its samples is.

The counts come from the index that is kept of it, or, at first sight, from its headers and captions.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Self, TypeVar

from dalle.data.image_tokens import Description, Encoding
from dalle.data.index import ShardIndex, index_shard, with_captions
from dalle.data.index_file import keep, kept_header, kept_index
from dalle.data.usable import DataReport, nothing_usable, refuse_tokens, usable_part
from storage.stores.files import file_status
from storage.tar import DamagedTarError

Item = TypeVar("Item")
Result = TypeVar("Result")
State = tuple[int, int]
"""Size of a shard, and the time of its last change in ns."""

_THREADS, _PER_TASK, _AT_ONCE = 16, 16, 4096
"""Threads that look at shards at the start, the shards that one looks at in turn, and those that wait together."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """The usable samples of one shard, as far as they are known before its index is read."""

    path: Path
    n_bytes: int
    """Its size."""
    n_samples: int
    """Usable ones, at least one."""
    tokens: Description | None
    """Description of its image tokens; None for a shard of pictures."""
    index: ShardIndex | None = None
    """Of the usable samples; None if `load` reads it."""
    load: Callable[[], ShardIndex] | None = None
    """Reads the index of the usable samples."""
    fingerprint: str | None = None
    """Of the usable samples; None if it is to be made of the index."""

    @classmethod
    def held(cls, index: ShardIndex) -> Self:
        """Return a shard whose index of usable samples stays in memory."""
        return cls(
            path=index.path,
            n_bytes=index.n_bytes,
            n_samples=len(index.keys),
            tokens=index.tokens,
            index=index.compact(),
        )


def in_threads(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """Yield what a function that waits for files returns for each item, in order; if they are many, threads call it."""
    iterator = iter(items)
    pool = ThreadPoolExecutor(_THREADS)
    try:
        while some := list(islice(iterator, _AT_ONCE)):
            if len(some) <= _PER_TASK:
                yield from map(function, some)
                continue
            tasks = [some[first : first + _PER_TASK] for first in range(0, len(some), _PER_TASK)]
            for results in pool.map(lambda task: list(map(function, task)), tasks):
                yield from results
    finally:
        pool.shutdown(cancel_futures=True)


def state_of(shard: Path) -> State:
    """Return the size of a shard and the time of its last change; raises OSError where it cannot be found out."""
    return file_status(shard)


def changed(shard: Path) -> ValueError:
    """Return the error for a shard that is not the one of the start any more."""
    return ValueError(f"{shard} has changed since it was indexed: start again to read it anew")


def look_at(path: Path, *, captions: bool, encoded: bool, skip_damaged: bool) -> tuple[Shard | None, DataReport]:
    """Return a shard, None if it has no usable sample, and its counts.

    Args:
        path: the tar file.
        captions: whether samples need captions.
        encoded: whether image tokens will do in place of pictures.
        skip_damaged: use the whole samples of a truncated shard, and leave out an unreadable one.

    Raises:
        ValueError: it is damaged, unless `skip_damaged`; a whole one has no usable sample, or image tokens where
            pictures are needed; or as `index_shard`.
    """
    state = state_of(path)
    header = kept_header(path, state)
    # What an index says of nothing usable is not believed: the shard itself says what is wrong.
    if header is None or captions not in header.parts or header.parts[captions].report.n_samples == 0:
        index, damage = _indexed(path, skip_damaged=skip_damaged)
        if index is None:
            return None, DataReport(damaged_shards=damage)
        index = with_captions(index) if captions else index
        used, report = usable_part(index, captions=captions, encoded=encoded)
        if not used.keys and not damage:
            raise ValueError(nothing_usable(index, report))
        header = keep(index, state)
        if header is None:
            report = DataReport.total([report, DataReport(damaged_shards=damage)])
            return Shard.held(used) if used.keys else None, report
    if not encoded:
        refuse_tokens(path, header.tokens)
    part = header.parts[captions]
    shard = Shard(
        path=path,
        n_bytes=state[0],
        n_samples=part.report.n_samples,
        tokens=header.tokens,
        load=partial(_load, path, state, captions),
        fingerprint=part.fingerprint,
    )
    return shard, part.report


def _load(path: Path, before: State, captions: bool) -> ShardIndex:
    """Return the index of a shard's usable samples, as it is kept, or made again if it is not there any more.

    Raises:
        ValueError: the shard has changed, or cannot be indexed.
        OSError: it cannot be read.
    """
    if state_of(path) != before:
        raise changed(path)
    index = kept_index(path, before) or index_shard(path)
    return usable_part(index, captions=captions, encoded=True)[0]


def _indexed(path: Path, *, skip_damaged: bool) -> tuple[ShardIndex | None, tuple[str, ...]]:
    """Return the index of a shard, None if nothing can be read, and the damage, none if it is whole.

    Raises:
        ValueError: it is damaged, unless `skip_damaged`; or as `index_shard`.
    """
    index: ShardIndex | None = None
    try:
        index = index_shard(path)
        if index.damage is None:
            return index, ()
        damage = f"{path} {index.damage}: {len(index.keys):,} whole samples before it"
    except DamagedTarError as error:
        damage = str(error)
    if not skip_damaged:
        raise ValueError(f"{damage}; make it again, or pass --skip-damaged-shards to leave out what is damaged")
    return index, (damage,)


def common_encoding(shards: Sequence[Shard]) -> Encoding | None:
    """Return the one encoding of all shards; None if they hold pictures.

    Raises:
        ValueError: there are shards of both kinds, or tokens that were made differently.
    """
    first = shards[0]
    for other in shards[1:]:
        if first.tokens is not None and other.tokens is not None and other.tokens.encoding == first.tokens.encoding:
            continue
        if (other.tokens is None) != (first.tokens is None):
            tokens, pictures = (first, other) if other.tokens is None else (other, first)
            raise ValueError(
                f"{tokens.path} holds image tokens and {pictures.path} pictures: give shards of one kind; "
                "`dalle-train encode` makes those of tokens"
            )
        if first.tokens is not None and other.tokens is not None:
            differences = other.tokens.encoding.differences(first.tokens.encoding)
            if differences:
                raise ValueError(
                    f"{other.path} holds other image tokens than {first.path} ({differences}): expected shards that "
                    "`dalle-train encode` made with the same dVAE, crops and seed; encode one of them again"
                )
    return first.tokens.encoding if first.tokens is not None else None
