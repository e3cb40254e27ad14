"""One cache shared by several processes, some of which are killed."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from gristmill.shards.client import Client
from gristmill.shards.remote import HttpBlob

from ..faulty_http import FaultyServer
from ..workers import Workers
from .cached import ENTRY, QUICK, SIZE, cache_at, content, fetched, taken

IMPORTS = """
    import json, os, sys, time
    from gristmill.shards.cache import Cache
    from gristmill.shards.client import Client
    from gristmill.shards.remote import HttpBlob
    from gristmill.shards.retry import RetryPolicy

    def begin(folder, budget):
        client = Client(RetryPolicy(deadline=20, first_pause=.005, longest_pause=.05, stall_timeout=60))
        return Cache(folder, budget, float), lambda number: HttpBlob(f"{url}/{number}.tar", client)
"""


@pytest.fixture(scope="module")
def workers() -> Iterator[Workers]:
    with Workers(IMPORTS) as workers:
        yield workers


def test_processes_share_a_cache_within_its_budget(tmp_path: Path, server: FaultyServer, workers: Workers):
    """Four ranks read twelve shards in orders of their own; four fit. Bytes right, budget kept, few fetched twice."""
    code = """
        cache, blob = begin(folder, budget)
        for number in numbers:
            lease = cache.fetch(str(number), blob(number), wait=10)
            data = lease.read(0, 10**6) if lease else blob(number).read(0, 10**6)
            assert data == (b"%08d" % number) * 12500, number
            if lease:
                lease.release()
        print(json.dumps([cache.stats.hits, cache.stats.waits, cache.stats.fetched, cache.stats.corrupt]))
    """
    budget = 4 * ENTRY
    server.hold = 0.01
    cache_at(tmp_path)
    orders = [list(range(12)), list(range(12)), list(range(11, -1, -1)), list(range(12))]
    started = [
        workers.start(code, folder=str(tmp_path), budget=budget, url=server.url(""), numbers=order) for order in orders
    ]
    most = 0
    while any(one.poll() is None for one in started):
        most = max(most, taken(tmp_path))
        time.sleep(0.002)
    assert [one.join() for one in started] == [0, 0, 0, 0], [one.output() for one in started]
    hits, waits, fetches, corrupt = (
        sum(column) for column in zip(*(json.loads(o.output()) for o in started), strict=True)
    )
    assert SIZE < most <= budget
    assert hits + waits > 0
    assert 12 <= fetches < 48
    assert corrupt == 0
    assert not list(tmp_path.glob("*.partial"))


def test_one_of_several_processes_fetches(tmp_path: Path, server: FaultyServer, workers: Workers):
    code = """
        cache, blob = begin(folder, 10**9)
        lease = cache.fetch("5", blob(5), wait=20)
        assert lease.read(0, 8) == b"00000005"
        print(cache.stats.fetched)
    """
    server.fault("drip", rate=500_000, path="/5.tar", times=10)
    started = [workers.start(code, folder=str(tmp_path), url=server.url("")) for _ in range(4)]
    assert [one.join() for one in started] == [0, 0, 0, 0], [one.output() for one in started]
    assert sorted(one.output() for one in started) == ["0\n", "0\n", "0\n", "1\n"]
    assert len([one for one in server.asked("/5.tar") if one.range == f"bytes=0-{SIZE - 1}"]) == 1


def test_what_another_process_uses_stays_and_is_free_when_it_is_killed(
    tmp_path: Path, server: FaultyServer, workers: Workers
):
    code = """
        cache, blob = begin(folder, budget)
        lease = cache.fetch("9", blob(9))
        child = os.fork()  # a child that lives on must not keep what its parent held
        if child == 0:
            print(os.getpid(), flush=True)  # it has let go by now
            time.sleep(60)
            os._exit(0)
        time.sleep(60)
    """
    cache, client = cache_at(tmp_path, 1), Client(QUICK)
    other = workers.start(code, folder=str(tmp_path), budget=ENTRY, url=server.url(""))
    while not other.output().endswith("\n"):
        assert other.poll() is None, other.output()
        time.sleep(0.01)
    try:
        assert cache.fetch("0", HttpBlob(server.url("/0.tar"), client)) is None
        assert "9" in cache
        other.kill()
        fetched(cache.fetch("0", HttpBlob(server.url("/0.tar"), client))).release()
        assert "9" not in cache
    finally:
        os.kill(int(other.output()), signal.SIGKILL)


def test_kills_at_any_moment_leave_a_cache_that_works(tmp_path: Path, server: FaultyServer, workers: Workers):
    """Two processes at a time, killed after random times in claims, fetches and evictions."""
    code = """
        cache, blob = begin(folder, budget)
        while True:
            for number in numbers:
                with cache.use(str(number), blob(number)):
                    print(number, flush=True)
    """
    rng = random.Random(7)
    server.fault("drip", rate=2_000_000, times=100_000)
    budget = 3 * ENTRY
    values = {"folder": str(tmp_path), "budget": budget, "url": server.url("")}
    cache_at(tmp_path)  # the first two may be killed before they have made its folder
    worked = 0
    for _ in range(12):
        pair = [workers.start(code, numbers=order, **values) for order in (list(range(8)), [5, 3, 1, 7])]
        time.sleep(rng.uniform(0.02, 0.3))
        for one in pair:
            one.kill()
            worked += len(one.output())
            assert "Error" not in one.output()
        assert taken(tmp_path) <= budget
    assert worked > 0
    server.heal()
    cache, client = cache_at(tmp_path, 3), Client(QUICK)
    for number in range(12):
        with fetched(cache.fetch(str(number), HttpBlob(server.url(f"/{number}.tar"), client))) as lease:
            assert lease.read(0, 10**6) == content(number)
        assert taken(tmp_path) <= budget
    assert cache.stats.corrupt == 0
    assert {path.suffix for path in tmp_path.iterdir()} == {"", ".json", ".shard"}


def test_a_process_killed_in_mid_fetch_is_taken_over(tmp_path: Path, server: FaultyServer, workers: Workers):
    code = """
        cache, blob = begin(folder, 10**9)
        cache.fetch("5", blob(5))
    """
    server.fault("end", after=1, path="/5.tar")  # what it is
    server.fault("stall", after=50_000, path="/5.tar")
    other = workers.start(code, folder=str(tmp_path), url=server.url(""))
    cache, blob = cache_at(tmp_path), HttpBlob(server.url("/5.tar"), Client(QUICK))
    partial = cache.entries.path("5", ".partial")
    while not partial.exists() or partial.stat().st_size < 50_000:
        assert other.poll() is None, other.output()
        time.sleep(0.005)
    assert cache.fetch("5", blob) is None, "somebody is at it"
    assert cache.stats.fallbacks == {"busy": 1}
    other.kill()
    with fetched(cache.fetch("5", blob)) as lease:
        assert lease.read(0, SIZE) == content(5)
    assert cache.stats.resumed_bytes == 50_000
    assert not partial.exists()
