"""The order in which samples are shown: a pure function of (seed, position), and local where there are many shards.

1. An epoch permutes the shards; `window` shards in a row of that permutation are a window, and the samples of a window
   are shuffled. The windows, one after the other, are the epoch's sequence. A window that holds all shards is the full
   shuffle: one permutation of all samples, in which the shards keep their order.
2. The sequence is cut into `streams` segments. Of every `batch` positions in a row each stream takes the same part, so
   ranks that take contiguous parts of every step stay in few streams, and read their shards one window after the other.

Memory is a number per shard, and one per sample of the windows at hand.

Legend: n samples in all  place, position within an epoch, 0 … n - 1
"""

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

MAX_FULL_SHUFFLE = 1_000_000
"""Samples up to which all are shuffled together unless a window is asked for."""
WINDOW = 8
"""Shards of a window where there are more samples than that."""
MAX_STREAMS = 64
"""Streams unless they are asked for; fewer where there are few windows or a small batch."""
_WINDOWS_PER_STREAM = 4
"""At least: a window that two streams share is read twice."""
_HELD = 16_000_000
"""Samples of windows held at once; the two newest windows always are. 4 bytes each."""
_NEAR = 8
"""Replacements looked for at the next places, before others all over the epoch: whole shards are lost together."""
_FAR = 101


