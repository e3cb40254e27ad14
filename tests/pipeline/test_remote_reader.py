"""Shards behind HTTP: the same stream as from disk, through faults of the network, with and without the node's cache."""

import os
import threading
import time

import numpy as np
import pytest
from gristmill.pipeline.fetch import DamageError
from gristmill.pipeline.loader import StallError
from gristmill.pipeline.order import Order
from gristmill.pipeline.reader import Reader
from gristmill.pipeline.views import CacheConfig
from gristmill.shards.mirror import open_manifest
from gristmill.shards.quarantine import Quarantine
from gristmill.shards.retry import RetryPolicy, StorageError

from ..faulty_http import FaultyServer
from ..shards.cached import taken
from .pictures import CONFIG, PER_SHARD, PICTURES, SHARDS, N, assert_equal, collect, load, ours, part, write_data

QUICK = RetryPolicy(deadline=20.0, first_pause=0.005, longest_pause=0.05, stall_timeout=2.0)


@pytest.fixture
def server():
    with FaultyServer() as server:
        yield server


def publish(server, manifest):
    """Put a data set onto the server, and the url of its folder."""
    for path in sorted(manifest.root.rglob("*")):
        if path.is_file():
            server.put(f"/set/{path.relative_to(manifest.root)}", path.read_bytes())
    return server.url("/set")


@pytest.fixture
def remote(server, manifest, tmp_path):
    return open_manifest(publish(server, manifest), tmp_path / "copy", policy=QUICK)


def read(manifest, folder, positions=None, *, cache=None, policy=QUICK):
    reader = Reader(
        manifest, Quarantine(folder / "q.jsonl"), order=Order(manifest.counts, 7, 3, 8), seed=7, damage_bound=0.5,
        cache=cache, policy=policy,
    )  # fmt: skip
    try:
        return reader, reader.read(np.arange(N) if positions is None else positions)
    except BaseException:
        reader.close()
        raise


def bytes_of(result):
    return [data.tobytes() for data in result.data]


def tars(server):
    return [asked for asked in server.asked() if asked.path.endswith(".tar")]


def test_ranges_give_the_same_samples_as_the_disk(manifest, remote, server, tmp_path):
    local, expected = read(manifest, tmp_path)
    reader, got = read(remote, tmp_path)
    assert bytes_of(got) == bytes_of(expected)
    assert got.keys == expected.keys
    assert np.array_equal(got.ids, expected.ids)
    assert reader.stats.remote_bytes > sum(map(len, PICTURES)) * 0.99
    assert all(asked.range for asked in tars(server))
    local.close()
    reader.close()


def test_passing_faults_leave_no_trace_in_the_stream(manifest, remote, server, tmp_path):
    local, expected = read(manifest, tmp_path)
    server.fault("status", 5, code=503)
    server.fault("reset", 3, after=100)
    server.fault("end", 2, after=700)
    server.fault("hangup", 2)
    reader, got = read(remote, tmp_path)
    assert bytes_of(got) == bytes_of(expected)
    assert not got.substituted.any()
    assert reader.quarantine.count == 0
    local.close()
    reader.close()


