"""The order is a bijection per epoch, depends on nothing but the position, costs nothing a sample, and never changes."""

import math
import subprocess
import sys
import tracemalloc
from collections import Counter

import numpy as np
import pytest
from gristmill.pipeline.order import Order, OrderError, Sequential, permute
from gristmill.pipeline.philox import philox4x32
from hypothesis import example, given, settings
from hypothesis import strategies as st

shapes = st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(any)
lanes_ = st.integers(1, 70)
windows_ = st.integers(1, 90)
seeds = st.integers(0, 2**64 - 1)


def ids(order, positions):
    shard, row = order.locate(positions)
    assert shard.dtype == row.dtype == np.int64
    assert ((row >= 0) & (row < order.counts[shard])).all()
    return np.stack([shard, row], axis=1)


def everything(counts):
    return sorted((s, r) for s, n in enumerate(counts) for r in range(n))


@settings(deadline=None)
@given(shapes, seeds, lanes_, windows_, st.integers(0, 3))
@example([18 + 17], 0, 2, 17, 0)  # lanes of 18 and 17 samples: cut into windows of 9, and into one of 17
@example([1], 0, 64, 65536, 2)
def test_every_sample_exactly_once_an_epoch(counts, seed, lanes, window, epoch):
    order = Order(counts, seed, lanes, window)
    assert order.samples == sum(counts)
    positions = epoch * order.samples + np.arange(order.samples)
    assert sorted(map(tuple, ids(order, positions).tolist())) == everything(counts)
    assert {order.epoch(int(p)) for p in positions} == {epoch}


@settings(deadline=None)
@given(shapes, seeds, lanes_, windows_, st.data())
def test_neither_batch_nor_world_size_matters(counts, seed, lanes, window, data):
    """Any way to cut the positions into calls, to fresh orders, in any sequence, gives the same samples."""
    total = 3 * sum(counts)
    whole = ids(Order(counts, seed, lanes, window), np.arange(total))
    order, at, calls = Order(counts, seed, lanes, window), 0, []
    while at < total:
        batch, world = data.draw(st.integers(1, total)), data.draw(st.integers(1, 5))
        calls += np.array_split(np.arange(at, min(at + batch, total)), world)
        at += batch
    for positions in data.draw(st.permutations(calls)) if len(calls) < 20 else calls[::-1]:
        assert np.array_equal(ids(order, positions), whole[positions])


@settings(deadline=None)
@given(shapes, seeds, lanes_, windows_, st.integers(0, 2))
def test_find_inverts_locate(counts, seed, lanes, window, epoch):
    order = Order(counts, seed, lanes, window)
    positions = epoch * order.samples + np.arange(order.samples)
    assert np.array_equal(order.find(*order.locate(positions), epoch), positions)


