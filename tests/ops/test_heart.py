"""Who is to blame, by what all ranks' hearts tell; and what a report of them looks like."""

import re
import threading

from gristmill.ops.heart import ROWS, Heart, accuse, describe, stack_of
from hypothesis import given
from hypothesis import strategies as st


def test_the_stack_of_a_thread_ends_where_it_stands():
    stack = stack_of(threading.get_ident())
    assert stack[-1][0].endswith("heart.py")
    assert [name for _, _, name in stack if name.startswith("test_")] == [stack[-2][2]]
    assert stack_of(-1) == []


def heart(rank: int, beat: int, **other) -> Heart:
    known = {"phase": "p", "position": 0, "count": 0, "idle": 1.0, "silent": 0.0, "waits": False, "left": False}
    return Heart(
        **{"rank": rank, "host": "h", "pid": rank, "beat": beat, "stack": [("f.py", rank, "g")], **known, **other}
    )


hearts = st.lists(
    st.tuples(st.integers(-1, 2), st.integers(0, 2), st.booleans(), st.booleans(), st.booleans()),
    min_size=1,
    max_size=6,
)


@given(hearts)
def test_blame(ranks: list[tuple[int, int, bool, bool, bool]]):
    """In order: who stopped; who is busy, the furthest behind; who left; who waits, the furthest behind."""
    after: dict[int, Heart | None] = {
        rank: heart(rank, 7, position=position, count=count, waits=waits, left=left)
        for rank, (position, count, waits, left, _) in enumerate(ranks)
    }
    before: dict[int, Heart | None] = {rank: heart(rank, 7 if ranks[rank][-1] else 6) for rank in after}
    kind, suspects = accuse(before, after)
    stopped = [rank for rank, (*_, left, stopped) in enumerate(ranks) if stopped and not left]
    present = [rank for rank, (*_, left, _) in enumerate(ranks) if not left]
    busy = [rank for rank in present if not ranks[rank][2]]
    assert suspects
    if stopped:
        assert (kind, suspects) == ("stopped", stopped)
    elif not busy and len(present) < len(ranks):
        assert (kind, suspects) == ("left", [rank for rank in after if rank not in present])
    else:
        least = min(ranks[rank][:2] for rank in busy or present)
        assert suspects == [rank for rank in busy or present if ranks[rank][:2] == least]
        assert kind == ("all" if len(suspects) == len(ranks) > 1 else "stuck")
    text = describe(before, after)
    assert text.count("stood here:\n") == len(suspects)
    assert all(f"rank {rank} (host h, pid {rank})" in text for rank in suspects[:3] if kind != "all")


def test_a_report_of_a_large_group_stays_short():
    before: dict[int, Heart | None] = {rank: heart(rank, 1) for rank in range(4096)}
    after: dict[int, Heart | None] = {rank: heart(rank, 2, waits=rank != 4000) for rank in before} | {7: None}
    lines = describe(before, after).splitlines()
    assert lines[0] == "rank 7 was never heard"
    after[7] = heart(7, 2, waits=True)
    text = describe(before, after)
    assert text.splitlines()[0].startswith("rank 4000 (host h, pid 4000) makes no progress")
    assert f"... {4096 - ROWS} more" in re.sub(" +", " ", text)
    assert len(text.splitlines()) < ROWS + 10
    alike = describe(before, {rank: heart(rank, 2, stack=[("f.py", 1, "g")]) for rank in before})
    assert alike.startswith("no rank makes progress, and none stands out\n")
    assert alike.count("stood here") == 1
    assert len(alike) < 10_000
