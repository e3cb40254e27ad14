"""The reader's inner loop in machine code: `pread` and check of many samples in one call that holds no lock.

In Python each read and each checksum lets go of the interpreter lock and waits to have it again, and with two threads
that waiting costs more than all else that is done for a sample. The loop calls the C library's `pread` and the crc32 of
ISA-L that lies in the isal package. It is kept as compiled (augment/jit.py), for it knows both by name only. Importing
this takes tenths of a second, the first time on a machine seconds; ImportError where ISA-L's function is not to be had,
and then the loop in share.py, which is the reference for this one, goes on alone.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
from isal import isal_zlib
from llvmlite import binding
from numba import types

from .augment.jit import compiled, inlined
from .checks import BLOCK

INDEX, SINCE, WAITED = range(
    3
)  # of `state`: sample that is being read, since when, and time in calls to storage, in ns
_MONOTONIC = 1


def _address() -> int:
    """Of ISA-L's crc32 over zlib's polynomial, once it has proved to be that."""
    try:
        function = ctypes.CDLL(isal_zlib.__file__).crc32_gzip_refl
    except (AttributeError, OSError) as error:
        raise ImportError(f"the isal package does not give away ISA-L's crc32 ({error})") from error
    function.argtypes, function.restype = [ctypes.c_uint32, ctypes.c_char_p, ctypes.c_uint64], ctypes.c_uint32
    sample = bytes(range(256)) * 5
    address = ctypes.cast(function, ctypes.c_void_p).value
    if (
        address is None
        or ctypes.sizeof(ctypes.c_long) != 8
        or function(0, sample, 1279) != isal_zlib.crc32(sample[:-1])
    ):
        raise ImportError("the isal package has another crc32 than zlib's under ISA-L's name")
    return address


binding.add_symbol("gristmill_crc32", _address())
_pread: Any = types.ExternalFunction("pread", types.int64(types.int32, types.int64, types.int64, types.int64))
_crc32: Any = types.ExternalFunction("gristmill_crc32", types.uint32(types.uint32, types.int64, types.int64))
_gettime: Any = types.ExternalFunction("clock_gettime", types.int32(types.int32, types.int64))


@inlined
def _announced(slab, at):  # pyright: ignore
    """Size of the member that the tar header at `at` announces in octal digits; -1: ask checks.member_size."""
    size, i, end = 0, at + 124, at + 136
    while i < end and (slab[i] == 0x20 or slab[i] == 0):
        i += 1
    first = i
    while i < end and 0x30 <= slab[i] <= 0x37:
        size = size * 8 + (slab[i] - 0x30)
        i += 1
    if i == first:
        return -1
    while i < end and (slab[i] == 0x20 or slab[i] == 0):
        i += 1
    return size if i == end else -1


@inlined
def _jpeg_size(slab, at, end, most):  # pyright: ignore
    """Width | height << 32 as checks.plain_jpeg_size finds them in slab[at:end], which is the form to read; else 0."""
    size = 0
    if end - at < 2 or slab[at] != 0xFF or slab[at + 1] != 0xD8:
        return 0
    at += 2
    while at + 4 <= end and slab[at] == 0xFF:
        kind, length = slab[at + 1], np.int64(slab[at + 2]) << 8 | np.int64(slab[at + 3])
        body, at = at + 4, at + 2 + length
        if at > end or length < 2:
            return 0
        if kind == 0xDA:
            return size
        if kind == 0xDB:
            if (length - 2) % 65:
                return 0
            for table in range(body, at, 65):
                if slab[table] >> 4:
                    return 0
        elif 0xC0 <= kind <= 0xC2:
            if size or length < 8 or slab[body] != 8 or length != 8 + 3 * np.int64(slab[body + 5]):
                return 0
            if slab[body + 5] != 1 and slab[body + 5] != 3 and slab[body + 5] != 4:
                return 0
            height = np.int64(slab[body + 1]) << 8 | np.int64(slab[body + 2])
            width = np.int64(slab[body + 3]) << 8 | np.int64(slab[body + 4])
            if not 0 < width * height <= most:
                return 0
            size = width | height << 32
        elif kind == 0xE0:
            jfif = slab[body] == 0x4A and slab[body + 1] == 0x46 and slab[body + 2] == 0x49 and slab[body + 3] == 0x46
            if length < 16 or not jfif or slab[body + 4] != 0:
                return 0
        elif kind != 0xC4 and kind != 0xDD and kind != 0xFE:
            return 0
    return 0


@compiled(f"int64(uint8[::1], {', '.join(['int64[::1]'] * 9)}, int64)")
def read_all(slab, handles, offsets, places, leads, lengths, got, crcs, sizes, frame, most):  # pyright: ignore
    """Read n samples into the slab: lead and data of each from its offset on, to its place. All int64 [n].

    Fills `got` with bytes read (fewer where the shard ends or the call fails, for others to tell why). Of what was read
    whole it fills `crcs` with the checksum of the data; or, where the lead is a tar's header, `sizes` with width |
    height << 32 if that header and the image's, of no more than `most` pixels, are sound at sight. `frame` is state
    [3], see above, and then a number that ends the loop before the next sample once it is not 0. Gives how many
    samples it has dealt with.
    """
    clock = np.zeros(2, np.int64)
    base = slab.ctypes.data
    for i in range(len(handles)):
        if frame[3]:
            return i
        _gettime(_MONOTONIC, clock.ctypes.data)
        begin = clock[0] * 1_000_000_000 + clock[1]
        frame[0], frame[1] = i, begin
        done, want = 0, leads[i] + lengths[i]
        while done < want:
            more = _pread(np.int32(handles[i]), base + places[i] + done, want - done, offsets[i] + done)
            if more <= 0:
                break
            done += more
        _gettime(_MONOTONIC, clock.ctypes.data)
        frame[2] += clock[0] * 1_000_000_000 + clock[1] - begin
        got[i] = done
        start = places[i] + leads[i]
        if done < want:
            continue
        if not leads[i]:
            crcs[i] = _crc32(np.uint32(0), base + start, lengths[i])
        elif leads[i] == BLOCK and _announced(slab, places[i]) == lengths[i]:
            sizes[i] = _jpeg_size(slab, start, start + lengths[i], most)
    return len(handles)
