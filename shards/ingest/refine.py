"""One candidate's bytes become what goes into a shard, or the outcome that keeps them out: decoded once, before all else bounded.

The header is held against the bounds before a decoder sees the file. A plain JPEG, which is most of a crawl, is decoded by
libjpeg-turbo (simplejpeg) in luma alone and at the scale that the fingerprint needs: every coefficient is read and checked
(strict: its warnings are errors), only the inverse transform is spared, which takes a third of the time. All else is
Pillow's, within what `shards.images` knows of DALI's decoder. Bytes stay the source's own but for a tail behind the image's
end, which is cut off (archives and pages in disguise, films of telephones); pictures that cannot stay are drawn anew.
"""

from __future__ import annotations

import io
import re
import warnings
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import simplejpeg
from isal.isal_zlib import crc32
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from ..images import MAX_PIXELS, OddError, in_rgb, is_lossless, plain_orientation, sniff, turned
from .candidate import Outcome
from .extent import extent, webp_size
from .fingerprint import SIDE

FORMATS = ("jpg", "png", "webp")  # what shards may hold
MAX_METADATA = 1 << 20  # bytes of EXIF, ICC, XMP, comments; with more of it the picture is drawn anew
MAX_SCANS = 256  # of a progressive JPEG: encoders write some ten
CUT_OFF, RESIZED, REENCODED = "bytes behind its end cut off", "resized", "re-encoded"
_FOREIGN = {b"GIF87a": "gif", b"GIF89a": "gif", b"II*\0": "tif", b"MM\0*": "tif"}
_CODECS = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP", "gif": "GIF", "bmp": "BMP", "tif": "TIFF"}
_TIFF_LOSSY = ("jpeg", "tiff_jpeg", "webp")
# What libjpeg-turbo complains of though the picture is whole, or what its simple interface alone cannot take.
_HARMLESS = re.compile(r"extraneous bytes before marker 0xd9|JFIF revision|Adobe color transform|subsampling level")


class Refused(Exception):
    """The candidate is not taken: its outcome, and a short reason without anything secret."""

    def __init__(self, outcome: Outcome, detail: str) -> None:
        super().__init__(detail)
        self.outcome, self.detail = outcome, detail


