"""One image file: is it whole, how large is it upright, and do DALI and Pillow see the same picture in it?

Every image is really decoded (Pillow), after its size was held against a bound. The bytes stay as they are unless DALI
2.4's decoder was seen to fail on such a file or to read it otherwise than the EXIF and PNG standards say; then the
picture is encoded anew, upright, as PNG if it was lossless and as JPEG (quality 95, full chroma) if not. Found by
experiment, and held by tests against the decoder itself: CMYK without Adobe's marker comes out inverted; WebP fails
where a chunk of odd length precedes EXIF, whose padding byte is not skipped; bytes between JPEG segments and wrong PNG
checksums fail though Pillow takes them; a damaged or doubled EXIF block is read differently by everybody. Palette,
grey, alpha (dropped), 16 bits, interlacing, progressive scans, animations (first frame) and EXIF turns are read well.
"""

from __future__ import annotations

import io
import struct
from dataclasses import dataclass

import numpy as np
from isal.isal_zlib import crc32
from PIL import Image

from .errors import GristmillError

MAX_PIXELS = 1 << 27  # decodes to 400 MB
_MIRRORED = (5, 6, 7, 8)  # orientations that swap width and height
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_TIFF_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8}  # bytes of a value
_PNG = b"\x89PNG\r\n\x1a\n"


class ImageError(GristmillError):
    """A file that is no image, or a broken one. The message is the bare reason; the caller names the file."""


class OddError(Exception):
    """The file is not as plain as DALI needs it; the message says in what, in one of few fixed ways."""


@dataclass(frozen=True)
class CheckedImage:
    """An image that was decoded. `width` and `height` are upright pixels, `format` is "jpg", "png" or "webp".

    `data` are the source's own bytes, unless `reencoded` says why they could not stay.
    """

    data: bytes
    format: str
    width: int
    height: int
    crc32: int
    reencoded: str | None = None


def sniff(data: bytes) -> str | None:
    """The format that the first bytes claim: "jpg", "png", "webp" or None."""
    if data[:3] == b"\xff\xd8\xff":
        return "jpg"
    if data[:8] == _PNG:
        return "png"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    return None


def check_image(data: bytes, *, max_pixels: int = MAX_PIXELS) -> CheckedImage:
    """Decode an image file and make sure that DALI reads it. Raises ImageError with the reason if it is broken."""
    kind = sniff(data)
    if kind is None:
        raise ImageError("neither JPEG nor PNG nor WebP" if data else "empty file")
    try:
        with Image.open(io.BytesIO(data), formats=[{"jpg": "JPEG"}.get(kind, kind.upper())]) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise ImageError(f"{width} x {height} pixels are over the bound of {max_pixels}")
            image.load()
            try:
                orientation = plain_orientation(kind, data)
            except OddError as error:
                return _reencode(image, data, kind, str(error))
    except (MemoryError, ImageError):
        raise
    except Exception as error:  # Pillow's decoders raise nearly anything on broken input
        raise ImageError(f"cannot be decoded: {' '.join(str(error).split()) or type(error).__name__}") from error
    if orientation in _MIRRORED:
        width, height = height, width
    return CheckedImage(data, kind, width, height, crc32(data))


def plain_orientation(kind: str, data: bytes) -> int:
    """Orientation, 1..8, of an image whose structure DALI reads as the standards say; OddError if it may not."""
    try:
        return {"jpg": _jpeg, "png": _png, "webp": _webp}[kind](data)
    except (struct.error, IndexError):
        raise OddError("unusual structure") from None


def in_rgb(image: Image.Image) -> Image.Image:
    """A decoded picture as RGB of 8 bits: alpha dropped, 16 bits of grey scaled. Itself if it is so already."""
    if image.mode.startswith("I"):  # Pillow's conversion would clip, not scale
        image = Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8))
    return image if image.mode == "RGB" else image.convert("RGB")


def turned(image: Image.Image, orientation: int) -> Image.Image:
    """A picture as its EXIF orientation wants it seen."""
    return image.transpose(_TURNS[orientation]) if orientation in _TURNS else image


def is_lossless(kind: str, data: bytes) -> bool:
    """Whether a file of this format keeps its pixels as they were."""
    return kind == "png" or (kind == "webp" and data.find(b"VP8L", 12, 4096) >= 0)


