"""Indexing what others made: everything is counted, nothing changed or lost, and a replaced shard is noticed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from gristmill.ops.index import run_index
from gristmill.pipeline.order import Sequential
from gristmill.pipeline.reader import DamageError, Reader
from gristmill.shards import Finding, Manifest, ManifestError, Quarantine, verify
from gristmill.shards.blob import Blob, LocalBlob
from gristmill.shards.foreign import IndexingError, index_dataset
from gristmill.shards.index import AGAIN, BARE, HIDDEN, LINKS, OUTSIDE, SIDES
from gristmill.shards.index_report import SKIPPED
from gristmill.shards.ingest import ingest_folder
from gristmill.shards.places import find_shards

from .tars import tar

Picture = Callable[..., bytes]


def read_all(root: Path, scratch: Path) -> list[tuple[str, bytes]]:
    manifest = Manifest.open(root)
    reader = Reader(manifest, Quarantine(scratch), order=Sequential(manifest.counts), seed=0, damage_bound=0.5)
    try:
        found = reader.read(np.arange(manifest.samples))
    finally:
        reader.close()
    return [(key, data.tobytes()) for key, data in zip(found.keys, found.data, strict=True)]


def test_everything_is_counted(tmp_path: Path, picture: Picture) -> None:
    image = picture()
    links = {
        "link.jpg": tarfile.SYMTYPE,
        "hard.jpg": tarfile.LNKTYPE,
        "pipe.jpg": tarfile.FIFOTYPE,
        "device.jpg": tarfile.CHRTYPE,
        "block.jpg": tarfile.BLKTYPE,
        "folder": tarfile.DIRTYPE,
    }
    entries = [
        ("__meta__/x.jpg", b"{}"),
        ("README", b"x"),
        (".hidden.jpg", b"x"),
        ("a/b/key.with.dots.jpg", b"the suffix is with.dots.jpg: no image by name"),
        ("a/key.jpg", image),
        ("a/key.json", b"{}"),
        ("b/key.jpg", image + b"2"),
        ("a.b/key.jpg", image),  # a dot in a folder is no suffix
        ("/absolute.jpg", image),
        ("../../up.jpg", image),
        ("..dots..jpg", b"x"),
        ("a/key.PNG", picture("PNG")),  # comes again
        ("text.txt", b"x"),
    ]
    tar(tmp_path / "set" / "a.tar", entries, links=links)
    report = index_dataset(find_shards([tmp_path / "set"]), tmp_path / "set")
    rows = Manifest.open(tmp_path / "set").rows(0)
    assert rows.keys == ["a/key", "b/key", "a.b/key", "/absolute", "../../up", "a/key"]
    assert rows.format == ["jpg"] * 5 + ["png"]
    assert report.counts == {LINKS: 5, HIDDEN: 4, BARE: 2, SIDES: 3, OUTSIDE: 2, AGAIN: 1}
    assert f"5 {LINKS}" in report.summary().splitlines()
    assert not Path("/absolute.jpg").exists()
    assert dict(read_all(tmp_path / "set", tmp_path / "q"))["b/key"] == image + b"2"


def test_a_quick_index_has_nulls_and_a_deep_one_fills_them(folder: Path, tmp_path: Path, picture: Picture) -> None:
    places = find_shards([folder])
    quick = index_dataset(places, folder)
    assert not quick.deep
    assert not Manifest.open(folder).rows(1).deep
    images = read_all(folder, tmp_path / "q")
    deep = index_dataset(places, folder, deep=True)
    assert deep.deep
    assert deep.digest == quick.digest
    assert deep.reused == 0
    rows = Manifest.open(folder).rows(1)
    assert rows.deep
    assert rows.width.tolist() == [20, 21, 22, 23, 24]
    assert rows.height.tolist() == [30] * 5
    assert read_all(folder, tmp_path / "q") == images
    assert verify(folder, deep=True) == []
    again = index_dataset(places, folder)  # a quick one takes nothing away
    assert again.deep
    assert again.reused == 3
    assert Manifest.open(folder).rows(1).crc32.tolist() == rows.crc32.tolist()


def test_images_that_do_not_decode_keep_their_place(folder: Path, tmp_path: Path, picture: Picture) -> None:
    with tarfile.open(folder / "000.tar") as file:
        member = file.getmembers()[4]
    data = bytearray((folder / "000.tar").read_bytes())
    data[member.offset_data : member.offset_data + member.size] = bytes(member.size)
    (folder / "000.tar").write_bytes(data)
    tar(folder / "odd.tar", [("cmyk.jpg", picture("JPEG", mode="CMYK")), ("fine.jpg", picture("JPEG", seed=9))])
    places = find_shards([folder])
    quick = index_dataset(places, folder)
    deep = index_dataset(places, folder, deep=True)
    assert deep.digest == quick.digest
    assert [(shard, key) for shard, key, _ in deep.damaged] == [("000.tar", "02")]
    assert deep.odd == {"CMYK": 1}
    rows = Manifest.open(folder).rows(0)
    assert rows.deep
    assert rows.width.tolist() == [20, 21, 0, 23, 24]
    assert (folder / SKIPPED).read_text().splitlines()[1] == "000.tar 02\tneither JPEG nor PNG nor WebP"
    found = read_all(folder, tmp_path / "q")
    assert [entry.reason for entry in Quarantine(tmp_path / "q")] == ["did not decode when it was indexed"]
    assert len(found) == 17
    assert found[2][0] != "02"
    taken = index_dataset(places, folder, deep=True)
    assert taken.reused == 4
    assert [(shard, key) for shard, key, _ in taken.damaged] == [("000.tar", "02")]
    assert [finding.key for finding in verify(folder, deep=True)] == ["02", "cmyk"]


def test_shards_that_cannot_be_indexed_are_all_named_and_nothing_is_left(folder: Path) -> None:
    whole = (folder / "001.tar").read_bytes()
    (folder / "001.tar").write_bytes(whole[:3000])
    subprocess.run(["gzip", folder / "002.tar"], check=True)
    places = find_shards([folder])
    before = sorted(folder.iterdir())
    with pytest.raises(IndexingError) as caught:
        index_dataset(places, folder)
    assert "2 of 3 shards cannot be indexed" in str(caught.value)
    assert [url for url, _ in caught.value.problems] == ["001.tar", "002.tar.gz"]
    assert "cut short" in caught.value.problems[0][1]
    assert "compressed with gzip; unpack it" in caught.value.problems[1][1]
    assert sorted(folder.iterdir()) == before

    with tarfile.open(folder / "003.tar", "w"):
        pass
    report = index_dataset(find_shards([folder]), folder, leave_out=True)
    assert (report.shards, report.samples) == (1, 5)
    assert report.empty == ["003.tar"]
    assert [line.split("\t")[0] for line in (folder / SKIPPED).read_text().splitlines()] == [
        "what",
        "001.tar",
        "002.tar.gz",
        "003.tar",
    ]
    assert verify(folder) == []  # what was left out on purpose is no stranger
    (folder / "001.tar").write_bytes(whole)
    (folder / "002.tar.gz").unlink()
    (folder / "003.tar").unlink()
    index_dataset(find_shards([folder]), folder)
    assert not (folder / SKIPPED).exists()


def test_an_error_leaves_the_index_that_was_there(folder: Path) -> None:
    places = find_shards([folder])
    digest = index_dataset(places, folder).digest
    (folder / "001.tar").write_bytes(b"junk" * 1000)
    with pytest.raises(IndexingError):
        index_dataset(places, folder)
    assert Manifest.open(folder).digest == digest


def test_a_second_index_looks_at_what_is_new(folder: Path, picture: Picture) -> None:
    opened: list[str] = []

    class Watched(LocalBlob):
        def read(self, offset: int, length: int) -> bytes:
            opened.append(self.path.name)
            return super().read(offset, length)

    def opener(place: str) -> Blob:
        return Watched(place)

    index_dataset(find_shards([folder]), folder, deep=True)
    tar(folder / "003.tar", [("new.jpg", picture(seed=50))])
    os.utime(folder / "001.tar")
    report = index_dataset(find_shards([folder]), folder, deep=True, opener=opener)
    assert set(opened) == {"001.tar", "003.tar"}
    assert (report.reused, report.samples) == (2, 16)


def test_ingests_own_checksums_are_kept(pictures: Path, tmp_path: Path) -> None:
    ingest_folder(pictures, tmp_path / "out", shard_samples=10)
    root = tmp_path / "out" / "train"
    before = Manifest.open(root)
    report = index_dataset(find_shards([root]), root)
    assert report.digest == before.digest
    assert report.deep
    assert Manifest.open(root).rows(0).crc32.tolist() == before.rows(0).crc32.tolist()


def test_a_replaced_shard_of_the_same_size_is_noticed(folder: Path, tmp_path: Path) -> None:
    index_dataset(find_shards([folder]), folder)
    images = read_all(folder, tmp_path / "q0")
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy, copy_function=shutil.copyfile)  # other times, the same bytes: no harm
    assert Manifest.open(copy).identities[0] != LocalBlob(copy / "000.tar").identity()
    assert read_all(copy, tmp_path / "q1") == images
    size = (copy / "001.tar").stat().st_size
    other = tar(tmp_path / "other.tar", [("10.jpg", images[5][1][:-1] + b"\0\0"), ("11.jpg", images[0][1])])
    data = other.read_bytes()[:size]
    (copy / "001.tar").write_bytes(data + bytes(size - len(data)))
    with pytest.raises(DamageError, match=r"001\.tar was replaced since it was indexed: its keys, offsets"):
        read_all(copy, tmp_path / "q2")
    assert {finding.shard for finding in verify(copy)} == {"001.tar"}
    (copy / "001.tar").write_bytes(os.urandom(size))
    with pytest.raises(DamageError, match=r"001\.tar was changed since it was indexed: byte 0"):
        read_all(copy, tmp_path / "q3")


def test_a_shard_replaced_while_it_is_indexed(folder: Path) -> None:
    class Slow(LocalBlob):
        def read(self, offset: int, length: int) -> bytes:
            if self.path.name == "001.tar" and offset:
                fresh = self.path.with_suffix(".new")
                shutil.copyfile(self.path, fresh)
                os.utime(fresh, (5, 5))
                os.replace(fresh, self.path)
            return super().read(offset, length)

    with pytest.raises(IndexingError, match=r"001\.tar: byte 0: was replaced while it was indexed"):
        index_dataset(find_shards([folder]), folder, opener=Slow)


def test_a_manifest_elsewhere_names_shards_by_their_whole_path(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "index"
    index_dataset(find_shards([folder]), out, idx=True)
    manifest = Manifest.open(out)
    assert manifest.urls == [str(folder / f"{i:03d}.tar") for i in range(3)]
    assert sorted(path.name for path in (out / "idx").iterdir()) == [f"{i:06d}-{i:03d}.idx" for i in range(3)]
    index_dataset(find_shards([folder]), folder)
    assert read_all(out, tmp_path / "q") == read_all(folder, tmp_path / "q")
    assert verify(out, deep=True) == []


class Faraway:
    """What any remote storage looks like from here: bytes by ranges, each a round trip."""

    leap = 1 << 20

    def __init__(self, place: str, log: list[int]) -> None:
        self.url, self._data, self._log = place, Path(place.removeprefix("https://host")).read_bytes(), log

    def size(self) -> int:
        return len(self._data)

    def read(self, offset: int, length: int) -> bytes:
        assert offset >= 0
        assert 0 < length <= len(self._data) - offset or offset == len(self._data)
        self._log.append(length)
        return self._data[offset : offset + length]

    def identity(self) -> str:
        return '"etag"'


def test_shards_behind_a_url_are_read_in_few_requests(folder: Path, tmp_path: Path) -> None:
    log: list[int] = []
    places = [f"https://host{place}" for place in find_shards([folder])]
    report = index_dataset(places, tmp_path / "out", deep=True, opener=lambda place: Faraway(place, log))
    assert report.samples == 15
    assert len(log) <= 3 * 4
    manifest = Manifest.open(tmp_path / "out")
    assert manifest.urls == places
    assert manifest.identities == ['"etag"'] * 3
    index_dataset(find_shards([folder]), folder, deep=True)
    assert [manifest.rows(i).digest() for i in range(3)] == Manifest.open(folder).digests


def test_one_writer_at_a_time(folder: Path) -> None:
    places = find_shards([folder])

    def nested(place: str) -> Blob:
        with pytest.raises(IndexingError, match="another index or ingest"):
            index_dataset(places, folder)
        return LocalBlob(place)

    assert index_dataset(places, folder, opener=nested).shards == 3


def test_killed_at_any_moment_there_is_a_whole_index_or_none(folder: Path) -> None:
    command = [
        sys.executable,
        "-c",
        "import sys; from gristmill.ops.index import run_index; run_index(sys.argv[1:], None)",
    ]
    digest = index_dataset(find_shards([folder]), folder).digest
    for wait in (0.0, 0.5, 1.5):
        process = subprocess.Popen([*command, folder], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(wait)
        process.send_signal(signal.SIGKILL)
        process.wait()
        if (folder / "dataset.json").exists():
            assert Manifest.open(folder).digest == digest
        else:
            with pytest.raises(ManifestError, match="is missing"):
                Manifest.open(folder)
    assert index_dataset(find_shards([folder]), folder).digest == digest
    assert not list(folder.rglob("*.partial"))


def test_a_full_disk_is_one_error_and_leaves_nothing(folder: Path, small_disk: Path) -> None:
    (small_disk / "fill").write_bytes(b"x" * 1_040_000)
    with pytest.raises(IndexingError, match=r"cannot be written \(No space left"):
        index_dataset(find_shards([folder]), small_disk / "out", idx=True)
    assert not (small_disk / "out" / "dataset.json").exists()
    assert not list((small_disk / "out").rglob("*.partial"))


def test_the_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_index([str(folder)], None) == 0
    assert capsys.readouterr().out.startswith("15 samples in 3 shards")
    assert run_index([str(folder)], tmp_path / "out", deep=True, idx=True, as_json=True) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["samples"], told["deep"], told["idx"], told["counts"]) == (15, True, 3, {SIDES: 15})
    with pytest.raises(IndexingError, match="--out"):
        run_index([str(folder / "000.tar")], None)
    (folder / "000.tar").write_bytes(b"")
    with pytest.raises(IndexingError, match=r"--leave-out:\n  000\.tar: byte 0: the file is empty"):
        run_index([str(folder)], None)
    assert run_index([str(folder)], None, leave_out=True) == 0
    assert Finding("000.tar", None, "in the folder, but not in the manifest") not in verify(folder)


def test_a_manifest_without_identities_is_still_read(folder: Path, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    digest = index_dataset(find_shards([folder]), folder).digest
    table = pq.read_table(folder / "shards.parquet")
    pq.write_table(table.drop_columns(["identity"]), folder / "shards.parquet")
    manifest = Manifest.open(folder)
    assert manifest.identities == [None] * 3
    assert manifest.digest == digest
    assert len(read_all(folder, tmp_path / "q")) == 15
    pq.write_table(table.drop_columns(["digest"]), folder / "shards.parquet")
    with pytest.raises(ManifestError, match="other columns"):
        Manifest.open(folder)
