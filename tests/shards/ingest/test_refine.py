"""One image file into a sample: limits that hold before anything is allocated, a strict check, few changes, all named."""

import gc
import io
import struct
import zlib
from collections.abc import Callable
from contextlib import suppress

import numpy as np
import pytest
import simplejpeg
from gristmill.shards.images import ImageError, check_image
from gristmill.shards.ingest.candidate import Outcome
from gristmill.shards.ingest.extent import extent, webp_size
from gristmill.shards.ingest.fingerprint import SIDE, distance, fingerprint
from gristmill.shards.ingest.refine import (
    CUT_OFF,
    MAX_SCANS,
    REENCODED,
    RESIZED,
    RefineConfig,
    Refined,
    Refused,
    refine,
)
from PIL import Image, ImageOps

Picture = Callable[..., bytes]
PLAIN = RefineConfig()
ZIP = b"PK\x03\x04" + b"z" * 300 + b"PK\x05\x06\xff\xd9"  # that ends as a JPEG does


def refused(data: bytes, config: RefineConfig = PLAIN) -> tuple[Outcome, str]:
    with pytest.raises(Refused) as caught:
        refine(data, config)
    assert len(caught.value.detail) < 260
    return caught.value.outcome, caught.value.detail


def scene(width: int = 500, height: int = 375, seed: int = 1) -> Image.Image:
    """Something like a photograph: smooth shapes of all sizes, no symmetry, some grain."""
    numbers = np.random.default_rng(seed)
    total = np.zeros((height, width, 3))
    for size in (3, 6, 12, 24, 48):
        coarse = Image.fromarray(numbers.integers(0, 256, (size, size, 3), dtype=np.uint8))
        total += np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(float) / size**0.5
    total += numbers.normal(0, 4, (height, width, 1))
    return Image.fromarray(((total - total.min()) / np.ptp(total) * 255).astype(np.uint8))


