"""Verify finds each kind of damage, names its sample, and is content with what is sound."""

from collections.abc import Callable
from pathlib import Path

import pytest
from gristmill.shards import Finding, Manifest, ManifestError, index_dataset, verify
from gristmill.shards.ingest import ingest_folder

from ..faulty_http import FaultyServer


@pytest.fixture
def sound(pictures: Path, tmp_path: Path) -> Manifest:
    ingest_folder(pictures, tmp_path / "out", shard_samples=10)
    return Manifest.open(tmp_path / "out" / "train")


def change(manifest: Manifest, shard: int, edit: Callable[[bytearray], object]) -> None:
    data = bytearray(manifest.path(shard).read_bytes())
    edit(data)
    manifest.path(shard).write_bytes(data)


def test_a_sound_data_set_has_no_findings(sound: Manifest) -> None:
    seen: list[tuple[int, int]] = []
    assert verify(sound.root, progress=lambda *step: seen.append(step)) == []
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert verify(sound.root, deep=True) == []


def test_a_flipped_byte_in_an_image_is_deep_damage(sound: Manifest) -> None:
    rows = sound.rows(1)
    middle = int(rows.offset[4] + rows.length[4] // 2)
    change(sound, 1, lambda data: data.__setitem__(middle, data[middle] ^ 0xFF))
    assert verify(sound.root) == []
    assert verify(sound.root, deep=True) == [Finding("000001.tar", rows.keys[4], "bytes changed (crc32)")]


def test_a_flipped_byte_in_a_header(sound: Manifest) -> None:
    header = int(sound.rows(0).offset[3]) - 512
    change(sound, 0, lambda data: data.__setitem__(header, data[header] ^ 1))
    (finding,) = verify(sound.root)
    assert finding == Finding("000000.tar", None, f"byte {header}: damaged header (its checksum is wrong)")


def test_a_cut_shard_a_missing_one_and_a_stranger(sound: Manifest) -> None:
    rows = sound.rows(0)
    cut = int(rows.offset[7]) + 20
    size = len(sound.path(0).read_bytes())
    change(sound, 0, lambda data: data.__delitem__(slice(cut, None)))
    sound.path(2).rename(sound.root / "stranger.tar")
    findings = verify(sound.root, deep=True)
    assert Finding("000000.tar", None, f"{cut} bytes long, {size} by the manifest") in findings
    assert Finding("000000.tar", rows.keys[7], f"cut short: 20 of {rows.length[7]} bytes") in findings
    assert Finding("000000.tar", rows.keys[9], f"cut short: 0 of {rows.length[9]} bytes") in findings
    assert Finding("000002.tar", None, "cannot be opened (No such file or directory)") in findings
    assert Finding("stranger.tar", None, "in the folder, but not in the manifest") in findings
    assert not [finding for finding in findings if finding.key in rows.keys[:7]]


def test_a_shard_in_anothers_place(sound: Manifest) -> None:
    sound.path(0).write_bytes(sound.path(1).read_bytes())
    problems = [finding.problem for finding in verify(sound.root)]
    assert sum("in its place" in problem for problem in problems) == 10


def test_rows_that_cannot_be_read(sound: Manifest) -> None:
    (sound.root / "samples" / "00000.parquet").write_bytes(b"junk")
    assert [finding.shard for finding in verify(sound.root)] == sound.urls


def test_a_folder_that_is_no_data_set_raises(tmp_path: Path) -> None:
    with pytest.raises(ManifestError):
        verify(tmp_path)


def test_shards_behind_a_url_are_not_fetched_image_by_image(
    sound: Manifest, server: FaultyServer, tmp_path: Path
) -> None:
    for shard, url in enumerate(sound.urls):
        server.put(f"/set/{url}", sound.path(shard).read_bytes())
    index_dataset([server.url(f"/set/{url}") for url in sound.urls], tmp_path / "index")
    server.log.clear()
    assert verify(tmp_path / "index", deep=True) == []
    assert len(server.asked()) < sound.samples
    server.files["/set/000001.tar"] = server.files["/set/000001.tar"][: int(sound.rows(1).offset[4]) + 20]
    keys = [finding.key for finding in verify(tmp_path / "index", deep=True)]
    assert keys == [None, None, *sound.rows(1).keys[4:]]
