"""One row at a time: the innermost loops of kernels.py. Rows are float32, RGB RGB ..., of values 0 ... 255.

Every loop runs along memory, so that it becomes vector code; what branches stands outside of it. Several taps are taken
in one pass, because the sums would otherwise go to memory and back for each.
"""

from __future__ import annotations

import numpy as np

from .jit import inlined

f4, u8 = np.float32, np.uint64


@inlined
def vertical(source, start, stride, length, weights, taps, row):
    """row[j] = sum over k of weights[k] source[start + k stride + j], for j < length. source is uint8 [any]."""
    for k in range(0, taps, 3):
        at = start + k * stride
        a, u = source[at : at + length], weights[k]
        if taps - k == 1:
            if k == 0:
                for j in range(length):
                    row[j] = u * f4(a[j])
            else:
                for j in range(length):
                    row[j] += u * f4(a[j])
            return
        b, v = source[at + stride : at + stride + length], weights[k + 1]
        if taps - k == 2:
            if k == 0:
                for j in range(length):
                    row[j] = u * f4(a[j]) + v * f4(b[j])
            else:
                for j in range(length):
                    row[j] += u * f4(a[j]) + v * f4(b[j])
            return
        c, w = source[at + 2 * stride : at + 2 * stride + length], weights[k + 2]
        if k == 0:
            for j in range(length):
                row[j] = u * f4(a[j]) + v * f4(b[j]) + w * f4(c[j])
        else:
            for j in range(length):
                row[j] += u * f4(a[j]) + v * f4(b[j]) + w * f4(c[j])


@inlined
def horizontal(row, left, first, weights, taps, clip, out):
    """Pixel x of out = sum over k of weights[x, k] times pixel first[x] + k - left of row; cut to 0 ... 255 if `clip`.

    Four numbers are summed for each pixel, one vector: the fourth is the next pixel's red, and is overwritten by it. So
    `out` has one number more than its pixels need, and `row` too.
    """
    for x in range(len(first)):
        at = u8(3 * (first[x] - left))
        mine = weights[x]
        red, green, blue, spare = f4(0), f4(0), f4(0), f4(0)
        for k in range(taps):
            w, j = mine[k], at + u8(3 * k)
            red += w * row[j]
            green += w * row[j + u8(1)]
            blue += w * row[j + u8(2)]
            spare += w * row[j + u8(3)]
        if clip:
            red, green = min(max(red, f4(0)), f4(255)), min(max(green, f4(0)), f4(255))
            blue, spare = min(max(blue, f4(0)), f4(255)), min(max(spare, f4(0)), f4(255))
        j = u8(3 * x)
        out[j] = red
        out[j + u8(1)] = green
        out[j + u8(2)] = blue
        out[j + u8(3)] = spare


@inlined
def coloured(row, colours, threshold, normal, red, green, blue):
    """Colours by a 3 x 4 matrix, cut to 0 ... 255, solarised, normalised; each channel to its own row."""
    m00, m01, m02, m03 = colours[0], colours[1], colours[2], colours[3]
    m10, m11, m12, m13 = colours[4], colours[5], colours[6], colours[7]
    m20, m21, m22, m23 = colours[8], colours[9], colours[10], colours[11]
    s0, s1, s2, t0, t1, t2 = normal[0, 0], normal[0, 1], normal[0, 2], normal[1, 0], normal[1, 1], normal[1, 2]
    zero, most = f4(0), f4(255)
    for x in range(len(red)):
        r, g, b = row[3 * x], row[3 * x + 1], row[3 * x + 2]
        p = min(max(m00 * r + m01 * g + m02 * b + m03, zero), most)
        q = min(max(m10 * r + m11 * g + m12 * b + m13, zero), most)
        s = min(max(m20 * r + m21 * g + m22 * b + m23, zero), most)
        p = most - p if p >= threshold else p
        q = most - q if q >= threshold else q
        s = most - s if s >= threshold else s
        red[x] = p * s0 + t0
        green[x] = q * s1 + t1
        blue[x] = s * s2 + t2


@inlined
def _mirrored(i, n):
    """The index inside 0 ... n - 1 that i is a mirror image of, edges not doubled."""
    if n == 1:
        return 0
    while i < 0 or i >= n:
        i = -i if i < 0 else 2 * (n - 1) - i
    return i


@inlined
def blurred(image, size, y, taps, padded, out):
    """Row y of an image, rows of size pixels end to end, after a blur in both directions. padded: room for one row and
    len(taps) pixels on both sides."""
    radius, n = len(taps) - 1, 3 * size
    row, centre, middle = padded[3 * radius : 3 * radius + n], image[y * n : y * n + n], taps[0]
    for j in range(n):
        row[j] = middle * centre[j]
    for k in range(1, radius + 1, 2):
        above, below = _mirrored(y - k, size) * n, _mirrored(y + k, size) * n
        a, b, u = image[above : above + n], image[below : below + n], taps[k]
        if k == radius:
            for j in range(n):
                row[j] += u * (a[j] + b[j])
        else:
            above, below = _mirrored(y - k - 1, size) * n, _mirrored(y + k + 1, size) * n
            c, d, v = image[above : above + n], image[below : below + n], taps[k + 1]
            for j in range(n):
                row[j] += u * (a[j] + b[j]) + v * (c[j] + d[j])
    for k in range(1, radius + 1):
        before, behind = 3 * _mirrored(-k, size), 3 * _mirrored(size - 1 + k, size)
        for c3 in range(3):
            padded[3 * (radius - k) + c3] = row[before + c3]
            padded[3 * (radius + size - 1 + k) + c3] = row[behind + c3]
    for j in range(n):
        out[j] = middle * row[j]
    for k in range(1, radius + 1, 2):
        low, high = 3 * (radius - k), 3 * (radius + k)
        a, b, u = padded[low : low + n], padded[high : high + n], taps[k]
        if k == radius:
            for j in range(n):
                out[j] += u * (a[j] + b[j])
        else:
            c, d, v = padded[low - 3 : low - 3 + n], padded[high + 3 : high + 3 + n], taps[k + 1]
            for j in range(n):
                out[j] += u * (a[j] + b[j]) + v * (c[j] + d[j])