@dataclass(frozen=True, kw_only=True)
class Shuffle:
    """How a run shuffles its samples; the same for all of it."""

    window: int = 0
    """Shards whose samples are shuffled together; 0 for all."""
    streams: int = 1
    """Segments of an epoch that are read side by side."""
    batch: int = 1
    """Positions in a row of which every stream takes the same part: the global batch with which the run began."""

    def __post_init__(self) -> None:
        if self.window < 0 or not 1 <= self.streams <= self.batch:
            raise ValueError(
                f"the order of samples needs a window of at least 0 shards and 1 to {self.batch} streams (the global "
                f"batch), got {self.window} and {self.streams}"
            )

    def __str__(self) -> str:
        return f"samples are shuffled in windows of {self.window} shards, in {self.streams} streams side by side"

    @classmethod
    def of(cls, counts: Sequence[int], batch: int, *, window: int | None = None, streams: int | None = None) -> Self:
        """Return how a new run shuffles.

        Args:
            counts: samples of each shard.
            batch: its global batch.
            window: shards of a window, 0 for all; None chooses by the number of samples.
            streams: segments that are read side by side; None chooses.

        Raises:
            ValueError: there are more streams than samples in a batch.
        """
        if window is None:
            window = 0 if sum(counts) <= MAX_FULL_SHUFFLE else WINDOW
        if window == 0 or window >= len(counts):
            return cls()
        if streams is None:
            n_windows = -(-len(counts) // window)
            streams = max(1, min(MAX_STREAMS, batch, n_windows // _WINDOWS_PER_STREAM))
        return cls(window=window, streams=streams, batch=batch)

    def shards_at_hand(self, n: int) -> int:
        """Return the shards of the windows from which n positions in a row are taken, at most; 0 for all shards."""
        return self.window * min(self.streams, 1 + -(-n * self.streams // self.batch))


class _Epoch(NamedTuple):
    """The permutation of the shards, and the places at which windows begin."""

    shards: NDArray[np.int64]
    starts: list[int]


class _Window(NamedTuple):
    """The samples of some shards, shuffled."""

    firsts: list[int]
    """Number of the first sample of each shard."""
    starts: list[int]
    """Number of samples in the shards before each of them."""
    shuffled: NDArray[np.integer[Any]]
    """A permutation of the window's samples, as they are numbered in it."""

    def number(self, place: int) -> int:
        """Return the number of the sample at a place of the window."""
        sample = int(self.shuffled[place])
        shard = bisect_right(self.starts, sample) - 1
        return self.firsts[shard] + sample - self.starts[shard]


class Order:
    """The endless sequence of the samples of some shards.

    Args:
        counts: samples of each shard; n is their sum.
        seed: of the run.
        shuffle: how they are shuffled; all together by default.
    """

    def __init__(self, counts: Sequence[int], seed: int, shuffle: Shuffle | None = None) -> None:
        self._shuffle = shuffle = shuffle or Shuffle()
        self._seed = seed
        self._counts = np.array(counts, dtype=np.int64)
        self._firsts = np.cumsum([0, *counts], dtype=np.int64)
        self.n = n = int(self._firsts[-1])
        self.is_full = not 0 < shuffle.window < len(counts)
        """Whether all samples are shuffled together."""
        self._per_window = len(counts) if self.is_full else shuffle.window
        # places of a stream in each batch, and where its segment of the epoch begins
        bounds = [stream * shuffle.batch // shuffle.streams for stream in range(shuffle.streams + 1)]
        self._bounds, self._sizes = bounds[:-1], np.diff(bounds).tolist()
        whole, rest = divmod(n, shuffle.batch)
        lengths = [
            whole * size + min(max(rest - bound, 0), size)
            for size, bound in zip(self._sizes, self._bounds, strict=True)
        ]
        self._segments: list[int] = np.cumsum([0, *lengths]).tolist()
        self._epochs: OrderedDict[int, _Epoch] = OrderedDict()
        self._windows: OrderedDict[tuple[int, int], _Window] = OrderedDict()
        self._n_held = 0

    def number(self, position: int) -> int:
        """Return the number of the sample at a position of the endless sequence."""
        epoch, place = divmod(position, self.n)
        window, start = self._window_at(epoch, self._in_sequence(place))
        return self._held(epoch, window).number(self._in_sequence(place) - start)

    def instead(self, position: int, attempt: int) -> int:
        """Return the number of the sample to try in place of an unusable one.

        It is that of a next place of the epoch; with windows, whose shards may be lost as a whole, after a few of them
        the places are spread over all of the epoch.

        Args:
            position: of the unusable one.
            attempt: 1, 2, …
        """
        epoch, place = divmod(position, self.n)
        step = 1 if self.is_full or attempt <= _NEAR else self.n // _FAR + 1
        return self.number(epoch * self.n + (place + attempt * step) % self.n)

    def epoch(self, epoch: int) -> NDArray[np.int64]:
        """Return the numbers of a whole epoch, (n,)."""
        if self.is_full and self._shuffle.streams == 1:
            return self._held(epoch, 0).shuffled.astype(np.int64)
        return np.array([self.number(epoch * self.n + place) for place in range(self.n)], dtype=np.int64)

    def shards_ahead(self, positions: Iterable[int], n_windows: int = 2) -> list[int]:
        """Return the shards that the streams of some positions read from there on, in the order of need.

        Args:
            positions: of the endless sequence; of each stream, the first of them counts.
            n_windows: windows of each stream, the one at the position and those after it; no more than the epoch has.
        """
        first = {self._stream(position % self.n): position for position in reversed(list(positions))}
        windows: dict[tuple[int, int], None] = {}
        for ahead in range(n_windows):
            for stream, position in sorted(first.items(), key=lambda item: item[1]):
                epoch, place = divmod(position, self.n)
                window, _ = self._window_at(epoch, self._in_sequence(place))
                starts = self._epoch(epoch).starts
                if window + ahead < len(starts) and starts[window + ahead] < self._segments[stream + 1]:
                    windows[epoch, window + ahead] = None
        return [int(shard) for epoch, window in windows for shard in self._shards_in(self._epoch(epoch).shards, window)]

    def _stream(self, place: int) -> int:
        return bisect_right(self._bounds, place % self._shuffle.batch) - 1

    def _in_sequence(self, place: int) -> int:
        """Return where in the epoch's sequence the sample of a place is."""
        if self._shuffle.streams == 1:
            return place
        stream = self._stream(place)
        n_batches, within = divmod(place, self._shuffle.batch)
        return self._segments[stream] + n_batches * self._sizes[stream] + within - self._bounds[stream]

    def _window_at(self, epoch: int, at: int) -> tuple[int, int]:
        """Return the number of the window in which a place of the sequence is, and where it begins."""
        if self.is_full:
            return 0, 0
        starts = self._epoch(epoch).starts
        window = bisect_right(starts, at) - 1
        return window, starts[window]

    def _bits(self, epoch: int, n: int, *key: int) -> NDArray[np.int64]:
        """Return a permutation of n numbers, of its own for each key."""
        bits = np.random.Philox(np.random.SeedSequence([self._seed, epoch], spawn_key=key))
        # Sorting raw bits, because NumPy guarantees those across its versions and not Generator.permutation.
        return np.argsort(bits.random_raw(n), kind="stable")

    def _epoch(self, epoch: int) -> _Epoch:
        if epoch not in self._epochs:
            n_shards = len(self._counts)
            shards = np.arange(n_shards) if self.is_full else self._bits(epoch, n_shards, 0)
            starts = np.cumsum([0, *self._counts[shards]])[: -1 : self._per_window].tolist()
            self._epochs[epoch] = _Epoch(shards, starts)
            if len(self._epochs) > 2:  # a micro-batch may reach over the end of an epoch
                self._epochs.popitem(last=False)
        return self._epochs[epoch]

    def _shards_in(self, shards: NDArray[np.int64], window: int) -> NDArray[np.int64]:
        return shards[window * self._per_window : (window + 1) * self._per_window]

    def _held(self, epoch: int, window: int) -> _Window:
        """Return a window; the ones used last are held."""
        held = self._windows.get((epoch, window))
        if held is not None:
            self._windows.move_to_end((epoch, window))
            return held
        shards = self._shards_in(self._epoch(epoch).shards, window)
        starts = np.cumsum([0, *self._counts[shards]])
        n = int(starts[-1])
        shuffled = self._bits(epoch, n) if self.is_full else self._bits(epoch, n, 1 + window)
        held = _Window(
            firsts=self._firsts[shards].tolist(),
            starts=starts[:-1].tolist(),
            shuffled=shuffled.astype(np.int32 if n < 1 << 31 else np.int64),
        )
        self._windows[epoch, window] = held
        self._n_held += n
        while len(self._windows) > 2 and self._n_held > _HELD:
            self._n_held -= len(self._windows.popitem(last=False)[1].shuffled)
        return held
