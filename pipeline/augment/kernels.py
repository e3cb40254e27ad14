"""Machine code for crops, by Numba: one pass from decoded pixels to a normalised view, without the GIL.

Library calls a stage (resize, flip, blur, colours, normalise, turn to planes) cost a walk through memory and a few
microseconds of Python each; torch's antialiased resize alone takes as long as all of this. Here each output row is made
while it is in the first-level cache, in float32 from the first sum to the last, so that only the view itself is
rounded. Vertical sums come first: they run along whole source rows, which is what vector units like. The arithmetic is
reference.py's, edge by edge: the filter sees the image around the box, outermost pixels are repeated. Row by row the
loops are in rows.py. Compiled once for each machine and kept in __pycache__, as Python's own byte code is.
"""

from __future__ import annotations

import math

import numpy as np

from .jit import compiled, inlined
from .rows import blurred, coloured, horizontal, vertical

SLACK = 64  # bytes behind the last pixel that may be read (they count nothing)
RESIZED, BLURRED, FINISHED = 2, 3, 4  # how far to go; less than FINISHED is for profiles (augment/cpu.py has 0 and 1)

f4 = np.float32


@inlined
def _weights(start, end, size, length, cubic, mirrored, first, weights):
    """Fill first int64 [size] and weights float32 [size, taps]: output pixel i is the sum of weights[i, k] times source
    pixel first[i] + k. Returns how many taps are needed at most. `mirrored`: the last output pixel comes first."""
    step = (end - start) / size
    scale = max(step, 1.0)
    radius = 2 * scale if cubic else scale
    most = 0
    for out in range(size):
        centre = start + (out + 0.5) * step - 0.5
        low, high = math.ceil(centre - radius), math.floor(centre + radius)
        begin, end_ = min(max(low, 0), length - 1), min(max(high, 0), length - 1)
        row = weights[size - 1 - out if mirrored else out]
        first[size - 1 - out if mirrored else out] = begin
        row[:] = 0
        total = 0.0
        for tap in range(low, high + 1):
            x = abs(tap - centre) / scale
            if not cubic:
                value = max(0.0, 1 - x)
            elif x < 1:
                value = (1.5 * x - 2.5) * x * x + 1
            else:
                value = ((-0.5 * x + 2.5) * x - 4) * x + 2 if x < 2 else 0.0
            total += value
            row[min(max(tap, begin), end_) - begin] += f4(value)
        for k in range(end_ - begin + 1):
            row[k] = f4(row[k] / total)
        most = max(most, end_ - begin + 1)
    return most


@inlined
def _gaussian(sigma):
    """Half of a Gaussian's taps, float32 [radius + 1], the middle first; cut at 3 sigma, the sum of all is 1."""
    radius = math.ceil(3 * sigma)
    taps = np.empty(radius + 1, np.float64)
    for k in range(radius + 1):
        taps[k] = math.exp(-0.5 * (k / sigma) ** 2)
    return (taps / (2 * taps.sum() - taps[0])).astype(np.float32)


@compiled("void(u1[::1], i8, i8, f8[::1], i8, b1, b1, f8, f4[::1], f4, f4[:, ::1], f4[::1], f4[:, :, ::1], i8)")
def cut(source, width, height, box, size, cubic, mirrored, sigma, colours, threshold, normal, scratch, out, upto):
    """One crop of one image.

    source uint8 [height * width * 3 + SLACK]: rows of RGB. box float64 [4]: x0, y0, x1, y1. sigma: of the blur in crop
    pixels, 0 for none. colours float32 [12]: a 3 x 4 matrix. threshold: solarise from here up. normal float32 [2, 3]:
    factor and offset of each channel at the end. scratch float32 [>= 3 size^2 + 1]. out float32 [3, size, size].
    """
    support = 2.0 if cubic else 1.0
    first_y, first_x = np.empty(size, np.int64), np.empty(size, np.int64)
    weights_y = np.empty((size, int(2 * support * max((box[3] - box[1]) / size, 1.0)) + 2), np.float32)
    weights_x = np.empty((size, int(2 * support * max((box[2] - box[0]) / size, 1.0)) + 2), np.float32)
    taps_y = _weights(box[1], box[3], size, height, cubic, False, first_y, weights_y)
    taps_x = _weights(box[0], box[2], size, width, cubic, mirrored, first_x, weights_x)

    left = min(first_x[0], first_x[size - 1])
    right = min(max(first_x[0], first_x[size - 1]) + taps_x, width)
    length = (3 * (right - left) + 31) // 32 * 32  # whole vectors: a remainder would be summed one by one
    row = np.zeros(length + 3 * taps_x + 4, np.float32)
    line = np.empty(3 * size + 1, np.float32)
    whole = 3 * size
    for y in range(size):
        at = first_y[y]
        vertical(source, (at * width + left) * 3, 3 * width, length, weights_y[y], min(taps_y, height - at), row)
        target = scratch[y * whole : (y + 1) * whole + 1] if sigma > 0 else line
        horizontal(row, left, first_x, weights_x, taps_x, cubic, target)
        if sigma == 0 and upto == FINISHED:
            coloured(line, colours, threshold, normal, out[0, y], out[1, y], out[2, y])
    if sigma > 0 and upto >= BLURRED:
        taps = _gaussian(sigma)
        padded = np.empty(3 * (size + 2 * len(taps)), np.float32)
        for y in range(size):
            blurred(scratch, size, y, taps, padded, line)
            if upto == FINISHED:
                coloured(line, colours, threshold, normal, out[0, y], out[1, y], out[2, y])


@compiled("void(f4[::1], u2[::1])")
def to_half(values, out):
    """float32 -> float16 as raw bits, to nearest, ties to even; values within 65,504."""
    bits = values.view(np.uint32)
    for i in range(len(values)):
        size = bits[i] & np.uint32(0x7FFFFFFF)
        normal = (size + np.uint32(0xC8000FFF) + ((size >> np.uint32(13)) & np.uint32(1))) >> np.uint32(13)
        # Below the smallest normal number a half counts in steps of 2^-24.
        small = np.uint32(np.rint(abs(values[i]) * f4(2.0**24)))
        sign = (bits[i] >> np.uint32(16)) & np.uint32(0x8000)
        out[i] = np.uint16(sign | (normal if size >= np.uint32(0x38800000) else small))


@compiled("void(f4[::1], u2[::1])")
def to_bfloat(values, out):
    """float32 -> bfloat16 as raw bits, to nearest, ties to even; finite values."""
    bits = values.view(np.uint32)
    for i in range(len(values)):
        out[i] = np.uint16((bits[i] + np.uint32(0x7FFF) + ((bits[i] >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))
