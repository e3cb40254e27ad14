"""Wallpapers become tiles: one file a picture, every pixel covered, flat tiles left out, mistakes told plainly."""

import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
from gristmill.ops.bench.photographs import PhotographsError, cut_pictures, find_pictures, picture_name, tile_boxes
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image


def noise(path, width: int, height: int, seed: int = 0):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def test_variants_of_a_picture_count_once(tmp_path):
    largest = noise(tmp_path / "Leaf/contents/images/200x100.png", 200, 100)
    noise(tmp_path / "Leaf/contents/images/100x50.png", 100, 50, 1)
    noise(tmp_path / "Leaf/contents/images_dark/200x100.png", 200, 100, 2)
    noise(tmp_path / "Leaf/contents/screenshot.png", 900, 900, 3)
    noise(tmp_path / "gnome/wood-d.webp", 80, 80, 4)
    light = noise(tmp_path / "gnome/wood-l.webp", 80, 80, 5)
    (tmp_path / "gnome/copy.png").write_bytes(largest.read_bytes())
    (tmp_path / "gnome/notes.png").write_text("no picture")
    (tmp_path / "gnome/drool-l.svg").write_text("<svg/>")
    assert find_pictures([tmp_path]) == {"Leaf": largest, "wood": light}
    assert picture_name(tmp_path / "sea_1920x1080.jpg", tmp_path) == "sea"


@settings(deadline=None)
@given(st.integers(1, 999), st.integers(1, 999), st.integers(32, 600), st.integers(32, 600), st.floats(0, 0.9))
def test_tiles_cover_the_picture(width, height, across, down, overlap):
    boxes = tile_boxes((width, height), (across, down), overlap)
    assert bool(boxes) == (width >= across and height >= down)
    for axis, length, window in ((0, width, across), (1, height, down)):
        starts = sorted({box[axis] for box in boxes})
        if boxes:
            assert starts[0] == 0
            assert starts[-1] == length - window
            # At least the overlap asked for; a start is rounded by at most half a pixel at either end.
            assert all(b - a <= window * (1 - overlap) + 1 for a, b in pairwise(starts))


def test_flat_tiles_are_left_out_and_the_rest_is_reproducible(tmp_path):
    pixels = np.full((100, 300, 3), 90, dtype=np.uint8)
    pixels[:, :100] = np.random.default_rng(0).integers(0, 256, (100, 100, 3))
    (tmp_path / "in").mkdir()
    Image.fromarray(pixels).save(tmp_path / "in/half.png")
    for out in ("a", "b"):
        (cut,) = cut_pictures(tmp_path / out, [tmp_path / "in"], tile=(100, 100), overlap=0)
        assert (cut.name, cut.tiles, cut.flat) == ("half", 1, 2)
    assert [path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*.jpg")]
    assert (tmp_path / "a/half/000.jpg").read_bytes() == (tmp_path / "b/half/000.jpg").read_bytes()
    with pytest.raises(PhotographsError, match="is not an empty folder"):
        cut_pictures(tmp_path / "a", [tmp_path / "in"])


def test_at_most_so_many_tiles(tmp_path):
    noise(tmp_path / "in/big.png", 400, 300)
    (cut,) = cut_pictures(tmp_path / "out", [tmp_path / "in"], tile=(50, 50), max_per_picture=7)
    assert cut.tiles == 7 == len(list((tmp_path / "out/big").glob("*.jpg")))


@pytest.mark.parametrize(("extra", "words"), [([], "apt-get install plasma"), (["--tile", "5by5"], "WIDTHxHEIGHT")])
def test_a_mistake_is_told_without_a_traceback(tmp_path, extra, words):
    command = [sys.executable, "-m", "gristmill.ops.bench.photographs", tmp_path / "out", "--source", tmp_path, *extra]
    answer = subprocess.run(command, capture_output=True, text=True)
    assert answer.returncode == 2
    assert words in answer.stderr
    assert "Traceback" not in answer.stderr
