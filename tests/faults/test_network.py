"""What a network does: it is waited for up to the deadline, without a trace in the stream, with and without a cache."""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path

import pytest
from gristmill.pipeline import loader as loader_module
from gristmill.pipeline.loader import Loader
from gristmill.shards.quarantine import Quarantine
from gristmill.shards.remote import client_for
from gristmill.shards.retry import ChangedError, StorageError

from ..disks import small_disk
from ..faulty_http import FaultyServer
from .served import TARS, cached, client_stats, counted, mirrored, publish
from .streams import CONFIG, IMAGES, PER_SHARD, SLOTS, N, hold, load, take, until_it_stops, write_set
from .table import Row

KINDS = ["ranges", "cache"]


@pytest.fixture
def server() -> Iterator[FaultyServer]:
    with FaultyServer() as server:
        yield server


@pytest.fixture
def remote(server, tmp_path):
    return mirrored(publish(server, write_set(tmp_path / "data").root), tmp_path / "copy")


def config_of(kind: str, tmp_path: Path, size: int = 1 << 20):
    return CONFIG if kind == "ranges" else cached(tmp_path / "cache", size)


def injected(server: FaultyServer) -> int:
    """Faults that really met a request."""
    return sum(asked.fault is not None for asked in server.log)


def landed(loader: Loader) -> None:
    """Wait until every shard is in the cache, where there is one."""
    fetcher, until = loader.reader._fetcher, time.monotonic() + 60
    while fetcher.cache and len(list(fetcher.cache.folder.glob("*.shard"))) < len(TARS):
        assert time.monotonic() < until
        time.sleep(0.01)


def read_through(fault: Row, undisturbed, server, remote, tmp_path, kind: str) -> Counter[str]:
    """Two epochs; nothing is damaged, nothing is booked. The tries that failed, by reason."""
    quarantine, before = Quarantine(tmp_path / f"{kind}.jsonl"), injected(server)
    with load(remote, quarantine, config=config_of(kind, tmp_path)) as loader:
        got = take(loader, SLOTS)
        landed(loader)
        stats = loader.stats
    client = client_stats(loader)
    client_for.cache_clear()
    assert (stats.samples, stats.substituted, stats.quarantined, quarantine.count) == (SLOTS, 0, 0, 0)
    assert not quarantine.path.exists()
    assert client.failures == {}
    assert client.in_flight == 0
    found = hold(got, undisturbed.plain.slots, undisturbed.plain.oracle)
    fault.add(found, injected(server) - before, **counted(client))
    return client.retries


@pytest.mark.fault("404")
def test_missing_object(tmp_path, undisturbed, server, remote, fault):
    """Said at once, not waited for: what is not there will not come by asking. Put back, the stream goes on."""
    plain = undisturbed.plain
    for path in (TARS[2], TARS[5]):
        quarantine, data = Quarantine(tmp_path / "q.jsonl"), server.files.pop(path)
        before = len(server.asked(path))
        with load(remote, quarantine) as loader:
            got = until_it_stops(loader, StorageError, rf"{path[5:]} is not there \(status 404\)")
            assert len(server.asked(path)) == before + 1
            server.files[path] = data
            loader.seek(loader.position)
            got += take(loader, SLOTS - len(got))
        assert quarantine.count == 0
        fault.add(hold(got, plain.slots, plain.oracle), 1, stops=1)
    fault.became = "stops at once and names it; back, it goes on where it stopped"


@pytest.mark.fault("503 storm, with and without Retry-After")
def test_storm(tmp_path, undisturbed, server, remote, fault):
    """Sixty refusals, some with a second's rest asked for: fewer requests at a time, and all are made again."""
    for kind in KINDS:
        for headers, times in (({}, 20), ({"Retry-After": "1"}, 1), ({}, 9)):
            server.fault("status", times, code=503, headers=headers)
        began = len(server.log)
        with load(remote, Quarantine(tmp_path / "first.jsonl"), config=config_of(kind, tmp_path)) as loader:
            fault.add(hold(take(loader, N), undisturbed.plain.slots, undisturbed.plain.oracle))
            landed(loader)
        client = client_stats(loader)
        client_for.cache_clear()
        met = [asked for asked in server.log[began:] if asked.fault]
        assert len(met) == 30 == client.retries["503"]
        assert client.throttled > 0
        assert client.throttled_seconds > 0
        assert client.failures == {}
        fault.add(hold([], [], undisturbed.plain.oracle), len(met), **{"retried 503": client.retries["503"]})
    fault.became = "fewer requests at once, all made again"


@pytest.mark.fault("server away for longer than the deadline")
def test_deadline(tmp_path, undisturbed, server, remote, fault):
    plain, path = undisturbed.plain, TARS[6]
    server.fault("status", 100_000, code=503, path=path)
    quarantine = Quarantine(tmp_path / "q.jsonl")
    config = CONFIG.model_copy(update={"deadline": 3.0})  # enough for the shards that answer
    with load(remote, quarantine, config=config) as loader:
        why = r"000006\.tar.*(503|throttled).*deadline is 3\.\d s.*goes on from what was saved"
        got = until_it_stops(loader, StorageError, why)
        client = client_stats(loader)
        assert set(client.failures) == {"deadline"}
    server.heal()
    with load(remote, quarantine, start=len(got)) as loader:
        got += take(loader, SLOTS - len(got))
    assert quarantine.count == 0
    fault.add(hold(got, plain.slots, plain.oracle), 1, "stops, resumably, and says why", stops=1)


