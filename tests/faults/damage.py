"""Damage put into shards as a disk would do it, and what must hold of the stream that is read from them."""

from __future__ import annotations

import os
from pathlib import Path

from gristmill.shards.manifest import Manifest
from gristmill.shards.quarantine import Quarantine

from .streams import (
    SLOTS,
    booked,
    dali,
    hold,
    load,
    offset_of,
    place_of,
    take,
)
from .table import Row


def write(path: Path, offset: int, data: bytes, *, unseen: bool = False) -> None:
    """Overwrite bytes; `unseen`: as a disk does that rots, with the file's times as they were."""
    about = path.stat()
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)
    if unseen:
        os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns))


def flip(manifest: Manifest, index: int, at: int, bit: int, *, unseen: bool = True) -> None:
    """Turn a bit of the byte `at` bytes behind the beginning of a sample over."""
    path, offset = manifest.path(place_of(index)[0]), offset_of(manifest, index) + at
    write(path, offset, bytes([path.read_bytes()[offset] ^ bit]), unseen=unseen)


def read_and_hold(
    fault: Row, undisturbed, manifest: Manifest, quarantine: Quarantine, bad: list[int], injected: int, **options
) -> None:
    """Two epochs by DALI: damaged slots hold their substitutes, all others what they always hold, and all is booked."""
    places = {place_of(index) for index in bad}
    with load(manifest, quarantine, dali()) as loader:
        got = take(loader, SLOTS)
        stats = loader.stats
    found = hold(got, undisturbed.dali.slots, undisturbed.dali.oracle, places)
    assert found.damaged == 2 * len(bad)
    assert (stats.samples, stats.substituted, stats.removed) == (SLOTS, found.damaged, 0)
    assert stats.bytes == sum(int(manifest.rows(slot.place[0]).length[slot.place[1]]) for slot in got)
    assert stats.quarantined == quarantine.count == len(bad)
    booked(quarantine, manifest, places, options.pop("reason", ""))
    with load(manifest, Quarantine(quarantine.path), dali(), start=16) as loader:  # known by now, from another place on
        again = hold(take(loader, 32), undisturbed.dali.slots, undisturbed.dali.oracle, places, 16)
    fault.add(found, injected, quarantined=stats.quarantined, **options)
    fault.add(again)
