"""Appended shards: what was decided stays, what is open is finished exactly once with them, what follows has all."""

from fractions import Fraction

import numpy as np
import pytest
from gristmill.pipeline.growth import Grown
from gristmill.pipeline.order import Order, OrderError, share
from hypothesis import example, given, settings
from hypothesis import strategies as st

shapes = st.lists(st.integers(0, 12), min_size=2, max_size=9).filter(lambda counts: counts[0] > 0)


def ids(order, start, stop):
    return list(map(tuple, np.stack(order.locate(np.arange(start, stop)), axis=1).tolist()))


def everything(counts):
    return sorted((s, r) for s, n in enumerate(counts) for r in range(n))


@settings(deadline=None)
@given(st.integers(0, 2**61), st.integers(0, 2**39), st.integers(1, 2**39))
@example(2**61, 2**40 - 2, 2**40 - 1)
def test_share_is_exact(n, part, whole):
    part = min(part, whole)
    if n * part // whole < 2**62:
        assert share(np.array([n]), part, whole)[0] == Fraction(n * part, whole).__floor__()


@settings(deadline=None, max_examples=60)
@given(shapes, st.integers(0, 2**64 - 1), st.integers(1, 9), st.integers(1, 20), st.data())
def test_every_epoch_shows_every_sample_that_was_there_once(counts, seed, lanes, window, data):
    """Any number of growths, in the middle of epochs, at their ends, or of an epoch that is already growing."""
    cuts = sorted(data.draw(st.sets(st.integers(1, len(counts)), min_size=1, max_size=4)))
    starts = sorted(data.draw(st.lists(st.integers(0, 90), min_size=len(cuts) - 1, max_size=len(cuts) - 1)))
    taken = tuple(zip([0, *starts], cuts, strict=True))
    order = Grown(counts, seed, lanes, window, taken)
    assert order.samples == sum(counts[: cuts[-1]])
    begin = 0
    for epoch in range(6):
        assert order.next_epoch(begin) == begin
        assert order.epoch(begin) == epoch
        stop = order.next_epoch(begin + 1)
        assert order.epoch(stop - 1) == epoch
        # Shards that were taken up by the time at which the epoch ended belong to it.
        there = max(number for start, number in taken if start < stop)
        assert sorted(ids(order, begin, stop)) == everything(counts[:there])
        begin = stop


@settings(deadline=None, max_examples=50)
@given(shapes, st.integers(0, 2**64 - 1), st.integers(1, 9), st.integers(1, 20), st.integers(0, 90))
def test_nothing_before_the_position_changes(counts, seed, lanes, window, at):
    before = Grown(counts[:-1], seed, lanes, window)
    after = Grown(counts, seed, lanes, window, ((0, len(counts) - 1), (at, len(counts))))
    assert ids(before, 0, at) == ids(after, 0, at)
    assert ids(before, 0, at) == ids(Order(counts[:-1], seed, lanes, window), 0, at)
    samples = {(s, r) for s, r in ids(after, 0, at)}
    assert all(s < len(counts) - 1 for s, _ in samples)


def test_newcomers_are_spread_over_the_rest_of_the_epoch():
    order = Grown([1000, 500], 3, 1, 1500, ((0, 1), (200, 2)))
    shard, _ = order.locate(np.arange(200, 1500))  # 800 old ones and 500 new ones
    for stop in range(100, 1301, 100):
        assert abs(shard[:stop].sum() - stop * 500 / 1300) < 1
    assert order.pool(199).samples == 1000
    assert order.pool(200).samples == 1500


def test_without_growth_it_is_the_plain_order():
    counts = [5, 0, 7, 1, 20]
    assert ids(Grown(counts, 1234, 3, 4), 0, 100) == ids(Order(counts, 1234, 3, 4), 0, 100)


def test_golden_values():
    """Part of the contract, as the plain order is."""
    order = Grown([5, 0, 7, 1, 20], 1234, 3, 4, ((0, 2), (8, 4), (12, 5)))
    assert ids(order, 0, 24) == GOLDEN


GOLDEN = [
    (0, 0),
    (0, 2),
    (0, 4),
    (0, 1),
    (0, 3),
    (0, 0),
    (0, 3),
    (0, 4),
    (0, 1),
    (2, 0),
    (2, 4),
    (2, 6),
    (3, 0),
    (4, 0),
    (4, 8),
    (4, 15),
    (0, 2),
    (4, 3),
    (4, 9),
    (4, 14),
    (2, 3),
    (4, 1),
    (4, 7),
    (4, 16),
]


@pytest.mark.parametrize(
    "taken", [(), ((1, 2),), ((0, 2), (5, 2)), ((0, 2), (5, 1)), ((0, 1), (9, 2), (8, 3)), ((0, 1), (4, 4))]
)
def test_impossible_growth_is_refused(taken):
    with pytest.raises(OrderError, match="taken"):
        Grown([3, 3, 3], 0, 1, 8, taken)