def encoded(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def opened(image: Refined) -> Image.Image:
    return Image.open(io.BytesIO(image.data))


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def segment(marker: int, body: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body


def turn(orientation: int) -> bytes:
    block = Image.Exif()
    block[0x112] = orientation
    return block.tobytes()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize(
    "options",
    [
        {}, {"progressive": True}, {"subsampling": 0}, {"lossless": True}, {"mode": "L"}, {"mode": "P"}, {"mode": "1"},
        {"mode": "LA"}, {"mode": "RGBA"}, {"mode": "CMYK"}, *({"exif": turn(i)} for i in range(1, 9)),
    ],
    ids=str,
)  # fmt: skip
def test_verdicts_are_those_of_the_plain_check(picture: Picture, kind: str, options: dict) -> None:
    """Plain JPEGs go another way than in `check_image`; what comes out is the same."""
    try:
        data = picture(kind, 400, 300, **options)
    except (OSError, ValueError):
        assert (kind, options["mode"]) in {("JPEG", "P"), ("JPEG", "LA"), ("JPEG", "RGBA"), ("PNG", "CMYK")}
        return
    expected, found = check_image(data), refine(data, PLAIN)
    assert found.changed == expected.reencoded
    for name in ("data", "format", "width", "height", "crc32"):
        assert getattr(found, name) == getattr(expected, name), name
    with Image.open(io.BytesIO(data)) as image:
        upright = ImageOps.exif_transpose(image).convert("RGB").convert("L")
    seen = np.asarray(upright.resize((SIDE, SIDE), Image.Resampling.BILINEAR)).astype(int)
    assert found.grey.shape == (SIDE, SIDE)
    # CMYK is turned into RGB another way; of dithered black and white, small boxes first leave more.
    assert np.abs(found.grey - seen).mean() < {"CMYK": 6, "1": 4}.get(options.get("mode", ""), 2)


@pytest.mark.parametrize(
    ("kind", "mode", "options"),
    [
        ("GIF", "P", {}), ("GIF", "L", {}), ("BMP", "RGB", {}), ("BMP", "P", {}), ("TIFF", "RGB", {}),
        ("TIFF", "CMYK", {}), ("TIFF", "RGBA", {"compression": "tiff_lzw"}), ("TIFF", "L", {"compression": "packbits"}),
        ("TIFF", "RGB", {"compression": "tiff_deflate"}), ("TIFF", "RGB", {"compression": "jpeg", "quality": 95}),
    ],
)  # fmt: skip
def test_other_formats_are_drawn_anew(picture: Picture, kind: str, mode: str, options: dict) -> None:
    data = picture(kind, mode=mode, **options)
    image = refine(data, PLAIN)
    lossy = options.get("compression") == "jpeg"
    assert (image.format, image.width, image.height) == ("jpg" if lossy else "png", 40, 24)
    assert image.changed == f"{kind} is no format of shards"
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
    apart = np.abs(np.asarray(opened(image).convert("RGB")) - expected)
    assert apart.mean() < 4 if lossy else not apart.any()
    assert refine(image.data, PLAIN).changed is None


def test_a_tiff_is_turned_once() -> None:
    data = encoded(scene(60, 30), "TIFF", exif=turn(6))
    image = refine(data, PLAIN)
    assert (image.width, image.height, opened(image).size) == (30, 60, (30, 60))
    assert np.array_equal(np.asarray(opened(image)), np.asarray(scene(60, 30).transpose(Image.Transpose.ROTATE_270)))


def test_of_an_animation_the_first_frame_is_taken() -> None:
    frames = [scene(60, 40, seed) for seed in range(3)]
    for kind in ("GIF", "TIFF"):
        image = refine(encoded(frames[0], kind, save_all=True, append_images=frames[1:]), PLAIN)
        first = Image.open(io.BytesIO(encoded(frames[0], kind))).convert("RGB")
        assert np.array_equal(np.asarray(opened(image).convert("RGB")), np.asarray(first))


def test_sixteen_bits_are_scaled_and_thirty_two_refused() -> None:
    ramp = (np.arange(64 * 64).reshape(64, 64) * 16).astype(np.uint16)
    image = refine(encoded(Image.fromarray(ramp), "TIFF"), PLAIN)
    assert np.array_equal(np.asarray(opened(image))[..., 0], ramp >> 8)
    for kind in (np.int32, np.float32):
        assert refused(encoded(Image.fromarray(ramp.astype(kind)), "TIFF"))[0] is Outcome.NOT_AN_IMAGE


def test_a_turn_that_only_xmp_knows_is_left_alone() -> None:
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    for mode in ("RGB", "CMYK"):
        image = refine(encoded(scene(60, 30).convert(mode), xmp=xmp), PLAIN)
        assert (image.width, image.height) == (60, 30)


@pytest.mark.parametrize(
    ("limits", "outcome"),
    [
        ({"min_side": 24}, None), ({"min_side": 25}, Outcome.TOO_SMALL), ({"min_pixels": 960}, None),
        ({"min_pixels": 961}, Outcome.TOO_SMALL), ({"max_pixels": 960}, None),
        ({"max_pixels": 959}, Outcome.TOO_MANY_PIXELS), ({"max_aspect": 1.7}, None),
        ({"max_aspect": 1.6}, Outcome.ASPECT), ({"min_bytes": 1 << 20}, Outcome.TOO_SMALL),
        ({"max_bytes": 100}, Outcome.TOO_LARGE),
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_limits(picture: Picture, kind: str, limits: dict, outcome: Outcome | None) -> None:
    data, config = picture(kind), RefineConfig(**limits)
    if outcome is None:
        assert refine(data, config).width == 40
    else:
        assert refused(data, config)[0] is outcome


@pytest.mark.parametrize(
    "data",
    [b"", b"\0", b"<html>not found</html>", bytes(5000), b"%PDF-1.7", b"\x7fELF" + bytes(60), b"RIFF\0\0\0\0WAVE"],
    ids=lambda data: repr(data[:8]),
)
def test_what_is_no_image(data: bytes) -> None:
    assert refused(data)[0] is Outcome.NOT_AN_IMAGE


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_no_truncated_file_passes(kind: str, mode: str) -> None:
    """At whatever byte it is cut: not taken, or every pixel is there (PNG's end mark, a TIFF's trailing directory)."""
    whole = encoded(scene(160, 120).convert(mode), kind)
    before = np.asarray(opened(refine(whole, PLAIN)).convert("RGB"))
    cuts = {*range(1, 40), *range(40, len(whole), max(1, len(whole) // 80)), *range(len(whole) - 16, len(whole))}
    passed, outcomes = 0, set()
    for cut in sorted(cuts):
        try:
            found = refine(whole[:cut], PLAIN)
        except Refused as error:
            outcomes.add(error.outcome)
        else:
            passed += 1
            assert found.changed
            assert np.array_equal(np.asarray(opened(found).convert("RGB")), before), cut
    assert outcomes == {Outcome.BROKEN, Outcome.NOT_AN_IMAGE}
    assert passed == 0 or kind in ("PNG", "GIF", "BMP", "TIFF")
    assert passed < 20


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_blocks": 2}, {"subsampling": 0}])
def test_a_scaled_decode_is_as_strict_as_a_whole_one(options: dict) -> None:
    """Luma at a quarter of the size sees what a full decode sees, and so more than Pillow does."""
    whole = encoded(scene(800, 800), quality=60, **options)
    numbers = np.random.default_rng(4)
    broken = forgiven = 0
    for at, bit in zip(numbers.integers(0, len(whole), 40).tolist(), numbers.integers(0, 8, 40).tolist(), strict=True):
        data = whole[:at] + bytes([whole[at] ^ (1 << bit)]) + whole[at + 1 :]
        try:
            simplejpeg.decode_jpeg(data, strict=True)
        except ValueError as error:
            if "0xd9" in str(error) or "subsampling" in str(error):
                continue
            assert refused(data)[0] is Outcome.BROKEN
            broken += 1
            with suppress(ImageError):
                check_image(data)
                forgiven += 1
        else:
            refine(data, PLAIN)
    assert broken > 5
    assert forgiven > 2


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("tail", [ZIP, b"<html><script>alert(1)</script></html>", b"\n", bytes(4096)], ids=len)
def test_what_hangs_behind_an_image_is_cut_off(kind: str, tail: bytes) -> None:
    whole = encoded(scene(120, 90), kind)
    image = refine(whole + tail, PLAIN)
    assert (image.data, image.changed) == (whole, CUT_OFF)
    assert image.crc32 == zlib.crc32(whole)


def test_of_several_pictures_in_one_jpeg_the_first_stays() -> None:
    first, second = scene(120, 90, 1), scene(120, 90, 2)
    both = encoded(first, "MPO", save_all=True, append_images=[second])
    image = refine(both, PLAIN)
    assert image.changed == CUT_OFF
    assert both.startswith(image.data)
    assert image.data.endswith(b"\xff\xd9")
    assert np.array_equal(np.asarray(opened(image)), np.asarray(Image.open(io.BytesIO(both))))


def test_an_end_mark_within_metadata_is_not_the_end() -> None:
    whole = encoded(scene(120, 90), progressive=True)
    trap = whole[:2] + segment(0xE5, b"\xff\xd9" * 9 + b"\xff\xda") + whole[2:]
    assert refine(trap, PLAIN).data == trap
    assert refine(trap + ZIP, PLAIN).data == trap
    between = whole.index(b"\xff\xc4", whole.index(b"\xff\xda"))
    trap = whole[:between] + segment(0xFE, b"\xff\xd9" * 9) + whole[between:]
    assert refine(trap + ZIP, PLAIN).data == trap


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_metadata_of_megabytes_does_not_stay(kind: str) -> None:
    image, giant = scene(120, 90), bytes(range(256)) * 5000
    small = encoded(image, kind, icc_profile=giant[:4096])
    assert refine(small, PLAIN).data == small
    data = encoded(image, kind, icc_profile=giant)
    if kind == "PNG":  # a profile would be deflated
        data = small[:33] + chunk(b"abCd", giant) + small[33:]
    assert len(data) > len(giant)
    found = refine(data, PLAIN)
    assert (found.changed, len(found.data) < 1 << 17) == ("metadata of over 1 MiB", True)
    assert np.abs(np.asarray(opened(found).convert("RGB")) - np.asarray(image).astype(int)).mean() < 8


def test_a_text_that_inflates_is_not_inflated() -> None:
    whole = encoded(scene(40, 30), "PNG")
    body = b"Comment\0\0" + zlib.compress(bytes(1 << 25), 1)
    assert refused(whole[:33] + chunk(b"zTXt", body) + whole[33:])[0] is Outcome.BROKEN


def test_scans_without_end() -> None:
    whole = encoded(scene(64, 48).convert("L"), progressive=True)
    last = whole.rindex(b"\xff\xda")
    for count, fine in ((100, True), (MAX_SCANS, False)):
        data = whole[:-2] + whole[last:-2] * count + whole[-2:]
        assert extent("jpg", data).scans > count
        if fine:
            assert "scans" not in refused(data)[1]  # but for something else
        else:
            assert refused(data) == (Outcome.BROKEN, f"a JPEG of {extent('jpg', data).scans} scans")


def test_some_bytes_before_the_end_do_no_harm() -> None:
    whole = encoded(scene(64, 48))
    odd = whole[:-2] + bytes(7) + whole[-2:]
    assert refine(odd, PLAIN).data == odd


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_fingerprint_is_that_of_the_upright_picture(orientation: int) -> None:
    upright = scene()
    back = {1: 1, 2: 2, 3: 3, 4: 4, 5: 5, 6: 8, 7: 7, 8: 6}[orientation]
    block = Image.Exif()
    block[0x112] = back
    stored = upright.copy()
    stored.info["exif"] = block.tobytes()
    stored = ImageOps.exif_transpose(stored)
    for kind in ("JPEG", "PNG", "WEBP"):
        turned = refine(encoded(stored, kind, exif=turn(orientation), quality=95), PLAIN)
        assert (turned.width, turned.height, turned.changed) == (500, 375, None)
        plain = refine(encoded(upright, kind, quality=95), PLAIN)
        assert distance(fingerprint(turned.grey), fingerprint(plain.grey)) < 8


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP"])
@pytest.mark.parametrize("orientation", [1, 6])
def test_resizing(kind: str, orientation: int) -> None:
    image, options = scene(600, 420), {} if kind == "BMP" else {"exif": turn(orientation), "quality": 95}
    size = (90, 63) if kind == "BMP" or orientation == 1 else (63, 90)
    found = refine(encoded(image, kind, **options), RefineConfig(resize=63))
    assert (found.width, found.height) == opened(found).size == size
    assert (found.changed, found.format) == (RESIZED, "png" if kind in ("PNG", "BMP") else "jpg")
    upright = image if size == (90, 63) else image.transpose(Image.Transpose.ROTATE_270)
    best = np.asarray(upright.resize(size, Image.Resampling.LANCZOS)).astype(int)
    assert np.abs(np.asarray(opened(found).convert("RGB")) - best).mean() < 4
    assert refine(found.data, RefineConfig(resize=63)).data == found.data
    small = encoded(image.resize((80, 60)), kind)
    assert (refine(small, RefineConfig(resize=63)).data == small) is (kind != "BMP")


def test_reencoding() -> None:
    image = scene(200, 100)
    for kind in ("JPEG", "PNG", "WEBP", "GIF"):
        data = encoded(image, kind)
        found = refine(data, RefineConfig(reencode="jpg"))
        assert (found.format, found.width, found.height) == ("jpg", 200, 100)
        assert found.changed == (REENCODED if kind != "GIF" else "GIF is no format of shards")
        expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
        assert np.abs(np.asarray(opened(found)) - expected).mean() < 4
        assert len(refine(data, RefineConfig(reencode="jpg", quality=20)).data) < len(found.data) / 2
    grey = refine(encoded(image.convert("L")), RefineConfig(reencode="jpg"))
    assert opened(grey).mode == "L"


@pytest.mark.parametrize(("options", "size"), [({}, (40, 24)), ({"lossless": True}, (40, 24))])
def test_webp_sizes_are_read_without_a_decoder(picture: Picture, options: dict, size: tuple[int, int]) -> None:
    assert webp_size(picture("WEBP", **options)) == size
    assert webp_size(picture("WEBP", exif=turn(6), **options)) == size
    assert webp_size(picture("WEBP")[:20]) is None


def test_nothing_is_kept_of_an_image() -> None:
    data = encoded(scene(64, 48), "WEBP")
    refine(data, PLAIN)
    gc.collect()
    before = len(gc.get_objects())
    for _ in range(20):
        refine(data, PLAIN)
    gc.collect()
    assert len(gc.get_objects()) - before < 20
