"""Checks that are gone on with, and repairs: what is sound is saved, what is lost is listed, the original is never touched."""

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from gristmill.shards.checked import CHECKED
from gristmill.shards.foreign import index_dataset
from gristmill.shards.headers import padded
from gristmill.shards.images import check_image
from gristmill.shards.manifest import Manifest
from gristmill.shards.repair import LOST, REPORT, RepairError, RepairReport, release, repair
from gristmill.shards.tombstones import Tombstones
from gristmill.shards.verify import Finding, verify

from .. import disks
from .takedowns import in_child, stored, tree
from .tars import by_tarfile, tar

Picture = Callable[..., bytes]
SHARDS, EACH = 6, 5


@pytest.fixture
def data(tmp_path: Path, picture: Picture) -> Manifest:
    """Six shards of five samples, each with a caption and a record beside, deeply indexed."""
    for shard in range(SHARDS):
        entries = []
        for number in range(EACH):
            key = f"{shard}{number}"
            entries.append((f"{key}.jpg", picture("JPEG", 60 + number, 50, 5 * shard + number)))
            entries += [(f"{key}.txt", f"caption {key}".encode()), (f"{key}.json", json.dumps({"k": key}).encode())]
        tar(tmp_path / "data" / f"{shard:03d}.tar", entries)
    index_dataset([str(path) for path in sorted((tmp_path / "data").glob("*.tar"))], tmp_path / "data", deep=True)
    return Manifest.open(tmp_path / "data")


def change(path: Path, edit: Callable[[bytearray], object]) -> None:
    data = bytearray(path.read_bytes())
    edit(data)
    path.write_bytes(data)


def flip(path: Path, at: int) -> None:
    change(path, lambda data: data.__setitem__(at, data[at] ^ 0xFF))


def mended(data: Manifest, out: Path, **options: object) -> RepairReport:
    """Repair, and hold what every repair promises: the original untouched, the new one sound to the last byte."""
    before = tree(data.root)
    report = repair(data.root, out, **options)  # type: ignore[arg-type]
    assert tree(data.root) == before
    assert verify(out, deep=True) == []
    new, old = Manifest.open(out), stored(data) if all(data.path(s).exists() for s in range(SHARDS)) else {}
    assert report.samples == new.samples == data.samples - report.lost - report.removed
    assert all(old.get(key, value) == value for key, value in stored(new).items())
    assert json.loads((out / REPORT).read_text())["lost"] == report.lost
    assert len((out / LOST).read_text().splitlines()) == 1 + len(report.findings)
    assert not (out / ".repair").exists()
    return report


def sides(path: Path) -> dict[str, bytes]:
    blob = path.read_bytes()
    return {
        name: blob[offset : offset + length] for name, offset, length in by_tarfile(path) if not name.endswith("jpg")
    }


def test_a_sound_data_set_is_copied(data: Manifest, tmp_path: Path) -> None:
    report = mended(data, tmp_path / "out")
    assert (report.digest, report.copied, report.findings) == (data.digest, SHARDS, [])
    assert all((tmp_path / "out" / url).read_bytes() == data.path(s).read_bytes() for s, url in enumerate(data.urls))


def test_each_kind_of_damage(data: Manifest, tmp_path: Path) -> None:
    """A cut, a flipped byte in an image, in a header, in a record; missing, empty, and replaced shards."""
    rows = [data.rows(shard) for shard in range(SHARDS)]
    whole = {url: data.path(shard).read_bytes() for shard, url in enumerate(data.urls)}
    os.truncate(data.path(0), int(rows[0].offset[3]) + 30)
    flip(data.path(1), int(rows[1].offset[2]) + 200)
    flip(data.path(1), int(rows[1].offset[4]) - 500)  # of the header before an image: the image is sound
    record = int(rows[1].offset[0]) + padded(int(rows[1].length[0])) + 2 * 512 + 512
    flip(data.path(1), record)
    data.path(2).unlink()
    data.path(3).write_bytes(b"")
    data.path(4).write_bytes(whole["005.tar"])
    report = mended(data, tmp_path / "out")
    assert report.dropped == ["002.tar", "003.tar", "004.tar"]
    assert report.lost == 2 + 1 + 3 * EACH
    new = Manifest.open(tmp_path / "out")
    assert new.urls == ["000.tar", "001.tar", "005.tar"]
    assert [new.rows(shard).keys for shard in range(3)] == [["00", "01", "02"], ["10", "11", "13", "14"], rows[5].keys]
    assert sides(new.path(0)) == {f"0{n}.{k}": v for n in range(3) for k, v in _sides(f"0{n}").items()}
    expected = {f"1{n}.{k}": v for n in (0, 1, 3, 4) for k, v in _sides(f"1{n}").items()}
    del expected["10.json"]
    assert sides(new.path(1)) == expected
    assert new.path(2).read_bytes() == whole["005.tar"]
    told = {(finding.shard, finding.key) for finding in report.findings}
    assert {("000.tar", "03"), ("000.tar", "04"), ("001.tar", "12"), ("001.tar", "10.json"), ("002.tar", None)} <= told
    assert Finding("001.tar", "12", "bytes changed (crc32)") in report.findings


