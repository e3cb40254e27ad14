"""The small parts under the loader: buffer, crew, slabs, counters."""

import gc
import threading
import time

import numpy as np
import pytest
from gristmill.pipeline.buffer import Buffer
from gristmill.pipeline.crew import Crew
from gristmill.pipeline.slabs import Slabs
from gristmill.pipeline.stats import Stats, bottleneck
from gristmill.shards.retry import Stopped
from hypothesis import given
from hypothesis import strategies as st

from ..waiting import wait_for


def test_a_buffer_never_holds_more_than_it_may():
    buffer, done = Buffer(2), []

    def produce():
        while (turn := buffer.turn()) is not None:
            assert buffer.depth < 2
            done.append(len(done))
            buffer.put(turn, len(done) - 1)

    thread = threading.Thread(target=produce)
    thread.start()
    for expected in range(50):
        assert buffer.first(60) == expected
        assert buffer.depth <= 2
        buffer.pop()
    buffer.close()
    thread.join(60)
    assert not thread.is_alive()
    assert 50 <= len(done) <= 53


def test_what_ends_a_buffer_stays_until_it_is_restarted():
    buffer = Buffer(3)
    buffer.put(0, "first")
    buffer.put(0, "end", last=True)
    assert buffer.first(1) == "first"
    buffer.pop()
    assert [buffer.first(1) for _ in range(3)] == ["end"] * 3
    buffer.restart(1)
    assert buffer.turn() == 1
    buffer.put(0, "late")  # begun before the restart
    assert buffer.first(0) is None
    buffer.put(1, "new")
    assert buffer.first(1) == "new"


def test_waits_are_booked_on_the_side_that_waits():
    buffer = Buffer(1)
    assert buffer.first(0.05) is None
    assert buffer.starved >= 0.04
    buffer.put(0, 1)

    def pop_late():
        wait_for(lambda: buffer._changed._waiters, 60, every=0.001)  # pyright: ignore[reportAttributeAccessIssue]
        time.sleep(0.05)
        buffer.pop()

    popping = threading.Thread(target=pop_late)
    popping.start()
    assert buffer.turn() == 0
    popping.join(60)
    assert buffer.blocked >= 0.04
    assert buffer.dwell >= 0.04


def test_a_crew_does_all_jobs_and_passes_errors_on():
    crew, done = Crew(3, "gristmill-test"), set()
    crew.run([lambda i=i: done.add(i) for i in range(20)])
    assert done == set(range(20))

    def fail():
        raise KeyError("one")

    with pytest.raises(KeyError):
        crew.run([fail, lambda: done.add(99)])
    assert 99 in done
    assert crew.close(30)
    with pytest.raises(Stopped):
        crew.run([fail])


def test_a_crew_lets_go_of_who_waits_and_leaves_a_hanging_thread_behind():
    crew, gate, entered, seen = Crew(1, "gristmill-test"), threading.Event(), threading.Event(), []

    def hang():
        entered.set()
        gate.wait()

    def wait():
        try:
            crew.run([hang])
        except Stopped:
            seen.append("stopped")

    waiting = threading.Thread(target=wait)
    waiting.start()
    assert entered.wait(60)
    assert not crew.close(0.05)
    waiting.join(60)
    assert seen == ["stopped"]
    gate.set()
    crew._threads[0].join(60)


@given(st.lists(st.integers(0, 200_000), min_size=1, max_size=30), st.integers(0, 2**32 - 1))
def test_a_slab_is_nobody_elses(sizes, seed):
    """Views of slabs, kept and dropped at random: what is kept never changes."""
    slabs, kept, rng = Slabs(), [], np.random.default_rng(seed)
    for number, size in enumerate(sizes):
        slab = slabs.take(size)
        assert slab.shape == (size,)
        slab[:] = number % 251
        kept.append((number % 251, slab[size // 3 : size // 2]))
        del slab
        kept = [one for one in kept if rng.random() < 0.6]
        assert all((view == value).all() for value, view in kept)


def test_slabs_come_back():
    slabs = Slabs()
    first = slabs.take(100_000)
    address, view = first.ctypes.data, first[10:20]
    del first
    gc.collect()
    assert slabs.take(100_000).ctypes.data != address  # somebody still looks into it
    del view
    gc.collect()
    taken = [slabs.take(50_000) for _ in range(2)]
    assert address in {slab.ctypes.data for slab in taken}


@pytest.mark.parametrize(
    ("expected", "spent"),
    [
        ("none", {}),
        ("consumer", {"augment_seconds": 5, "blocked_seconds": 5, "starved_seconds": 1, "hungry_seconds": 0.1}),
        ("augment", {"augment_seconds": 9, "starved_seconds": 9, "hungry_seconds": 0.4, "encoded_blocked_seconds": 6}),
        ("storage", {"read_seconds": 9, "storage_seconds": 8, "starved_seconds": 9, "hungry_seconds": 8}),
        ("reader", {"read_seconds": 9, "storage_seconds": 1, "starved_seconds": 9, "hungry_seconds": 8}),
    ],
)
def test_the_bottleneck_is_who_is_waited_for(expected, spent):
    before = Stats(samples=100, augment_seconds=50.0, blocked_seconds=50.0)
    now = Stats(**{name: value + getattr(before, name) for name, value in spent.items()})
    now.augment_seconds = max(now.augment_seconds, before.augment_seconds)
    now.blocked_seconds = max(now.blocked_seconds, before.blocked_seconds)
    assert bottleneck(now.since(before)) == expected
