"""The batches of a run: an endless, seeded, exactly resumable sequence of micro-batches, and every sample once.

1. `Share` selects one rank's part of every optimizer step, `Transform` makes tensors of a sample, `Batch` holds them.
2. `BadSamples` counts samples that cannot be used, and stops a run that has too many.
3. `batches` for training, `validation_batches` and `parts_in_order` for every sample once.

The sample at a position of the sequence is a function of (seed, position) alone, and its randomness one of (seed,
epoch, key): neither the number of workers nor that of ranks changes what is seen.
"""

import dataclasses
import itertools
import logging
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dalle.data.order import MAX_FULL_SHUFFLE, Order, Shuffle
from dalle.data.reader import Sample, ShardData, sample_rng
from storage.stores.errors import StoreError
from training.data.workers import forking, obey_the_parent_alone

logger = logging.getLogger(__name__)

_REPLACEMENTS = 100  # samples tried in place of an unusable one
_NAMED_IN_LOG = 20  # unusable samples that are logged by name
_MIN_BAD = 10  # fewer unusable samples say nothing about those not read yet

Transform = Callable[[Sample, np.random.Generator], dict[str, Tensor]]


@dataclass(frozen=True, kw_only=True)
class Share:
    """One rank's part of the endless sequence of samples.

    Optimizer step s takes the positions s·G to (s + 1)·G of the sequence (`dalle/data/order.py`), where G is
    micro_batch × accumulation × world_size; rank r takes the r-th of world_size equal parts, in micro-batches.

    Raises:
        ValueError: a number is out of range.
    """

    seed: int
    """Of the order and of the transforms, ≥ 0."""
    micro_batch: int
    """Samples per batch."""
    accumulation: int = 1
    """Micro-batches per optimizer step."""
    rank: int = 0
    """Of this process, 0 ≤ rank < world_size."""
    world_size: int = 1
    """Processes that share the steps."""
    start_step: int = 0
    """Optimizer step to begin with: the number of steps already done."""
    max_steps: int | None = None
    """Step before which to end, counted from step 0 of the run; None: never end."""

    def __post_init__(self) -> None:
        for name, least in (("micro_batch", 1), ("accumulation", 1), ("seed", 0), ("start_step", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank must be at least 0 and below world_size ({self.world_size}), got {self.rank}")

    def positions(self) -> Iterator[range]:
        """Yield the positions of each micro-batch."""
        per_rank = self.micro_batch * self.accumulation
        first_step, end = self.start_step, self.max_steps
        for step in itertools.count(first_step) if end is None else range(first_step, end):
            start = (step * self.world_size + self.rank) * per_rank
            for first in range(start, start + per_rank, self.micro_batch):
                yield range(first, first + self.micro_batch)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """A micro-batch of B samples."""

    tensors: dict[str, Tensor]
    """The transform's tensors, stacked: (B, …) each; empty if no sample was usable."""
    numbers: list[int]
    """The B samples, in order, as `ShardData` numbers them."""
    keys: list[str]
    """Their keys."""
    n_bad: int
    """Unusable samples that belong here; in training the next usable one replaces each."""


@dataclass(frozen=True, kw_only=True)
class _Read:
    """A batch as a worker hands it over."""

    tensors: dict[str, Tensor] | None
    """None if too many samples in a row were unusable."""
    numbers: list[int]
    keys: list[str]
    bad: list[tuple[int, str]]
    """Number of each unusable sample, and the reason."""
    store: str | None = None  # what is wrong with the store of the samples, and no fault of theirs


def _stack(samples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]} if samples else {}


class _Positions(Dataset[_Read]):
    """Reads the micro-batch at a range of positions of the endless sequence."""

    def __init__(self, data: ShardData, transform: Transform, seed: int, shuffle: Shuffle) -> None:
        self._data = data
        self._transform = transform
        self._seed = seed
        self._order = Order(data.counts, seed, shuffle)

    def __getitem__(self, positions: range) -> _Read:
        tensors: list[dict[str, Tensor]] = []
        used: list[int] = []
        keys: list[str] = []
        bad: list[tuple[int, str]] = []
        n = len(self._data)
        if not self._order.is_full:
            self._data.read_ahead(self._order.shards_ahead(positions))
        for position in positions:
            epoch = position // n
            for attempt in range(min(n, 1 + _REPLACEMENTS)):
                i = self._order.instead(position, attempt) if attempt else self._order.number(position)
                try:
                    sample = dataclasses.replace(self._data.read(i), position=position)
                    tensors.append(self._transform(sample, sample_rng(self._seed, epoch, sample.key, "training")))
                except StoreError as error:
                    return _Read(tensors=None, numbers=used, keys=keys, bad=bad, store=str(error))
                except (ValueError, OSError) as error:
                    if attempt == 0:  # the others are counted at their own positions
                        bad.append((i, str(error)))
                    continue
                used.append(i)
                keys.append(sample.key)
                break
            else:
                return _Read(tensors=None, numbers=used, keys=keys, bad=bad)
        return _Read(tensors=_stack(tensors), numbers=used, keys=keys, bad=bad)


class _Parts(Dataset[_Read]):
    """Reads the usable ones of a range of samples, none replaced, with the same randomness each time."""

    def __init__(self, data: ShardData, transform: Transform) -> None:
        self._data = data
        self._transform = transform

    def __getitem__(self, numbers: Sequence[int]) -> _Read:
        tensors: list[dict[str, Tensor]] = []
        used: list[int] = []
        keys: list[str] = []
        bad: list[tuple[int, str]] = []
        for i in numbers:
            try:
                sample = self._data.read(i)
                tensors.append(self._transform(sample, sample_rng(0, 0, sample.key, "validation")))
                used.append(i)
                keys.append(sample.key)
            except StoreError as error:
                return _Read(tensors=None, numbers=used, keys=keys, bad=bad, store=str(error))
            except (ValueError, OSError) as error:
                bad.append((i, str(error)))
        return _Read(tensors=_stack(tensors), numbers=used, keys=keys, bad=bad)


class BadSamples:
    """Counts unusable samples, logs each once, and raises when there are too many.

    Too many are, first, more different ones than the fraction of all samples: certain, whatever part of which
    epoch this process has read, and prompt for small data. Before that, for large data, at least ten, and
    more among the samples read than chance explains (four standard deviations): an unlucky start stops
    nothing. Where samples are read a few shards at a time, `by_shard`, chance hits shards, not samples. Samples
    that a manifest knows and the shards have lost count from the start, on every rank alike.

    Raises:
        ValueError: more samples are lost than the fraction of all.
    """

    def __init__(self, data: ShardData, max_fraction: float, *, by_shard: bool = False) -> None:
        self._data = data
        self._max_fraction = max_fraction
        self._n_seen = 0
        self._by_shard = by_shard
        self._n_bad = self._squares = 0  # unusable samples read, and the sum of the squares of their numbers by shard
        self._bad_reads: Counter[int] = Counter()
        self._found: set[int] = set()
        self._per_shard = Counter({str(shard): count for shard, count in data.lost_in().items()})
        self._n_lost = n_lost = data.report.n_lost
        self._first_reason = "the sample is lost" if n_lost else ""
        if n_lost > max_fraction * len(data):
            shards = data.report.damaged_shards
            listed = "; ".join(shards[:_NAMED_IN_LOG]) + ("; …" if len(shards) > _NAMED_IN_LOG else "")
            raise ValueError(
                f"{n_lost:,} of the {len(data):,} samples that the manifest knows are lost, more than "
                f"--max-bad-fraction {max_fraction:g} allows: {listed}; restore these shards, or raise "
                "--max-bad-fraction; for a new run, a new manifest will do (`dalle-train check-data`)"
            )

    def name(self, bad: Sequence[tuple[int, str]]) -> None:
        """Count unusable samples, given by number and reason."""
        for i, reason in bad:
            if self._data.is_lost(i):
                continue
            shard = self._data.shard_of(i)
            number = self._data.shard_number(i)
            self._squares += 2 * self._bad_reads[number] + 1
            self._bad_reads[number] += 1
            self._n_bad += 1
            if i in self._found:
                continue
            self._found.add(i)
            self._per_shard[str(shard)] += 1
            self._first_reason = self._first_reason or reason
            if self._n_different <= _NAMED_IN_LOG:
                logger.warning("unusable sample %s (%s): %s", self._name(i), shard, reason)
            elif self._n_different == _NAMED_IN_LOG + 1:
                logger.warning("further unusable samples are counted, not named")

    def _name(self, i: int) -> str:
        """Return the key of a sample, or its number where the index of its shard cannot be read."""
        try:
            return self._data.key(i)
        except (ValueError, OSError):
            return f"number {i:,}"

    @property
    def _n_different(self) -> int:
        """Different unusable samples up to now, lost ones included."""
        return self._n_lost + len(self._found)

    def add(self, bad: Sequence[tuple[int, str]], n_seen: int) -> None:
        """Count `n_seen` more samples, of which those in `bad` (number, reason) are unusable.

        Raises:
            ValueError: there are too many.
        """
        self._n_seen += n_seen
        self.name(bad)
        limit = max(0.0, self._max_fraction - self._n_lost / len(self._data)) * self._n_seen
        variance = self._squares if self._by_shard else limit
        is_certain = self._n_different > self._max_fraction * len(self._data)
        is_likely = self._n_bad >= _MIN_BAD and self._n_bad > limit + 4 * math.sqrt(variance)
        # The first condition spares long runs that add up rare failures of the disk or the network.
        if self._n_bad > limit and (is_certain or is_likely):
            n_read = min(self._n_seen, len(self._data))
            raise self.error(f"{self._n_different:,} unusable samples after reading {n_read:,} of {len(self._data):,}")

    def error(self, what: str) -> ValueError:
        """Return an error with the message `what`, the shards with most unusable samples, and the remedy."""
        worst = ", ".join(f"{shard} ({count:,})" for shard, count in self._per_shard.most_common(3))
        return ValueError(
            f"{what}, more than --max-bad-fraction {self._max_fraction:g} allows; most are in {worst}; "
            f"the first: {self._first_reason}; repair the shards, or raise --max-bad-fraction"
        )


def _reads(reader: Dataset[_Read], parts: Iterable[Sequence[int]], workers: int, *, ahead: int = 1) -> Iterator[_Read]:
    """Read each part, in order; workers are forked processes that read `ahead` parts or more."""
    if workers == 0:
        return map(reader.__getitem__, parts)
    loader = DataLoader(
        reader,
        batch_size=None,  # an item is a micro-batch
        sampler=parts,
        num_workers=workers,  # DataLoader gives each worker one torch thread
        prefetch_factor=max(4, math.ceil(ahead / workers)),
        multiprocessing_context="fork",  # shares the index; transforms need not be picklable
        worker_init_fn=partial(obey_the_parent_alone, os.getpid()),
        generator=torch.Generator(),  # or it draws from the global one, and workers=0 would train differently
    )
    with forking():
        return iter(loader)  # forks the workers


def _deliver(reads: Iterator[_Read], data: ShardData, bad_samples: BadSamples) -> Iterator[Batch]:
    for read in reads:
        if read.store is not None:
            raise StoreError(read.store)
        if read.tensors is None:
            bad_samples.name(read.bad)
            raise bad_samples.error(f"{min(len(data), 1 + _REPLACEMENTS)} samples in a row are unusable")
        bad_samples.add(read.bad, n_seen=len(read.numbers))
        yield _batch(read, read.tensors)


def _batch(read: _Read, tensors: dict[str, Tensor]) -> Batch:
    return Batch(tensors=tensors, numbers=read.numbers, keys=read.keys, n_bad=len(read.bad))


def batches(
    data: ShardData,
    transform: Transform,
    share: Share,
    *,
    workers: int = 0,
    max_bad_fraction: float = 0.01,
    shuffle: Shuffle | None = None,
) -> Iterator[Batch]:
    """Return the micro-batches of a training run, without end.

    What a step sees depends on (seed, step, global batch) alone: not on the number of workers or ranks, nor on where
    it was resumed.

    A sample whose reading or transform raises ValueError or OSError is replaced by another usable one of its epoch:
    see `Order.instead`. A store that fails is no fault of a sample: StoreError ends the run.

    Args:
        data: the samples.
        transform: makes tensors of a sample; its only randomness is the generator it is given, a function of
            (seed, epoch, key).
        share: selects the samples.
        workers: forked processes that read ahead; 0 reads in this one.
        max_bad_fraction: of all samples that may be unusable, in [0, 1].
        shuffle: how samples are shuffled; all together by default.

    Raises:
        ValueError: an argument is out of range (at once); too many samples are unusable (while iterating).
    """
    if workers < 0 or not 0 <= max_bad_fraction <= 1:
        raise ValueError(f"workers ({workers}) must be at least 0, max_bad_fraction ({max_bad_fraction}) in [0, 1]")
    # a step's micro-batches are taken at once: they are read ahead while the step before is computed
    bad_samples = BadSamples(data, max_bad_fraction, by_shard=shuffle is not None and shuffle.window > 0)
    shuffle = shuffle or Shuffle()
    data.by_turns(shuffle.shards_at_hand(share.micro_batch * share.accumulation))
    reader = _Positions(data, transform, share.seed, shuffle)
    reads = _reads(reader, share.positions(), workers, ahead=share.accumulation)
    return _deliver(reads, data, bad_samples)


def parts_in_order(
    data: ShardData, transform: Transform, parts: Iterable[Sequence[int]], bad_samples: BadSamples, *, workers: int = 0
) -> Iterator[Batch]:
    """Yield the usable samples of each part, as numbers of samples, in order: one batch a part, empty if it has none.

    Args:
        data: the samples.
        transform: as in `batches`; its generator depends on the key alone.
        parts: numbers of the samples of each batch.
        bad_samples: counts the unusable ones.
        workers: as in `batches`.

    Raises:
        ValueError: too many samples are unusable.
    """
    for read in _reads(_Parts(data, transform), parts, workers):
        if read.tensors is None:
            raise StoreError(read.store)
        bad_samples.add(read.bad, n_seen=len(read.numbers) + len(read.bad))
        yield _batch(read, read.tensors)


def validation_batches(
    data: ShardData,
    transform: Transform,
    batch_size: int,
    *,
    max_bad_fraction: float = 0.01,
    samples: int | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[Batch]:
    """Yield every sample once, or some, always the same ones, in the order of the shards, with the same randomness.

    Args:
        data: the samples.
        transform: as in `batches`; its generator depends on the key alone.
        batch_size: samples per batch; fewer in the last one, and where unusable samples are left out, even none.
        max_bad_fraction: of the samples that may be unusable, in [0, 1].
        samples: number of samples, always the same ones, chosen from all shards; None: all.
        rank: takes every `world_size`-th batch.
        world_size: ranks that share the batches.

    Raises:
        ValueError: batch_size is below 1; too many samples are unusable, or all where they are not shared out.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    bad_samples = BadSamples(data, max_bad_fraction)
    chosen = _chosen(data, samples)
    firsts = range(rank * batch_size, len(chosen), world_size * batch_size)
    parts = (chosen[first : first + batch_size] for first in firsts)
    n_usable = 0
    for batch in parts_in_order(data, transform, parts, bad_samples):
        n_usable += len(batch.numbers)
        yield batch
    if n_usable == 0 and world_size == 1:
        raise bad_samples.error(f"all {len(chosen):,} samples are unusable")


def _chosen(data: ShardData, count: int | None) -> Sequence[int]:
    """Return the numbers of all samples, or of some in the order of the shards: of very many, one of each part."""
    n = len(data)
    if count is None or count >= n:
        return range(n)
    if n <= MAX_FULL_SHUFFLE:
        return sorted(map(int, data.order(0, 0)[:count]))
    bits = np.random.Philox(0).random_raw(count).tolist()
    ends = [(part + 1) * n // count for part in range(count)]
    return [first + int(bit) % (end - first) for first, end, bit in zip([0, *ends], ends, bits, strict=False)]