def _sides(key: str) -> dict[str, bytes]:
    return {"txt": f"caption {key}".encode(), "json": json.dumps({"k": key}).encode()}


def test_a_tar_that_was_packed_anew_in_another_order(data: Manifest, tmp_path: Path) -> None:
    """Nothing is lost: names lead to the images, checksums prove them."""
    blob = data.path(1).read_bytes()
    members = [(name, blob[offset : offset + length]) for name, offset, length in by_tarfile(data.path(1))]
    tar(data.path(1), [("first.txt", b"x" * 700), *reversed(members)], "pax")
    report = mended_anywhere(data, tmp_path / "out")
    assert report.lost == 0
    assert sides(tmp_path / "out" / "001.tar").keys() == {name for name, _ in members if not name.endswith("jpg")}


def mended_anywhere(data: Manifest, out: Path) -> RepairReport:
    report = repair(data.root, out)
    assert verify(out, deep=True) == []
    return report


def test_a_damaged_manifest_leaves_what_the_tars_show(data: Manifest, tmp_path: Path) -> None:
    """And an image within an image is nobody's sample: damage lets the walk go on at sound headers alone."""
    (data.root / "samples" / "00000.parquet").write_bytes(b"junk")
    flip(data.path(0), 3)  # the name of the first image
    report = repair(data.root, tmp_path / "out")
    assert verify(tmp_path / "out", deep=True) == []
    assert report.samples == SHARDS * EACH - 1


def test_headers_within_an_image_are_no_samples(tmp_path: Path, picture: Picture) -> None:
    inner = tar(tmp_path / "inner.tar", [("evil.jpg", picture(seed=3)), ("k0.json", b'{"evil": 1}')]).read_bytes()
    images = [picture(seed=1) + bytes(-len(picture(seed=1)) % 512) + inner, picture(seed=2)]
    tar(tmp_path / "data" / "0.tar", [("k0.jpg", images[0]), ("k1.jpg", images[1])])
    index_dataset([str(tmp_path / "data" / "0.tar")], tmp_path / "data", deep=True)
    flip(tmp_path / "data" / "0.tar", 3)
    repair(tmp_path / "data", tmp_path / "out")
    new = Manifest.open(tmp_path / "out")
    assert stored(new) == {"k0": check_image(images[0]).data, "k1": images[1]}
    assert [name for name, _, _ in by_tarfile(new.path(0))] == ["k0.jpg", "k1.jpg"]


def test_removed_samples_do_not_come_along(data: Manifest, tmp_path: Path) -> None:
    gone = stored(data)["31"]
    Tombstones.of(data).remove(data, ["31"], "asked")
    report = mended(data, tmp_path / "out")
    assert (report.removed, report.lost, report.copied, report.findings) == (1, 0, SHARDS - 1, [])
    assert not [name for name, content in tree(tmp_path / "out").items() if gone in content]


def test_images_that_dali_may_not_read_are_encoded_anew(tmp_path: Path, picture: Picture) -> None:
    odd = picture("JPEG", 40, 30, 3, mode="CMYK")
    tar(tmp_path / "data" / "0.tar", [("a.jpg", picture()), ("b.jpg", odd), ("c.jpg", b"\xff\xd8\xff none")])
    index_dataset([str(tmp_path / "data" / "0.tar")], tmp_path / "data")
    data = Manifest.open(tmp_path / "data")
    report = repair(tmp_path / "data", tmp_path / "out")
    assert (report.samples, report.changed, report.lost) == (2, 1, 1)
    assert verify(tmp_path / "out", deep=True) == []
    assert stored(Manifest.open(tmp_path / "out"))["a"] == stored(data)["a"]


