"""Loops over an index of digests and fingerprints, as machine code: exact matches, near ones, and merging.

A fingerprint of 256 bits is cut into 16 bands of 16. Two that differ in at most 31 bits differ in at most one bit within
some band, two that differ in at most 15 agree in one; so 17 buckets of each band, or one, hold every candidate (multi-index
hashing: Norouzi, Punjani, Fleet, CVPR 2012). Compiled as they are imported and kept beside the byte code.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from numba import types
from numba.extending import intrinsic

BANDS = 16
BUCKETS = 1 << 16
MAX_NEAR = 31  # bits; beyond, a bucket could miss a match


def _given(kind: types.Type, dimensions: int) -> types.Array:
    """An array that is read alone, in memory or mapped."""
    return types.Array(kind, dimensions, "C", readonly=True)


_U32, _U64, _U64S = _given(types.uint32, 1), _given(types.uint64, 1), _given(types.uint64, 2)
_I64, _I64S = types.int64, types.int64[::1]


def _compiled(*signatures: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: machine code for these types, at once, that runs without the GIL."""

    def make(function: Callable[..., Any]) -> Callable[..., Any]:
        how: dict[str, Any] = {"nogil": True, "error_model": "numpy", "boundscheck": False}
        try:
            return numba.njit(list(signatures), cache=True, **how)(function)
        except RuntimeError as error:
            if "cache" not in str(error):  # no place to keep it: each process compiles for itself
                raise
            return numba.njit(list(signatures), **how)(function)

    return make


def _popcount(_: Any, word: Any) -> Any:
    """How many bits of a word are set."""
    return word(word), lambda context, builder, signature, arguments: builder.ctpop(arguments[0])


_ones: Any = intrinsic(_popcount)


@_compiled(types.void(_U64S, _I64, _U64S, _U32, _U64, _I64, _I64S))
def find_exact(queries: Any, count: Any, digests: Any, starts: Any, places: Any, base: Any, found: Any) -> None:
    """found[i] becomes the number, from `base`, of the first digest equal to queries[i], unless it is 0 or more already.

    queries uint64 [m, 2], digests uint64 [n, 2]. Bucket b is places[starts[b] : starts[b + 1]], in order of entries: a
    row in the lower half, 32 further bits of the digest in the upper.
    """
    for i in range(count):
        if found[i] >= 0:
            continue
        bucket = np.int64(queries[i, 0] & np.uint64(0xFFFF))
        tag = (queries[i, 0] >> np.uint64(16)) & np.uint64(0xFFFFFFFF)
        for j in range(np.int64(starts[bucket]), np.int64(starts[bucket + 1])):
            if places[j] >> np.uint64(32) == tag:
                row = np.int64(places[j] & np.uint64(0xFFFFFFFF))
                if digests[row, 0] == queries[i, 0] and digests[row, 1] == queries[i, 1]:
                    found[i] = base + row
                    break


@_compiled(types.void(_U64S, _I64, _U64S, _U32, _U32, _I64, _I64, _I64S, _I64S))
def find_near(
    queries: Any, count: Any, prints: Any, starts: Any, rows: Any, flips: Any, base: Any, apart: Any, found: Any
) -> None:
    """Improve apart[i] and found[i], distance and number, by the fingerprints of one segment.

    queries uint64 [m, 4], prints uint64 [n, 4], starts [16 * 65537], rows uint32: buckets of all bands, one band after the
    other. On entry apart[i] is the greatest distance that is of interest, negative if none is; at equal distances the
    lower number wins. `flips` is 17, or 1 where nothing beyond 15 bits is asked for.
    """
    for i in range(count):
        bound, best = apart[i], found[i]
        if bound < 0:
            continue
        first, second, third, fourth = queries[i, 0], queries[i, 1], queries[i, 2], queries[i, 3]
        for band in range(BANDS):
            key = (queries[i, band >> 2] >> np.uint64(16 * (band & 3))) & np.uint64(0xFFFF)
            for flip in range(flips):
                bucket = np.int64(key) ^ ((1 << flip) >> 1)  # the first of them is the very key
                at = band * (BUCKETS + 1) + bucket
                for j in range(np.int64(starts[at]), np.int64(starts[at + 1])):
                    row = rows[j]
                    bits = np.int64(_ones(prints[row, 0] ^ first) + _ones(prints[row, 1] ^ second))
                    if bits > bound:  # nearly all end here
                        continue
                    bits += np.int64(_ones(prints[row, 2] ^ third) + _ones(prints[row, 3] ^ fourth))
                    number = base + np.int64(row)
                    if bits < bound or (bits == bound and (best < 0 or number < best)):
                        bound, best = bits, number
        apart[i], found[i] = bound, best


@_compiled(types.void(_U64S, _I64, _U64S, _given(types.boolean, 1), _I64, _I64, _I64, _I64S, _I64S))
def scan_near(
    queries: Any, i: Any, prints: Any, printed: Any, start: Any, stop: Any, base: Any, apart: Any, found: Any
) -> None:
    """The same for queries[i] alone, by looking at rows `start` to `stop` one by one; `printed` says which have one."""
    bound, best = apart[i], found[i]
    if bound < 0:
        return
    first, second, third, fourth = queries[i, 0], queries[i, 1], queries[i, 2], queries[i, 3]
    for row in range(np.uint64(start), np.uint64(stop)):
        bits = np.int64(_ones(prints[row, 0] ^ first) + _ones(prints[row, 1] ^ second))
        if bits > bound:
            continue
        bits += np.int64(_ones(prints[row, 2] ^ third) + _ones(prints[row, 3] ^ fourth))
        number = base + np.int64(row)
        if bits <= bound and printed[row] and (bits < bound or best < 0 or number < best):
            bound, best = bits, number
    apart[i], found[i] = bound, best


@_compiled(
    types.void(_U32, _I64, _U32, _I64, types.uint32[::1], _I64S),
    types.void(_U64, _I64, _U32, _I64, types.uint64[::1], _I64S),
)
def pour(values: Any, shift: Any, starts: Any, at: Any, into: Any, filled: Any) -> None:
    """Append each bucket, starts[at + b] to starts[at + b + 1] of values, plus `shift`, at into[filled[b]]."""
    for bucket in range(BUCKETS):
        place = filled[bucket]
        for j in range(np.int64(starts[at + bucket]), np.int64(starts[at + bucket + 1])):
            into[place] = values[j] + np.uint64(shift)
            place += 1
        filled[bucket] = place
