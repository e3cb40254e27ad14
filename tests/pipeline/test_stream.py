"""Filters, mixture, growth and removals together: exactly once, elastic, and resumed from a cursor or refused by name."""

import hashlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from gristmill.pipeline.cursor import MAX_SKIPPED, Cursor, CursorError
from gristmill.pipeline.order import Order
from gristmill.pipeline.philox import SUBSTITUTE, integers
from gristmill.pipeline.selection import Selection
from gristmill.pipeline.source import Removals, Source
from gristmill.pipeline.stream import Stream
from gristmill.shards.tombstones import Tombstones
from hypothesis import given, settings
from hypothesis import strategies as st

from .rows import write_rows

seeds = st.integers(0, 2**64 - 1)


def source(counts, *, name="a", weight=1.0, masks=None, removed=()) -> Source:
    """A data set without a folder. `masks`: which rows a filter selects, a shard each."""

    def digest(n):
        return hashlib.blake2b(repr((name, list(counts[:n]))).encode(), digest_size=16).hexdigest()

    places = np.array(list(removed), np.int64).reshape(-1, 2)
    return Source(
        name,
        np.array(counts, np.int64),
        digest,
        weight,
        None if masks is None else Selection(counts, iter(masks[: len(counts)])),
        Removals(places, len(places), lambda n: f"{hash(tuple(map(tuple, places[:n].tolist()))):x}")
        if removed
        else None,
    )


def ids(stream, start, stop):
    return list(map(tuple, np.stack(stream.locate(np.arange(start, stop)), axis=1).tolist()))


def at(stream: Stream, position: int) -> Cursor:
    return stream.cursor.advance(position, committed=True)


@st.composite
def sources_(draw):
    found = []
    for number in range(draw(st.integers(1, 3))):
        counts = draw(st.lists(st.integers(0, 15), min_size=1, max_size=5))
        masks = None
        if draw(st.booleans()):
            masks = [np.array(draw(st.lists(st.booleans(), min_size=n, max_size=n)), bool) for n in counts]
        if not sum(map(sum, masks) if masks else counts):
            counts, masks = [3], None
        weight = draw(st.sampled_from([1.0, 0.5, 3.0, 0.1]))
        found.append(source(counts, name=f"set{number}", weight=weight, masks=masks))
    return found


@settings(deadline=None, max_examples=20)
@given(sources_(), seeds, st.integers(1, 9), st.integers(1, 20), st.data())
def test_each_selected_sample_once_an_epoch_through_any_topology(found, seed, lanes, window, data):
    """Over (shards, samples, filters, mixing, lanes, window), read by any ranks in any batches that change on the way."""
    stream = Stream(found, seed, lanes, window)
    assert stream.samples == sum(int(one.selected.sum()) for one in found)
    got, position = [], 0
    for ranks in (1, 2, 4, 3):
        local, restarted = data.draw(st.integers(1, 60)), Stream(found, seed, lanes, window)
        slices = [np.arange(local) + position + rank * local for rank in range(ranks)]
        read = {rank: restarted.locate(slices[rank]) for rank in data.draw(st.permutations(range(ranks)))}
        for rank in range(ranks):
            got += zip(*(part.tolist() for part in read[rank]), strict=True)
        position += ranks * local
    assert got == ids(stream, 0, position)
    sets = [int(s) for s in stream.split(np.array([shard for shard, _ in got]))[0]]
    for number, one in enumerate(found):
        mine = [place for place, which in zip(got, sets, strict=True) if which == number]
        wanted = sorted(
            (s + int(stream.first[number]), r)
            for s, n in enumerate(one.counts.tolist())
            for r in range(n)
            if one.selection is None or one.selection.holds([s], [r])[0]
        )
        epochs = [mine[i : i + len(wanted)] for i in range(0, len(mine), len(wanted))]
        assert all(sorted(epoch) == wanted for epoch in epochs[:-1])
        for epoch in epochs[-1:]:  # a light set may not have come yet
            assert len(set(epoch)) == len(epoch)
            assert set(epoch) <= set(wanted)
        assert stream.epochs(position)[number] == len(mine) // len(wanted)
    assert stream.epoch(position) == min(stream.epochs(position))


def test_one_plain_data_set_is_the_plain_order():
    counts = [5, 0, 7, 1, 20]
    stream, order = Stream([source(counts)], 1234, 3, 4), Order(counts, 1234, 3, 4)
    assert ids(stream, 0, 200) == ids(order, 0, 200)
    pool = stream.pool(17)
    assert pool.samples == 33
    assert ids(pool, 0, 33) == ids(order.pool(17), 0, 33)
    assert not stream.removed(*stream.locate(np.arange(100))).any()


