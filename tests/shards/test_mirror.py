"""A manifest behind a url: copied as needed, whole or not at all, and told apart from another."""

import fcntl

import numpy as np
import pytest
from gristmill.shards.demo import make_demo_images
from gristmill.shards.ingest import ingest_folder
from gristmill.shards.manifest import Manifest, ManifestError
from gristmill.shards.mirror import MirroredManifest, open_manifest
from gristmill.shards.retry import RetryPolicy, StorageError
from gristmill.shards.tombstones import Tombstones

from ..faulty_http import FaultyServer

QUICK = RetryPolicy(deadline=10.0, first_pause=0.005, longest_pause=0.05, stall_timeout=2.0)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    make_demo_images(root / "images", images=400, size=32)
    ingest_folder(root / "images", root / "set", shard_samples=50)
    return Manifest.open(root / "set" / "train")


@pytest.fixture
def server(data):
    with FaultyServer() as server:
        for path in sorted(data.root.rglob("*")):
            if path.is_file():
                server.put(f"/sets/train/{path.relative_to(data.root)}", path.read_bytes())
        yield server


def asked(server):
    return [one.path.rpartition("/")[2] for one in server.asked()]


def test_it_is_the_same_data_set(data, server, tmp_path):
    remote = open_manifest(server.url("/sets/train"), tmp_path, policy=QUICK)
    assert remote.digest == data.digest
    assert remote.urls == data.urls
    assert "00000.parquet" not in asked(server)  # rows come when they are asked for
    for shard in range(len(data.urls)):
        assert remote.rows(shard).keys == data.rows(shard).keys
        assert np.array_equal(remote.rows(shard).offset, data.rows(shard).offset)
    assert remote.place(3) == server.url(f"/sets/train/{data.urls[3]}")
    assert not [name for name in asked(server) if name.endswith(".tar")]
    assert not list(tmp_path.rglob("*.partial"))


def test_a_second_opening_copies_little(server, tmp_path):
    open_manifest(server.url("/sets/train"), tmp_path, policy=QUICK).rows(0)
    server.log.clear()
    again = open_manifest(server.url("/sets/train/"), tmp_path / "other", policy=QUICK)
    assert isinstance(again, MirroredManifest)
    again.complete()
    server.log.clear()
    third = open_manifest(server.url("/sets/train"), tmp_path, policy=QUICK)
    third.rows(1)
    assert set(asked(server)) == {"dataset.json", "tombstones.jsonl"}


def test_options_stay_behind_the_path(server, tmp_path):
    remote = open_manifest(server.url("/sets/train?token=abc"), tmp_path, policy=QUICK)
    assert remote.place(0) == server.url(f"/sets/train/{remote.urls[0]}?token=abc")
    assert not any("abc" in path.read_text(errors="replace") for path in tmp_path.rglob("*") if path.is_file())


def test_removed_samples_come_along_and_are_asked_for_each_time(data, server, tmp_path):
    key = data.rows(0).keys[0]
    assert Tombstones.of(open_manifest(server.url("/sets/train"), tmp_path, policy=QUICK)).count == 0
    line = f'{{"shard": "{data.urls[0]}", "row": 0, "key": "{key}", "reason": "asked for"}}\n'
    server.put("/sets/train/tombstones.jsonl", line.encode())
    assert Tombstones.of(open_manifest(server.url("/sets/train"), tmp_path, policy=QUICK)).count == 1


def test_what_is_no_data_set_is_said(server, tmp_path):
    with pytest.raises(ManifestError, match=r"no data set \(dataset.json is missing there\).*gristmill index"):
        open_manifest(server.url("/sets"), tmp_path, policy=QUICK)
    server.put("/sets/train/dataset.json", b"<html>")
    with pytest.raises(ManifestError, match="is no manifest"):
        open_manifest(server.url("/sets/train"), tmp_path, policy=QUICK)


def test_a_manifest_that_is_gone_is_no_empty_one(server, tmp_path):
    remote = open_manifest(server.url("/sets/train"), tmp_path, policy=QUICK)
    del server.files["/sets/train/samples/00000.parquet"]
    with pytest.raises(StorageError, match="404"):
        remote.rows(0)
    server.fault("status", 1000, code=403)
    with pytest.raises(StorageError, match="refused"):
        open_manifest(server.url("/sets/train"), tmp_path, policy=QUICK)


def test_rows_of_another_data_set_are_refused(data, server, tmp_path):
    remote = open_manifest(server.url("/sets/train"), tmp_path, policy=QUICK)
    server.put("/sets/train/samples/00000.parquet", b"PAR1 but not really")
    with pytest.raises(ManifestError, match="cannot be read"):
        remote.rows(0)


def test_passing_faults_are_retried(data, server, tmp_path):
    server.fault("status", 3, code=503)
    server.fault("reset", 2, after=20)
    assert open_manifest(server.url("/sets/train"), tmp_path, policy=QUICK).rows(2).keys == data.rows(2).keys


def test_a_folder_is_opened_where_it_is(data, tmp_path):
    for place in (data.root, str(data.root), f"file://{data.root}"):
        found = open_manifest(place, tmp_path)
        assert found.root == data.root
        assert not isinstance(found, MirroredManifest)
    assert not list(tmp_path.iterdir())


def test_what_a_killed_process_left_half_written_goes_and_what_is_being_written_stays(data, server, tmp_path):
    root = open_manifest(server.url("/sets/train"), tmp_path, policy=QUICK).root
    (root / "samples").mkdir(exist_ok=True)
    left = [root / "dataset.jsonabc.partial", root / "samples" / "00000.parquetabc.partial"]
    for path in left:
        path.write_bytes(b"half")
    busy = root / "shards.parquetabc.partial"
    with busy.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        open_manifest(server.url("/sets/train"), tmp_path, policy=QUICK)
        assert busy.exists()
        assert not any(path.exists() for path in left)
    open_manifest(server.url("/sets/train"), tmp_path, policy=QUICK)
    assert not busy.exists()