def test_where_a_repair_may_not_go(data: Manifest, tmp_path: Path) -> None:
    with pytest.raises(RepairError, match="lies in it"):
        repair(data.root, data.root / "new")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("")
    with pytest.raises(RepairError, match="not empty"):
        repair(data.root, tmp_path / "full")
    for shard in range(SHARDS):
        data.path(shard).write_bytes(b"")
    with pytest.raises(RepairError, match=r"nothing of .* can be saved"):
        repair(data.root, tmp_path / "nothing")


def test_killed_ten_times_at_random_and_gone_on_with(data: Manifest, tmp_path: Path) -> None:
    """Steps (n-th touch of the file system) and moments; the result is the same to the byte."""
    os.truncate(data.path(0), 9000)
    flip(data.path(3), int(data.rows(3).offset[1]) + 99)
    began = time.monotonic()
    repair(data.root, tmp_path / "calm")
    whole, calm = time.monotonic() - began, tree(tmp_path / "calm")
    out, chance = tmp_path / "out", random.Random(3)

    def work() -> object:
        return repair(data.root, out, last=False)

    killed = 0
    for turn in range(10):
        how = {"kill_at": chance.randrange(4, 60)} if turn % 2 else {"kill_after": chance.uniform(0, whole)}
        killed += in_child(work, **how) == -signal.SIGKILL  # type: ignore[arg-type]
    assert killed > 3
    assert in_child(work) == 0
    release(out)
    mine = {name: content for name, content in tree(out).items() if name != REPORT}
    assert mine == {name: content for name, content in calm.items() if name != REPORT}


def test_a_full_disk_stops_a_repair_which_then_goes_on(data: Manifest, tmp_path: Path) -> None:
    with disks.small_disk(tmp_path / "disk", "1m") as disk:
        (disk / "filler").write_bytes(bytes(shutil.disk_usage(disk).free - 70_000))
        with pytest.raises(OSError, match="No space"):
            repair(data.root, disk / "out")
        assert not list(disk.rglob("*.partial"))
        (disk / "filler").unlink()
        assert repair(data.root, disk / "out").digest == data.digest


def test_an_interrupted_check_goes_on_and_a_finished_one_does_not(data: Manifest, tmp_path: Path) -> None:
    class Interrupted(Exception):
        pass

    def stop(done: int, total: int) -> None:
        if done == 4:
            raise Interrupted

    notes: list[str] = []
    with pytest.raises(Interrupted):
        verify(data.root, deep=True, workers=1, progress=stop)
    assert len((data.root / CHECKED).read_text().splitlines()) == 5
    about = data.path(0).stat()
    flip(data.path(0), int(data.rows(0).offset[1]) + 99)
    os.utime(data.path(0), ns=(about.st_atime_ns, about.st_mtime_ns))  # bits rot without a change of date
    flip(data.path(1), int(data.rows(1).offset[1]) + 99)
    shutil.copytree(data.root, tmp_path / "again", copy_function=shutil.copy2)
    assert verify(data.root, deep=True, note=notes.append) == [Finding("001.tar", "11", "bytes changed (crc32)")]
    assert "4 shards were sound" in notes[0]
    assert not (data.root / CHECKED).exists()
    both = [Finding(f"00{n}.tar", f"{n}1", "bytes changed (crc32)") for n in range(2)]
    assert verify(data.root, deep=True, note=notes.append) == both  # anew, for the last came to its end
    assert verify(tmp_path / "again", deep=True, again=True, note=notes.append) == both
    assert len(notes) == 1


@pytest.mark.parametrize("text", [b"\xff\x00", b"[]\n", b'{"data": "another", "deep": true, "since": 1}\n', b"{}\n{\n"])
def test_a_spoiled_record_of_a_check_counts_for_nothing(data: Manifest, text: bytes) -> None:
    (data.root / CHECKED).write_bytes(text)
    flip(data.path(0), int(data.rows(0).offset[1]) + 99)
    assert len(verify(data.root, deep=True)) == 1
    assert not (data.root / CHECKED).exists()


def test_any_number_of_workers_finds_the_same(data: Manifest) -> None:
    os.truncate(data.path(0), 9000)
    flip(data.path(3), int(data.rows(3).offset[1]) + 99)
    found = verify(data.root, deep=True, workers=1)
    assert len(found) > 3
    assert all(verify(data.root, deep=True, workers=workers) == found for workers in (2, 5))