def test_data_sets_of_one_shape_have_orders_of_their_own():
    stream = Stream([source([50, 50], name="a"), source([50, 50], name="b")], 5, 1, 100)
    a, b = ([i for i, _ in ids(order, 0, 100)] for order in stream.orders)
    assert a != b


def test_golden_values():
    """Part of the contract, as the plain order is."""
    masks = [np.arange(n) % 3 > 0 for n in (9, 30)]
    stream = Stream([source([9, 30], name="a", masks=masks), source([20], name="b", weight=0.5)], 99, 2, 8)
    assert ids(stream, 0, 14) == GOLDEN


GOLDEN = [
    (2, 1),
    (1, 1),
    (1, 17),
    (0, 5),
    (1, 16),
    (0, 2),
    (2, 10),
    (1, 14),
    (0, 1),
    (1, 20),
    (0, 4),
    (1, 11),
    (0, 7),
    (1, 19),
]


def test_the_substitutes_pool_is_what_is_read():
    masks = [np.array([True, False, True]), np.array([False] * 4)]
    stream = Stream([source([3, 4], masks=masks), source([2, 2], name="b")], 1, 1, 8)
    source_, _ = stream.mixing.at(np.arange(50))
    for position, which in enumerate(source_.tolist()):
        pool = stream.pool(position)
        draws = integers(1, [position], SUBSTITUTE, 40, pool.samples)[0]
        places = set(zip(*(part.tolist() for part in pool.locate(draws)), strict=True))
        assert places == ({(0, 0), (0, 2)}, {(2, 0), (2, 1), (3, 0), (3, 1)})[which]


def test_resumed_it_goes_on_and_a_cursor_of_old_is_taken():
    found = [source([9, 8, 7])]
    stream = Stream(found, 3, 2, 8)
    cursor = Cursor.from_json(at(stream, 40).to_json())
    assert ids(Stream(found, 3, 2, 8, cursor=cursor), 0, 99) == ids(stream, 0, 99)
    old = Cursor(data=found[0].digest(3), seed=3, lanes=2, window=8, position=40, trained=40)
    assert "grown" not in old.to_json()
    again = Stream(found, 3, 2, 8, cursor=old)
    assert ids(again, 0, 99) == ids(stream, 0, 99)
    assert again.cursor == cursor


def test_appended_shards_wait_for_the_next_epoch_or_a_position():
    counts = [9, 8, 7, 30]
    old = Stream([source(counts[:3])], 3, 2, 8)
    for position, boundary in ((0, 0), (10, 24), (24, 24), (25, 48)):
        new = Stream([source(counts)], 3, 2, 8, cursor=at(old, position))
        assert ids(new, 0, boundary) == ids(old, 0, boundary)
        assert sorted(ids(new, boundary, boundary + 54)) == sorted(
            (s, r) for s, n in enumerate(counts) for r in range(n)
        )
        if position:
            assert new.cursor.grown == ((0, 0, 3), (boundary, 0, 4))
        assert new.cursor.data == source(counts).digest(4)
        # A restart, before or behind the boundary, changes nothing any more.
        for later in (position, 60):
            cursor = replace(new.cursor, position=later, trained=later)
            again = Stream([source(counts)], 3, 2, 8, cursor=Cursor.from_json(cursor.to_json()))
            assert again.cursor == cursor
            assert ids(again, 0, 150) == ids(new, 0, 150)
    named = Stream([source(counts)], 3, 2, 8, cursor=at(old, 10), take_up=13)
    assert ids(named, 0, 13) == ids(old, 0, 13)
    assert sorted(ids(named, 0, 54)) == sorted((s, r) for s, n in enumerate(counts) for r in range(n))
    never = Stream([source(counts)], 3, 2, 8, cursor=at(old, 10), take_up="never")
    assert never.waiting == {"a": 1}
    assert ids(never, 0, 99) == ids(old, 0, 99)
    assert never.cursor == at(old, 10)
    with pytest.raises(CursorError, match=r"^grown: .*position 9"):
        Stream([source(counts)], 3, 2, 8, cursor=at(old, 10), take_up=9)


def test_it_may_grow_again_before_the_first_growth_took_effect():
    counts = [9, 8, 7, 30, 5]
    stream = Stream([source(counts[:3])], 3, 2, 8)
    stream = Stream([source(counts[:4])], 3, 2, 8, cursor=at(stream, 10))
    stream = Stream([source(counts)], 3, 2, 8, cursor=stream.cursor)
    assert stream.cursor.grown == ((0, 0, 3), (24, 0, 5))
    assert sorted(ids(stream, 24, 24 + 59)) == sorted((s, r) for s, n in enumerate(counts) for r in range(n))