def test_the_loader_goes_on_where_a_server_was_gone(manifest, remote, server, tmp_path):
    """The batches before are delivered, the reason comes out at its own batch, and resuming gives the rest."""
    config = CONFIG.model_copy(update={"deadline": 3.0})  # enough for the shards that answer
    whole = collect(load(manifest, Quarantine(tmp_path / "a.jsonl")), 12)
    server.fault("status", 10_000, code=503, path="/set/000002.tar")
    quarantine, got = Quarantine(tmp_path / "b.jsonl"), []
    with load(remote, quarantine, config=config) as loader:
        with pytest.raises(StorageError, match=r"000002\.tar.*(503|throttled).*deadline.*goes on from what was saved"):
            got.extend(loader)
        stopped = loader.position
    assert [key for batch in got for key in batch.keys] == whole[0][:stopped]
    assert quarantine.count == 0
    server.heal()
    calm = CONFIG.model_copy(update={"deadline": 60.0})
    rest = load(remote, quarantine, config=calm, start=stopped)
    assert_equal(collect(rest, (48 - stopped) // 4), part(whole, stopped, 48))


def test_what_is_not_there_is_said_at_once(remote, server, tmp_path):
    del server.files["/set/000001.tar"]
    with pytest.raises(StorageError, match=r"000001\.tar is not there \(status 404\)"):
        read(remote, tmp_path)


def test_another_object_in_its_place_is_not_read(manifest, remote, server, tmp_path):
    reader, _ = read(remote, tmp_path, np.arange(4))
    for shard in range(SHARDS):
        server.put(f"/set/{shard:06d}.tar", server.files[f"/set/{shard:06d}.tar"][::-1])
    with pytest.raises(StorageError, match="was replaced while it was in use"):
        reader.read(np.arange(4, N))
    reader.close()


def test_a_longer_one_is_refused_and_a_shorter_one_is_damage(remote, server, tmp_path):
    whole = server.files["/set/000003.tar"]
    server.put("/set/000003.tar", whole + b"\0" * 512)
    with pytest.raises(DamageError, match=r"000003\.tar was replaced: it has"):
        read(remote, tmp_path)
    server.put("/set/000003.tar", whole[: int(remote.rows(3).offset[5]) + 10])
    reader, got = read(remote, tmp_path)
    assert got.substituted.sum() == 1
    assert "truncated: 10 of" in next(iter(reader.quarantine)).reason
    reader.close()


def test_a_quick_index_notices_a_small_shard_of_the_same_size(server, tmp_path):
    """Other members, same size of the tar: the etag and then the headers tell."""
    manifest = write_data(tmp_path / "quick", deep=False)
    remote = open_manifest(publish(server, manifest), tmp_path / "copy", policy=QUICK)
    remote.identities = [*remote.identities]
    remote.identities[2] = "etag of another day"
    reader, got = read(remote, tmp_path)  # the headers are still those: a copy of the data set
    assert not got.substituted.any()
    reader.close()
    size = len(server.files["/set/000002.tar"])
    server.put("/set/000002.tar", server.files["/set/000001.tar"].ljust(size, b"\0")[:size])
    with pytest.raises(DamageError, match=r"000002\.tar was (replaced|changed) since it was indexed"):
        read(remote, tmp_path)


def landed(reader, seconds=60):
    stats, until = reader._fetcher.prefetcher.stats, time.monotonic() + seconds
    while stats.fetched < SHARDS and time.monotonic() < until:  # a name comes before the lock on it goes
        time.sleep(0.02)
    return stats.fetched


def test_shards_land_in_the_cache_and_are_read_there(manifest, remote, server, tmp_path):
    local, expected = read(manifest, tmp_path)
    cache = CacheConfig(folder=tmp_path / "cache", bytes=10 * manifest.bytes)
    reader, got = read(remote, tmp_path, cache=cache)
    assert bytes_of(got) == bytes_of(expected)
    assert landed(reader) == SHARDS
    before = len(tars(server))
    again = reader.read(np.arange(N, 2 * N))
    assert len(tars(server)) == before  # not a single request more
    assert reader.stats.cached_bytes > 0
    assert bytes_of(again) == bytes_of(local.read(np.arange(N, 2 * N)))
    local.close()
    reader.close()
    second, _ = read(remote, tmp_path, cache=cache)  # of another run on the node
    assert second.stats.remote_bytes == 0
    second.close()


def test_a_cache_too_small_for_all_stays_within_its_budget(manifest, remote, tmp_path):
    budget = int(manifest.shard_bytes[:2].sum()) + 4096
    cache = CacheConfig(folder=tmp_path / "cache", bytes=budget)
    local, expected = read(manifest, tmp_path)
    reader, got = read(remote, tmp_path, np.arange(4), cache=cache)
    keys, most = list(got.keys), 0
    for start in range(4, N, 4):
        keys += reader.read(np.arange(start, start + 4)).keys
        most = max(most, taken(cache.folder))
    assert keys == expected.keys
    assert most <= budget
    local.close()
    reader.close()


def test_a_spoiled_copy_in_the_cache_is_no_damage(manifest, remote, tmp_path):
    """A byte of the cached shard turns over, unseen by size and time: it is dropped and read anew."""
    cache = CacheConfig(folder=tmp_path / "cache", bytes=10 * manifest.bytes)
    reader, expected = read(remote, tmp_path, cache=cache)
    assert landed(reader) == SHARDS
    reader.close()
    for path in cache.folder.glob("*.shard"):
        about, data = path.stat(), bytearray(path.read_bytes())
        for offset, length in zip(manifest.rows(0).offset, manifest.rows(0).length, strict=True):
            data[int(offset + length // 2)] ^= 1
        path.chmod(0o600)
        path.write_bytes(data)
        os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns))
    reader, got = read(remote, tmp_path, cache=cache)
    assert bytes_of(got) == bytes_of(expected)
    assert reader.stats.refetched > 0
    assert reader.quarantine.count == 0
    reader.close()


def test_damage_at_the_source_is_damage(manifest, remote, server, tmp_path):
    """Asked for twice, then substituted: as from a disk, and the same substitute."""
    offset = int(manifest.rows(1).offset[3])
    spoiled = bytearray(server.files["/set/000001.tar"])
    spoiled[offset + 50] ^= 1
    server.put("/set/000001.tar", bytes(spoiled))
    reader, got = read(remote, tmp_path)
    assert got.substituted.sum() == 1
    manifest.path(1).write_bytes(spoiled)
    local, expected = read(manifest, tmp_path / "local")
    assert np.array_equal(got.ids, expected.ids)
    reader.close()
    local.close()


@pytest.mark.parametrize("where", [None, "/set/000000.tar"], ids=["rows", "shard"])
def test_a_server_that_hangs_is_named_and_closing_does_not_wait_for_it(remote, server, tmp_path, where):
    """In the rows of the manifest, which are copied when they are first needed, and in a shard."""
    server.fault("stall", 1000, after=0, path=where)
    loader = load(remote, Quarantine(tmp_path / "q.jsonl"), stall=0.5)
    while not server.busy:
        time.sleep(0.01)
    with pytest.raises(StallError, match=r"stage 'storage' has been reading .* position 0 \(00000\d\.tar.*server"):
        next(loader)
    closer = threading.Thread(target=loader.close)
    closer.start()
    closer.join(20)
    assert not closer.is_alive()
    server.close()
    until = time.monotonic() + 60
    while ours() and time.monotonic() < until:  # what was left behind ends when the server lets go
        time.sleep(0.05)


def test_an_epoch_of_a_plain_stream_is_the_same_over_the_network(manifest, remote, tmp_path):
    whole = collect(load(manifest, Quarantine(tmp_path / "a.jsonl")), N // 4)
    assert_equal(collect(load(remote, Quarantine(tmp_path / "b.jsonl")), N // 4), whole)
    assert sorted(whole[0]) == [f"k{i:03d}" for i in range(SHARDS * PER_SHARD)]