class RefineConfig(BaseModel):
    """What images may be like, and what is made of them. Sides and areas are upright pixels of the source, bytes its own."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    min_side: int = Field(default=0, ge=0)
    min_pixels: int = Field(default=0, ge=0)
    max_pixels: int = Field(default=MAX_PIXELS, ge=1, le=MAX_PIXELS)
    max_aspect: float | None = Field(default=None, ge=1)
    min_bytes: int = Field(default=0, ge=0)
    max_bytes: int = Field(default=64 << 20, ge=1)
    resize: int | None = Field(
        default=None, ge=16, description="shorter side; larger images are made smaller, no other"
    )
    reencode: Literal["jpg"] | None = Field(default=None, description="all images become JPEG")
    quality: int = Field(default=95, ge=1, le=100, description="of JPEG that is written here")


@dataclass(frozen=True)
class Refined:
    """An image as it goes into a shard: `format` is "jpg", "png" or "webp", `width` and `height` are upright.

    `changed` says in one of few fixed ways why `data` are not the source's own bytes, None if they are. `grey` is the
    upright luma, uint8 [64, 64] whatever the image's shape, that `fingerprint` takes. `colours` is how the source differs
    from plain RGB, which every decoder brings it to: animated (the first frame counts), cmyk, 16 bit, alpha, palette,
    grey, or nothing.
    """

    data: bytes
    format: str
    width: int
    height: int
    crc32: int
    changed: str | None
    grey: np.ndarray
    colours: str = ""


def refine(data: bytes, config: RefineConfig) -> Refined:
    """Check one image file and make of it what a shard may hold. Raises Refused with the outcome and a reason."""
    if not data:
        raise Refused(Outcome.NOT_AN_IMAGE, "empty")
    if len(data) > config.max_bytes:
        raise Refused(Outcome.TOO_LARGE, f"{len(data)} bytes are over the bound of {config.max_bytes}")
    if len(data) < config.min_bytes:
        raise Refused(Outcome.TOO_SMALL, f"{len(data)} bytes are under the bound of {config.min_bytes}")
    kind = sniff(data) or _FOREIGN.get(data[:6]) or _FOREIGN.get(data[:4]) or ("bmp" if data[:2] == b"BM" else None)
    if kind is None:
        raise Refused(Outcome.NOT_AN_IMAGE, "none of JPEG, PNG, WebP, GIF, BMP, TIFF")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of what is bounded here, or harmless
            return (_jpeg(data, config) if kind == "jpg" else None) or _other(kind, data, config)
    except Refused:
        raise
    except Image.DecompressionBombError:  # Pillow's own bound is greater, and comes before ours
        raise Refused(Outcome.TOO_MANY_PIXELS, f"its header claims more than {config.max_pixels} pixels") from None
    except MemoryError:  # may be the machine's fault: such an input can be taken up again
        raise Refused(Outcome.UNREADABLE, "not enough memory to decode it") from None
    except Exception as error:  # Pillow's decoders raise nearly anything on broken input
        raise _broken(error) from error


def _broken(error: Exception) -> Refused:
    # Some messages end with where in memory an object lay, which is another place each time.
    reason = " ".join(re.sub(r"<[^<>]* at 0x[0-9a-f]+>", "the file", str(error)).split())[:200]
    return Refused(Outcome.BROKEN, f"cannot be decoded: {reason or type(error).__name__}")


def _check_shape(width: int, height: int, config: RefineConfig) -> None:
    """Refuse by the size that a header claims; turning an image changes none of the verdicts."""
    if min(width, height) < 1:
        raise Refused(Outcome.BROKEN, f"{width} x {height} pixels")
    if width * height > config.max_pixels:
        bound = f"the bound of {config.max_pixels}"
        raise Refused(Outcome.TOO_MANY_PIXELS, f"{width} x {height} pixels are over {bound}")
    if min(width, height) < config.min_side:
        raise Refused(Outcome.TOO_SMALL, f"{width} x {height}: a side is under {config.min_side}")
    if width * height < config.min_pixels:
        raise Refused(Outcome.TOO_SMALL, f"{width} x {height} pixels are under the bound of {config.min_pixels}")
    if config.max_aspect is not None and max(width, height) > config.max_aspect * min(width, height):
        raise Refused(Outcome.ASPECT, f"{width} x {height}: sides differ by more than {config.max_aspect:g} times")


def _jpeg(data: bytes, config: RefineConfig) -> Refined | None:
    """A plain JPEG by the fast way; None if it needs Pillow."""
    try:
        header = simplejpeg.decode_jpeg_header(data, strict=True)
    except ValueError as error:
        if _HARMLESS.search(str(error)):
            return None
        raise
    height, width, colours = int(header[0]), int(header[1]), header[2]
    _check_shape(width, height, config)
    try:
        orientation = plain_orientation("jpg", data)
    except OddError:
        return None
    whole = extent("jpg", data)
    if whole.scans > MAX_SCANS:
        raise Refused(Outcome.BROKEN, f"a JPEG of {whole.scans} scans")
    if whole.metadata > MAX_METADATA or not whole.scans > 0:
        return None
    size = (height, width) if orientation > 4 else (width, height)
    smaller = config.resize is not None and min(size) > config.resize
    try:
        if smaller or config.reencode:
            mode = "GRAY" if colours == "Gray" else "RGB"
            found = _decoded(data, mode, width, height, 1.5 * (config.resize or 1) if smaller else max(size))
            image = Image.fromarray(found[..., 0] if mode == "GRAY" else found)
            drawn = _drawn(turned(image, orientation), size, False, config, RESIZED if smaller else REENCODED)
            return replace(drawn, colours="grey" if mode == "GRAY" else "")
        luma = _decoded(data, "GRAY", width, height, 3 * SIDE)
    except ValueError as error:
        if _HARMLESS.search(str(error)):
            return None
        raise
    changed = CUT_OFF if whole.end < len(data) else None
    data = data[: whole.end]
    small = turned(_small(Image.fromarray(luma[..., 0])), orientation)
    return Refined(data, "jpg", *size, crc32(data), changed, np.asarray(small), "grey" if colours == "Gray" else "")


def _decoded(data: bytes, mode: str, width: int, height: int, least: float) -> np.ndarray:
    """All of a JPEG's coefficients checked, pixels at 1, 1/2, 1/4 or 1/8 of its size: sides of `least` where it has them.

    Other scales have no fast transform. ValueError with libjpeg-turbo's complaint, warnings included.
    """
    scale = 1
    while scale < 8 and min(width, height) >= 2 * scale * least:
        scale *= 2
    sides = {"min_height": -(-height // scale), "min_width": -(-width // scale)}
    return simplejpeg.decode_jpeg(data, mode, strict=True, **sides)


def _other(kind: str, data: bytes, config: RefineConfig) -> Refined:
    """Whatever Pillow reads, and the fast way does not."""
    if kind == "webp":
        _check_shape(*(webp_size(data) or (0, 0)), config)  # opening it allocates the canvas already
    with Image.open(io.BytesIO(data), formats=[_CODECS[kind]]) as image:
        _check_shape(*image.size, config)
        if kind == "jpg" and extent("jpg", data).scans > MAX_SCANS:
            raise Refused(Outcome.BROKEN, f"a JPEG of more than {MAX_SCANS} scans")
        if kind == "tif":
            _check_tiles(image, config)
        image.load()
        _check_shape(*image.size, config)  # GIF and TIFF may know better now
        if image.mode in ("I", "F"):
            raise Refused(Outcome.NOT_AN_IMAGE, "pixels of 32 bits, whose range nobody knows")
        lossless = is_lossless(kind, data) or (kind not in FORMATS and image.info.get("compression") not in _TIFF_LOSSY)
        orientation, why = _judge(kind, data, image)
        whole = extent(kind, data) if kind in FORMATS else None
        if why is None and whole is not None and whole.metadata > MAX_METADATA:
            why = "metadata of over 1 MiB"
        colours = _colours(image)
        seen = turned(in_rgb(image), orientation)
    smaller = config.resize is not None and min(seen.size) > config.resize
    if why or smaller or config.reencode or whole is None:
        reason = RESIZED if smaller else why or (REENCODED if whole else f"{_CODECS[kind]} is no format of shards")
        return replace(_drawn(seen, seen.size, lossless, config, reason), colours=colours)
    changed = CUT_OFF if whole.end < len(data) else None
    data = data[: whole.end]
    grey = np.asarray(_small(seen.convert("L")))
    return Refined(data, kind, *seen.size, crc32(data), changed, grey, colours)


def _colours(image: Image.Image) -> str:
    """How a decoded image differs from plain RGB: see Refined."""
    with suppress(Exception):  # of a GIF this looks at the second frame, which is nobody's business if it is broken
        if getattr(image, "is_animated", False):
            return "animated"
    if image.mode.startswith("I"):
        return "16 bit"
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        return "alpha"
    return {"CMYK": "cmyk", "YCCK": "cmyk", "P": "palette", "L": "grey", "1": "grey"}.get(image.mode, "")


def _judge(kind: str, data: bytes, image: Image.Image) -> tuple[int, str | None]:
    """The orientation of a decoded image, and why DALI would not read the file well, None if it would."""
    if kind in FORMATS:
        try:
            return plain_orientation(kind, data), None
        except OddError as error:
            reason = str(error)
    else:
        reason = None  # drawn anew in any case; Pillow has turned a TIFF already
    # Not `image.getexif()`, which believes XMP too: browsers, OpenCV and DALI do not.
    block = Image.Exif()
    if kind in FORMATS and image.info.get("exif"):
        block.load(image.info["exif"])
    orientation = block.get(0x112, 1)
    return (orientation if orientation in range(1, 9) else 1), reason


def _check_tiles(image: Image.Image, config: RefineConfig) -> None:
    """A TIFF's tiles are allocated whole, however small the picture is that they are cut to."""
    tags = getattr(image, "tag_v2", {})
    width, height = int(tags.get(322, 1)), int(tags.get(323, 1))
    if width * height > max(1 << 20, 4 * image.width * image.height) or width * height > config.max_pixels:
        raise Refused(
            Outcome.TOO_MANY_PIXELS, f"tiles of {width} x {height} in an image of {image.width} x {image.height}"
        )


def _drawn(image: Image.Image, size: tuple[int, int], lossless: bool, config: RefineConfig, changed: str) -> Refined:
    """An upright picture encoded anew. `size` is its full one, `image` may be smaller by decoding at a scale."""
    if config.resize is not None and min(size) > config.resize:
        scale = config.resize / min(size)
        image = image.resize((round(size[0] * scale), round(size[1] * scale)), Image.Resampling.HAMMING)
    file = io.BytesIO()
    png = lossless and config.reencode is None
    if png:
        image.save(file, "PNG")
    else:
        image.save(file, "JPEG", quality=config.quality, subsampling=0)
    out = file.getvalue()
    grey = np.asarray(_small(image.convert("L")))
    return Refined(out, "png" if png else "jpg", *image.size, crc32(out), changed, grey)


def _small(luma: Image.Image) -> Image.Image:
    """Means under a tent two pixels wide, in Pillow's fixed point: the same on every machine.

    Means of bare boxes differ between sizes of one picture in twice as many bits; small boxes first, to 1.5 times the size,
    cost none of that and halve the time.
    """
    return luma.resize((SIDE, SIDE), Image.Resampling.BILINEAR, reducing_gap=1.5)
