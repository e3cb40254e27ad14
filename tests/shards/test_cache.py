"""The shared cache of a node: its budget, its locks, its disk, and what kills leave behind. All for real."""

from __future__ import annotations

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random

import pytest
from gristmill.shards.blob import LocalBlob
from gristmill.shards.cache import Cache, CacheError, Lease
from gristmill.shards.client import Client
from gristmill.shards.errors import GristmillError
from gristmill.shards.remote import HttpBlob
from gristmill.shards.retry import ChangedError, Stopped, StorageError
from hypothesis import given, settings
from hypothesis import strategies as st

from ..faulty_http import FaultyServer
from .cached import ENTRY, QUICK, SIZE, cache_at, content, fetched, flip, taken

NEVER = float("inf")


def test_a_shard_is_fetched_once_and_then_there(tmp_path: Path, server: FaultyServer, blob):
    cache = cache_at(tmp_path)
    assert "3" not in cache
    assert cache.lookup("3") is None
    with cache.use("3", blob(3)) as path:
        assert path is not None
        assert path.read_bytes() == content(3)
    asked = len(server.asked())
    with fetched(cache.lookup("3")) as lease:
        assert lease.read(8, 16) == content(3)[8:24]
        assert lease.read(SIZE - 4, 100) == content(3)[-4:]
    with fetched(Cache(tmp_path, 10 * ENTRY, float).fetch("3", blob(3))) as lease:
        assert lease.size == SIZE
    assert len(server.asked()) == asked, "a hit asks no network"
    stats = cache.stats
    assert (stats.hits, stats.misses, stats.fetched, stats.bytes) == (1, 1, 1, SIZE)
    assert "3" in cache
    assert sorted(path.suffix for path in tmp_path.iterdir()) == ["", ".json", ".shard"]


def test_any_blob_will_do(tmp_path: Path):
    source = tmp_path / "source.tar"
    source.write_bytes(content(1))
    with cache_at(tmp_path / "cache").use("1", LocalBlob(source)) as path:
        assert path is not None
        assert path.read_bytes() == content(1)


def test_what_is_needed_last_goes_and_what_is_in_use_stays(tmp_path: Path, blob):
    cache = cache_at(tmp_path, 3)
    held = fetched(cache.fetch("9", blob(9)))
    for number in (1, 2):
        fetched(cache.fetch(str(number), blob(number))).release()
    fetched(cache.fetch("3", blob(3))).release()
    assert ["9" in cache, "1" in cache, "2" in cache, "3" in cache] == [True, True, False, True]
    assert held.read(0, SIZE) == content(9)
    held.release()
    fetched(cache.fetch("0", blob(0))).release()
    assert "9" not in cache
    assert (cache.stats.evictions, cache.stats.fallbacks) == (2, {})
    assert taken(tmp_path) <= cache.budget


def test_no_room_is_no_error(tmp_path: Path, blob):
    cache = cache_at(tmp_path, 2)
    leases = [fetched(cache.fetch(str(number), blob(number))) for number in (1, 2)]
    assert cache.fetch("3", blob(3)) is None
    with cache.use("3", blob(3)) as path:
        assert path is None
    assert cache.stats.fallbacks == {"no room": 2}
    small = Cache(tmp_path / "small", SIZE // 2, float)
    assert small.fetch("1", blob(1)) is None
    assert small.stats.fallbacks == {"too large": 1}
    for lease in leases:
        lease.release()
    fetched(cache.fetch("3", blob(3))).release()


def test_what_is_needed_sooner_makes_no_room_for_what_is_needed_later(tmp_path: Path, blob):
    cache = cache_at(tmp_path, 2)
    for number in (1, 2):
        fetched(cache.fetch(str(number), blob(number))).release()
    assert cache.fetch("5", blob(5), needed=5) is None
    fetched(cache.fetch("0", blob(0), needed=0)).release()
    assert ["0" in cache, "1" in cache, "2" in cache] == [True, True, False]


def test_room_is_made_only_if_it_suffices(tmp_path: Path, server: FaultyServer, blob):
    server.put("/11.tar", content(11, 3 * SIZE))
    cache = cache_at(tmp_path, 4)
    pinned = [fetched(cache.fetch(str(number), blob(number))) for number in (1, 2)]
    for number in (7, 8):
        fetched(cache.fetch(str(number), blob(number))).release()
    assert cache.fetch("11", blob(11)) is None
    assert "7" in cache
    assert "8" in cache
    for lease in pinned:
        lease.release()


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["fetch", "prefetch", "release", "drop"]), st.integers(0, 5)), min_size=1, max_size=25
    ),
    st.integers(1, 6),
    st.randoms(use_true_random=False),
)
def test_never_over_budget_and_never_without_what_is_in_use(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, int]], room: int, rng: Random
):
    """Against a model: what may stay does, what is in use stays, what comes is whole, and the budget holds throughout."""
    folder = tmp_path_factory.mktemp("cache")
    when = {str(number): rng.choice([1.0, 2.0, 3.0, NEVER]) for number in range(6)}
    sizes = {str(number): 1000 * (number + 1) for number in range(6)}
    cache = Cache(folder, room * 3000, when.__getitem__)
    source = {}
    for key, size in sizes.items():
        path = folder.with_name(f"{folder.name}-{key}")
        path.write_bytes(bytes([int(key)]) * size)
        source[key] = LocalBlob(path)
    held: dict[str, list[Lease]] = {key: [] for key in sizes}
    for what, number in steps:
        key = str(number)
        before = {one for one in sizes if one in cache}
        if what in ("fetch", "prefetch"):
            needed = when[key] if what == "prefetch" else -NEVER
            lease = cache.fetch(key, source[key], needed=needed)
            if lease is not None:
                held[key].append(lease)
            gone = before - {one for one in sizes if one in cache}
            assert not any(held[one] for one in gone)
            assert all(when[one] > needed for one in gone)
            if lease is None:
                assert gone == set()
        elif what == "release" and held[key]:
            held[key].pop().release()
        elif what == "drop" and key in cache and not held[key]:
            flip(cache, key)
            assert cache.suspect(key)
        assert taken(folder) <= cache.budget
        for one, leases in held.items():
            for lease in leases:
                assert lease.read(0, 10**6) == bytes([int(one)]) * sizes[one]
    for leases in held.values():
        for lease in leases:
            lease.release()


