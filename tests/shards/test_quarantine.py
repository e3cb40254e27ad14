"""The quarantine lasts, forgets nothing that was said to be remembered, and survives a kill in mid-line."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from gristmill.shards.quarantine import Damaged, Quarantine, QuarantineError


def test_entries_last_and_are_kept_once(tmp_path: Path) -> None:
    path = tmp_path / "run" / "quarantine.jsonl"
    quarantine = Quarantine(path)
    assert quarantine.count == 0
    assert not path.exists()
    assert quarantine.add("000001.tar", 7, "abc", "bytes changed (crc32)")
    assert not quarantine.add("000001.tar", 7, "abc", "seen again")
    assert quarantine.add("000000.tar", 3, "déjà", 'with "quotes"\nand a line')
    assert ("000001.tar", 7) in quarantine
    assert ("000001.tar", 8) not in quarantine

    again = Quarantine(path)
    assert again.count == len(again) == 2
    assert list(again) == [
        Damaged("000000.tar", 3, "déjà", 'with "quotes"\nand a line'),
        Damaged("000001.tar", 7, "abc", "bytes changed (crc32)"),
    ]
    assert again.digest == quarantine.digest
    assert path.read_bytes().count(b"\n") == 2


def test_the_digest_does_not_depend_on_the_order(tmp_path: Path) -> None:
    places = [("a.tar", 3), ("b.tar", 1), ("a.tar", 20)]
    one, two = Quarantine(tmp_path / "1"), Quarantine(tmp_path / "2")
    for shard, row in places:
        one.add(shard, row, "k", "x")
    for shard, row in reversed(places):
        two.add(shard, row, "k", "y")
    assert one.digest == two.digest
    assert one.digest != Quarantine(tmp_path / "3").digest


def test_a_line_cut_by_a_kill_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "quarantine.jsonl"
    Quarantine(path).add("a.tar", 1, "k", "first")
    whole = path.read_bytes()
    Quarantine(path).add("a.tar", 2, "k", "second")
    both = path.read_bytes()
    for cut in range(len(whole), len(both)):
        path.write_bytes(both[:cut])
        quarantine = Quarantine(path)
        assert [entry.row for entry in quarantine] == [1]
        quarantine.add("a.tar", 3, "k", "third")
        assert [entry.row for entry in Quarantine(path)] == [1, 3]


def test_a_foreign_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "quarantine.jsonl"
    for line in (b"not json\n", b'{"shard": "a.tar"}\n', b"[1]\n", b"\xff\xfe\n"):
        path.write_bytes(line)
        with pytest.raises(QuarantineError, match="line 1"):
            Quarantine(path)


def test_processes_may_share_a_file(tmp_path: Path) -> None:
    path = tmp_path / "quarantine.jsonl"
    code = """
import sys
from gristmill.shards.quarantine import Quarantine
quarantine = Quarantine(sys.argv[1])
for row in range(100):
    quarantine.add(sys.argv[2] + ".tar", row, "k" * 50, "damaged")
"""
    names = ["a", "b", "c"]
    running = [subprocess.Popen([sys.executable, "-c", code, str(path), name]) for name in names]
    assert [process.wait(60) for process in running] == [0, 0, 0]
    assert Quarantine(path).count == 300
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_a_full_disk_is_said_and_leaves_whole_lines(small_disk: Path) -> None:
    path = small_disk / "quarantine.jsonl"
    quarantine = Quarantine(path)
    quarantine.add("a.tar", 1, "k", "first")
    room = shutil.disk_usage(small_disk).free
    (small_disk / "ballast").write_bytes(bytes(room))
    row = 2

    def fill() -> None:
        nonlocal row
        while row < 2000:
            quarantine.add("a.tar", row, "k", "x" * 500)
            row += 1

    with pytest.raises(QuarantineError, match="No space left"):
        fill()
    stuck = quarantine.count
    os.unlink(small_disk / "ballast")
    assert path.read_bytes().endswith(b"\n")
    assert Quarantine(path).count == stuck
    assert quarantine.add("a.tar", 9999, "k", "room again")