def test_a_mixed_data_set_grows_at_its_own_epoch():
    def sets(n):
        return [source([40, 40], name="a", weight=3.0), source([9, 8, 7][:n], name="b")]

    old = Stream(sets(2), 3, 2, 8)
    new = Stream(sets(3), 3, 2, 8, cursor=at(old, 30))
    boundary = new.cursor.grown[-1][0]
    assert boundary > 30
    assert old.mixing.counts(boundary)[1] % 17 == 0
    assert ids(new, 0, boundary) == ids(old, 0, boundary)
    mine = [place for place in ids(new, boundary, boundary + 400) if place[0] >= 2][:24]
    assert sorted(mine) == [(2 + s, r) for s, n in enumerate([9, 8, 7]) for r in range(n)]
    assert [i for i in ids(new, 0, 400) if i[0] < 2] == [i for i in ids(old, 0, 400) if i[0] < 2]


def test_weights_change_at_a_position_and_a_data_set_joins():
    def sets(*weights):
        return [source([40, 40], name=f"set{i}", weight=weight) for i, weight in enumerate(weights)]

    old = Stream(sets(1.0, 1.0), 3, 2, 8)
    cursor = at(old, 300)
    with pytest.raises(CursorError, match=r"^mixture: the weights were \[1.0, 1.0\].*300 or later"):
        Stream(sets(1.0, 3.0), 3, 2, 8, cursor=cursor)
    with pytest.raises(CursorError, match=r"^mixture"):
        Stream(sets(1.0, 3.0), 3, 2, 8, cursor=cursor, mixture_from=299)
    assert Stream(sets(2.0, 2.0), 3, 2, 8, cursor=cursor).cursor == cursor  # the same proportions
    new = Stream(sets(1.0, 3.0), 3, 2, 8, cursor=cursor, mixture_from=310)
    assert new.cursor.mixture == ((0, (1.0, 1.0)), (310, (1.0, 3.0)))
    assert ids(new, 0, 310) == ids(old, 0, 310)
    assert (new.mixing.counts(310 + 1024) - new.mixing.counts(310)).tolist() == [256, 768]
    with pytest.raises(CursorError, match=r"^mixture: set2 is new"):
        Stream(sets(1.0, 3.0, 4.0), 3, 2, 8, cursor=new.cursor)
    third = Stream(sets(1.0, 3.0, 4.0), 3, 2, 8, cursor=at(new, 100), mixture_from=500)
    assert ids(third, 0, 500) == ids(new, 0, 500)
    assert (third.mixing.counts(500 + 1024) - third.mixing.counts(500)).tolist() == [128, 384, 512]
    again = Stream(sets(1.0, 3.0, 4.0), 3, 2, 8, cursor=Cursor.from_json(third.cursor.to_json()))
    assert again.cursor == third.cursor
    single = Stream(sets(1.0), 3, 2, 8)
    joined = Stream(sets(1.0, 1.0), 3, 2, 8, cursor=at(single, 50), mixture_from=64)
    assert ids(joined, 0, 64) == ids(single, 0, 64)
    with pytest.raises(CursorError, match=r"^data: the checkpoint mixes 2 data sets"):
        Stream(sets(1.0), 3, 2, 8, cursor=joined.cursor)


def test_whatever_does_not_fit_is_refused_by_its_field():
    masks = [np.array([True, False, True, True]), np.array([True] * 5)]
    other = [np.array([True, True, False, True]), np.array([True] * 5)]
    stones = [(0, 2), (1, 1)]
    mine = source([4, 5], masks=masks, removed=stones)
    cursor = at(Stream([mine], 3, 2, 8), 4)
    Stream([mine], 3, 2, 8, cursor=cursor)
    Stream([source([4, 5], masks=masks, removed=[*stones, (1, 4)])], 3, 2, 8, cursor=cursor)  # more may be removed
    for spoiled, seed, lanes, window, field in (
        (mine, 4, 2, 8, "seed"),
        (mine, 3, 3, 8, "lanes"),
        (mine, 3, 2, 9, "window"),
        (source([4, 5], name="b", masks=masks, removed=stones), 3, 2, 8, "data"),
        (source([4], masks=masks, removed=stones), 3, 2, 8, "grown"),
        (source([4, 5], removed=stones), 3, 2, 8, "where"),
        (source([4, 5], masks=other, removed=stones), 3, 2, 8, "where"),
        (source([4, 5], masks=masks), 3, 2, 8, "removed"),
        (source([4, 5], masks=masks, removed=stones[:1]), 3, 2, 8, "removed"),
        (source([4, 5], masks=masks, removed=stones[::-1]), 3, 2, 8, "removed"),
    ):
        with pytest.raises(CursorError, match=f"^{field}: "):
            Stream([spoiled], seed, lanes, window, cursor=cursor)
    with pytest.raises(CursorError, match=r"^grown: does not tell"):
        Stream([mine], 3, 2, 8, cursor=replace(cursor, grown=((0, 1, 2),)))


