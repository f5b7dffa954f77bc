"""The order of samples: what it is, for any window and number of streams."""

from collections.abc import Sequence

import numpy as np
import pytest

from dalle.data.order import MAX_FULL_SHUFFLE, Order, Shuffle

UNEVEN = (5, 1, 7, 1, 1, 12, 3, 9, 2, 4)


def full_shuffle(n: int, seed: int, epoch: int) -> list[int]:
    """The order of version 0.1, as it was written there."""
    bits = np.random.Philox(np.random.SeedSequence([seed, epoch]))
    return np.argsort(bits.random_raw(n), kind="stable").tolist()


def shard_of(number: int, counts: Sequence[int]) -> int:
    return int(np.searchsorted(np.cumsum(counts), number, side="right"))


@pytest.mark.parametrize("counts", [UNEVEN, (1,), (1, 1, 1), (6, 5), (100,) * 30])
@pytest.mark.parametrize(
    ("window", "streams", "batch"), [(0, 1, 1), (1, 1, 4), (3, 1, 4), (3, 4, 7), (1, 7, 7), (2, 3, 16), (99, 5, 64)]
)
def test_every_epoch_shows_every_sample_once(counts: tuple[int, ...], window: int, streams: int, batch: int) -> None:
    order = Order(counts, 3, Shuffle(window=window, streams=streams, batch=batch))
    for epoch in (0, 1, 7):
        assert sorted(order.epoch(epoch).tolist()) == list(range(sum(counts)))


@pytest.mark.parametrize("seed", [0, 5, 2**40])
@pytest.mark.parametrize("window", [0, len(UNEVEN), len(UNEVEN) + 1])
def test_a_window_of_all_shards_is_the_order_that_older_runs_have(seed: int, window: int) -> None:
    order = Order(UNEVEN, seed, Shuffle(window=window))
    for epoch in (0, 1, 12):
        assert order.epoch(epoch).tolist() == full_shuffle(sum(UNEVEN), seed, epoch)
    assert Order([45], 0).epoch(0).tolist()[:8] == [0, 31, 8, 19, 26, 9, 3, 18]


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    shuffle = Shuffle(window=2, streams=2, batch=4)
    orders = [tuple(Order(UNEVEN, seed, shuffle).epoch(epoch)) for seed in (0, 1) for epoch in range(3)]
    assert len(set(orders)) == 6
    assert tuple(Order(UNEVEN, 1, shuffle).epoch(2)) == orders[-1]


@pytest.mark.parametrize("window", [1, 3])
def test_one_window_of_shards_is_read_after_the_other(window: int) -> None:
    counts = (20,) * 12
    places = Order(counts, 1, Shuffle(window=window)).epoch(0)
    size = 20 * window
    sets = [{shard_of(i, counts) for i in places[first : first + size]} for first in range(0, 240, size)]
    assert all(len(shards) == window for shards in sets)
    assert len({tuple(sorted(shards)) for shards in sets}) == len(sets)
    assert places.tolist() != sorted(places.tolist())
    half = [shard_of(i, counts) for i in places[: size // 2]]
    assert len(set(half)) == window, "the shards of a window are mixed"


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_a_rank_reads_its_share_of_the_shards(ranks: int) -> None:
    counts, batch = (10,) * 80, 16
    order = Order(counts, 0, Shuffle(window=2, streams=8, batch=batch))
    per_rank = batch // ranks
    read = [
        {
            shard_of(order.number(step * batch + rank * per_rank + i), counts)
            for step in range(800 // batch)
            for i in range(per_rank)
        }
        for rank in range(ranks)
    ]
    assert set().union(*read) == set(range(80))
    # a window at the border of two streams is read by both
    assert max(map(len, read)) <= 80 / ranks + 2 * 2


def test_no_number_depends_on_what_was_asked_before() -> None:
    shuffle = Shuffle(window=3, streams=2, batch=5)
    whole = [Order(UNEVEN, 2, shuffle).number(p) for p in range(90)]
    backwards = Order(UNEVEN, 2, shuffle)
    assert [backwards.number(p) for p in reversed(range(90))] == whole[::-1]


def test_replacements_of_the_full_shuffle_are_the_next_in_its_order() -> None:
    order, n = Order(UNEVEN, 0), sum(UNEVEN)
    for place in (0, 20, n - 1):
        expected = [full_shuffle(n, 0, 1)[(place + attempt) % n] for attempt in range(1, n)]
        assert [order.instead(n + place, attempt) for attempt in range(1, n)] == expected


@pytest.mark.parametrize("window", [1, 3])
def test_a_lost_shard_has_replacements_in_others(window: int) -> None:
    counts = (5_000,) * 10
    order = Order(counts, 0, Shuffle(window=window))
    for position in range(0, 50_000, 997):
        shards = {shard_of(order.instead(position, attempt), counts) for attempt in range(1, 100)}
        assert len(shards) == 10


def test_small_data_are_shuffled_whole_and_large_data_in_windows() -> None:
    assert Shuffle.of([10_000] * 100, 512) == Shuffle()
    large = Shuffle.of([10_000] * 25_000, 1024)
    assert (large.window, large.streams, large.batch) == (8, 64, 1024)
    assert Shuffle.of([10_000] * 25_000, 16).streams == 16
    assert Shuffle.of([MAX_FULL_SHUFFLE, 1], 512) == Shuffle(), "two shards are one window"
    assert Shuffle.of([10] * 100, 4, window=3) == Shuffle(window=3, streams=4, batch=4)
    assert Shuffle.of([10] * 100, 4, window=3, streams=2).streams == 2
    assert Shuffle.of([10_000] * 25_000, 1024, window=0) == Shuffle()
    with pytest.raises(ValueError, match="1 to 4 streams"):
        Shuffle.of([10] * 100, 4, window=3, streams=5)


def test_the_shards_that_a_stream_needs_next_are_known() -> None:
    counts, batch = (10,) * 40, 8
    order = Order(counts, 0, Shuffle(window=2, streams=4, batch=batch))
    for position in (0, 2, 131, 200, 399):
        ahead = order.shards_ahead([position])
        assert shard_of(order.number(position), counts) in ahead[:2]
        later = range(position, 400, batch)
        read = list(dict.fromkeys(shard_of(order.number(p), counts) for p in later))
        assert set(read[:4]) <= set(order.shards_ahead([position], 3))
    together = order.shards_ahead(range(16, 24), 1)
    assert together == [shard for first in range(16, 24, 2) for shard in order.shards_ahead([first], 1)]


@pytest.mark.parametrize("streams", [1, 4])
def test_the_order_of_many_samples_holds_a_window_not_all(streams: int) -> None:
    order = Order([1_000] * 10_000, 0, Shuffle(window=4, streams=streams, batch=64))
    numbers = [order.number(9_000_000 + p) for p in range(64)]
    assert len(set(numbers)) == 64
    assert sum(len(window.shuffled) for window in order._windows.values()) <= 4_000 * streams
