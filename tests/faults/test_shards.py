"""A shard that is missing, or another one in its place: the run stops and names it, and goes on when it is put right."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from gristmill.pipeline.fetch import DamageError
from gristmill.shards.errors import GristmillError
from gristmill.shards.quarantine import Quarantine

from .streams import IMAGES, PER_SHARD, SLOTS, Found, N, hold, load, take, until_it_stops, write_set


@pytest.mark.fault("missing shard")
def test_missing(tmp_path, undisturbed, fault):
    """Away before it is first read; back, the same loader goes on, and so does a new one."""
    manifest, plain = write_set(tmp_path / "data"), undisturbed.plain
    for shard in (1, 4, 7):
        quarantine = Quarantine(tmp_path / f"{shard}.jsonl")
        away = manifest.path(shard).rename(tmp_path / "away")
        with load(manifest, quarantine) as loader:
            got = until_it_stops(loader, DamageError, rf"00000{shard}\.tar cannot be read \(No such file")
            away.rename(manifest.path(shard))
            loader.seek(loader.position)
            stopped = len(got)
            got += take(loader, SLOTS - stopped)
            assert (loader.stats.samples, loader.stats.substituted) == (SLOTS, 0)
        fault.add(hold(got, plain.slots, plain.oracle), 1, stops=1)
        with load(manifest, quarantine, start=stopped) as loader:
            fault.add(hold(take(loader, 64), plain.slots, plain.oracle, start=stopped))
        assert quarantine.count == 0
        assert not quarantine.path.exists()
    fault.became = "stops and names it; restored, it goes on where it stopped"


def other(root: Path, **options) -> Path:
    """Shards of other pictures; the tars are as long as the others where the pictures are."""
    images = [*IMAGES[PER_SHARD:], *IMAGES[:PER_SHARD]]
    return write_set(root, images=images, **options).root


@pytest.mark.fault("shard replaced while it is open")
def test_replaced_while_open(tmp_path, undisturbed, fault):
    """By rename, as every tool does it that writes safely: what was opened and checked is still read."""
    plain, strange = undisturbed.plain, other(tmp_path / "strange")
    for deep in (True, False):
        manifest, quarantine = write_set(tmp_path / str(deep) / "data", deep=deep), Quarantine(tmp_path / "q.jsonl")
        with load(manifest, quarantine) as loader:
            got = take(loader, N)  # every shard is open now
            for shard in range(4):
                data = (strange / f"00000{shard}.tar").read_bytes()
                size = manifest.path(shard).stat().st_size
                (tmp_path / "new").write_bytes(data[:size].ljust(size + 10240 * (shard % 2), b"\0"))
                os.replace(tmp_path / "new", manifest.path(shard))
            got += take(loader, SLOTS - N)
            assert (loader.stats.substituted, quarantine.count) == (0, 0)
        fault.add(hold(got, plain.slots, plain.oracle), 4, "the old one is read to the end")


def replaced_and_put_back(tmp_path: Path, undisturbed, deep: bool, shard: int, change: int) -> Found:
    """One shard is replaced by another tar, `change` bytes longer; the run stops, it is put back, the run goes on."""
    plain = undisturbed.plain
    strange = other(tmp_path / "strange", name=lambda index: f"s{index:03d}.jpg")
    manifest, quarantine = write_set(tmp_path / "data", deep=deep), Quarantine(tmp_path / "q.jsonl")
    path, away = manifest.path(shard), tmp_path / "away"
    size = path.stat().st_size
    shutil.move(path, away)
    data = (strange / path.name).read_bytes().rstrip(b"\0")
    assert len(data) + 1024 <= size + change
    path.write_bytes(data.ljust(size + change, b"\0"))
    with load(manifest, quarantine) as loader:
        got = until_it_stops(loader, GristmillError, rf"{path.name} was replaced")
        shutil.move(away, path)
        loader.seek(loader.position)
        got += take(loader, SLOTS - len(got))
        assert (loader.stats.substituted, quarantine.count) == (0, 0)
    return hold(got, plain.slots, plain.oracle)


@pytest.mark.fault("shard replaced before it is opened")
def test_replaced(tmp_path, undisturbed, fault):
    """By a longer one, one of the same size, or a shorter one that is a whole tar."""
    cases = [(True, 3, 10240), (True, 6, 512), (False, 3, 10240), (False, 1, 0), (False, 6, 0)]
    cases += [(True, 5, 0), (True, 5, -5120), (False, 5, -5120)]
    for number, case in enumerate(cases):
        fault.add(replaced_and_put_back(tmp_path / str(number), undisturbed, *case), 1, stops=1)
    fault.became = "stops and names it; put back, it goes on where it stopped"
