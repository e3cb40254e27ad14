"""Whether what a server has is still the same object: told by it, seen without its help, demanded by an index."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from gristmill.shards.client import Client
from gristmill.shards.remote import HttpBlob, resumable
from gristmill.shards.retry import ChangedError

from ..faulty_http import FaultyServer
from ..waiting import wait_for
from .remotes import DATA, QUICK, blob_of


def test_an_object_replaced_under_a_reader_is_named(server: FaultyServer):
    blob = blob_of(server)
    blob.read(0, 10)
    server.put("/a.tar", DATA[::-1])
    with pytest.raises(ChangedError, match=r'a\.tar was replaced.*"7d000-0".*is etag "7d000-1"'):
        blob.read(10, 10)
    assert server.asked()[1].headers["if-match"] == '"7d000-0"'


@pytest.mark.parametrize("what", ["etag", "modified", "size"])
def test_a_replaced_object_is_seen_without_the_servers_help(server: FaultyServer, what: str):
    server.conditions = False
    server.etag, server.modified = what == "etag", what == "modified"
    blob = blob_of(server)
    blob.read(0, 10)
    server.put("/a.tar", DATA + b"1" if what == "size" else DATA[::-1])
    with pytest.raises(ChangedError, match="was replaced"):
        blob.read(10, 10)


def test_a_replacement_between_two_tries_is_seen(server: FaultyServer):
    server.fault("end", after=1000)
    blob = blob_of(server, first_pause=2.0, longest_pause=2.0)
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(blob.read, 0, 50_000)
        # A try is counted before the pause behind it: the first one is over, the second not yet made.
        wait_for(lambda: blob.client.stats.retries, 60, every=0.01)
        server.put("/a.tar", DATA[::-1])
        with pytest.raises(ChangedError):
            reading.result()


def test_an_identity_from_an_index_is_demanded(server: FaultyServer):
    identity = blob_of(server).identity()
    assert HttpBlob(server.url("/a.tar"), Client(QUICK), identity=identity).read(0, 4) == DATA[:4]
    server.put("/a.tar", DATA[::-1])
    with pytest.raises(ChangedError):
        HttpBlob(server.url("/a.tar"), Client(QUICK), identity=identity).read(0, 4)


def test_identities_that_vouch_for_nothing_are_not_resumed_by(server: FaultyServer):
    assert resumable(blob_of(server).identity())
    server.etag = False
    assert blob_of(server).identity().startswith("modified ")
    assert resumable(blob_of(server).identity())
    server.modified = False
    assert blob_of(server).identity() == f"size {len(DATA)}"
    assert not resumable(f"size {len(DATA)}")
    server.etag, server.etags = True, {"/a.tar": 'W/"weak"'}
    assert not resumable(blob_of(server).identity())
    blob = blob_of(server)
    assert blob.read(0, 4) + blob.read(4, 4) == DATA[:8]
