"""Segments of the index of what is known: files that never change, mapped and not read, so that they take no memory.

A file holds entries in the order in which they came (digests, fingerprints) and, by the first 16 bits of the digest and by
each 16-bit band of the fingerprint, the rows of the entries with these bits. Segments are made from what memory holds, and
merged from older segments bucket by bucket, which needs no sorting and no memory either.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

from ..storage import PARTIAL, sync_folder
from .search import BANDS, BUCKETS, pour

_MAGIC = b"GMKNOWN1"
_HEADER = 64
_STARTS = BUCKETS + 1
_CHUNK = 1 << 16  # rows copied at a time
MAX_ROWS = (1 << 32) // BANDS - 1  # in a segment: starts count through all bands in 32 bits


class DamagedError(Exception):
    """A file of the index is not what it was. Never seen outside: the index is made anew."""


class Segment:
    """`entries` rows from number `base` on, `printed` of them with a fingerprint.

    digests uint64 [n, 2] and prints uint64 [n, 4] (no rows if none is printed), little endian; starts uint32 [65537] and
    places uint64 [n] by digest; band_starts uint32 [16 * 65537], counted through all bands, and rows uint32 [16 * printed].
    """

    def __init__(self, path: Path, base: int, entries: int) -> None:
        self.path, self.base, self.entries = path, base, entries
        try:
            raw = np.memmap(path, np.uint8, "r")
        except (OSError, ValueError) as error:
            raise DamagedError(str(error)) from error
        self.printed = int(raw[16:24].view("<u8")[0]) if len(raw) >= _HEADER else -1
        if bytes(raw[:8]) != _MAGIC or int(raw[8:16].view("<u8")[0]) != entries or self.printed < 0:
            raise DamagedError(f"{path} is no segment of {entries} entries")
        if len(raw) != _size(entries, self.printed):
            raise DamagedError(f"{path} has another length")
        parts = _parts(np.asarray(raw), entries, self.printed)
        self.digests, self.prints, self.places, self.starts, self.band_starts, self.rows = parts


def _lengths(entries: int, printed: int) -> list[int]:
    return [
        16 * entries, 32 * entries if printed else 0, 8 * entries, 4 * _STARTS, 4 * BANDS * _STARTS if printed else 0,
        4 * BANDS * printed,
    ]  # fmt: skip


def _size(entries: int, printed: int) -> int:
    return _HEADER + sum(_lengths(entries, printed))


def _parts(raw: np.ndarray, entries: int, printed: int) -> list[np.ndarray]:
    ends = np.cumsum([_HEADER, *_lengths(entries, printed)]).tolist()
    cuts = [raw[a:b] for a, b in pairwise(ends)]
    kinds = (np.uint64, np.uint64, np.uint64, np.uint32, np.uint32, np.uint32)
    parts = [cut.view(kind) for cut, kind in zip(cuts, kinds, strict=True)]
    return [parts[0].reshape(-1, 2), parts[1].reshape(-1, 4), *parts[2:]]


class _Draft:
    """A segment that is being written: parts mapped into a file beside its place, whose blocks are all there already."""

    def __init__(self, path: Path, entries: int, printed: int) -> None:
        self.path, self.beside = path, path.with_name(path.name + PARTIAL)
        size = _size(entries, printed)
        try:
            with self.beside.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, size)  # a full disk is an error here, and a signal later
            self.raw = np.memmap(self.beside, np.uint8, "r+")
        except BaseException:
            self.beside.unlink(missing_ok=True)
            raise
        self.raw[:8] = np.frombuffer(_MAGIC, np.uint8)
        self.raw[8:24] = np.array([entries, printed], "<u8").view(np.uint8)
        self.parts = _parts(np.asarray(self.raw), entries, printed)

    def __enter__(self) -> list[np.ndarray]:
        return self.parts

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self.beside.unlink(missing_ok=True)
            return
        self.raw.flush()
        with self.beside.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(self.beside, self.path)
        sync_folder(self.path.parent)


def write(path: Path, base: int, digests: np.ndarray, prints: np.ndarray, printed: np.ndarray) -> Segment:
    """A segment of what lies in memory: uint64 [n, 2], uint64 [n, 4], bool [n]. OSError passes through."""
    rows = np.flatnonzero(printed)
    with _Draft(path, len(digests), len(rows)) as (own_digests, own_prints, places, starts, band_starts, own_rows):
        own_digests[:] = digests
        order, starts[:] = _grouped(digests[:, 0])
        places[:] = (digests[order, 0] >> np.uint64(16) << np.uint64(32)) | order.astype(np.uint64)
        if len(rows):
            own_prints[:] = prints
        for band in range(BANDS if len(rows) else 0):
            order, ends = _grouped(prints[rows, band >> 2] >> np.uint64(16 * (band & 3)))
            first = band * len(rows)
            own_rows[first : first + len(rows)] = rows[order]
            band_starts[band * _STARTS : (band + 1) * _STARTS] = first + ends
    return Segment(path, base, len(digests))


def _grouped(words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The order that puts words into buckets by their low 16 bits, and where each bucket starts: [n], [65537]."""
    keys = words.astype(np.uint16)
    return np.argsort(keys, kind="stable"), np.concatenate([[0], np.cumsum(np.bincount(keys, minlength=BUCKETS))])


def merge(path: Path, sources: Sequence[Segment]) -> Segment:
    """One segment of several that follow each other. OSError passes through."""
    entries, printed = sum(s.entries for s in sources), sum(s.printed for s in sources)
    with _Draft(path, entries, printed) as (digests, prints, places, starts, band_starts, rows):
        for source in sources:
            at = source.base - sources[0].base
            for first in range(0, source.entries, _CHUNK):
                last = min(first + _CHUNK, source.entries)
                digests[at + first : at + last] = source.digests[first:last]
                if source.printed:
                    prints[at + first : at + last] = source.prints[first:last]
        _pour([(s, s.places, s.starts) for s in sources], sources[0].base, 0, 0, starts, places)
        parts = [(s, s.rows, s.band_starts) for s in sources if s.printed]
        for band in range(BANDS if printed else 0):
            _pour(parts, sources[0].base, band * _STARTS, band * printed, band_starts, rows)
    return Segment(path, sources[0].base, entries)


def _pour(
    sources: Sequence[tuple[Segment, np.ndarray, np.ndarray]],
    base: int, at: int, first: int, starts: np.ndarray, into: np.ndarray,
) -> None:  # fmt: skip
    """Bucket by bucket, the values of one source after the other; rows count from `base` now. `at`: where starts begin."""
    counts = sum(np.diff(theirs[at : at + _STARTS]).astype(np.int64) for _, _, theirs in sources)
    starts[at] = first
    starts[at + 1 : at + _STARTS] = first + np.cumsum(counts)
    filled = starts[at : at + BUCKETS].astype(np.int64)
    for source, values, theirs in sources:
        pour(values, source.base - base, theirs, at, into, filled)
