"""The 15 operations of RandAugment in plain NumPy, on uint8 images as PIL and timm carry them out.

Eight of them are one table of 256 values a channel, made of the argument and, for three, of the image's histogram;
Color blends each pixel with its own luma, Sharpness with its 3 x 3 neighbourhood. The other five only move pixels:
`warped` carries out any chain of them in one bilinear pass, where PIL makes one pass each and rounds in between.
The arithmetic is PIL's to the last bit (truncation after a blend, luma in 16-bit fixed point, histograms as integers).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..strong import GEOMETRIC, NONE, OPERATIONS

FILL = (124, 116, 104)  # what comes in from outside of the image: ImageNet's mean, as Mugs and timm round it
ROUNDED = 1 << 23  # half of a 256th of a pixel, see `fixed`

Pixels = NDArray[np.uint8]  # [H, W, 3]
_LEVELS = np.arange(256)


def table(operation: int, argument: float, image: Pixels) -> NDArray[np.uint8] | None:
    """Output value for each input value and channel, uint8 [256, 3]; None if the operation is no such table.

    `image` is looked at by AutoContrast, Equalize (histogram of each channel) and Contrast (mean luma) alone.
    """
    name = OPERATIONS[operation - 1] if operation != NONE else ""
    if name in ("AutoContrast", "Equalize"):
        make = stretched if name == "AutoContrast" else equalized
        return np.stack([make(np.bincount(image[..., c].ravel(), minlength=256)) for c in range(3)], -1)
    if name == "Invert":
        values = 255 - _LEVELS
    elif name == "Posterize":
        values = _LEVELS & ~(2 ** (8 - int(argument)) - 1)  # no bit kept: black, as in PIL before it refused that
    elif name == "Solarize":
        values = np.where(argument > _LEVELS, _LEVELS, 255 - _LEVELS)
    elif name == "SolarizeAdd":
        values = np.where(_LEVELS < 128, np.minimum(255, _LEVELS + int(argument)), _LEVELS)
    elif name == "Contrast":
        values = blend(np.full(256, int(luma(image).mean() + 0.5)), _LEVELS, argument)
    elif name == "Brightness":
        values = blend(np.zeros(256), _LEVELS, argument)
    else:
        return None
    return np.repeat(values.astype(np.uint8)[:, None], 3, -1)


def apply(operation: int, argument: float, image: Pixels) -> Pixels:
    """One operation on pixels: uint8 [H, W, 3]. Operations on places leave the image as it is."""
    values = table(operation, argument, image)
    if values is not None:
        return np.stack([values[image[..., c], c] for c in range(3)], -1)
    name = OPERATIONS[operation - 1] if operation != NONE else ""
    if name == "Color":
        return blend(luma(image)[..., None], image, argument)
    if name == "Sharpness":
        return blend(smooth(image), image, argument)
    return image


def luma(image: Pixels) -> NDArray[np.uint8]:
    """PIL's conversion to "L": ITU-R 601 in 16-bit fixed point, rounded: [..., 3] -> [...]."""
    red, green, blue = (image[..., c].astype(np.int64) for c in range(3))
    return ((19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16).astype(np.uint8)


def blend(start: NDArray, end: NDArray, factor: float) -> NDArray[np.uint8]:
    """PIL's Image.blend: start + factor (end - start) in float32, cut to 0 ... 255 and truncated."""
    first = start.astype(np.float32)
    return (first + np.float32(factor) * (end.astype(np.float32) - first)).clip(0, 255).astype(np.uint8)


def smooth(image: Pixels) -> Pixels:
    """PIL's ImageFilter.SMOOTH: the centre counts five times its eight neighbours; the outermost pixels stay."""
    out = image.copy()
    height, width = image.shape[:2]
    if height > 2 and width > 2:
        wide = image.astype(np.int64)
        total = 4 * wide[1:-1, 1:-1]
        for y in range(3):
            for x in range(3):
                total = total + wide[y : y + height - 2, x : x + width - 2]
        out[1:-1, 1:-1] = (2 * total + 13) // 26  # total / 13, rounded
    return out


def fixed(warp: NDArray[np.float64]) -> NDArray[np.int64]:
    """A warp in 2**-32 of a pixel, moved by ROUNDED so that cutting a coordinate to 256ths rounds it: int64 [2, 3]."""
    whole = np.rint(warp * 2.0**32).astype(np.int64)
    whole[:, 2] += ROUNDED
    return whole


def warped(image: Pixels, warp: NDArray[np.float64]) -> Pixels:
    """The image after all of its operations on places, as large as before: uint8 [H, W, 3].

    warp [2, 3] maps a pixel to the source pixel that it shows (Draws.warp), to a 256th of a pixel. Bilinear between the
    four source pixels around it, rounded (PIL truncates); what lies outside of the image gets FILL, with a hard edge,
    as in PIL. All of it is whole numbers, so that every machine gives the same.
    """
    height, width = image.shape[:2]
    y, x = np.mgrid[:height, :width]
    (xx, xy, xt), (yx, yy, yt) = fixed(warp)
    source_x, source_y = xx * x + xy * y + xt, yx * x + yy * y + yt
    first, wide, high = ROUNDED - (1 << 31), width << 32, height << 32
    inside = (source_x >= first) & (source_x < wide + first) & (source_y >= first) & (source_y < high + first)
    left, top = source_x >> 32, source_y >> 32
    right_share, low_share = (source_x >> 24 & 255)[..., None], (source_y >> 24 & 255)[..., None]

    def at(rows: NDArray[np.int64], columns: NDArray[np.int64]) -> NDArray[np.int64]:
        return image[rows.clip(0, height - 1), columns.clip(0, width - 1)].astype(np.int64)

    upper = at(top, left) * (256 - right_share) + at(top, left + 1) * right_share
    lower = at(top + 1, left) * (256 - right_share) + at(top + 1, left + 1) * right_share
    shown = (upper * (256 - low_share) + lower * low_share + 0x8000) >> 16
    return np.where(inside[..., None], shown, FILL).astype(np.uint8)


def strengthened(
    image: Pixels, operations: tuple[int, int], arguments: tuple[float, float], warp: NDArray[np.float64]
) -> Pixels:
    """Both operations on the full-size image, first one first: uint8 [H, W, 3]; `warp` is that of both, see Draws.warp.

    As timm does it with PIL's bilinear filter (timm takes bicubic for half of the images), with one exception: two
    operations on places are one pass. That is an interpolation less, and what the first moves out of the image the
    second can bring back, where two passes would leave the fill.
    """
    moved = False
    for operation, argument in zip(operations, arguments, strict=True):
        if operation not in GEOMETRIC:
            image = apply(operation, argument, image)
        elif not moved:
            image, moved = warped(image, warp), True
    return image


def stretched(histogram: NDArray[np.int64]) -> NDArray[np.uint8]:
    """AutoContrast's table [256]: the darkest value that occurs becomes 0, the lightest 255."""
    low, high = np.flatnonzero(histogram)[[0, -1]]
    if high <= low:
        return _LEVELS.astype(np.uint8)
    scale = 255.0 / (high - low)
    return np.trunc(_LEVELS * scale - low * scale).clip(0, 255).astype(np.uint8)


def equalized(histogram: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Equalize's table [256]: values in proportion to how many pixels are darker."""
    present = histogram[histogram > 0]
    step = (histogram.sum() - present[-1]) // 255
    if len(present) <= 1 or step == 0:
        return _LEVELS.astype(np.uint8)
    darker = np.concatenate([[0], np.cumsum(histogram)[:-1]])
    return np.minimum((step // 2 + darker) // step, 255).astype(np.uint8)
