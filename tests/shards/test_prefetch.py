"""Shards fetched ahead of need, in the order of need, by threads that end when they should."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from gristmill.shards.cache import Cache
from gristmill.shards.client import Client
from gristmill.shards.prefetch import Prefetcher
from gristmill.shards.remote import HttpBlob

from ..faulty_http import FaultyServer
from ..waiting import wait_for
from .cached import ENTRY, QUICK, content, fetched, taken

soon = partial(wait_for, seconds=20.0, every=0.005)


class Stream:
    """A run that reads shards 0, 1, 2 ... 11: `at` is where it stands."""

    def __init__(self, folder: Path, server: FaultyServer, entries: float) -> None:
        self.at = 0
        client = Client(QUICK)
        self.open: Callable[[str], HttpBlob] = lambda key: HttpBlob(server.url(f"/{key}.tar"), client)
        self.cache = Cache(folder, int(entries * ENTRY), self.next_use)

    def next_use(self, key: str) -> float:
        return float(key) if int(key) >= self.at else float("inf")

    def upcoming(self) -> list[str]:
        return [str(number) for number in range(self.at, 12)]

    def here(self) -> list[int]:
        return [number for number in range(12) if str(number) in self.cache]


def test_what_is_needed_next_is_there_and_the_budget_holds(
    tmp_path: Path, server: FaultyServer, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("gristmill.shards.prefetch._TURN", 60.0)  # so that no look, however slow, is overtaken
    stream = Stream(tmp_path, server, 4)
    with Prefetcher(stream.cache, stream.upcoming, stream.open, threads=2) as ahead:
        soon(lambda: stream.here() == [0, 1, 2, 3] and ahead.stats.left > 0)
        for at in range(12):
            stream.at = at
            ahead.poke()
            with fetched(soon(lambda at=at: stream.cache.lookup(str(at)))) as lease:
                assert lease.read(0, 10**6) == content(at)
            assert taken(tmp_path) <= stream.cache.budget
    assert ahead.stats.fetched == 12, "each shard once: nothing needed was given up"
    assert stream.cache.stats.hits == 12
    assert ahead.stats.failed == ahead.stats.in_flight == 0


def test_a_shard_that_cannot_be_had_does_not_hold_up_the_others(tmp_path: Path, server: FaultyServer):
    del server.files["/1.tar"]
    stream = Stream(tmp_path, server, 20)
    with Prefetcher(stream.cache, stream.upcoming, stream.open, threads=1) as ahead:
        soon(lambda: len(stream.here()) == 11)
        assert ahead.stats.failed == 1
        assert "404" in ahead.stats.last_error
        ahead.poke()


@pytest.mark.parametrize(
    "fault", [{"kind": "stall", "after": 10_000}, {"kind": "status", "code": 503, "times": 10_000}]
)
def test_closing_ends_what_is_in_flight(tmp_path: Path, server: FaultyServer, fault: dict):
    server.fault(path="/0.tar", **fault)
    stream = Stream(tmp_path, server, 20)
    patient = Client(QUICK.model_copy(update={"stall_timeout": 600.0, "deadline": 600.0, "longest_pause": 600.0}))
    ahead = Prefetcher(
        stream.cache, stream.upcoming, lambda key: HttpBlob(server.url(f"/{key}.tar"), patient), threads=1
    )
    soon(lambda: len(server.asked("/0.tar")) > 1 or (fault["kind"] == "stall" and len(server.log) > 0))
    ahead.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("gristmill-prefetch")]
    ahead.close()
    assert ahead.stats.in_flight == 0


def test_an_error_of_the_order_surfaces(tmp_path: Path, server: FaultyServer):
    stream = Stream(tmp_path, server, 4)

    def broken() -> list[str]:
        raise ZeroDivisionError("the order is broken")

    with Prefetcher(stream.cache, broken, stream.open) as ahead:
        soon(lambda: ahead._crash is not None)
        with pytest.raises(ZeroDivisionError):
            ahead.poke()


def test_a_forked_child_has_no_prefetcher_and_loses_nothing(tmp_path: Path, server: FaultyServer):
    stream = Stream(tmp_path, server, 20)
    with Prefetcher(stream.cache, stream.upcoming, stream.open) as ahead:
        child = os.fork()
        if child == 0:
            ahead.poke()
            ahead.close()
            lease = stream.cache.fetch("11", stream.open("11"), wait=10)
            os._exit(0 if lease is not None and lease.read(0, 8) == b"00000011" else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        soon(lambda: len(stream.here()) == 12)
