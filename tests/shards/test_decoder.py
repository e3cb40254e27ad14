"""What ingest lets through, DALI's CPU decoder reads, upright and as Pillow does: the ground of `check_image`'s rules."""

import io
import struct
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from gristmill.shards.images import ImageError, check_image
from PIL import Image, ImageOps

Decode = Callable[[bytes], np.ndarray]
Picture = Callable[..., bytes]


@pytest.fixture(scope="module")
def decode() -> Decode:
    """One file to pixels [H, W, 3] by DALI; the pipeline is built anew after a failure, which leaves it unusable."""
    from nvidia.dali import fn, types
    from nvidia.dali.pipeline import pipeline_def

    @pipeline_def(batch_size=1, num_threads=1, device_id=None, prefetch_queue_depth=1)  # pyright: ignore
    def graph():
        return fn.decoders.image(fn.external_source(name="file", dtype=types.UINT8, ndim=1), device="cpu")

    built: list = []

    def run(data: bytes) -> np.ndarray:
        if not built:
            built.append(graph())
            built[0].build()
        try:
            built[0].feed_input("file", [np.frombuffer(data, np.uint8)])
            return np.array(built[0].run()[0].at(0)).astype(int)
        except RuntimeError:
            built.clear()
            raise

    return run


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png(depth: int, colour: int, rows: list[bytes], width: int, interlaced: bool = False) -> bytes:
    header = struct.pack(">IIBBBBB", width, len(rows), depth, colour, 0, 0, interlaced)
    data = zlib.compress(b"".join(b"\0" + row for row in rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def exif(orientation: int) -> Image.Exif:
    block = Image.Exif()
    block[0x112] = orientation
    return block


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"progressive": True},
        {"subsampling": 0},
        {"mode": "L"},
        {"mode": "P"},
        {"mode": "1"},
        {"mode": "LA"},
        {"mode": "RGBA"},
        {"mode": "CMYK"},
        {"lossless": True},
        {"lossless": True, "mode": "RGBA"},
        *({"exif": exif(orientation)} for orientation in range(1, 9)),
        *({"exif": exif(6), "mode": mode} for mode in ("L", "P", "RGBA", "CMYK")),
        *({"exif": exif(5), "lossless": True, "width": width} for width in (31, 32, 33, 34)),
    ],
    ids=lambda options: " ".join(f"{key}={dict(value) if key == 'exif' else value}" for key, value in options.items()),
)
def test_the_same_pixels_as_pillow(decode: Decode, picture: Picture, kind: str, options: dict) -> None:
    mode = options.get("mode", "RGB")
    if (kind, mode) in {("JPEG", "P"), ("JPEG", "LA"), ("JPEG", "RGBA"), ("PNG", "CMYK"), ("WEBP", "CMYK")}:
        with pytest.raises((OSError, ValueError)):  # there is no such file
            picture(kind, **options) if kind != "WEBP" else picture("PNG", **options)
        return
    data = picture(kind, **options)
    image = check_image(data)
    found = decode(image.data)
    assert found.shape == (image.height, image.width, 3)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")).astype(int)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= (48 if image.reencoded == "CMYK" else 0)
    assert np.abs(found - expected).mean() < 4


def test_rare_pngs(decode: Decode) -> None:
    numbers = np.random.Philox(key=1).random_raw(40 * 8)
    grey = (numbers & 0xFFFF).astype(np.uint16).reshape(8, 40)
    sixteen = png(16, 0, [row.astype(">u2").tobytes() for row in grey], 40)
    assert check_image(sixteen).reencoded is None
    assert np.abs(decode(sixteen)[..., 0] - (grey >> 8)).max() <= 1

    eight = (grey >> 8).astype(np.uint8)
    passes = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]
    scans = [row.tobytes() for x, y, dx, dy in passes for row in eight[y::dy, x::dx]]
    header = struct.pack(">IIBBBBB", 40, 8, 8, 0, 0, 0, 1)
    data = zlib.compress(b"".join(b"\0" + row for row in scans))
    interlaced = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    assert check_image(interlaced).reencoded is None
    assert np.array_equal(decode(interlaced)[..., 0], eight)


def test_cmyk_without_adobes_marker_is_why_cmyk_does_not_stay(decode: Decode, picture: Picture) -> None:
    data = picture(mode="CMYK", quality=95)
    at = data.index(b"Adobe")
    (length,) = struct.unpack_from(">H", data, at - 2)
    bare = data[: at - 4] + data[at - 2 + length :]
    expected = np.asarray(Image.open(io.BytesIO(bare)).convert("RGB")).astype(int)
    assert np.abs(decode(bare) - expected).mean() > 50
    assert np.abs(decode(check_image(bare).data) - expected).mean() < 4


def test_what_dali_fails_on_is_why_such_files_do_not_stay(decode: Decode, picture: Picture) -> None:
    whole = picture("PNG")
    odd = next(
        data
        for width in range(30, 60)
        if check_image(data := picture("WEBP", width, lossless=True, exif=exif(6))).reencoded is not None
    )
    stray = picture()[:20] + b"\0" + picture()[20:]
    for data in (whole[:-12], odd, stray):
        with pytest.raises(RuntimeError):
            decode(data)
        image = check_image(data)
        assert decode(image.data).shape == (image.height, image.width, 3)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_damaged_files_are_turned_away_or_read(decode: Decode, picture: Picture) -> None:
    sources = [
        picture(progressive=True, exif=exif(8)),
        picture(exif=exif(6)),
        picture("PNG", exif=exif(3), mode="RGBA"),
        picture("WEBP", exif=exif(6)),
        picture("WEBP", lossless=True, exif=exif(1)),
    ]
    draws = np.random.Philox(key=7).random_raw((60, len(sources), 3)).astype(np.uint64)
    kept = 0
    for draw in draws:
        for source, (where, what, how) in zip(sources, draw.tolist(), strict=True):
            reach = len(source) if how % 2 else min(len(source), 400)  # headers are where opinions differ
            at, value = where % reach, bytes([what % 256])
            damaged = source[:at] + (value if how % 4 < 2 else b"" if how % 8 < 4 else value * 2) + source[at + 1 :]
            try:
                image = check_image(damaged)
            except ImageError:
                continue
            kept += 1
            assert decode(image.data).shape == (image.height, image.width, 3), image.reencoded
    assert kept > 30