def test_a_fetch_that_was_cut_goes_on_where_it_stopped(tmp_path: Path, server: FaultyServer, blob):
    cache, one = cache_at(tmp_path), blob(1)
    one.size()
    server.fault("end", after=60_000)
    server.fault("status", code=403)  # ends it at once
    with pytest.raises(StorageError, match="is refused"):
        cache.fetch("1", one)
    with fetched(cache.fetch("1", one)) as lease:
        assert lease.read(0, SIZE) == content(1)
    assert (cache.stats.resumed_bytes, cache.stats.bytes) == (60_000, SIZE)
    assert not cache.suspect("1"), "what was there before is part of the digest"


@pytest.mark.parametrize("sound", [True, False])
def test_a_kill_just_before_the_last_rename_costs_nothing(tmp_path: Path, server: FaultyServer, blob, sound: bool):
    cache = cache_at(tmp_path)
    fetched(cache.fetch("1", blob(1))).release()
    if not sound:
        flip(cache, "1")
    cache.entries.path("1").rename(cache.entries.path("1", ".partial"))
    with fetched(cache.fetch("1", blob(1))) as lease:
        assert lease.read(0, SIZE) == content(1)
    assert cache.stats.resumed_bytes == (SIZE if sound else 0)
    assert cache.stats.bytes == (SIZE if sound else 2 * SIZE)


@pytest.mark.parametrize("why", ["replaced", "not vouched for"])
def test_half_of_another_object_is_not_continued(tmp_path: Path, server: FaultyServer, blob, why: str):
    server.etag = server.modified = why == "replaced"
    first = blob(1)
    first.size()
    server.fault("end", after=60_000)
    server.fault("status", code=403)  # ends it at once
    cache = cache_at(tmp_path)
    with pytest.raises(StorageError, match="is refused"):
        cache.fetch("1", first)
    assert [path.stat().st_size for path in tmp_path.glob("*.partial")] == [60_000]
    server.put("/1.tar", content(7))
    with fetched(cache.fetch("1", HttpBlob(server.url("/1.tar"), Client(QUICK)))) as lease:
        assert lease.read(0, SIZE) == content(7)
    assert cache.stats.resumed_bytes == 0


def test_an_object_replaced_during_the_fetch_is_an_error_and_leaves_nothing(tmp_path: Path, server: FaultyServer, blob):
    one = blob(1)
    one.size()
    server.fault("drip", rate=200_000)
    cache = cache_at(tmp_path)
    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(cache.fetch, "1", one)
        while cache.stats.bytes == 0:
            time.sleep(0.005)
        server.put("/1.tar", content(2))
        server.fault("status", code=503)  # for whoever asks again
        for connection in list(server._open):
            connection.shutdown(2)
        with pytest.raises(ChangedError, match="was replaced"):
            job.result()
    assert not list(tmp_path.glob("*.partial"))


def test_a_server_that_ignores_ranges_fills_a_cache_too(tmp_path: Path, server: FaultyServer, blob):
    server.ranges = False
    with fetched(cache_at(tmp_path).fetch("1", blob(1))) as lease:
        assert lease.read(500, 10) == content(1)[500:510]


def test_a_fetch_can_be_called_off(tmp_path: Path, server: FaultyServer, blob):
    cache, stop = cache_at(tmp_path), threading.Event()
    one = blob(1)
    one.size()
    server.fault("stall", after=5000, path="/1.tar")
    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(cache.fetch, "1", one, stop=stop)
        while cache.stats.bytes == 0:
            time.sleep(0.005)
        stop.set()
        with pytest.raises(Stopped):
            job.result()
    with fetched(cache.fetch("1", one)) as lease:
        assert lease.read(0, SIZE) == content(1)
    assert cache.stats.resumed_bytes == 5000


def test_a_folder_that_cannot_be_one(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(CacheError, match="cannot be a cache") as caught:
        Cache(tmp_path / "file", 10, float)
    assert isinstance(caught.value, GristmillError)


def test_a_fork_does_not_take_leases_along(tmp_path: Path, blob):
    cache = cache_at(tmp_path)
    lease = fetched(cache.fetch("1", blob(1)))
    child = os.fork()
    if child == 0:
        try:
            lease.read(0, 1)
        except OSError:
            lease.release()
            mine = cache.lookup("1")
            os._exit(0 if mine is not None and mine.read(0, 8) == b"00000001" else 2)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert lease.read(0, 8) == b"00000001"
    lease.release()
