"""The procedural data set: same bytes for the same seed, the promised tree and masks, truths that are really in it."""

import colorsys
import hashlib

import cv2
import numpy as np
import pytest
from gristmill.shards.demo import (
    CLOTHS,
    MASKS,
    OUTLINES,
    PARTS,
    PATCHES,
    DemoError,
    draw_instance,
    identity,
    make_demo_images,
)
from gristmill.shards.errors import GristmillError
from hypothesis import given, settings
from hypothesis import strategies as st


def _digest(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "images"
    calls = []
    written = make_demo_images(folder, images=101, instances=3, seed=5, progress=lambda *call: calls.append(call))
    return folder, written, calls


def test_tree_has_every_class_and_whole_instances(small):
    folder, written, calls = small
    assert written == 96, "101 images over 48 instances: 2 each"
    assert calls[-1] == (96, 96)
    assert len(calls) == 48
    for cloth in CLOTHS:
        for patch in PATCHES:
            for instance in range(3):
                names = sorted(path.name for path in (folder / cloth / patch / f"{instance:02d}").iterdir())
                assert names == ["00.jpg", "01.jpg"]
    picture = cv2.imread(str(folder / "green" / "rose" / "02" / "01.jpg"))
    assert picture is not None
    assert picture.shape == (64, 64, 3)


def test_masks_join_by_path_and_by_content(small):
    folder, written, _ = small
    with np.load(folder / MASKS, allow_pickle=False) as side:
        path, key, mask, parts = (side[name] for name in ("path", "key", "mask", "parts"))
    assert tuple(parts) == PARTS
    assert mask.shape == (written, 64, 64)
    for i in range(0, written, 17):
        data = (folder / str(path[i])).read_bytes()
        assert hashlib.blake2b(data, digest_size=16).hexdigest() == key[i]
    assert len(set(key)) == written, "no two images alike"
    assert set(np.unique(mask)) == set(range(len(PARTS)))


def test_same_seed_same_bytes_other_seed_other_bytes(small, tmp_path):
    folder, _, _ = small
    make_demo_images(tmp_path / "again", images=101, instances=3, seed=5)
    make_demo_images(tmp_path / "other", images=101, instances=3, seed=6)
    again, other = _digest(tmp_path / "again"), _digest(tmp_path / "other")
    assert again == _digest(folder)
    assert again.keys() == other.keys()
    assert all(again[name] != other[name] for name in again)


def test_images_of_an_instance_share_its_numbers_and_nothing_else():
    pictures, masks = draw_instance(0, 1, 3, 4, images=8)
    again, _ = draw_instance(0, 1, 3, 4, images=8)
    assert np.array_equal(pictures, again)
    assert pictures.dtype == masks.dtype == np.uint8
    flat = pictures.reshape(8, -1).astype(np.float64)
    assert all(np.abs(flat[i] - flat[j]).mean() > 8 for i in range(8) for j in range(i))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**64 - 1), st.integers(0, 3), st.integers(0, 3), st.integers(2, 40))
def test_instances_of_a_class_are_apart(seed, cloth, patch, instances):
    who = [identity(seed, cloth, patch, i) for i in range(instances)]
    points = np.array([[4 * w.cloth.hue % 1, 4 * w.patch.hue % 1, w.cloth.angle * 2 / np.pi] for w in who])
    gaps = np.abs(points[:, None] - points[None]).max(-1)[~np.eye(instances, dtype=bool)]
    assert gaps.min() > 0.4 / instances


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**63), st.integers(0, 3), st.integers(0, 3), st.integers(0, 30), st.sampled_from([32, 48, 64]))
def test_both_parts_are_seen_and_have_their_dyes(seed, cloth, patch, instance, size):
    """The classes are in the colours: of each part's median hue, whatever the light."""
    who = identity(seed, cloth, patch, instance)
    pictures, masks = draw_instance(seed, cloth, patch, instance, images=12, size=size)
    for part, textile in ((0, who.cloth), (1 + who.outline, who.patch)):
        assert (masks == part).any(axis=(1, 2)).all(), PARTS[part]
        mean = pictures[masks == part].astype(float).mean(0) / 255
        hue = colorsys.rgb_to_hsv(*mean)[0]
        assert abs((hue - textile.hue + 0.5) % 1 - 0.5) < 0.06, PARTS[part]
    assert set(np.unique(masks)) == {0, 1 + who.outline}
    assert OUTLINES[who.outline] == PARTS[1 + who.outline]


def test_user_errors_name_the_remedy(tmp_path):
    with pytest.raises(DemoError, match="at least 32"):
        make_demo_images(tmp_path / "a", images=31, instances=1)
    with pytest.raises(DemoError, match="32 to 512"):
        make_demo_images(tmp_path / "b", size=8)
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(GristmillError, match="not empty"):
        make_demo_images(tmp_path, images=32, instances=1)
    assert (tmp_path / "note.txt").read_text() == "mine"