def _reencode(image: Image.Image, data: bytes, kind: str, reason: str) -> CheckedImage:
    upright = turned(in_rgb(image), image.getexif().get(0x112, 1))
    lossless = is_lossless(kind, data)
    file = io.BytesIO()
    if lossless:
        upright.save(file, "PNG")
    else:
        upright.save(file, "JPEG", quality=95, subsampling=0)
    out = file.getvalue()
    return CheckedImage(out, "png" if lossless else "jpg", *upright.size, crc32(out), reason)


def _jpeg(data: bytes) -> int:
    """Orientation of a JPEG whose header is plain, else OddError. Walks the segments up to the first scan."""
    at, orientation, seen = 2, 1, False
    while True:
        if data[at] != 0xFF:
            raise OddError("JPEG with stray bytes between segments")
        while data[at] == 0xFF:
            at += 1
        marker, (length,) = data[at], struct.unpack_from(">H", data, at + 1)
        body = at + 3
        at += 1 + length
        if marker == 0xDA:
            return orientation
        if marker == 0xE1 and data[body : body + 6] == b"Exif\0\0":
            if seen:
                raise OddError("two EXIF blocks")
            orientation, seen = _orientation(data[body + 6 : at]), True
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            precision, components = data[body], data[body + 5]
            if components == 4:
                raise OddError("CMYK")
            if marker > 0xC2 or precision != 8 or components not in (1, 3):
                raise OddError("JPEG of a rare kind")


def _png(data: bytes) -> int:
    """Orientation of a PNG whose chunks are whole, else OddError."""
    at, orientation, seen = 8, 1, False
    while True:
        if at + 12 > len(data):
            raise OddError("PNG without its end")
        (length,) = struct.unpack_from(">I", data, at)
        name, end = data[at + 4 : at + 8], at + 8 + length
        if data[end : end + 4] != crc32(data[at + 4 : end]).to_bytes(4, "big"):
            raise OddError("PNG with a wrong checksum")
        if name == b"IEND":
            return orientation
        if name == b"eXIf":
            if seen:
                raise OddError("two EXIF blocks")
            orientation, seen = _orientation(data[at + 8 : end]), True
        at = end + 4


def _webp(data: bytes) -> int:
    """Orientation of a WebP whose chunks DALI can follow, else OddError."""
    if data[12:16] != b"VP8X":
        return 1
    at, orientation, seen, odd = 12, 1, 0, False
    while at + 8 <= len(data):
        name, (length,) = data[at : at + 4], struct.unpack_from("<I", data, at + 4)
        if name == b"EXIF":
            orientation, seen = _orientation(data[at + 8 : at + 8 + length]), seen + 1
        odd |= bool(length & 1)
        at += 8 + length + (length & 1)
    flagged = bool(data[20] & 0x08)
    if seen != flagged:
        raise OddError("WebP whose EXIF block is not where it says")
    if seen and odd:
        raise OddError("WebP with EXIF and a chunk of odd length")
    return orientation


def _orientation(tiff: bytes) -> int:
    """Orientation, 1..8, from an EXIF block (TIFF, first directory), by the letter of its standard, else OddError."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    if order is None:
        raise OddError("damaged EXIF block")
    try:
        (start,) = struct.unpack_from(order + "I", tiff, 4)
        (count,) = struct.unpack_from(order + "H", tiff, start)
        entries = [struct.unpack_from(order + "HHI4s", tiff, start + 2 + 12 * i) for i in range(count)]
    except struct.error:
        raise OddError("damaged EXIF block") from None
    found = [entry for entry in entries if entry[0] == 0x112]
    if not found:
        return 1
    _, kind, number, field = found[0]
    if len(found) > 1 or kind != 3 or number != 1:
        raise OddError("EXIF orientation of a wrong type")
    (value,) = struct.unpack_from(order + "H", field)
    if not 2 <= value <= 8:
        return 1
    # DALI gives up, and does not turn the image, where any entry points out of the block.
    for _, kind, number, field in entries:
        size = _TIFF_SIZES.get(kind, len(tiff)) * number
        if size > 4 and struct.unpack(order + "I", field)[0] + size > len(tiff):
            raise OddError("damaged EXIF block")
    return value
