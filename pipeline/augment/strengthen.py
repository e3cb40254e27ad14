"""RandAugment on the CPU: operations.py's arithmetic to the bit, on no more of the image than a crop shows.

The result of a chain of operations is asked for as a rectangle; each operation asks the one before it for what it needs:
a table of values the same rectangle, sharpening a pixel more on each side, a warp the bounding box of where its pixels
come from. Only what looks at a whole image (AutoContrast, Equalize, Contrast) is told its histogram, which for the
image as decoded is counted once for all its crops.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from ..strong import GEOMETRIC, NONE, NUMBER
from . import operations
from .jit import compiled

Rect = tuple[int, int, int, int]  # x0, y0, x1, y1, end not included
Pixels = NDArray[np.uint8]  # [h, w, 3]

_SHARPNESS, _COLOR, _CONTRAST = NUMBER["Sharpness"], NUMBER["Color"], NUMBER["Contrast"]
_STRETCHES = {NUMBER["AutoContrast"]: operations.stretched, NUMBER["Equalize"]: operations.equalized}
_NOTHING = np.zeros((1, 1, 3), np.uint8)
_LEVELS = np.arange(256)


class Strengthened:
    """One decoded image and what is known of it: uint8 [H, W, 3]."""

    def __init__(self, image: Pixels) -> None:
        self.image = image
        self.height, self.width = image.shape[:2]
        self.whole: Rect = (0, 0, self.width, self.height)
        self._histograms: NDArray[np.int64] | None = None

    def part(self, chain: list[tuple[int, float]], warp: NDArray[np.float64], rect: Rect) -> Pixels:
        """`rect` of the image after the operations (number, argument), as operations.strengthened gives it."""
        steps, moved = [], False
        for operation, argument in chain:
            if operation == NONE or (moved and operation in GEOMETRIC):
                continue
            moved = moved or operation in GEOMETRIC
            steps.append((operation, argument))
        return self._after(steps, warp, rect)

    def _after(self, steps: list[tuple[int, float]], warp: NDArray[np.float64], rect: Rect) -> Pixels:
        x0, y0, x1, y1 = rect
        if not steps:
            return self.image[y0:y1, x0:x1]
        before, (operation, argument) = steps[:-1], steps[-1]
        if operation in GEOMETRIC:
            from_x, from_y, to_x, to_y = came_from(warp, rect, self.width, self.height)
            source = self._after(before, warp, (from_x, from_y, to_x, to_y))
            out = np.empty((y1 - y0, x1 - x0, 3), np.uint8)
            warped(source, from_x, from_y, self.width, self.height, warp, x0, y0, out)
            return out
        if operation == _SHARPNESS:
            more = max(x0 - 1, 0), max(y0 - 1, 0), min(x1 + 1, self.width), min(y1 + 1, self.height)
            source = np.ascontiguousarray(self._after(before, warp, more))
            out = np.empty_like(source)
            sharpened(source, np.float32(argument), out)
            return out[y0 - more[1] : y1 - more[1], x0 - more[0] : x1 - more[0]]
        source = self._after(before, warp, rect)
        if operation == _COLOR:
            out = np.empty(source.shape, np.uint8)
            saturated(source, np.float32(argument), out)
            return out
        values = self._table(operation, argument, before, warp)
        looked_up: Any = cv2.LUT(np.ascontiguousarray(source), values[None])
        return looked_up.reshape(source.shape)

    def _table(
        self, operation: int, argument: float, before: list[tuple[int, float]], warp: NDArray[np.float64]
    ) -> NDArray[np.uint8]:
        """uint8 [256, 3]."""
        if operation not in _STRETCHES and operation != _CONTRAST:
            values = operations.table(operation, argument, _NOTHING)
            assert values is not None
            return values
        counts = self._counted() if not before else _histograms_of(self._after(before, warp, self.whole))
        if operation == _CONTRAST:
            mean = int((counts[3] * _LEVELS).sum() / counts[3].sum() + 0.5)
            values = operations.blend(np.full(256, mean), _LEVELS, argument)
            return np.repeat(values[:, None], 3, -1)
        make: Callable[[NDArray[np.int64]], NDArray[np.uint8]] = _STRETCHES[operation]
        return np.stack([make(counts[channel]) for channel in range(3)], -1)

    def _counted(self) -> NDArray[np.int64]:
        if self._histograms is None:
            self._histograms = _histograms_of(self.image)
        return self._histograms


def came_from(warp: NDArray[np.float64], rect: Rect, width: int, height: int) -> Rect:
    """Bounding box of the source pixels that a warp shows in `rect`, with room for interpolation; never empty."""
    x, y = (np.array([rect[axis], rect[axis + 2] - 1]) for axis in (0, 1))
    found: list[int] = []
    for row, most in ((warp[0], width), (warp[1], height)):
        ends = np.add.outer(row[0] * x, row[1] * y) + row[2]
        start = min(max(math.floor(ends.min()) - 1, 0), most - 1)
        found += [start, max(min(math.ceil(ends.max()) + 3, most), start + 1)]
    return found[0], found[2], found[1], found[3]


def _histograms_of(image: Pixels) -> NDArray[np.int64]:
    counts = np.zeros((4, 256), np.int64)
    histograms(image, counts)
    return counts


@compiled("void(u1[:, :, :], i8[:, ::1])", exact=True)
def histograms(image: Any, counts: Any) -> None:
    """Add to counts int64 [4, 256] how often each value occurs: red, green, blue, luma."""
    for y in range(image.shape[0]):
        for x in range(image.shape[1]):
            r, g, b = np.int64(image[y, x, 0]), np.int64(image[y, x, 1]), np.int64(image[y, x, 2])
            counts[0, r] += 1
            counts[1, g] += 1
            counts[2, b] += 1
            counts[3, (19595 * r + 38470 * g + 7471 * b + 0x8000) >> 16] += 1


@compiled("void(u1[:, :, :], f4, u1[:, :, ::1])", exact=True)
def saturated(image: Any, factor: Any, out: Any) -> None:
    """operations.blend of luma and image."""
    for y in range(image.shape[0]):
        for x in range(image.shape[1]):
            r, g, b = np.int64(image[y, x, 0]), np.int64(image[y, x, 1]), np.int64(image[y, x, 2])
            grey = np.float32((19595 * r + 38470 * g + 7471 * b + 0x8000) >> 16)
            for c in range(3):
                value = grey + factor * (np.float32(image[y, x, c]) - grey)
                out[y, x, c] = np.uint8(min(max(value, np.float32(0)), np.float32(255)))


@compiled("void(u1[:, :, ::1], f4, u1[:, :, ::1])", exact=True)
def sharpened(image: Any, factor: Any, out: Any) -> None:
    """operations.blend of operations.smooth and image; the outermost pixels stay."""
    height, width = image.shape[0], image.shape[1]
    out[:] = image
    for y in range(1, height - 1):
        above, row, below, target = image[y - 1], image[y], image[y + 1], out[y]
        for x in range(1, width - 1):
            for c in range(3):
                total = np.int32(5) * row[x, c] + row[x - 1, c] + row[x + 1, c]
                total += np.int32(above[x - 1, c]) + above[x, c] + above[x + 1, c]
                total += np.int32(below[x - 1, c]) + below[x, c] + below[x + 1, c]
                smooth = np.float32((2 * total + 13) // 26)
                value = smooth + factor * (np.float32(row[x, c]) - smooth)
                target[x, c] = np.uint8(min(max(value, np.float32(0)), np.float32(255)))


@compiled("void(u1[:, :, :], i8, i8, i8, i8, f8[:, :], i8, i8, u1[:, :, ::1])", exact=True)
def warped(source: Any, left: Any, top: Any, width: Any, height: Any, warp: Any, x0: Any, y0: Any, out: Any) -> None:
    """operations.warped, the rectangle of `out` from (x0, y0) on; `source` is the image from (left, top) on."""
    for j in range(out.shape[0]):
        y = y0 + j
        for i in range(out.shape[1]):
            x = x0 + i
            at_x = warp[0, 0] * x + warp[0, 1] * y + warp[0, 2]
            at_y = warp[1, 0] * x + warp[1, 1] * y + warp[1, 2]
            if at_x < -0.5 or at_x >= width - 0.5 or at_y < -0.5 or at_y >= height - 0.5:
                out[j, i, 0], out[j, i, 1], out[j, i, 2] = 124, 116, 104
                continue
            first_x, first_y = math.floor(at_x), math.floor(at_y)
            right, low = at_x - first_x, at_y - first_y
            a, b = max(first_x, 0) - left, min(first_x + 1, width - 1) - left
            c, d = max(first_y, 0) - top, min(first_y + 1, height - 1) - top
            for k in range(3):
                upper = source[c, a, k] * (1 - right) + source[c, b, k] * right
                lower = source[d, a, k] * (1 - right) + source[d, b, k] * right
                out[j, i, k] = np.uint8(np.rint(upper * (1 - low) + lower * low))