@pytest.mark.fault("slow server", varies=True)
def test_slow(tmp_path, undisturbed, server, remote, fault, monkeypatch):
    """Answers that drip, and answers that stop in the middle for good: those are given up and asked for again."""
    monkeypatch.setattr(loader_module, "RetryPolicy", partial(loader_module.RetryPolicy, stall_timeout=0.5))
    for kind in KINDS:
        server.fault("drip", 6, rate=40_000)
        server.fault("stall", 3, after=200)
        server.hold = 0.002
        assert read_through(fault, undisturbed, server, remote, tmp_path, kind)["stalled"] >= 3
    assert fault.injected == 18
    fault.became = "waited for; without a byte for the stall timeout, asked again for the rest"


@pytest.mark.fault("connection cut in mid-body", varies=True)
def test_cut(tmp_path, undisturbed, server, remote, fault):
    """By a reset and by an early end, after a few bytes: only the rest is asked for again."""
    for kind in KINDS:
        for kind_of_cut, after in (("reset", 0), ("end", 1), ("reset", 300), ("end", 700), ("end", 1100)):
            server.fault(kind_of_cut, 6, after=after, path=None)
        retries = read_through(fault, undisturbed, server, remote, tmp_path, kind)
        # A reset that takes the answer's first bytes along is no failed try: an idle connection had been closed.
        assert 12 <= retries["short"] + retries["cut"] <= 30
    assert fault.injected == 60
    fault.became = "the rest is asked for again"


@pytest.mark.fault("object replaced under a running reader")
def test_replaced(tmp_path, undisturbed, server, remote, fault):
    """Same size and other size, behind HTTP: refused by its etag before a byte of it is used."""
    plain = undisturbed.plain
    strange = write_set(tmp_path / "strange", images=[*IMAGES[PER_SHARD:], *IMAGES[:PER_SHARD]]).root
    for shard, more in ((0, 0), (3, 512), (6, -512), (7, 0)):
        quarantine, path = Quarantine(tmp_path / "q.jsonl"), TARS[shard]
        old = server.files[path]
        new = (strange / path[5:]).read_bytes()[: len(old) + more].ljust(len(old) + more, b"\0")
        with load(remote, quarantine) as loader:
            got = take(loader, 64)  # of all shards by now
            server.etags[path] = '"another"'
            server.files[path] = new
            got += until_it_stops(loader, ChangedError, rf"{path[5:]} was replaced while it was in use")
            del server.etags[path]
            server.files[path] = old
            loader.seek(loader.position)
            got += take(loader, SLOTS - len(got))
            assert loader.stats.substituted == quarantine.count == 0
        fault.add(hold(got, plain.slots, plain.oracle), 1, stops=1)
    fault.became = "stops and names it; put back, it goes on where it stopped"


@pytest.mark.fault("full cache disk")
def test_full_cache_disk(tmp_path, undisturbed, server, remote, fault):
    """A disk of 128 kB under a cache that believes in a megabyte; one without room; one that fills up in mid-fetch."""
    config = cached(tmp_path / "disk" / "cache", 1 << 20)
    with small_disk(tmp_path / "disk", "128k") as disk:
        for case in ("small", "full", "filled"):
            quarantine, filler = Quarantine(tmp_path / f"{case}.jsonl"), disk / "filler"
            filler.unlink(missing_ok=True)
            shutil.rmtree(disk / "cache", ignore_errors=True)
            filler.write_bytes(b"x" * (100 << 10 if case == "full" else 0))
            filling = None
            with ExitStack() as stack:
                if case == "filled":
                    stack.enter_context(pytest.warns(RuntimeWarning, match="is full"))
                    server.fault("drip", 100_000, rate=20_000)  # looks and ranges take their share of them, too
                    # From a thread, since a busy machine may open a loader for longer than a shard drips.
                    filling = stack.enter_context(ThreadPoolExecutor(1)).submit(fill, disk)
                loader = stack.enter_context(load(remote, quarantine, config=config))
                fetcher = loader.reader._fetcher
                assert fetcher.cache is not None
                if filling is not None:
                    filling.result()
                    server.heal()
                got = take(loader, SLOTS)
                stats, cache = fetcher.stats, fetcher.cache.stats
                assert stats.remote_bytes > 0
                assert (stats.cached_bytes > 0) == (cache.fetched > 0) >= (case == "small")
                assert (cache.fallbacks["disk"] > 0) == (case == "filled")
            assert (loader.stats.substituted, quarantine.count) == (0, 0)
            assert {path.suffix for path in (disk / "cache").iterdir()} <= {"", ".json", ".shard"}
            assert client_stats(loader).failures == {}
            fault.add(hold(got, undisturbed.plain.slots, undisturbed.plain.oracle), 1)
    fault.became = "costs requests, stops nothing"


def fill(disk: Path) -> None:
    """Wait until a shard is on its way, and take all the room that there is."""
    until = time.monotonic() + 60
    while not arrived(disk / "cache"):
        assert time.monotonic() < until
        time.sleep(0.002)
    with (disk / "filler").open("ab", buffering=0) as file, suppress(OSError):
        while file.write(b"x" * 4096):
            continue


def arrived(cache: Path) -> int:
    """Bytes of the shards that are on their way, without what is written about them."""
    total = 0
    for path in cache.glob("*.partial"):
        with suppress(FileNotFoundError):  # it got its name, or was given up, since the folder was listed
            total += 0 if path.stem.endswith(".json") else path.stat().st_size
    return total
