"""Single images: what is kept as it came, what is encoded anew, what is turned away, and how large each is upright."""

import io
import struct
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from gristmill.shards.images import CheckedImage, ImageError, check_image, sniff
from PIL import Image

Picture = Callable[..., bytes]


def exif(orientation: int, kind: int = 3, order: str = ">") -> bytes:
    """A TIFF block with an orientation of the given type (3 is the right one)."""
    value = struct.pack(order + "HH", orientation, 0) if kind == 3 else struct.pack(order + "I", orientation)
    head = {">": b"MM\0*", "<": b"II*\0"}[order] + struct.pack(order + "I", 8)
    return head + struct.pack(order + "HHHI", 1, 0x112, kind, 1) + value + struct.pack(order + "I", 0)


def with_segment(jpeg: bytes, body: bytes, marker: int = 0xE1) -> bytes:
    return jpeg[:2] + struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body + jpeg[2:]


def with_chunk(png: bytes, name: bytes, body: bytes) -> bytes:
    return png[:33] + struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) + png[33:]


def pixels(image: CheckedImage) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(image.data)).convert("RGB")).astype(int)


@pytest.mark.parametrize(
    ("kind", "options", "name"),
    [
        ("JPEG", {}, "jpg"),
        ("JPEG", {"progressive": True}, "jpg"),
        ("JPEG", {"mode": "L"}, "jpg"),
        ("PNG", {}, "png"),
        ("PNG", {"mode": "P"}, "png"),
        ("PNG", {"mode": "1"}, "png"),
        ("PNG", {"mode": "RGBA"}, "png"),
        ("WEBP", {}, "webp"),
        ("WEBP", {"lossless": True}, "webp"),
    ],
)
def test_what_dali_reads_keeps_its_bytes(picture: Picture, kind: str, options: dict, name: str) -> None:
    data = picture(kind, 40, 24, **options)
    image = check_image(data)
    assert image == CheckedImage(data, name, 40, 24, zlib.crc32(data))
    assert sniff(data) == name


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("orientation", range(10))
def test_sizes_are_upright(picture: Picture, orientation: int, order: str) -> None:
    block = exif(orientation, order=order)
    for data in (
        with_segment(picture(), b"Exif\0\0" + block),
        with_chunk(picture("PNG"), b"eXIf", block),
        picture("WEBP", exif=block),
    ):
        image = check_image(data)
        assert image.reencoded is None
        assert (image.width, image.height) == ((24, 40) if orientation in (5, 6, 7, 8) else (40, 24))


def test_cmyk_is_encoded_anew(picture: Picture) -> None:
    image = check_image(picture(mode="CMYK", quality=95))
    assert (image.reencoded, image.format) == ("CMYK", "jpg")
    assert image.crc32 == zlib.crc32(image.data)
    assert np.abs(pixels(image) - pixels(check_image(picture("PNG")))).mean() < 8


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data", "ignore:Tag data larger")
def test_odd_exif_is_applied_and_gone(picture: Picture) -> None:
    twice = with_segment(with_segment(picture(), b"Exif\0\0" + exif(3)), b"Exif\0\0" + exif(3))
    assert check_image(twice).reencoded == "two EXIF blocks"
    long = check_image(with_segment(picture(), b"Exif\0\0" + exif(6, kind=4)))
    assert long.reencoded == "EXIF orientation of a wrong type"
    assert (long.width, long.height) == (24, 40)
    assert check_image(long.data).reencoded is None
    cut = with_segment(picture(), b"Exif\0\0" + exif(1)[:12])
    assert check_image(cut).reencoded == "damaged EXIF block"
    # Pointing out of the block does not matter where the image need not be turned.
    stray = exif(1)[:8] + struct.pack(">HHHII", 2, 0x10F, 2, 99, 9999) + exif(1)[10:]
    assert check_image(with_segment(picture(), b"Exif\0\0" + stray)).reencoded is None
    turned = exif(6)[:8] + struct.pack(">HHHII", 2, 0x10F, 2, 99, 9999) + exif(6)[10:]
    assert check_image(with_segment(picture(), b"Exif\0\0" + turned)).reencoded == "damaged EXIF block"


def test_a_turn_that_only_xmp_knows_is_left_alone(picture: Picture) -> None:
    # Browsers, OpenCV and DALI do not read it; Pillow alone does.
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    image = check_image(picture(xmp=xmp))
    assert (image.width, image.height, image.reencoded) == (40, 24, None)


def test_a_png_that_pillow_forgives_is_encoded_anew_without_loss(picture: Picture) -> None:
    whole = picture("PNG")
    for damaged in (whole[:-12], whole[:-14] + bytes([whole[-14] ^ 1]) + whole[-13:]):
        image = check_image(damaged)
        assert image.reencoded
        assert image.format == "png"
        assert np.array_equal(pixels(image), pixels(check_image(whole)))


def test_webp_with_exif_after_a_chunk_of_odd_length(picture: Picture) -> None:
    found = set()
    for width in range(20, 60):
        data = picture("WEBP", width, 17, lossless=True, exif=exif(8))
        image = check_image(data)
        found.add(image.reencoded)
        assert (image.width, image.height) == (17, width)
        assert image.format == ("webp" if image.reencoded is None else "png")
    assert found == {None, "WebP with EXIF and a chunk of odd length"}


def test_sixteen_bits_of_grey_are_scaled_not_clipped(picture: Picture) -> None:
    file = io.BytesIO()
    ramp = (np.arange(24 * 40).reshape(24, 40) * 68).astype(np.uint16)
    Image.fromarray(ramp).save(file, "PNG")
    assert check_image(file.getvalue()).reencoded is None
    damaged = check_image(file.getvalue()[:-12])
    assert np.array_equal(pixels(damaged)[..., 0], ramp >> 8)


def test_of_an_animation_the_size_is_the_canvas(picture: Picture) -> None:
    frames = [Image.open(io.BytesIO(picture("PNG", seed=seed))) for seed in (1, 2, 3)]
    for kind in ("WEBP", "PNG"):
        file = io.BytesIO()
        frames[0].save(file, kind, save_all=True, append_images=frames[1:])
        image = check_image(file.getvalue())
        assert (image.width, image.height, image.reencoded) == (40, 24, None)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda data: b"", "empty file"),
        (lambda data: b"<html>not found</html>", "neither JPEG nor PNG nor WebP"),
        (lambda data: b"GIF89a" + data, "neither JPEG nor PNG nor WebP"),
        (lambda data: data[: len(data) // 2], "cannot be decoded: .*(runcated|broken)"),
        (lambda data: data[:-2], "cannot be decoded: .*truncated"),
        (lambda data: data[:30], "cannot be decoded"),
    ],
)
def test_broken_files_are_turned_away_with_the_reason(picture: Picture, change: Callable, reason: str) -> None:
    with pytest.raises(ImageError, match=reason):
        check_image(change(picture()))


def test_a_bomb_is_not_decoded(picture: Picture) -> None:
    with pytest.raises(ImageError, match="40 x 24 pixels are over the bound of 900"):
        check_image(picture(), max_pixels=900)
    header = struct.pack(">IIBBBBB", 2**30, 2**30, 8, 2, 0, 0, 0)
    bomb = with_chunk(b"\x89PNG\r\n\x1a\n" + b"\0" * 25, b"IDAT", zlib.compress(bytes(1000)))
    bomb = bomb[:8] + with_chunk(bytes(33), b"IHDR", header)[33:] + bomb[33:]
    with pytest.raises(ImageError, match=r"cannot be decoded: .*decompression bomb"):
        check_image(bomb)
