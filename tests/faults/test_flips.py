"""Single bits turned over: in the headers of tars, in pixels, in the headers of JPEGs; with and without checksums."""

from __future__ import annotations

import random

import pytest
from gristmill.pipeline.fetch import DamageError
from gristmill.shards.quarantine import Quarantine

from .damage import flip, read_and_hold
from .streams import (
    IMAGES,
    SLOTS,
    N,
    Oracle,
    booked,
    dali,
    hold,
    load,
    offset_of,
    place_of,
    take,
    until_it_stops,
    write_set,
)


@pytest.mark.fault("flipped byte in a tar header, checksums in the index")
def test_flipped_header_deep(tmp_path, undisturbed, fault):
    """The image is what counts, and its checksum is right: every field of the header, byte by byte."""
    rng = random.Random(3)
    manifest = write_set(tmp_path / "data")
    hits = [(index, at - 512) for index, at in enumerate(sorted(rng.sample(range(512), N)))]
    for index, at in hits:
        flip(manifest, index, at, 1 << rng.randrange(8))
    read_and_hold(fault, undisturbed, manifest, Quarantine(tmp_path / "q.jsonl"), [], len(hits))
    fault.became = "no damage: the bytes of the images are those of the index"


@pytest.mark.fault("flipped byte in a tar header, quick index, times kept")
def test_flipped_header_quick(tmp_path, undisturbed, fault):
    """A disk that rots. Of the header the reader needs the size, and nothing else of it."""
    rng = random.Random(4)
    manifest = write_set(tmp_path / "data", deep=False)
    size, name = [3, 40, 61, 93], [10, 25, 70, 88]
    for index in size:
        flip(manifest, index, 124 + 6 + rng.randrange(4) - 512, 1)
    for index in name:
        flip(manifest, index, rng.randrange(3) - 512, 1)
    read_and_hold(fault, undisturbed, manifest, Quarantine(tmp_path / "q.jsonl"), size, 8, reason="no tar member of")
    fault.became = "4 in the size: substituted; 4 in the name: no damage"


@pytest.mark.fault("flipped byte in a tar header, quick index, time changed")
def test_flipped_header_noticed(tmp_path, undisturbed, fault):
    """The shard is not the file that was indexed: its headers are looked at anew, and the run stops and names it."""
    manifest = write_set(tmp_path / "data", deep=False)
    for index in (12, 59, 95):
        quarantine = Quarantine(tmp_path / f"{index}.jsonl")
        shard = place_of(index)[0]
        path, whole = manifest.path(shard), manifest.path(shard).read_bytes()
        flip(manifest, index, 130 - 512, 1, unseen=False)
        with load(manifest, quarantine, dali()) as loader:
            why = rf"{path.name} was changed since it was indexed: byte {offset_of(manifest, index) - 512}:"
            got = until_it_stops(loader, DamageError, why)
            path.write_bytes(whole)
            loader.seek(loader.position)
            got += take(loader, SLOTS - len(got))
        assert quarantine.count == 0
        fault.add(hold(got, undisturbed.dali.slots, undisturbed.dali.oracle), 1, stops=1)
    fault.became = "stops, names shard and byte; put right, it goes on where it stopped"


@pytest.mark.fault("flipped byte in the pixels, checksums in the index")
def test_flipped_pixel_deep(tmp_path, undisturbed, fault):
    manifest, rng = write_set(tmp_path / "data"), random.Random(6)
    bad = sorted(rng.sample(range(N), 20))
    for index in bad:
        flip(
            manifest,
            index,
            rng.randrange(IMAGES[index].index(b"\xff\xda") + 14, len(IMAGES[index])),
            1 << rng.randrange(8),
        )
    read_and_hold(fault, undisturbed, manifest, Quarantine(tmp_path / "q.jsonl"), bad, 20, reason="checksum")
    fault.became = "all found, substituted"


@pytest.mark.parametrize(
    "region",
    [
        pytest.param("pixels", marks=pytest.mark.fault("flipped byte in the pixels, quick index")),
        pytest.param("head", marks=pytest.mark.fault("flipped byte in a JPEG's own header, quick index")),
    ],
)
def test_flipped_image_quick(tmp_path, undisturbed, fault, region):
    """Without checksums the decoder decides. What it lets pass is another picture in the same slot, and nothing else."""
    manifest, rng = write_set(tmp_path / "data", deep=False), random.Random(7)
    hit, spoiled = sorted(rng.sample(range(N), 20)), list(IMAGES)
    for index in hit:
        scan = IMAGES[index].index(b"\xff\xda") + 14
        at = rng.randrange(scan, len(IMAGES[index])) if region == "pixels" else rng.randrange(scan)
        bit = 1 << rng.randrange(8)
        flip(manifest, index, at, bit)
        spoiled[index] = IMAGES[index][:at] + bytes([IMAGES[index][at] ^ bit]) + IMAGES[index][at + 1 :]
    quarantine = Quarantine(tmp_path / "q.jsonl")
    with load(manifest, quarantine, dali()) as loader:
        got, stats = take(loader, SLOTS), loader.stats
    seen = {(entry.shard, entry.row) for entry in quarantine}
    bad = {place_of(index) for index in hit if (manifest.urls[place_of(index)[0]], place_of(index)[1]) in seen}
    assert len(bad) == quarantine.count == stats.quarantined
    passed = {place_of(index) for index in hit} - bad
    oracle, healthy = Oracle(dali(), spoiled), undisturbed.dali.slots
    whole = [oracle.slot(at, slot.place) if slot.place in passed else slot for at, slot in enumerate(healthy)]
    found = hold(got, whole, oracle, bad)
    assert stats.substituted == found.damaged == 2 * len(bad)
    booked(quarantine, manifest, bad)
    numbers = {"found by the decoder": len(bad), "undetected": len(passed)}
    fault.add(found, 20, "refused by the decoder: substituted; else not to be known without `--deep`", **numbers)
