"""Damage in the data itself costs its own slots, by the DALI executor, with and without checksums in the index."""

from __future__ import annotations

import io
import os

import numpy as np
import pytest
from gristmill.shards.quarantine import Quarantine
from PIL import Image

from .damage import read_and_hold, write
from .streams import (
    IMAGES,
    PER_SHARD,
    SLOTS,
    N,
    dali,
    hold,
    load,
    offset_of,
    place_of,
    take,
    write_set,
)

DEPTHS = [True, False]  # checksums in the index, or headers alone


@pytest.mark.fault("truncated tar")
def test_truncated_tar(tmp_path, undisturbed, fault):
    """Cut in the middle of a sample, in a header, and between two samples."""
    cuts = {(3, 9): 100, (0, 6): -300, (7, 11): -512}
    for deep in DEPTHS:
        manifest = write_set(tmp_path / str(deep) / "data", deep=deep)
        bad = []
        for (shard, row), beyond in cuts.items():
            os.truncate(manifest.path(shard), offset_of(manifest, shard * PER_SHARD + row) + beyond)
            bad += range(shard * PER_SHARD + row, (shard + 1) * PER_SHARD)
        read_and_hold(
            fault, undisturbed, manifest, Quarantine(tmp_path / f"{deep}.jsonl"), bad, len(cuts), reason="truncated"
        )
    fault.became = "what was cut off is substituted, what is left is read"


@pytest.mark.fault("JPEG of garbage")
def test_garbage(tmp_path, undisturbed, fault):
    """Random bytes, text, and a good header with noise behind it; there before the index was made, and put in later."""
    rng = np.random.default_rng(5)
    bad = [2, 31, 50, 95]
    images = list(IMAGES)
    for number, index in enumerate(bad):
        noise = rng.bytes(len(IMAGES[index]))
        head = IMAGES[index][: IMAGES[index].index(b"\xff\xda")] + b"\0" * 40
        images[index] = [noise, b"<html>not found</html>", head, noise][number][: len(noise)]
    for deep in DEPTHS:
        born = write_set(tmp_path / f"born-{deep}", deep=deep, images=images)
        read_and_hold(fault, undisturbed, born, Quarantine(tmp_path / f"born-{deep}.jsonl"), bad, len(bad))
        later = write_set(tmp_path / f"later-{deep}", deep=deep)
        for index in bad:
            spoiled = images[index].ljust(len(IMAGES[index]), b"\0")
            write(later.path(place_of(index)[0]), offset_of(later, index), spoiled, unseen=True)
        read_and_hold(fault, undisturbed, later, Quarantine(tmp_path / f"later-{deep}.jsonl"), bad, len(bad))
    fault.became = "substituted, whether it was there before the index or not"


@pytest.mark.fault("zero-byte member")
def test_zero_bytes(tmp_path, undisturbed, fault):
    bad = [0, 17, 47, 95]
    for deep in DEPTHS:
        images = [b"" if index in bad else data for index, data in enumerate(IMAGES)]
        manifest = write_set(tmp_path / str(deep) / "data", deep=deep, images=images)
        read_and_hold(fault, undisturbed, manifest, Quarantine(tmp_path / f"{deep}.jsonl"), bad, len(bad))
    fault.became = "a sample like any other, substituted"


@pytest.mark.fault("PNG named jpg")
def test_png_named_jpg(tmp_path, undisturbed, fault):
    """The pixels that the JPEG has, in a file of another kind: nothing goes by names, so nothing changes."""
    others = [1, 20, 44, 66, 90]
    images = list(IMAGES)
    for index in others:
        out = io.BytesIO()
        Image.fromarray(decoded(IMAGES[index])).save(out, "PNG")
        images[index] = out.getvalue()
    for deep in DEPTHS:
        manifest = write_set(tmp_path / str(deep) / "data", deep=deep, images=images)
        read_and_hold(fault, undisturbed, manifest, Quarantine(tmp_path / f"{deep}.jsonl"), [], len(others))
    fault.became = "no damage: read as what it is"


def decoded(data: bytes) -> np.ndarray:
    """An image as DALI's decoder sees it."""
    from gristmill.pipeline.augment.decode import Decoder

    (image,) = Decoder("cpu", None, 1).decode([np.frombuffer(data, np.uint8)])
    return np.array(image)


@pytest.mark.fault("duplicate basenames in two folders of a tar")
def test_duplicate_basenames(tmp_path, undisturbed, fault):
    """Every name comes twice in its shard, once in each folder: two samples, told apart."""
    half = PER_SHARD // 2

    def name(index):
        return f"{'ab'[index % PER_SHARD // half]}/{index % half:02d}.jpg"

    renamed = [
        slot._replace(key=name(slot.place[0] * PER_SHARD + slot.place[1])[:-4]) for slot in undisturbed.dali.slots
    ]
    for deep in DEPTHS:
        manifest = write_set(tmp_path / str(deep), deep=deep, name=name)
        assert manifest.counts.tolist() == [PER_SHARD] * (N // PER_SHARD)
        quarantine = Quarantine(tmp_path / f"{deep}.jsonl")
        with load(manifest, quarantine, dali()) as loader:
            found = hold(take(loader, SLOTS), renamed, undisturbed.dali.oracle)
            assert (loader.stats.substituted, quarantine.count) == (0, 0)
        fault.add(found, N // 2, "each its own sample, under `folder/name`")