def test_a_removal_moves_nothing_and_is_on_record():
    old = Stream([source([40, 50]), source([9], name="b")], 3, 2, 8)
    new = Stream([source([40, 50], removed=[(0, 7), (1, 49)]), source([9], name="b", removed=[(0, 0)])], 3, 2, 8)
    assert ids(new, 0, 400) == ids(old, 0, 400)
    gone = new.removed(*new.locate(np.arange(400)))
    assert {place for place, out in zip(ids(new, 0, 400), gone, strict=True) if out} == {(0, 7), (1, 49), (2, 0)}
    resumed = Stream(new.sources, 3, 2, 8, cursor=at(old, 100))
    assert [count for count, _ in resumed.cursor.removed] == [2, 1]


def test_the_cursor_stays_under_a_kilobyte_or_says_so():
    masks = [np.arange(n) % 3 > 0 for n in (9, 30, 5, 6)]
    found = [
        source([9, 30, 5, 6], name=n, masks=masks, removed=[(0, 1)], weight=w) for n, w in (("a", 0.7), ("b", 0.3))
    ]
    cursor = Stream(found, 2**64 - 1, 64, 65536).cursor.noting(10**6, "f" * 32)
    for _ in range(MAX_SKIPPED):
        cursor = cursor.advance(10**9, committed=False).advance(10**9, committed=True)
    assert len(cursor.to_json()) < 1024
    cursor = Stream(found, 3, 2, 8).cursor
    for change in range(1, 99):
        cursor = cursor.advance(1000, committed=True)
        found = [replace(found[0], weight=0.5 + change % 2 / 10), *found[1:]]
        try:
            cursor = Stream(found, 3, 2, 8, cursor=cursor, mixture_from=cursor.position).cursor
        except CursorError:
            break
    assert 4 < change < 98
    with pytest.raises(CursorError, match=r"^mixture: the cursor has no room"):
        Stream(found, 3, 2, 8, cursor=cursor, mixture_from=cursor.position)
    for _ in range(MAX_SKIPPED):  # there still is room for all that a run may skip
        cursor = cursor.advance(10**9, committed=False).advance(10**9, committed=True)
    assert len(cursor.to_json()) < 1024


def test_a_billion_samples_cost_only_their_shards():
    """Mixed of two and grown in the middle of an epoch: the memory of a process that seeks and looks at 2,048 ids."""
    code = """
import numpy as np
from gristmill.pipeline.source import Source
from gristmill.pipeline.stream import Stream
counts = np.full(100_000, 10_000)
def sets(n):
    return [Source(name, counts[:n], lambda shards: f"{shards:032x}") for name in "ab"]
old = Stream(sets(45_000), 3)
new = Stream(sets(50_000), 3, cursor=old.cursor.advance(300_000_000, True), take_up=300_000_000)
ids = np.stack(new.locate(np.arange(654_321_987, 654_321_987 + 2048)), axis=1)
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(new.samples, len(np.unique(ids, axis=0)), int(peak.split()[1]) // 1024, len(new.cursor.to_json()))
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    samples, distinct, megabytes, state = map(int, ran.stdout.split())
    assert samples == 10**9
    assert distinct == 2048
    assert megabytes < 200
    assert state < 400


def test_from_a_folder(tmp_path: Path):
    """With real manifests: columns, digests of the first shards, and the tombstones file."""
    data = write_rows(tmp_path / "a", [20, 30])
    stream = Stream([Source.of(data, where="width > 3")], 1, 2, 8)
    for shard, row in ids(stream, 0, stream.samples):
        assert data.rows(shard).width[row] > 3
    cursor = at(stream, 10)
    assert cursor.data == data.digest
    Tombstones.of(data).remove(data, ["a-00003"], "asked")
    grown = write_rows(tmp_path / "a", [20, 30, 40])
    again = Stream([Source.of(grown, where="width > 3")], 1, 2, 8, cursor=cursor)
    assert again.cursor.data == grown.digest != data.digest
    assert again.cursor.removed == ((1, Tombstones.of(grown).digest()),)
    assert ids(again, 0, stream.samples) == ids(stream, 0, stream.samples)
    assert again.cursor.grown[-1] == (stream.samples, 0, 3)
    selection = again.sources[0].selection
    assert selection is not None
    assert json.loads(again.cursor.to_json())["where"] == selection.digest()
    assert again.removed([0, 0], [3, 4]).tolist() == [True, False]
