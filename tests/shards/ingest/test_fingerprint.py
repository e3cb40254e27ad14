"""The perceptual hash: the same bits on every machine, near for the same look, none for what has no look."""

import hashlib
from typing import Any

import numpy as np
import pytest
from gristmill.shards.ingest import fingerprint as module
from gristmill.shards.ingest.fingerprint import BITS, MIN_QUALITY, SIDE, distance, fingerprint, quality
from gristmill.shards.ingest.refine import RefineConfig, refine
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw
from scipy.fft import dctn

from .test_refine import encoded, scene


def looks(seed: int) -> np.ndarray:
    return np.asarray(scene(SIDE, SIDE, seed).convert("L"))


def seen(image: Image.Image, **options: Any) -> bytes:
    return fingerprint(refine(encoded(image, **options), RefineConfig()).grey)


@given(seed=st.integers(0, 2**32 - 1))
def test_bits_are_the_signs_of_a_dct_against_its_median(seed: int):
    pixels = np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE), dtype=np.uint8)
    frequencies = np.asarray(dctn(pixels.astype(float), norm="ortho"))[1:17, 1:17]
    ours = np.unpackbits(np.frombuffer(fingerprint(pixels), np.uint8)).reshape(16, 16)
    expected = frequencies > np.sort(frequencies.ravel())[127]
    diagonal = np.array([[expected[row, (band - row) % 16] for row in range(16)] for band in range(16)])
    assert (ours != diagonal).sum() <= 2  # cosines are rounded, so those next to the median may differ
    assert ours.sum() == BITS // 2


def test_every_band_takes_one_frequency_of_each_row_and_column():
    places = module._DIAGONAL.reshape(16, 16)
    assert sorted(places.ravel()) == list(range(BITS))
    for band in places:
        assert sorted(band // 16) == sorted(band % 16) == list(range(16))


def test_known_answers():
    """Whole numbers alone: these bits are the same on every machine, and must never change."""
    table = module._COSINES.astype("<i8").tobytes()
    assert hashlib.sha256(table).hexdigest()[:16] == "b02b12bc1bbd36a4"
    numbers = np.random.Philox(key=5).random_raw(SIDE * SIDE // 8)
    pixels = np.frombuffer(numbers.astype("<u8").tobytes(), np.uint8).reshape(SIDE, SIDE)
    assert fingerprint(pixels).hex() == "16c377478844cd1fdda2d7736dabdf882c2134782c0e7067dad7e9890ca545cc"


def test_the_order_of_sums_does_not_matter():
    """Products stay whole below 2**53, where float64 is exact."""
    pixels = looks(1).astype(np.int64)
    table = module._COSINES.astype(np.int64)
    exact = (table @ pixels @ table.T).ravel()[module._DIAGONAL]
    assert np.array_equal(module._frequencies(looks(1)), exact)
    assert np.abs(table).sum(1).max() ** 2 * 255 < 2**53


def test_distance():
    assert distance(bytes(32), b"\xff" * 32) == 256
    assert distance(bytes(32), bytes(31) + b"\x81") == 2


@pytest.mark.parametrize(
    ("change", "most"),
    [
        (lambda image: image, 4),
        (lambda image: image.resize((1000, 750), Image.Resampling.BICUBIC), 16),
        (lambda image: image.resize((150, 112), Image.Resampling.LANCZOS), 24),
        (lambda image: image.resize((600, 300), Image.Resampling.BICUBIC), 16),
        (lambda image: image.point(lambda level: level * 0.7 + 20), 16),
        (lambda image: image.convert("L"), 6),
    ],
)
def test_what_looks_the_same_is_near(change, most: int):
    for seed in range(3):
        original = scene(seed=seed)
        assert distance(seen(original), seen(change(original), quality=60)) <= most + 8
        assert distance(seen(original), seen(change(original), kind="PNG")) <= most


def test_others_are_far_and_so_is_a_mirrored_one():
    prints = [seen(scene(seed=seed)) for seed in range(12)]
    apart = [distance(a, b) for i, a in enumerate(prints) for b in prints[:i]]
    assert min(apart) > 80
    assert distance(prints[0], seen(scene(seed=0).transpose(Image.Transpose.FLIP_LEFT_RIGHT))) > 80


def flat(kind: str, seed: int) -> Image.Image:
    numbers = np.random.default_rng(seed)
    if kind == "grain":
        return Image.fromarray(numbers.normal(128, 3, (375, 500, 3)).clip(0, 255).astype(np.uint8))
    if kind == "sky":
        ramp = np.linspace(100 + seed, 140 + seed, 375)[:, None, None] + numbers.normal(0, 1, (375, 500, 3))
        return Image.fromarray(ramp.clip(0, 255).astype(np.uint8))
    image = Image.new("RGB", (500, 375), "white")
    ImageDraw.Draw(image).rectangle((200 + seed, 150, 203 + seed, 153), fill=(200, 200, 255))
    return image


def test_what_is_flat_has_no_fingerprint():
    ramp = Image.fromarray(np.repeat(np.linspace(90, 160, 375).astype(np.uint8)[:, None], 500, 1))
    for image in (Image.new("RGB", (500, 375)), Image.new("RGB", (90, 900), "teal"), ramp):
        grey = refine(encoded(image), RefineConfig()).grey
        assert quality(grey) < MIN_QUALITY
        assert fingerprint(grey) == b""


@pytest.mark.parametrize("kind", ["grain", "sky", "dot"])
def test_what_is_nearly_flat_is_not_near_to_its_like(kind: str):
    prints = [found for seed in range(8) if (found := seen(flat(kind, 9 * seed)))]
    assert min([distance(a, b) for i, a in enumerate(prints) for b in prints[:i]], default=BITS) > 40


def test_logos_are_told_apart():
    """Few shapes on an even ground are enough of a look, and different ones are far from each other."""
    prints = []
    for seed in range(8):
        numbers = np.random.default_rng(seed)
        image = Image.new("RGB", (300, 300), "white")
        for _ in range(4):
            x, y, w, h = numbers.integers(0, 200, 4).tolist()
            ImageDraw.Draw(image).ellipse((x, y, x + w // 2 + 20, y + h // 2 + 20), fill=(0, 0, int(x)))
        prints.append(seen(image))
    assert all(prints)
    assert min(distance(a, b) for i, a in enumerate(prints) for b in prints[:i]) > 40


def test_other_shapes_are_errors():
    for wrong in (np.zeros((64, 63), np.uint8), np.zeros((64, 64)), np.zeros((64, 64, 1), np.uint8)):
        with pytest.raises(ValueError, match="uint8"):
            fingerprint(wrong)


def test_the_luma_does_not_depend_on_how_a_file_was_made():
    """Lossless files of one picture, decoded by Pillow: equal lumas, not just near ones."""
    image = scene()
    greys = [refine(encoded(image, kind, **o), RefineConfig()).grey for kind, o in (
        ("PNG", {}), ("BMP", {}), ("TIFF", {}), ("WEBP", {"lossless": True, "exact": True}),
    )]  # fmt: skip
    assert all(np.array_equal(greys[0], grey) for grey in greys)
    assert np.abs(greys[0].astype(int) - refine(encoded(image, quality=95), RefineConfig()).grey).max() <= 3
