"""Copies in the cache that went bad, and a disk that takes no more: found, said, and done without."""

from __future__ import annotations

import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
from gristmill.shards.cache import Cache

from ..faulty_http import FaultyServer
from .cached import SIZE, cache_at, content, fetched, flip, taken


def test_a_damaged_copy_is_found_dropped_and_fetched_anew(tmp_path: Path, blob):
    cache = cache_at(tmp_path)
    fetched(cache.fetch("1", blob(1))).release()
    assert not cache.suspect("1"), "a sound copy says that the source is damaged"
    flip(cache, "1")
    reader = fetched(cache.lookup("1"))  # nothing to be seen yet
    assert cache.suspect("1")
    assert "1" not in cache
    with fetched(cache.fetch("1", blob(1))) as lease:
        assert lease.read(0, SIZE) == content(1)
        # The bad copy counts until its last user is done with it.
        assert taken(tmp_path) > 2 * SIZE
    reader.release()
    fetched(cache.fetch("2", blob(2))).release()
    assert [path for path in tmp_path.iterdir() if path.suffix == ".dead"] == []
    assert cache.stats.corrupt == 1


@pytest.mark.parametrize(
    "damage", ["shorter", "rewritten", "no description", "bad description", "flipped before a boot"]
)
def test_damage_that_can_be_seen_is_seen_at_once(tmp_path: Path, blob, damage: str):
    cache = cache_at(tmp_path)
    fetched(cache.fetch("1", blob(1))).release()
    path, about = cache.entries.path("1"), cache.entries.path("1", ".json")
    if damage == "shorter":
        os.truncate(path, SIZE - 1)
    elif damage == "rewritten":
        path.write_bytes(content(2))
    elif damage == "no description":
        about.unlink()
    elif damage == "bad description":
        about.write_text("{")
    else:
        flip(cache, "1")
        about.write_text(json.dumps(json.loads(about.read_text()) | {"boot": "an earlier one"}))
    assert cache.lookup("1") is None
    with fetched(cache.fetch("1", blob(1))) as lease:
        assert lease.read(0, SIZE) == content(1)
    assert (cache.stats.corrupt, cache.stats.fetched) == (1, 2)


def test_after_a_boot_a_sound_shard_is_checked_once(tmp_path: Path, server: FaultyServer, blob):
    cache = cache_at(tmp_path)
    fetched(cache.fetch("1", blob(1))).release()
    about = cache.entries.path("1", ".json")
    about.write_text(json.dumps(json.loads(about.read_text()) | {"boot": "an earlier one"}))
    fetched(cache.lookup("1")).release()
    assert json.loads(about.read_text())["boot"] == cache.entries.boot


def test_another_object_of_that_name_is_not_served(tmp_path: Path, server: FaultyServer, blob):
    cache = cache_at(tmp_path)
    fetched(cache.fetch("1", blob(1))).release()
    old = blob(1).identity()
    fetched(cache.lookup("1", old)).release()
    server.put("/1.tar", content(99))
    assert cache.lookup("1", blob(1).identity()) is None
    assert cache.stats.replaced == 1
    with fetched(cache.fetch("1", blob(1))) as lease:
        assert lease.read(0, 8) == b"00000099"


def fill(path: Path) -> None:
    """Take all that is left of a disk."""
    with suppress(OSError), path.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def test_a_full_disk_sends_readers_to_the_remote_and_says_so_once(small_disk: Path, server: FaultyServer, blob):
    """The disk fills while a shard is on its way, which no looking ahead can prevent."""
    said: list[str] = []
    cache = Cache(small_disk / "cache", 10**9, float, say=said.append, disk_pause=0.0)
    server.put("/1.tar", content(1, 400_000))
    one = blob(1)
    one.size()
    server.fault("drip", rate=400_000, times=1)
    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(cache.fetch, "1", one)
        while cache.stats.bytes == 0:
            time.sleep(0.005)
        fill(small_disk / "other")
        assert job.result() is None
    assert not list((small_disk / "cache").glob("*.partial"))
    (small_disk / "other").write_bytes(bytes(1_000_000))
    assert cache.fetch("3", blob(3)) is None, "what does not fit on the disk is not begun"
    assert one.read(10, 100) == content(1, 400_000)[10:110]
    (small_disk / "other").unlink()
    with fetched(cache.fetch("1", one)) as lease:
        assert lease.read(0, 10**6) == content(1, 400_000)
    assert cache.stats.fallbacks["disk"] >= 1
    assert len(said) == 1
    assert "is full" in said[0]
    assert str(small_disk) in said[0]


def test_a_disk_that_others_fill_makes_the_cache_smaller(small_disk: Path, blob):
    cache = Cache(small_disk / "cache", 10**9, float)
    for number in range(4):
        fetched(cache.fetch(str(number), blob(number))).release()
    (small_disk / "other").write_bytes(bytes(1_048_576 - 4 * SIZE - 60_000 - 40_000))
    fetched(cache.fetch("0", blob(0))).release()
    with fetched(cache.fetch("9", blob(9))) as lease:
        assert lease.read(0, 8) == b"00000009"
    assert cache.stats.evictions >= 1
    assert "0" in cache
    assert "3" not in cache