@settings(deadline=None)
@given(shapes, seeds, lanes_, windows_)
def test_lanes_take_turns_and_windows_bound_the_reach(counts, seed, lanes, window):
    """Lane l holds positions l, l + lanes, ...; a lane's samples lie together, a window's do so within the lane."""
    order = Order(counts, seed, lanes, window)
    n = order.samples
    sequence = ids(order, np.arange(n))
    shards = [s for s, _ in sorted(Counter(sequence[:, 0].tolist()).items())]
    ends = dict.fromkeys(shards, 0)
    # Where each shard lies on the axis is not public; recover it from the smallest position set of each lane.
    axis = order._axis(0)
    place = {s: int(axis.ends[axis.places[s]] - counts[s]) for s in ends}
    spots = np.array([place[s] + r for s, r in sequence.tolist()])
    first = 0
    for lane in range(min(lanes, n)):
        mine = spots[lane::lanes]
        assert sorted(mine.tolist()) == list(range(first, first + len(mine)))
        assert len(mine) in (n // lanes, n // lanes + 1)
        assert np.abs(mine - first - np.arange(len(mine))).max() < window
        first += len(mine)


def test_epochs_seeds_and_shards_are_shuffled():
    counts = [50] * 40
    order = Order(counts, 5, 8, 100)
    first, second = ids(order, np.arange(2000)), ids(order, np.arange(2000, 4000))
    assert (first == second).all(axis=1).mean() < 0.02
    assert (first == ids(Order(counts, 6, 8, 100), np.arange(2000))).all(axis=1).mean() < 0.02
    full = ids(Order(counts, 5, 1, 2000), np.arange(2000))
    index = full[:, 0] * 50 + full[:, 1]
    assert abs(np.corrcoef(index, np.arange(2000))[0, 1]) < 0.1
    assert abs(np.corrcoef(index[1:], index[:-1])[0, 1]) < 0.1


@pytest.mark.parametrize("size", [2, 3, 4])
def test_permutations_are_evenly_drawn(size):
    seen = Counter(tuple(Order([size], seed, 1, 16).locate(np.arange(size))[1].tolist()) for seed in range(720))
    expected = 720 / math.factorial(size)
    assert len(seen) == math.factorial(size)
    assert sum((n - expected) ** 2 / expected for n in seen.values()) < 3 * math.factorial(size) + 10


@settings(deadline=None)
@given(st.integers(1, 500), st.integers(0, 2**64 - 1), st.integers(0, 2))
def test_permute_and_its_inverse(size, key, slack):
    x, sizes = np.arange(size), np.full(size, size)
    keys = np.broadcast_to(np.array([key, key ^ 12345], np.uint64), (size, 2))
    bits = (size - 1).bit_length() + slack
    y = permute(x, sizes, keys, bits)
    assert sorted(y.tolist()) == list(range(size))
    assert np.array_equal(permute(y, sizes, keys, bits, inverse=True), x)


def mix(x):
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return x ^ x >> 31


def walk(x, size, bits, counter, seed):
    """The permutation in plain integers, word for word as the module's docstrings have it."""
    words = philox4x32(counter, [seed % 2**32, seed >> 32]).tolist()
    keys = words[0] | words[1] << 32, words[2] | words[3] << 32
    low = bits // 2
    while True:
        left, right = x >> low, x % 2**low
        for r in range(0, 10, 2):
            left ^= mix(((right ^ keys[0]) + (r + 1) * 0x9E3779B97F4A7C15) % 2**64) % 2 ** (bits - low)
            right ^= mix(((left ^ keys[1]) + (r + 2) * 0x9E3779B97F4A7C15) % 2**64) % 2**low
        x = left << low | right
        if x < size:
            return x


def reference(counts, seed, lanes, window, position):
    """Shard and row of one position, with lists and loops."""

    def cut(total, parts):
        return [total // parts + (i < total % parts) for i in range(parts)]

    total = sum(counts)
    epoch, q = divmod(position, total)
    lane, off = q % lanes, q // lanes
    sizes = cut(total, lanes)
    bits = (min(window, max(sizes)) - 1).bit_length()
    start, number = sum(sizes[:lane]), 0
    windows = cut(sizes[lane], -(-sizes[lane] // window))
    while off >= windows[number]:
        start, off, number = start + windows[number], off - windows[number], number + 1
    place = start + walk(off, windows[number], bits, [epoch, lane, 2001, number], seed)
    s = len(counts)
    for i in range(s):
        shard = walk(i, s, (s - 1).bit_length(), [epoch, 0, 2000, 0], seed)
        if place < counts[shard]:
            return shard, place
        place -= counts[shard]
    raise AssertionError("the place lies behind the last shard")


@settings(deadline=None)
@given(shapes, seeds, lanes_, windows_, st.integers(0, 10**6))
def test_the_order_is_the_plain_one(counts, seed, lanes, window, position):
    shard, row = Order(counts, seed, lanes, window).locate(np.array([position]))
    assert (shard[0], row[0]) == reference(counts, seed, lanes, window, position)


def test_golden_values():
    """The order is a contract: a change here makes every recorded run another one."""
    order = Order([5, 0, 7, 1, 20], seed=1234, lanes=3, window=4)
    assert ids(order, np.array([0, 1, 2, 3, 4, 32, 33, 34, 35, 10**15])).tolist() == GOLDEN_SMALL
    order = Order(np.full(1000, 1000), seed=2**63 + 11)
    assert ids(order, np.array([0, 1, 63, 64, 999_999, 1_000_000, 123_456_789_012])).tolist() == GOLDEN_LARGE


GOLDEN_SMALL = [[0, 1], [4, 5], [4, 19], [0, 2], [4, 6], [2, 6], [4, 2], [4, 12], [0, 3], [4, 6]]
GOLDEN_LARGE = [[118, 936], [332, 570], [452, 910], [261, 217], [713, 923], [967, 3], [917, 839]]


def test_a_billion_samples_cost_only_their_shards():
    """Seek to anywhere in 1e9 samples in 1e5 shards: memory of the order of the table, and no loop over samples."""
    counts = np.full(100_000, 10_000)
    tracemalloc.start()
    order = Order(counts, seed=3)
    positions = np.arange(987_654_321, 987_654_321 + 2048)
    got = ids(order, positions)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40e6  # 400 bytes a shard
    assert len(np.unique(got, axis=0)) == 2048
    assert len(np.unique(got[:, 0])) > 400  # 64 windows over seven shards each
    assert np.array_equal(order.find(got[:, 0], got[:, 1], 0), positions)
    for epoch in range(1, 9):
        order.locate(epoch * order.samples + positions)
    assert order._axis.cache_info().currsize == 2


@settings(deadline=None)
@given(shapes, st.integers(0, 3))
def test_sequential_is_the_manifests_order(counts, epoch):
    order = Sequential(counts)
    positions = epoch * order.samples + np.arange(order.samples)
    assert list(map(tuple, ids(order, positions).tolist())) == everything(counts)
    assert order.epoch(int(positions[-1])) == epoch


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], 0), "no samples"),
        (([0, 0], 0), "no samples"),
        (([3, -1], 0), "counts"),
        (([3], 0, 0), "lanes"),
        (([3], 0, 4, 0), "window"),
    ],
)
def test_impossible_orders_are_refused(arguments, message):
    with pytest.raises(OrderError, match=message):
        Order(*arguments)


def test_impossible_positions_are_refused():
    with pytest.raises(OrderError, match="from 0 on"):
        Order([4], 0).locate(np.array([-1]))
    with pytest.raises(OrderError, match="row"):
        Order([4], 0).find([0], [4], 0)


def test_order_and_cursor_load_neither_torch_nor_dali():
    code = (
        "import sys, gristmill.pipeline, gristmill.pipeline.order, gristmill.pipeline.cursor;"
        "gristmill.pipeline.Order, gristmill.pipeline.Cursor;"
        "print([m for m in ('torch', 'nvidia.dali', 'cv2') if m in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"
