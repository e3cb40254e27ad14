"""The cursor counts what was decided, stays small, and refuses whatever would silently be another stream."""

import json
from dataclasses import FrozenInstanceError, replace

import pytest
from gristmill.pipeline.cursor import MAX_SKIPPED, Cursor, CursorError
from hypothesis import given, settings
from hypothesis import strategies as st

START = Cursor(data="a" * 32, seed=7, lanes=64, window=65536)

steps = st.lists(st.tuples(st.integers(1, 4096), st.booleans()), max_size=60)


def walk(steps):
    cursor = START
    for n, committed in steps:
        cursor = cursor.advance(n, committed)
    return cursor


@settings(deadline=None)
@given(steps)
def test_advance_counts_every_sample_once(steps):
    runs = sum(1 for i, (_, ok) in enumerate(steps) if not ok and (i == 0 or steps[i - 1][1]))
    if runs > MAX_SKIPPED:
        with pytest.raises(CursorError, match="stop"):
            walk(steps)
        return
    cursor = walk(steps)
    assert cursor.position == sum(n for n, _ in steps)
    assert cursor.trained == sum(n for n, ok in steps if ok)
    left_out = {p for start, stop in cursor.skipped for p in range(start, stop)}
    at, expected = 0, set()
    for n, ok in steps:
        expected |= set() if ok else set(range(at, at + n))
        at += n
    assert left_out == expected
    assert len(cursor.skipped) == runs  # adjacent steps make one range
    assert Cursor.from_json(cursor.to_json()) == cursor


def test_the_seventeenth_skip_stops_and_an_adjacent_one_does_not():
    cursor = walk([(8, i % 2 == 1) for i in range(2 * MAX_SKIPPED - 1)])
    assert len(cursor.skipped) == MAX_SKIPPED
    assert len(cursor.advance(8, committed=False).skipped) == MAX_SKIPPED
    with pytest.raises(CursorError, match=r"skipped: stop.*position 256"):
        cursor.advance(8, committed=True).advance(8, committed=False)


def test_the_worst_cursor_stays_under_a_kilobyte():
    cursor = replace(
        START,
        data="f" * 64,
        seed=2**64 - 1,
        lanes=2**20,
        window=2**40,
        position=10**15,
        mixture=((0, (0.123456789, 0.876543211)),),
        quarantine=(10**6, "f" * 32),
    )
    for _ in range(MAX_SKIPPED):
        cursor = cursor.advance(65536, committed=False).advance(65536, committed=True)
    assert len(cursor.skipped) == MAX_SKIPPED
    assert len(cursor.to_json().encode()) < 1024


def test_mixture_and_quarantine_come_back():
    cursor = replace(START, mixture=((0, (1.0, 2.0)), (500, (0.5, 0.5)))).noting(3, "abc")
    assert Cursor.from_json(cursor.to_json()) == cursor


def test_a_cursor_cannot_be_changed_in_place():
    with pytest.raises(FrozenInstanceError):
        START.position = 5  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("field", ["data", "seed", "lanes", "window"])
def test_another_stream_is_refused_by_name(field):
    asked = {"manifest_digest": START.data, "seed": START.seed, "lanes": START.lanes, "window": START.window}
    START.check(**asked)
    name = "manifest_digest" if field == "data" else field
    asked[name] = "b" * 32 if field == "data" else asked[name] + 1
    with pytest.raises(CursorError, match=rf"^{field}: .*To resume, "):
        START.check(**asked)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"version": 2}, "version"),
        ({"position": -1}, "position"),
        ({"position": 8}, "position"),  # is not trained + skipped
        ({"trained": 1.5}, "trained"),
        ({"seed": True}, "seed"),
        ({"data": None}, "data"),
        ({"skipped": [[5, 3]]}, "skipped"),
        ({"skipped": [[0, 3], [3, 4]]}, "skipped"),
        ({"skipped": [[3 * i, 3 * i + 1] for i in range(MAX_SKIPPED + 1)]}, "skipped"),
        ({"mixture": [[0, "half"]]}, "mixture"),
        ({"quarantine": [1]}, "quarantine"),
        ({"surprise": 1}, "surprise"),
    ],
)
def test_a_spoiled_cursor_is_refused_by_name(change, field):
    raw = json.loads(START.to_json()) | change
    with pytest.raises(CursorError, match=f"^{field}:"):
        Cursor.from_json(json.dumps(raw))


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null"])
def test_what_is_no_cursor_is_refused(text):
    with pytest.raises(CursorError):
        Cursor.from_json(text)


def test_a_missing_field_is_named():
    raw = json.loads(START.to_json())
    del raw["lanes"]
    with pytest.raises(CursorError, match=r"^lanes: missing"):
        Cursor.from_json(json.dumps(raw))


def test_a_stream_does_not_go_back():
    with pytest.raises(CursorError, match="forward"):
        START.advance(-1, committed=True)


LIVING = replace(START, where="a+b", grown=((0, 0, 5), (0, 1, 7), (900, 0, 6)), removed=((3, "ab"), (0, "")))


def test_what_a_living_data_set_adds_comes_back():
    assert Cursor.from_json(LIVING.to_json()) == LIVING
    LIVING.check(START.data, START.seed, START.lanes, START.window, where="a+b")
    with pytest.raises(CursorError, match=r"^where: .*To resume, "):
        LIVING.check(START.data, START.seed, START.lanes, START.window)


def test_a_plain_cursor_is_written_as_it_always_was():
    assert START.to_json() == (
        '{"data":"aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa","seed":7,"lanes":64,"window":65536,"position":0,"trained":0,'
        '"skipped":[],"mixture":[],"quarantine":[0,""],"version":1}'
    )


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"where": 3}, "where"),
        ({"grown": [[0, 0]]}, "grown"),
        ({"grown": [[5, 0, 3]]}, "grown"),  # from nowhere
        ({"grown": [[0, 0, 5], [7, 0, 5]]}, "grown"),  # by nothing
        ({"grown": [[0, 0, 5], [9, 0, 6], [8, 0, 7]]}, "grown"),
        ({"removed": [[1]]}, "removed"),
        ({"removed": [[-1, ""]]}, "removed"),
    ],
)
def test_a_spoiled_living_cursor_is_refused_by_name(change, field):
    with pytest.raises(CursorError, match=f"^{field}:"):
        Cursor.from_json(json.dumps(json.loads(LIVING.to_json()) | change))


def test_a_change_must_leave_room_for_what_may_be_skipped():
    grown = tuple((1000 * i, 0, i + 1) for i in range(99))
    cursor = replace(START, grown=grown[:9]).fitting("grown")  # more than a plain data set will see
    with pytest.raises(CursorError, match=r"^grown: the cursor has no room"):
        replace(START, grown=grown).fitting("grown")
    for _ in range(MAX_SKIPPED):
        cursor = cursor.advance(3 * 10**10, committed=False).advance(3 * 10**10, committed=True)
    assert len(cursor.to_json()) < 1024
