"""The choice of what to give up: enough, no more than that, never what is needed sooner, and as good as any choice."""

from functools import cache

from gristmill.shards.eviction import Candidate, choose_victims
from hypothesis import given, settings
from hypothesis import strategies as st

INF = float("inf")
candidates = st.lists(st.tuples(st.integers(1, 9), st.sampled_from([1.0, 2.0, 3.0, 5.0, 8.0, INF])), max_size=8).map(
    lambda rows: [Candidate(f"s{number}", size, when) for number, (size, when) in enumerate(rows)]
)


@given(candidates, st.integers(0, 30), st.sampled_from([-INF, 1.0, 3.0, INF]))
def test_the_choice_is_enough_and_nothing_in_it_is_idle(rows: list[Candidate], needed: int, before: float):
    eligible = [row for row in rows if row.next_use > before]
    chosen = choose_victims(rows, needed, before)
    if chosen is None:
        assert sum(row.bytes for row in eligible) < needed
        return
    free = sum(row.bytes for row in chosen)
    assert free >= needed
    assert all(row in eligible for row in chosen)
    assert len(set(chosen)) == len(chosen)
    if needed <= 0:
        assert chosen == []
    for row in chosen:
        assert free - row.bytes < needed, "it could have been kept"


@given(candidates, st.integers(1, 8))
def test_of_equal_sizes_the_latest_go(rows: list[Candidate], count: int):
    rows = [Candidate(row.name, 10, row.next_use) for row in rows]
    chosen = choose_victims(rows, 10 * count, -INF)
    if chosen is None:
        assert len(rows) < count
        return
    kept = [row.next_use for row in rows if row not in chosen]
    assert len(chosen) == count
    assert not kept or max(kept) <= min(row.next_use for row in chosen)


def run(trace: tuple[int, ...], room: int) -> int:
    """Fetches of our policy over a trace of shards of one size, `room` of which fit."""
    here: set[int] = set()
    fetches = 0
    for at, shard in enumerate(trace):
        if shard in here:
            continue
        fetches += 1
        later = {one: next((n for n in range(at, len(trace)) if trace[n] == one), INF) for one in here}
        chosen = choose_victims([Candidate(str(one), 1, later[one]) for one in here], len(here) + 1 - room, -INF)
        assert chosen is not None
        here -= {int(one.name) for one in chosen}
        here.add(shard)
        assert len(here) <= room
    return fetches


def fewest(trace: tuple[int, ...], room: int) -> int:
    """The least that any choice of what to give up can do, by trying them all."""

    @cache
    def best(at: int, here: frozenset[int]) -> int:
        if at == len(trace):
            return 0
        if trace[at] in here:
            return best(at + 1, here)
        if len(here) < room:
            return 1 + best(at + 1, here | {trace[at]})
        return 1 + min(best(at + 1, (here - {one}) | {trace[at]}) for one in here)

    return best(0, frozenset())


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=14).map(tuple), st.integers(1, 4))
def test_no_choice_of_victims_fetches_less(trace: tuple[int, ...], room: int):
    assert run(trace, room) == fewest(trace, room)
