"""When a shard is needed next: never later than it is, and infinitely far only if it is not needed."""

import numpy as np
import pytest
from gristmill.pipeline.foresight import Foresight
from gristmill.pipeline.order import Order, Sequential
from gristmill.pipeline.source import Source
from gristmill.pipeline.stream import Stream
from hypothesis import given
from hypothesis import strategies as st

counts_ = st.lists(st.integers(0, 20), min_size=1, max_size=15).filter(sum)


def first_uses(order, shards, position, ahead):
    shard, _ = order.locate(np.arange(position, position + ahead))
    found = np.full(shards, np.inf)
    which, first = np.unique(shard, return_index=True)
    found[which] = position + first
    return found


def looked(order, shards, position, lanes=None):
    foresight = Foresight(order, shards, lanes)
    foresight.go(position)
    return foresight, np.array([foresight.next_use(shard) for shard in range(shards)])


@given(counts_, st.integers(0, 99), st.integers(1, 9), st.integers(1, 40), st.integers(0, 500))
def test_no_shard_is_needed_before_it_is_expected(counts, seed, lanes, window, position):
    order = Order(counts, seed, lanes, window)
    foresight, expected = looked(order, len(counts), position)
    true = first_uses(order, len(counts), position, 2 * order.samples)
    assert (expected <= true).all()
    assert (expected >= position).all()
    assert np.isinf(expected[np.array(counts) == 0]).all()
    soonest = foresight.soonest()
    assert sorted(soonest) == [shard for shard, count in enumerate(counts) if count]
    assert (np.diff(expected[soonest]) >= 0).all()


@given(counts_, st.integers(0, 99), st.integers(1, 9), st.integers(1, 40))
def test_a_shard_is_expected_open_while_its_windows_are(counts, seed, lanes, window):
    """Checked against the order itself: outside of the spans no sample of the shard is read."""
    order = Order(counts, seed, lanes, window)
    positions = np.arange(2 * order.samples)
    shard, _ = order.locate(positions)
    inside = np.zeros(len(positions), bool)
    for epoch in range(2):
        for which, _, first, last in zip(*order.open_spans(epoch), strict=True):
            inside |= (shard == which) & (positions >= first) & (positions <= last)
    assert inside.all()


def test_one_lane_passes_its_shards_by():
    """A window of one shard's size: what was read is not needed before the next epoch, and the next one is next."""
    order = Order([10] * 8, 3, 1, 10)
    _, expected = looked(order, 8, 35)
    true = first_uses(order, 8, 35, 160)
    assert np.array_equal(expected, np.maximum(true // 10 * 10, 35))
    assert sorted(expected)[:5] == [35, 40, 50, 60, 70]


def test_the_lanes_of_other_nodes_do_not_count():
    order = Order([10] * 8, 3, 4, 20)
    mine = np.array([0, 1])
    _, expected = looked(order, 8, 0, mine)
    shard, _ = order.locate(np.arange(80))
    needed = set(shard[np.isin(np.arange(80) % 4, mine)].tolist())
    assert set(np.flatnonzero(expected < 80).tolist()) == needed


@given(counts_, st.integers(0, 200))
def test_the_manifests_own_order_is_foreseen_exactly(counts, position):
    order = Sequential(counts)
    _, expected = looked(order, len(counts), position)
    assert np.array_equal(expected, first_uses(order, len(counts), position, 2 * order.samples))


def source(name, counts, weight=1.0):
    return Source(name, np.array(counts, np.int64), lambda n: f"{n:032x}", weight)


def test_a_mixture_reaches_the_rare_data_set_later():
    """Same shards, weights 15 to 1: what comes next in both comes much later in the second."""
    stream = Stream([source("a", [40] * 10, 15), source("b", [40] * 10, 1)], 0, 1, 40)
    _, expected = looked(stream, 20, 0)
    ahead = np.sort(expected[:10])[1], np.sort(expected[10:])[1]
    assert ahead[0] == pytest.approx(40 * 16 / 15)
    assert ahead[1] == pytest.approx(40 * 16)


def test_a_data_set_of_weight_zero_is_not_needed():
    stream = Stream([source("a", [40] * 3), source("b", [40] * 3, 0)], 0, 1, 40)
    _, expected = looked(stream, 6, 0)
    assert np.isinf(expected[3:]).all()


def test_shards_taken_up_on_the_way_are_looked_up_until_their_own_epoch_begins(monkeypatch):
    old = Stream([source("a", [30] * 4)], 0, 2, 16)
    cursor = old.cursor.advance(37, committed=True)
    stream = Stream([source("a", [30] * 6)], 0, 2, 16, cursor=cursor, take_up=50)
    for position in (37, 50, 179):
        _, expected = looked(stream, 6, position)
        assert np.array_equal(expected, first_uses(stream, 6, position, 2 * stream.samples))
    assert stream.epoch(180) == 1
    monkeypatch.setattr(Foresight, "_looked_up", None)  # from there on one order is read, and worked out
    for position in range(180, 600, 7):
        _, expected = looked(stream, 6, position)
        assert (expected >= position).all()
        assert (expected <= first_uses(stream, 6, position, 2 * stream.samples)).all()


def test_later_epochs_begin_in_other_lanes():
    counts, mine = np.array([10] * 8 + [3]), np.array([0, 1])  # 83 samples on 4 lanes
    for order in (Order(counts, 3, 4, 20), Stream([source("a", counts)], 3, 4, 20)):
        for epoch in range(4):
            _, expected = looked(order, 9, epoch * 83, mine)
            positions = np.arange(epoch * 83, (epoch + 1) * 83)
            needed = set(order.locate(positions)[0][np.isin(positions % 4, mine)].tolist())
            assert set(np.flatnonzero(expected < (epoch + 1) * 83).tolist()) == needed
