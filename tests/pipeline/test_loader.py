"""The loader gives the same stream however it is cut, refills batch by batch, and leaves nothing behind."""

import threading
import time

import pytest
import torch
from gristmill.pipeline.cursor import Cursor
from gristmill.pipeline.loader import LoaderError
from gristmill.pipeline.reader import Reader

from .pictures import (
    CONFIG,
    PER_SHARD,
    PICTURES,
    Gated,
    N,
    PlainExecutor,
    assert_equal,
    collect,
    load,
    open_files,
    ours,
    part,
)


def test_a_batch_is_what_it_says(manifest, quarantine):
    loader = load(manifest, quarantine, batch=5, start=10)
    with loader:
        batch = next(loader)
        assert batch.position == 10
        assert loader.position == 15
    assert batch.views["global"].shape == (5, 2, 3, 16, 16)
    assert batch.views["local"].shape == (5, 3, 3, 8, 8)
    assert batch.views["local"].dtype == torch.float32
    assert batch.geometry["global"].shape == (5, 2, 2, 3)
    assert batch.geometry["global"].dtype == torch.float32
    assert batch.ids.shape == (5, 2)
    assert batch.keys == [f"k{shard * PER_SHARD + row:03d}" for shard, row in batch.ids.tolist()]


def test_the_stream_does_not_depend_on_how_it_is_cut(manifest, quarantine):
    """Batch size, world size, threads, prefetch and place of start are all the same to it, over three epochs."""
    whole = collect(load(manifest, quarantine, batch=6), 12)
    assert_equal(collect(load(manifest, quarantine, batch=36), 2), whole)
    config = CONFIG.model_copy(update={"prefetch": 5, "reader_threads": 1})
    assert_equal(collect(load(manifest, quarantine, batch=9, start=18, config=config), 6), part(whole, 18, 72))
    ranks = [collect(load(manifest, quarantine, batch=12, world=3, rank=rank), 6) for rank in range(3)]
    for step in range(6):
        for rank in range(3):
            mine, first = part(ranks[rank], 4 * step, 4 * step + 4), 12 * step + 4 * rank
            assert_equal(mine, part(whole, first, first + 4))
    assert sorted(whole[0][:N]) == [f"k{i:03d}" for i in range(N)]


def test_what_is_prefetched_is_not_decided(manifest, quarantine):
    """A loop that is killed after some steps goes on from its cursor, whatever lay ready."""
    whole = collect(load(manifest, quarantine), 9)
    cursor = Cursor(manifest.digest, CONFIG.seed, CONFIG.lanes, CONFIG.window)
    with load(manifest, quarantine) as loader:
        for _ in range(3):
            next(loader)
            cursor = cursor.advance(4, committed=True)
        next(loader)  # delivered, but its step was never decided
    cursor = Cursor.from_json(cursor.to_json())
    cursor.check(manifest.digest, CONFIG.seed, CONFIG.lanes, CONFIG.window)
    assert_equal(collect(load(manifest, quarantine, start=cursor.position), 6), part(whole, 12, 36))


def test_seek_goes_both_ways(manifest, quarantine):
    whole = collect(load(manifest, quarantine, batch=3), 12)
    with load(manifest, quarantine, batch=3) as loader:
        for position in (0, 9, 30, 3, 3, 0):
            loader.seek(position)
            assert loader.position == position
            batch = next(loader)
            assert batch.position == position
            assert torch.equal(batch.views["local"], whole[2]["views.local"][position : position + 3])


def test_one_thread_runs_the_executor(manifest, quarantine):
    executor = PlainExecutor()
    collect(load(manifest, quarantine, executor=executor), 5)
    assert len(executor.threads) == 1
    assert threading.get_ident() not in executor.threads


def test_every_batch_taken_starts_one_more_and_no_more(manifest, quarantine):
    """Refill goes batch by batch, and what lies ready never exceeds the capacity."""
    executor = Gated()
    with load(manifest, quarantine, executor=executor) as loader:
        for _ in range(CONFIG.prefetch):
            assert executor.entered.acquire(timeout=60)
            executor.gate.release()
        for _ in range(5):
            assert not executor.entered.acquire(timeout=0.05)  # the buffer is full
            next(loader)
            assert executor.entered.acquire(timeout=60)  # room for one: the next one begins at once
            executor.gate.release()
        executor.gate.release(100)


def test_reading_goes_on_while_the_executor_works(manifest, quarantine, monkeypatch):
    """Two batches ahead of the one in work, and no more."""
    asked, read = [], Reader.read

    def noting(self, positions, *args):
        asked.extend(positions.tolist())
        return read(self, positions, *args)

    monkeypatch.setattr(Reader, "read", noting)
    executor = Gated()
    loader = load(manifest, quarantine, executor=executor)
    assert executor.entered.acquire(timeout=60)
    deadline = time.monotonic() + 60
    while len(asked) < 12 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert asked == list(range(12))
    executor.gate.release(100)
    loader.close()


def test_close_in_the_middle_of_everything(manifest, quarantine):
    executor = Gated()
    loader = load(manifest, quarantine, executor=executor)
    assert executor.entered.acquire(timeout=60)
    assert len(ours()) >= 2
    closer = threading.Thread(target=loader.close)
    closer.start()
    executor.gate.release(100)
    closer.join(60)
    assert not closer.is_alive()
    assert not ours()
    assert not any(str(manifest.root) in name and name.endswith(".tar") for name in open_files())
    loader.close()
    with pytest.raises(LoaderError, match="closed"):
        next(loader)
    with pytest.raises(LoaderError, match="closed"):
        loader.seek(0)


def test_closing_wakes_a_waiting_consumer(manifest, quarantine):
    executor, seen = Gated(), []
    loader = load(manifest, quarantine, executor=executor)

    def consume():
        try:
            next(loader)
        except LoaderError as error:
            seen.append(error)

    assert executor.entered.acquire(timeout=60)
    consumer = threading.Thread(target=consume)
    consumer.start()
    closer = threading.Thread(target=loader.close)
    closer.start()
    consumer.join(60)
    executor.gate.release(100)
    closer.join(60)
    assert len(seen) == 1


def test_counters(manifest, quarantine):
    with load(manifest, quarantine, batch=6) as loader:
        for _ in range(4):
            next(loader)
        stats = loader.stats
        assert stats.samples == N
        assert stats.bytes == sum(map(len, PICTURES))
        assert stats.ready_capacity == CONFIG.prefetch
        assert 0 <= stats.ready_depth <= stats.ready_capacity
        assert stats.read_seconds > 0
        assert stats.augment_seconds > 0
        assert stats.substituted == stats.quarantined == 0


@pytest.mark.parametrize(
    "options",
    [{"batch": 0}, {"batch": 6, "world": 4}, {"world": 2, "rank": 2}, {"start": -1}, {"stop": 8, "world": 2}],
)
def test_impossible_loaders_are_refused(manifest, quarantine, options):
    with pytest.raises(LoaderError):
        load(manifest, quarantine, **options)


def test_an_end_leaves_a_shorter_batch_and_stays_ended(manifest, quarantine):
    with load(manifest, quarantine, batch=10, stop=N) as loader:
        assert [len(batch.keys) for batch in loader] == [10, 10, 4]
        assert loader.position == N
        assert list(loader) == []
