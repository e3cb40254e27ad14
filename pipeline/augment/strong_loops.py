"""RandAugment's operations as machine code, on rows of RGB RGB ... that lie anywhere in flat memory.

The results are operations.py's to the bit, so every product is rounded by itself (jit.compiled, exact). Loops run along
memory without a branch, in float32 where that is exact: luma's sum in 16-bit fixed point stays below 2**24, and a
thirteenth of a whole number, rounded, is never near a tie. What only some pixels need (the image's edges, the fill of a
warp) stands in loops of its own. A source is given as flat uint8 memory, the index of its first byte, the bytes from
row to row, and its height and width; `out` has its rows end to end.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .jit import compiled, exactly_inlined
from .operations import ROUNDED

f4, u8 = np.float32, np.uint64
FIRST = ROUNDED - (1 << 31)  # where an image begins: half a pixel before the middle of its first


@compiled("void(u1[::1], i8, i8, i8, i8, u1[::1], u1[::1])", exact=True)
def looked_up(source: Any, start: Any, stride: Any, height: Any, width: Any, values: Any, out: Any) -> None:
    """values: uint8 [768], 256 for red, 256 for green, 256 for blue."""
    red, green, blue = values[:256], values[256:512], values[512:768]
    for y in range(height):
        at, to = u8(start + y * stride), u8(3 * y * width)
        for _ in range(width):
            r, g, b = red[source[at]], green[source[at + u8(1)]], blue[source[at + u8(2)]]
            out[to], out[to + u8(1)], out[to + u8(2)] = r, g, b
            at += u8(3)
            to += u8(3)


@compiled("void(u1[::1], i8, i8, i8, i8, i8[:, ::1])", exact=True)
def histograms(source: Any, start: Any, stride: Any, height: Any, width: Any, counts: Any) -> None:
    """Add to counts int64 [3, 256] how often each value occurs in each channel."""
    # Two each, as equal neighbours would wait for each other's count.
    even, odd = np.zeros((3, 256), np.int32), np.zeros((3, 256), np.int32)
    for y in range(height):
        at = u8(start + y * stride)
        for _ in range(width // 2):
            even[0, source[at]] += 1
            even[1, source[at + u8(1)]] += 1
            even[2, source[at + u8(2)]] += 1
            odd[0, source[at + u8(3)]] += 1
            odd[1, source[at + u8(4)]] += 1
            odd[2, source[at + u8(5)]] += 1
            at += u8(6)
        if width % 2:
            for c in range(3):
                even[c, source[at + u8(c)]] += 1
    counts += even
    counts += odd


@compiled("void(u1[::1], i8, i8, i8, i8, u1[:, ::1])", exact=True)
def extremes(source: Any, start: Any, stride: Any, height: Any, width: Any, found: Any) -> None:
    """found: uint8 [2, 3], the least and the greatest value of each channel."""
    low, high = np.full(3 * width, 255, np.uint8), np.zeros(3 * width, np.uint8)
    for y in range(height):
        row = source[start + y * stride : start + y * stride + 3 * width]
        for j in range(3 * width):
            low[j] = row[j] if row[j] < low[j] else low[j]
            high[j] = row[j] if row[j] > high[j] else high[j]
    for c in range(3):
        found[0, c], found[1, c] = low[c::3].min(), high[c::3].max()


@exactly_inlined
def _luma(r, g, b):
    return np.floor((f4(19595) * f4(r) + f4(38470) * f4(g) + f4(7471) * f4(b) + f4(0x8000)) * f4(2.0**-16))


@compiled("i8(u1[::1], i8, i8, i8, i8)", exact=True)
def luma_sum(source: Any, start: Any, stride: Any, height: Any, width: Any) -> Any:
    """The sum of operations.luma over all pixels."""
    lumas = np.empty(width, np.uint8)
    total = np.int64(0)
    for y in range(height):
        row = source[start + y * stride : start + y * stride + 3 * width]
        for x in range(width):
            lumas[x] = np.uint8(np.int32(_luma(row[3 * x], row[3 * x + 1], row[3 * x + 2])))
        total += lumas.sum()
    return total


@compiled("void(u1[::1], i8, i8, i8, i8, f4, u1[::1])", exact=True)
def saturated(source: Any, start: Any, stride: Any, height: Any, width: Any, factor: Any, out: Any) -> None:
    """operations.blend of luma and image."""
    zero, most = f4(0), f4(255)
    for y in range(height):
        row = source[start + y * stride : start + y * stride + 3 * width]
        to = out[3 * y * width : 3 * (y + 1) * width]
        for x in range(width):
            r, g, b = f4(row[3 * x]), f4(row[3 * x + 1]), f4(row[3 * x + 2])
            grey = _luma(r, g, b)
            to[3 * x] = np.uint8(np.int32(min(max(grey + factor * (r - grey), zero), most)))
            to[3 * x + 1] = np.uint8(np.int32(min(max(grey + factor * (g - grey), zero), most)))
            to[3 * x + 2] = np.uint8(np.int32(min(max(grey + factor * (b - grey), zero), most)))


@compiled("void(u1[::1], i8, i8, i8, i8, i8, i8, i8, i8, f4, u1[::1])", exact=True)
def sharpened(
    source: Any,
    start: Any,
    stride: Any,
    height: Any,
    width: Any,
    above: Any,
    left: Any,
    below: Any,
    right: Any,
    factor: Any,
    out: Any,
) -> None:
    """operations.blend of operations.smooth and image.

    above, left, below, right: 1 where the source goes on by another pixel there (start counts without it), 0 where the
    image ends: its outermost pixels stay.
    """
    whole, zero, most = 3 * width, f4(0), f4(255)
    first, last = 3 * (1 - left), whole - 3 * (1 - right)
    sums = np.zeros(whole + 6, np.float32)
    for y in range(height):
        at = start + y * stride
        row, to = source[at : at + whole], out[y * whole : (y + 1) * whole]
        if (y == 0 and not above) or (y == height - 1 and not below):
            to[:] = row
            continue
        begin, end = 3 - 3 * left, whole + 3 + 3 * right  # of sums, which has a pixel more on both sides
        a = source[at - stride - 3 + begin : at - stride - 3 + end]
        b = source[at - 3 + begin : at - 3 + end]
        c = source[at + stride - 3 + begin : at + stride - 3 + end]
        some = sums[begin:end]
        for j in range(end - begin):
            some[j] = f4(a[j]) + f4(b[j]) + f4(c[j])
        to[:first] = row[:first]
        to[max(first, last) :] = row[max(first, last) :]
        before, middle, behind = sums[first:], sums[first + 3 :], sums[first + 6 :]
        own, mine = row[first:], to[first:]
        for j in range(last - first):
            value = f4(own[j])
            total = before[j] + middle[j] + behind[j] + f4(4) * value
            smooth = np.floor((f4(2) * total + f4(13)) * f4(1 / 26))
            mine[j] = np.uint8(np.int32(min(max(smooth + factor * (value - smooth), zero), most)))


@exactly_inlined
def _blended(source, a, b, c, d, right, low):
    """Bilinear: of the pixels at a and b, above, and c and d, below; shares of b and d, of c and d, in 256ths."""
    u, v = f4(256) - right, f4(256) - low
    above = f4(source[a]) * u + f4(source[b]) * right
    below = f4(source[c]) * u + f4(source[d]) * right
    return above * v + below * low + f4(0x8000)


@exactly_inlined
def _pixel(source, stride, left, top, width, height, at_x, at_y, to, out):
    """One pixel of `warped`, wherever it comes from."""
    if at_x < FIRST or at_x >= (width << 32) + FIRST or at_y < FIRST or at_y >= (height << 32) + FIRST:
        out[to], out[to + 1], out[to + 2] = 124, 116, 104
        return
    x, y, right, low = at_x >> 32, at_y >> 32, f4((at_x >> 24) & 255), f4((at_y >> 24) & 255)
    a, b = 3 * (max(x, 0) - left), 3 * (min(x + 1, width - 1) - left)
    c, d = (max(y, 0) - top) * stride, (min(y + 1, height - 1) - top) * stride
    for k in range(3):
        value = _blended(source, c + a + k, c + b + k, d + a + k, d + b + k, right, low)
        out[to + k] = np.uint8(np.int32(value * f4(2.0**-16)))


@compiled("void(u1[::1], i8, i8, i8, i8, i8, i8[:, ::1], i8, i8, i8, i8, u1[::1])", exact=True)
def warped(
    source: Any,
    stride: Any,
    left: Any,
    top: Any,
    width: Any,
    height: Any,
    warp: Any,
    x0: Any,
    y0: Any,
    rows: Any,
    columns: Any,
    out: Any,
) -> None:
    """operations.warped, its rectangle of rows x columns from (x0, y0) on; warp is operations.fixed of it.

    `source` begins with pixel (left, top) of an image of width x height, and holds all that is looked at.
    """
    line = np.empty(3 * columns + 1, np.float32)
    step_x, step_y = warp[0, 0], warp[1, 0]
    # Well inside: a pixel, its lower neighbour, and two to the right of each are in the image.
    most_x, most_y = (width - 2) << 32, (height - 1) << 32
    for j in range(rows):
        start_x = warp[0, 0] * x0 + warp[0, 1] * (y0 + j) + warp[0, 2]
        start_y = warp[1, 0] * x0 + warp[1, 1] * (y0 + j) + warp[1, 2]
        row = 3 * j * columns
        # Along a row both coordinates only grow or only fall: what is well inside is one stretch.
        begin, end = 0, columns
        while begin < end:
            x, y = start_x + step_x * begin, start_y + step_y * begin
            if x >= 0 and x < most_x and y >= 0 and y < most_y:
                break
            _pixel(source, stride, left, top, width, height, x, y, row + 3 * begin, out)
            begin += 1
        while end > begin:
            x, y = start_x + step_x * (end - 1), start_y + step_y * (end - 1)
            if x >= 0 and x < most_x and y >= 0 and y < most_y:
                break
            end -= 1
            _pixel(source, stride, left, top, width, height, x, y, row + 3 * end, out)
        x, y = start_x + step_x * begin, start_y + step_y * begin
        to = u8(3 * begin)
        for _ in range(end - begin):
            right, low = f4(np.int32((x >> 24) & 255)), f4(np.int32((y >> 24) & 255))
            a = u8(((y >> 32) - top) * stride + 3 * ((x >> 32) - left))
            b, c = a + u8(3), a + u8(stride)
            d = c + u8(3)
            # Four numbers at a time are one vector; the fourth is the next pixel's, and is overwritten by it.
            red = _blended(source, a, b, c, d, right, low)
            green = _blended(source, a + u8(1), b + u8(1), c + u8(1), d + u8(1), right, low)
            blue = _blended(source, a + u8(2), b + u8(2), c + u8(2), d + u8(2), right, low)
            spare = _blended(source, a + u8(3), b + u8(3), c + u8(3), d + u8(3), right, low)
            line[to] = red
            line[to + u8(1)] = green
            line[to + u8(2)] = blue
            line[to + u8(3)] = spare
            x += step_x
            y += step_y
            to += u8(3)
        values, target = line[3 * begin : 3 * end], out[row + 3 * begin : row + 3 * end]
        for i in range(len(target)):
            target[i] = np.uint8(np.int32(values[i] * f4(2.0**-16)))
