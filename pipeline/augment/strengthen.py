"""RandAugment on the CPU: operations.py's arithmetic to the bit, on no more of the image than a crop shows.

The result of a chain of operations is asked for as a rectangle; each operation asks the one before it for what it needs:
sharpening a pixel more on each side, a warp the bounding box of where its pixels come from. Tables of values that follow
each other become one. Only what looks at a whole image (AutoContrast, Equalize, Contrast) is told of it: its extremes,
histogram or mean luma, which for the image as decoded are found once for all its crops. strong_loops.py has the loops.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..strong import GEOMETRIC, NONE, NUMBER
from . import operations, strong_loops

Rect = tuple[int, int, int, int]  # x0, y0, x1, y1, end not included
Pixels = NDArray[np.uint8]  # [h, w, 3]
Chain = list[tuple[int, float]]  # operations by number, and their arguments

_SHARPNESS, _COLOR, _CONTRAST = NUMBER["Sharpness"], NUMBER["Color"], NUMBER["Contrast"]
_AUTOCONTRAST, _EQUALIZE = NUMBER["AutoContrast"], NUMBER["Equalize"]
_LOOKS = (_AUTOCONTRAST, _EQUALIZE, _CONTRAST)
_NOTHING = np.zeros((1, 1, 3), np.uint8)
_LEVELS = np.arange(256)


class Part(NamedTuple):
    """Pixels inside flat memory: the first byte, bytes from row to row, and how many rows and columns."""

    memory: NDArray[np.uint8]
    start: int
    stride: int
    height: int
    width: int

    def cut(self, x: int, y: int, width: int, height: int) -> Part:
        return Part(self.memory, self.start + y * self.stride + 3 * x, self.stride, height, width)

    def image(self) -> Pixels:
        """uint8 [h, w, 3], no copy."""
        strides = (self.stride, 3, 1)
        return np.lib.stride_tricks.as_strided(self.memory[self.start :], (self.height, self.width, 3), strides)


class Room:
    """Memory that one chain after the other is worked out in, kept from image to image; `slack` bytes behind each."""

    def __init__(self, slack: int = 0) -> None:
        self._slack = slack
        self._used = 0
        self._memory: list[NDArray[np.uint8]] = []

    def clear(self) -> None:
        """What was taken so far may be overwritten."""
        self._used = 0

    def take(self, height: int, width: int) -> Part:
        """A part with its rows end to end from the start of its memory on."""
        size = 3 * height * width + self._slack
        if self._used == len(self._memory):
            self._memory.append(np.zeros(size, np.uint8))
        elif len(self._memory[self._used]) < size:
            self._memory[self._used] = np.zeros(size, np.uint8)
        self._used += 1
        return Part(self._memory[self._used - 1][:size], 0, 3 * width, height, width)


class _Facts:
    """What operations ask about a whole image, each found when it is first asked for."""

    def __init__(self, image: Part) -> None:
        self._image = image
        self._extremes: NDArray[np.uint8] | None = None
        self._counts: NDArray[np.int64] | None = None
        self._luma: int | None = None

    def counts(self, values: NDArray[np.uint8] | None) -> NDArray[np.int64]:
        """Histograms [3, 256] of the image, or of what `values` [256, 3] make of it."""
        if self._counts is None:
            self._counts = np.zeros((3, 256), np.int64)
            strong_loops.histograms(*self._image, self._counts)
        if values is None:
            return self._counts
        found = np.zeros_like(self._counts)
        for channel in range(3):
            np.add.at(found[channel], values[:, channel], self._counts[channel])
        return found

    def present(self, values: NDArray[np.uint8] | None) -> NDArray[np.int64]:
        """The same, or, cheaper, histograms with only the least and the greatest value in them."""
        if values is not None or self._counts is not None:
            return self.counts(values)
        if self._extremes is None:
            self._extremes = np.zeros((2, 3), np.uint8)
            strong_loops.extremes(*self._image, self._extremes)
        found = np.zeros((3, 256), np.int64)
        found[[0, 1, 2], self._extremes] = 1
        return found

    def luma(self, values: NDArray[np.uint8] | None, room: Room) -> int:
        """The mean, rounded; of the image, or of what `values` make of it."""
        if values is None and self._luma is not None:
            return self._luma
        image = self._image if values is None else _looked_up(self._image, values, room)
        mean = int(strong_loops.luma_sum(*image) / (image.height * image.width) + 0.5)
        if values is None:
            self._luma = mean
        return mean


class Strengthened:
    """One decoded image and what is known of it: uint8 [H, W, 3], rows end to end. `room` serves one thread."""

    def __init__(self, image: Pixels, room: Room | None = None) -> None:
        self.height, self.width = image.shape[:2]
        self.whole: Rect = (0, 0, self.width, self.height)
        self._room = Room() if room is None else room
        self._image = Part(np.ascontiguousarray(image).reshape(-1), 0, 3 * self.width, self.height, self.width)
        self._facts = _Facts(self._image)

    def part(self, chain: Chain, warp: NDArray[np.float64], rect: Rect) -> Part:
        """`rect` of the image after the operations (number, argument), as operations.strengthened gives it.

        It lies in the room until the next is asked for, its rows end to end if there is any operation.
        """
        self._room.clear()
        steps, moved = [], False
        for operation, argument in chain:
            if operation == NONE or (moved and operation in GEOMETRIC):
                continue
            moved = moved or operation in GEOMETRIC
            steps.append((operation, argument))
        return self._after(steps, warp, rect)

    def _after(self, steps: Chain, warp: NDArray[np.float64], rect: Rect) -> Part:
        x0, y0, x1, y1 = rect
        if not steps:
            return self._image.cut(x0, y0, x1 - x0, y1 - y0)
        before, (operation, argument) = steps[:-1], steps[-1]
        if operation in GEOMETRIC:
            window = came_from(warp, rect, self.width, self.height)
            source = self._after(before, warp, window)
            out = self._room.take(y1 - y0, x1 - x0)
            strong_loops.warped(
                *(source.memory[source.start :], source.stride, window[0], window[1], self.width, self.height),
                *(operations.fixed(warp), x0, y0, y1 - y0, x1 - x0, out.memory),
            )
            return out
        if operation == _SHARPNESS:
            left, above, right, below = int(x0 > 0), int(y0 > 0), int(x1 < self.width), int(y1 < self.height)
            source = self._after(before, warp, (x0 - left, y0 - above, x1 + right, y1 + below))
            source = source.cut(left, above, x1 - x0, y1 - y0)
            out = self._room.take(y1 - y0, x1 - x0)
            strong_loops.sharpened(*source, above, left, below, right, np.float32(argument), out.memory)
            return out
        if operation == _COLOR:
            source = self._after(before, warp, rect)
            out = self._room.take(y1 - y0, x1 - x0)
            strong_loops.saturated(*source, np.float32(argument), out.memory)
            return out
        first = len(steps)
        while first and _is_table(steps[first - 1][0]):
            first -= 1
        return self._tables(steps[:first], steps[first:], warp, rect)

    def _tables(self, before: Chain, tables: Chain, warp: NDArray[np.float64], rect: Rect) -> Part:
        """`rect` after the steps before and the tables, which become one."""
        x0, y0, x1, y1 = rect
        facts, source = self._facts, None
        if before and any(operation in _LOOKS for operation, _ in tables):
            whole = self._after(before, warp, self.whole)
            facts, source = _Facts(whole), whole.cut(x0, y0, x1 - x0, y1 - y0)
        values: NDArray[np.uint8] | None = None
        for operation, argument in tables:
            more = self._values(operation, argument, facts, values)
            values = more if values is None else np.take_along_axis(more, values.astype(np.intp), 0)
        assert values is not None
        return _looked_up(self._after(before, warp, rect) if source is None else source, values, self._room)

    def _values(
        self, operation: int, argument: float, facts: _Facts, before: NDArray[np.uint8] | None
    ) -> NDArray[np.uint8]:
        """Table of an operation, uint8 [256, 3], on an image with these facts, looked up in the table before."""
        if operation == _CONTRAST:
            one = operations.blend(np.full(256, facts.luma(before, self._room)), _LEVELS, argument)
            return np.repeat(one[:, None], 3, -1)
        if operation == _AUTOCONTRAST:
            return np.stack([operations.stretched(counts) for counts in facts.present(before)], -1)
        if operation == _EQUALIZE:
            return np.stack([operations.equalized(counts) for counts in facts.counts(before)], -1)
        values = operations.table(operation, argument, _NOTHING)
        assert values is not None
        return values


def _is_table(operation: int) -> bool:
    return operation not in GEOMETRIC and operation not in (_SHARPNESS, _COLOR)


def _looked_up(source: Part, values: NDArray[np.uint8], room: Room) -> Part:
    out = room.take(source.height, source.width)
    strong_loops.looked_up(*source, np.ascontiguousarray(values.T).reshape(-1), out.memory)
    return out


def came_from(warp: NDArray[np.float64], rect: Rect, width: int, height: int) -> Rect:
    """Bounding box of the source pixels that a warp shows in `rect`, with room for interpolation; never empty."""
    x, y = (np.array([rect[axis], rect[axis + 2] - 1]) for axis in (0, 1))
    found: list[int] = []
    for row, most in ((warp[0], width), (warp[1], height)):
        ends = np.add.outer(row[0] * x, row[1] * y) + row[2]
        start = min(max(math.floor(ends.min()) - 1, 0), most - 1)
        found += [start, max(min(math.ceil(ends.max()) + 3, most), start + 1)]
    return found[0], found[2], found[1], found[3]
