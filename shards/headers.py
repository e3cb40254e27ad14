"""Tar headers: blocks of 512 bytes, one at a time where they are odd and thousands at once where they are not.

Checksums and names of a batch are NumPy operations over [n, 512] bytes: that is what makes the index an order of
magnitude faster than `tarfile`, which builds an object of 20 fields for each. The layout is POSIX.1's ustar with GNU's
base-256 numbers; Python's `tarfile` is the reference in the tests.
"""

from __future__ import annotations

import numpy as np

BLOCK = 512
REGULAR = b"0\x007"  # plain file; the same as written before 1988; contiguous file
DATALESS = b"123456"  # tarfile's view: links, devices, folders and pipes have no data, whatever their size says
META = b"xgXLK"  # PAX for one member, for all, Solaris' PAX, GNU long name, GNU long link
KINDS = {
    b"1": "hard links",
    b"2": "symbolic links",
    b"3": "character devices",
    b"4": "block devices",
    b"5": "folders",
    b"6": "pipes",
}


def padded(size: int) -> int:
    """Bytes that `size` bytes of data take in a tar."""
    return (size + BLOCK - 1) // BLOCK * BLOCK


def text(raw: bytes) -> str:
    """A name as text. Any bytes may be a name, but a key must be text; ill-formed ones become `\\xNN`."""
    return raw.decode("utf-8", "backslashreplace")


def name(header: bytes) -> str:
    """A member's name, by its own header alone."""
    found = header[:100].partition(b"\0")[0]
    # Only POSIX has a prefix there; GNU keeps times in that place.
    if header[257:263] == b"ustar\0" and header[345]:
        found = header[345:500].partition(b"\0")[0] + b"/" + found
    return text(found)


def number(field: bytes) -> int | None:
    """A number of a header: octal digits, or base 256 after a set top bit (GNU). None if it is neither, or negative."""
    if field[0] & 0x80:
        return int.from_bytes(field[1:], "big") if field[0] == 0x80 else None
    digits = field.partition(b"\0")[0].strip()
    try:
        found = int(digits or b"0", 8)
    except ValueError:
        return None
    return found if found >= 0 else None


def checksums_agree(blocks: np.ndarray) -> np.ndarray:
    """For headers [n, 512] uint8: does the sum of the bytes, the checksum itself read as spaces, agree with it? [n]."""
    ours = blocks[:, 148:156].sum(axis=1, dtype=np.uint32)
    outside = (blocks.sum(axis=1, dtype=np.uint32) - ours).astype(np.int64) + 8 * 32  # 32 bits: twice as fast as 64
    digits = blocks[:, 148:154] - np.uint8(48)  # what is no digit wraps around to above 7
    written = np.zeros(len(blocks), np.int64)
    for column in range(6):
        written = written * 8 + digits[:, column]
    odd = (digits > 7).any(axis=1) | ((blocks[:, 154] != 0) & (blocks[:, 154] != 32))
    for row in np.flatnonzero(odd):
        found = number(blocks[row, 148:156].tobytes())
        written[row] = -1 if found is None else found
    agree = written == outside
    if not agree.all():  # some old writers summed signed bytes
        rest = np.flatnonzero(~agree)
        signed = blocks[rest].view(np.int8).sum(axis=1, dtype=np.int64)
        signed -= blocks[rest, 148:156].view(np.int8).sum(axis=1, dtype=np.int64) - 8 * 32
        agree[rest] = written[rest] == signed
    return agree


def names(blocks: np.ndarray) -> list[str]:
    """Names of headers [n, 512] uint8, as `name` gives them one by one."""
    if not len(blocks):
        return []
    field = np.ascontiguousarray(blocks[:, :100])
    there = field != 0
    if (there[:, 1:] > there[:, :-1]).any():  # what follows the first NUL is no part of the name, whatever it is
        field = field * np.minimum.accumulate(there, axis=1)
    found = field.view("S100").ravel().tolist()
    for row in np.flatnonzero(blocks[:, 345]).tolist():
        if blocks[row, 257:263].tobytes() == b"ustar\0":
            found[row] = blocks[row, 345:500].tobytes().partition(b"\0")[0] + b"/" + found[row]
    return text(b"\0".join(found)).split("\0")
