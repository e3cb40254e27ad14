"""Tombstones: lasting, all or none, only ever more of them, and known by their first so many."""

import json
import os
import resource
import signal
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
from gristmill.shards.manifest import Manifest, Rows
from gristmill.shards.tombstones import TOMBSTONES, TombstoneError, Tombstones
from gristmill.shards.writer import write_manifest

COUNTS = [4, 3, 5]


@pytest.fixture
def data(tmp_path: Path) -> Manifest:
    """Keys k0 ... k10, and k3 a second time as the last sample."""
    shards, first = [], 0
    for shard, n in enumerate(COUNTS):
        keys = [f"k{i}" if i < 11 else "k3" for i in range(first, first + n)]
        first += n
        zeros = np.zeros(n, np.int64)
        rows = Rows(keys, np.arange(n) * 1024 + 512, zeros + 9, zeros.astype(np.uint32), zeros, zeros, ["jpg"] * n)
        shards.append((f"{shard}.tar", 1024 * n, rows))
    write_manifest(tmp_path / "set", shards)
    return Manifest.open(tmp_path / "set")


def test_removed_wherever_they_occur_and_for_good(data):
    stones = Tombstones.of(data)
    assert (stones.count, stones.digest(), len(stones.places(data.urls))) == (0, "", 0)
    assert not (data.root / TOMBSTONES).exists()
    assert stones.remove(data, ["k3", "k5"], "asked on paper") == 3
    assert stones.remove(data, ["k5"], "asked again") == 0
    for known in (stones, Tombstones.of(data)):
        assert known.count == 3
        assert known.places(data.urls).tolist() == [[0, 3], [1, 1], [2, 4]]
        assert known.places(data.urls[:2]).tolist() == [[0, 3], [1, 1]]
        assert ("1.tar", 1) in known
        assert ("1.tar", 0) not in known
    line = json.loads((data.root / TOMBSTONES).read_text().splitlines()[0])
    assert line == {"shard": "0.tar", "row": 3, "key": "k3", "reason": "asked on paper"}


def test_the_digest_of_the_first_ones_stays(data):
    stones = Tombstones.of(data)
    stones.remove(data, ["k7"], "")
    before = stones.digest()
    stones.remove(data, ["k1", "k2"], "")
    assert stones.digest(1) == before != stones.digest()
    assert stones.digest(3) == stones.digest() == Tombstones.of(data).digest()


def test_an_unknown_key_removes_nothing(data):
    with pytest.raises(TombstoneError, match="no sample nobody: nothing was removed"):
        Tombstones.of(data).remove(data, ["k1", "nobody"], "")
    assert Tombstones.of(data).count == 0


def test_two_writers_know_of_each_other(data):
    one, two = Tombstones.of(data), Tombstones.of(data)
    one.remove(data, ["k1", "k2"], "")
    assert two.remove(data, ["k2", "k4"], "") == 1
    assert two.digest() == Tombstones.of(data).digest()
    assert two.count == 3


def test_half_a_line_is_cut_off_by_the_next_writer(data):
    stones = Tombstones.of(data)
    stones.remove(data, ["k1"], "")
    path = data.root / TOMBSTONES
    with path.open("ab") as file:
        file.write(b'{"shard": "0.tar", "ro')
    assert Tombstones.of(data).digest() == stones.digest()
    Tombstones.of(data).remove(data, ["k2"], "")
    assert Tombstones.of(data).count == 2
    assert len(path.read_text().splitlines()) == 2


@pytest.mark.parametrize("line", ["{", "3", '{"shard": "0.tar"}', '{"shard": "0.tar", "row": "x", "key": ""}'])
def test_a_spoiled_file_stops_everything(data, line):
    (data.root / TOMBSTONES).write_text(line + "\n")
    with pytest.raises(TombstoneError, match=r"line 1, is no tombstone.*restore"):
        Tombstones.of(data)


def _remove_within(limit: int, root: Path) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    data = Manifest.open(root)
    try:
        Tombstones.of(data).remove(data, [f"k{i}" for i in range(11)], "a reason of some length")
    except TombstoneError:
        os._exit(7)
    os._exit(0)


def test_a_full_disk_removes_nothing(data):
    Tombstones.of(data).remove(data, ["k1"], "")
    before = (data.root / TOMBSTONES).read_bytes()
    process = get_context("fork").Process(target=_remove_within, args=(300, data.root))
    process.start()
    process.join()
    assert process.exitcode == 7
    assert (data.root / TOMBSTONES).read_bytes() == before
