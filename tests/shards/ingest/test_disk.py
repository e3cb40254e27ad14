"""Disks that are full or read-only: said at once, nothing half-written is left, and room is all that it takes to go on."""

import resource
import shutil
import subprocess
from pathlib import Path

import pytest
from gristmill.shards import verify
from gristmill.shards.ingest import IngestConfig, IngestError, ingest

from .sets import noise, scenes, tree

CONFIG = IngestConfig(unit=3, shard_samples=4, holdout=0.3, near=2)


def attempt(source: Path, out: Path) -> str:
    try:
        ingest([source], out, CONFIG, workers=1)
    except IngestError as error:
        return str(error)
    return ""


def test_a_disk_that_fills_at_any_moment(small_disk: Path, tmp_path: Path) -> None:
    """From "no room for anything" to "room for all"; each time room is made, and the same command goes on."""
    scenes(tmp_path / "in", 12)
    ingest([tmp_path / "in"], tmp_path / "calm", CONFIG, workers=1)
    expected = tree(tmp_path / "calm")
    ballast, failures = small_disk / "ballast", []
    free = shutil.disk_usage(small_disk).free
    for room in range(0, 640_000, 49_152):
        ballast.write_bytes(bytes(free - room))
        failure = attempt(tmp_path / "in", small_disk / "out")
        failures.append(bool(failure))
        if failure:
            assert "no space" in failure
            found = tree(small_disk / "out") if (small_disk / "out").exists() else {}
            assert {name: data for name, data in found.items() if name.endswith(".tar")}.items() <= expected.items()
            ballast.unlink()
            assert attempt(tmp_path / "in", small_disk / "out") == ""
        assert tree(small_disk / "out") == expected
        assert verify(small_disk / "out" / "train", deep=True) == []
        shutil.rmtree(small_disk / "out")
    assert failures == sorted(failures, reverse=True)
    assert failures[:3] == [True] * 3
    assert not failures[-1]


def test_a_worker_says_that_the_disk_is_full(small_disk: Path, tmp_path: Path) -> None:
    noise(tmp_path / "noise", 24, 128)
    with pytest.raises(IngestError, match=rf"no space in {small_disk}.*start the same command again, it goes on"):
        ingest([tmp_path / "noise"], small_disk / "out", CONFIG, workers=2)
    with pytest.raises(IngestError, match="no space"):
        ingest([tmp_path / "noise"], small_disk / "out", CONFIG, workers=2)
    shutil.rmtree(tmp_path / "noise")
    noise(tmp_path / "noise", 6, 64)
    assert ingest([tmp_path / "noise"], small_disk / "out", CONFIG, workers=1, restart=True).accepted == 6


def test_a_limit_on_file_sizes_is_said_too(tmp_path: Path) -> None:
    noise(tmp_path / "noise", 8, 128)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, hard))  # Python ignores SIGXFSZ, so that writing fails
    try:
        with pytest.raises(IngestError, match=r"no space in .* \(File too large\)"):
            ingest([tmp_path / "noise"], tmp_path / "out", CONFIG, workers=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert ingest([tmp_path / "noise"], tmp_path / "out", CONFIG, workers=1).accepted == 8


def test_a_read_only_destination(small_disk: Path, tmp_path: Path) -> None:
    scenes(tmp_path / "in", 6)
    ingest([tmp_path / "in"], small_disk / "out", CONFIG, workers=1)
    before = tree(small_disk / "out")
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    try:
        with pytest.raises(IngestError, match=r"cannot be written or read \(Read-only file system\)"):
            ingest([tmp_path / "in"], small_disk / "new", CONFIG, workers=1)
        with pytest.raises(IngestError, match=r"cannot be written or read \(Read-only file system\)"):
            ingest([tmp_path / "in"], small_disk / "out", CONFIG, append=True, workers=1)
    finally:
        subprocess.run(["mount", "-o", "remount,rw", small_disk], check=True)
    assert tree(small_disk / "out") == before
    assert not (small_disk / "new").exists()
    (tmp_path / "file").write_text("mine")
    with pytest.raises(IngestError, match="file"):
        ingest([tmp_path / "in"], tmp_path / "file" / "out", CONFIG, workers=1)
