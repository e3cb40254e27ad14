"""The laying of blocks as machine code: what masks.py says with arrays, one mask after another and without the GIL.

Some twenty tries a mask on a grid of a few hundred patches are thousands of small array operations a batch, between the
steps of the thread that trains. Here a try costs what its random numbers and its block cost, and they are drawn when
they are needed. Every product is rounded by itself (jit.compiled, exact), so that masks are masks.py's to the bit.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .augment.jit import compiled, exactly_inlined

u8 = np.uint64


@exactly_inlined
def _philox(c0, c1, c2, c3, k0, k1):
    """Four words of philox.philox4x32, as uint64 below 2**32."""
    low, half = u8(0xFFFFFFFF), u8(32)
    for _ in range(10):
        p0, p1 = c0 * u8(0xD2511F53), c2 * u8(0xCD9E8D57)
        c0, c1, c2, c3 = (p1 >> half) ^ c1 ^ k0, p1 & low, (p0 >> half) ^ c3 ^ k1, p0 & low
        k0, k1 = (k0 + u8(0x9E3779B9)) & low, (k1 + u8(0xBB67AE85)) & low
    return c0, c1, c2, c3


@exactly_inlined
def _exp(x):
    """boxes.exp of one number."""
    small, result = x / 32.0, 1.0
    for n in range(12, 0, -1):
        result = 1.0 + result * small / n
    for _ in range(5):
        result = result * result
    return result


@compiled("void(i8, i8, i8[::1], i8[::1], i8[::1], i8, f8, f8, i8, b1[:, :, ::1])", exact=True)
def lay_all(
    low_key: Any,
    high_key: Any,
    positions: Any,
    streams: Any,
    targets: Any,
    first: Any,
    log_low: Any,
    log_high: Any,
    most: Any,
    masks: Any,
) -> None:
    """Lay blocks into masks bool [m, h, w], all False before, as `masks.draw_masks_reference` does.

    positions, streams, targets int64 [m]; first: the counter's block of the first try; most: tries in a row that fail.
    """
    height, width = masks.shape[1], masks.shape[2]
    smallest = (min(height, width) // 3) ** 2
    low, half = u8(0xFFFFFFFF), u8(32)
    for i in range(len(targets)):
        mask, position, left, fails, block = masks[i], u8(positions[i]), targets[i], 0, first
        while left > 0 and fails < most:
            a, b, c, d = _philox(position & low, position >> half, u8(streams[i]), u8(block), u8(low_key), u8(high_key))
            block += 1
            fails += 1
            area = smallest + (left - smallest) * (a * 2.0**-32)
            aspect = _exp(log_low + (log_high - log_low) * (b * 2.0**-32))
            h, w = np.int64(np.rint(np.sqrt(area * aspect))), np.int64(np.rint(np.sqrt(area / aspect)))
            if h >= height or w >= width:
                continue
            top = np.int64(np.floor(c * 2.0**-32 * (height - h + 1)))
            start = np.int64(np.floor(d * 2.0**-32 * (width - w + 1)))
            gained = 0
            for y in range(top, top + h):
                for x in range(start, start + w):
                    gained += not mask[y, x]
            if 0 < gained <= left:
                mask[top : top + h, start : start + w] = True
                left -= gained
                fails = 0
