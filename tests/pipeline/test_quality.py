"""The measures tell a shuffle from none, the working set is what a reader really has open, the remedies help."""

import numpy as np
import pytest
from gristmill.pipeline.order import Order
from gristmill.pipeline.quality import WorkingSetError, check_working_set, compare, size, suggest, working_set
from hypothesis import given, settings
from hypothesis import strategies as st


def test_measures_rank_the_shuffles():
    """40,000 samples in 40 shards: ours with eight windows over all mixes as a full permutation, a buffer does not."""
    counts = np.full(40, 1000)
    rows = {row.name: row for row in compare(Order(counts, 5, 8, 40_000), batch=256)}
    ours, full, small, large, none = rows.values()
    assert list(rows) == [
        "this order",
        "full permutation",
        "webdataset buffer 1000",
        "webdataset buffer 10000",
        "as on disk",
    ]
    assert all(row.samples == 40_000 and row.batch == 256 for row in rows.values())
    assert full.shards == pytest.approx(40, abs=0.2)
    assert full.displacement == pytest.approx(1, abs=0.03)
    assert full.spread == pytest.approx(1, abs=0.03)
    assert ours.shards > 39
    assert ours.spread == pytest.approx(1, abs=0.03)
    assert none.shards < 2
    assert none.displacement == 0
    assert none.spread < 1e-3
    for measure in ("shards", "shard_entropy", "spread", "lag_entropy"):
        values = [getattr(row, measure) for row in (none, small, large, full)]
        assert values == sorted(values), measure
        # Eight lanes take turns, which leaves its mark on the distance from one sample to the next, and on nothing else.
        assert getattr(full, measure) == pytest.approx(getattr(ours, measure), rel=0.05), measure
    assert small.spread < 0.2


def test_a_large_order_is_measured_by_its_beginning():
    counts = np.full(2000, 1000)
    ours, full, small, *_ = compare(Order(counts, 5, 64, 4096), batch=512, limit=20_000)
    assert ours.samples == small.samples == 20_000
    assert full.shards == pytest.approx(2000 * (1 - (1 - 1 / 2000) ** 512), rel=0.02)
    assert 64 < ours.shards < full.shards
    # Two neighbours lie in one window, which spans 64 lanes x 4,069 positions; or just across a window's edge.
    assert ours.spread == pytest.approx(64 * 4069 / 2_000_000, rel=0.05)
    assert ours.displacement == pytest.approx(1, abs=0.1)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(0, 12), min_size=1, max_size=10).filter(any),
    st.integers(1, 12),
    st.integers(1, 20),
    st.integers(1, 6),
    st.integers(1, 4),
    st.sampled_from([1, 2, 4]),
    st.integers(0, 2**32),
)
def test_the_working_set_is_what_is_open(counts, lanes, window, local, ranks_per_node, nodes, seed):
    """Against a walk through an epoch: each lane holds the shards of the window that it is in."""
    ranks = nodes * ranks_per_node
    batch = local * ranks
    order = Order(counts, seed, lanes, window)
    sizes = np.arange(len(counts)) * 10 + 7
    got = working_set(order, sizes, batch=batch, ranks=ranks, ranks_per_node=ranks_per_node)
    # Which lanes a node reads, over enough steps to come round.
    share = local * ranks_per_node
    reads = [
        {(step * batch + node * share + i) % lanes for step in range(lanes) for i in range(share)}
        for node in range(nodes)
    ]
    assert got.lanes == max(len({lane for lane in mine if lane < order.samples}) for mine in reads)
    shard, _ = order.locate(np.arange(order.samples))
    lengths = [len(range(lane, order.samples, lanes)) for lane in range(lanes)]

    def open_at(lane, off):
        total = lengths[lane]
        parts = -(-total // window)
        short, longer = divmod(total, parts)
        off, start = min(off, total - 1), 0
        for part in range(parts):
            stop = start + short + (part < longer)
            if off < stop:
                return {int(shard[lane + k * lanes]) for k in range(start, stop)}
            start = stop
        raise AssertionError

    worst_count = worst_bytes = 0
    for mine in reads:
        for off in range(max(lengths)):
            held = set().union(*(open_at(lane, off) for lane in mine if lengths[lane]))
            worst_count = max(worst_count, len(held))
            worst_bytes = max(worst_bytes, sum(int(sizes[s]) for s in held))
    assert (got.shards, got.bytes) == (worst_count, worst_bytes)


def test_nodes_share_the_lanes_where_slices_line_up():
    order, sizes = Order(np.full(640, 100), 1, 64, 300), np.full(640, 1000)
    whole = working_set(order, sizes, batch=64, ranks=8)
    eighth = working_set(order, sizes, batch=64, ranks=8, ranks_per_node=1)
    assert (whole.lanes, eighth.lanes) == (64, 8)
    assert eighth.shards * 6 < whole.shards <= 64 * 5
    assert working_set(order, sizes, batch=63 * 8, ranks=8, ranks_per_node=1).lanes == 64
    assert working_set(order, sizes) == whole


def test_a_cache_that_is_too_small_is_refused_with_numbers_and_a_remedy():
    order, sizes = Order(np.full(1000, 1000), 1, 64, 65536), np.full(1000, 1 << 20)
    need = working_set(order, sizes)
    assert check_working_set(order, sizes, need.bytes) == need
    with pytest.raises(WorkingSetError, match=r"1000 shards.*1000\.0 MiB.*64 lanes.*200\.0 MiB") as caught:
        check_working_set(order, sizes, 200 << 20)
    words = str(caught.value).replace("=", " ").split()
    lanes, window = int(words[words.index("stream.lanes") + 1]), int(words[words.index("stream.window") + 1])
    check_working_set(Order(order.counts, 1, lanes, window), sizes, 200 << 20)
    with pytest.raises(WorkingSetError) as caught:
        check_working_set(order, sizes, 1000)
    assert "stream.lanes" not in str(caught.value)  # nothing would fit
    assert "give the cache 1000.0 MiB" in str(caught.value)


def test_small_data_sets_are_suggested_one_lane():
    assert suggest([5, 5]) == (1, 1024)
    assert suggest([1_281_167]) == (1, 1 << 21)
    assert suggest(np.full(1000, 4194)) == (1, 1 << 22)
    assert suggest(np.full(100_000, 10_000)) == (64, 65536)
    counts, sizes = np.full(1000, 1000), np.full(1000, 100 << 20)
    lanes, window = suggest(counts, shard_bytes=sizes, budget=20 << 30)
    assert lanes > 1
    assert working_set(Order(counts, 7, lanes, window), sizes).bytes <= 20 << 30
    assert suggest(counts, shard_bytes=sizes, budget=200 << 30) == suggest(counts)


def test_sizes_are_readable():
    assert [size(n) for n in (7, 2048, 5 << 20, 3 << 40, 9000 << 40)] == [
        "7 B",
        "2.0 KiB",
        "5.0 MiB",
        "3.0 TiB",
        "9000.0 TiB",
    ]
