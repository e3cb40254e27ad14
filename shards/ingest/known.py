"""What was kept so far, on disk: is a new image one of these, to the byte or to the eye?

The newest entries lie in memory, 65,536 at most; older ones in segments (segments.py), four of one size merged into one of
the next, so that there are few however many entries there are, and memory stays as it is. `commit` writes down a number of
the caller's beside the state: after a kill the index is what it was at the last one. It is a cache of the ledger, and so one
that is damaged or of another make opens empty, with the mark -1.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from bisect import bisect_right
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from isal.isal_zlib import crc32

from ..storage import claimed, published
from . import segments
from .candidate import Outcome
from .errors import IngestError
from .search import BANDS, MAX_NEAR, find_exact, find_near, scan_near
from .segments import DamagedError, Segment

ROOM = 1 << 14  # entries in memory
_TIER = 4  # segments of one size before they become one
_BLOCK = 4096  # inputs that are looked up together
_VERSION = 1
_STATE = "state.json"
_DIGEST, _PRINT = 16, 32  # bytes
_NONE = bytes(_PRINT)
_RECORD = np.dtype([("digest", "<u8", 2), ("print", "<u8", 4), ("printed", "<u8")])


@dataclass(frozen=True)
class Match:
    """An earlier entry: `outcome` is DUPLICATE (equal digests) or NEAR_DUPLICATE (fingerprints `distance` bits apart)."""

    outcome: Outcome
    digest: bytes
    distance: int


class Known:
    """Entries of a digest (16 bytes) and a fingerprint (32 bytes; None or b"" for none), numbered as they were added.

    near: bits by which near duplicates differ at most, 0 to 31; None: no fingerprint is looked at. The folder is this
    process's alone while it is open. What is new since the last `commit` is lost by closing. OSError passes through.
    """

    def __init__(self, folder: Path, near: int | None = MAX_NEAR) -> None:
        if near is not None and not 0 <= near <= MAX_NEAR:
            raise IngestError(f"near duplicates {near} bits apart cannot be found: give 0 to {MAX_NEAR}")
        self.folder, self.near = folder, near
        self._held = ExitStack()
        taken = IngestError(f"another process uses {folder}: wait for it to end, or name another folder")
        self._held.enter_context(claimed(folder, taken))
        self._digests, self._prints = np.zeros((ROOM, 2), np.uint64), np.zeros((ROOM, 4), np.uint64)
        self._printed = np.zeros(ROOM, np.bool_)
        self._garbage: list[Path] = []
        try:
            self._forget()
            try:
                self._open()
            except (DamagedError, FileNotFoundError, ValueError, KeyError, TypeError):
                self.clear()
        except BaseException:
            self._held.close()
            raise

    def __enter__(self) -> Known:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def entries(self) -> int:
        """How many were added, committed or not."""
        return self._base + self._count

    @property
    def segments(self) -> int:
        """How many files hold what memory does not."""
        return len(self._segments)

    def find(self, digest: bytes, fingerprint: bytes | None = None) -> Match | None:
        """The earlier entry that is equal or nearest: equal digests first, then the least distance, then the earliest."""
        asked = _Asked([digest], [fingerprint], self.near)
        self._look_in_segments(asked)
        return self._look_in_memory(asked, 0)

    def add(self, digest: bytes, fingerprint: bytes | None = None) -> None:
        """Keep one, whatever is known of it."""
        if self._count == ROOM:
            self._seal()
        self._add(_Asked([digest], [fingerprint], self.near), 0)

    def sift(self, digests: Sequence[bytes], fingerprints: Sequence[bytes | None]) -> list[Match | None]:
        """One after the other: what `find` says, and None for those that are new, which are kept at once."""
        answers: list[Match | None] = []
        for first in range(0, len(digests), _BLOCK):
            asked = _Asked(digests[first : first + _BLOCK], fingerprints[first : first + _BLOCK], self.near)
            if self._count + len(asked.keys) > ROOM:
                self._seal()  # not in between: segments are searched for all of these at once
            self._look_in_segments(asked)
            for i in range(len(asked.keys)):
                answers.append(self._look_in_memory(asked, i))
                if answers[-1] is None:
                    self._add(asked, i)
        return answers

    def commit(self, mark: int) -> None:
        """Make all of it last, and with it `mark`: a number that says up to where it holds."""
        self._write_tail()
        with published(self.folder / _STATE) as file:
            file.write(json.dumps(self._state(mark)).encode())
        self.mark = mark
        for path in self._garbage:
            path.unlink(missing_ok=True)
        self._garbage = []

    def clear(self) -> None:
        """Forget everything, on disk too; the mark is -1 again."""
        (self.folder / _STATE).unlink(missing_ok=True)
        self._forget()
        self._clear_away(set())

    def close(self) -> None:
        """Let go of the files and the folder."""
        self._forget()
        self._held.close()

    def destroy(self) -> None:
        """Close, and remove the folder."""
        self.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    # The files.

    def _forget(self) -> None:
        self.mark = -1
        self._segments: list[Segment] = []
        self._base = self._count = self._written = self._sum = 0  # _written: rows of memory that are in the tail
        self._tail = self._tail_of(0)
        self._numbers: dict[bytes, int] = {}

    def _tail_of(self, base: int) -> Path:
        return self.folder / f"{base:012d}.tail"

    def _segment_of(self, base: int, entries: int) -> Path:
        return self.folder / f"{base:012d}-{entries:010d}.segment"

    def _state(self, mark: int) -> dict[str, Any]:
        return {
            "version": _VERSION,
            "mark": mark,
            "near": self.near is not None,
            "segments": [[segment.path.name, segment.entries] for segment in self._segments],
            "tail": [self._count, self._sum],
        }

    def _open(self) -> None:
        try:
            state = json.loads((self.folder / _STATE).read_bytes())
        except FileNotFoundError:
            self._clear_away(set())
            return
        if state["version"] != _VERSION or state["near"] != (self.near is not None):
            raise DamagedError("of another version, or with fingerprints and used without, or the other way round")
        for name, entries in state["segments"]:
            self._segments.append(Segment(self.folder / str(name), self._base, int(entries)))
            self._base += int(entries)
        self._tail = self._tail_of(self._base)
        count, checksum = state["tail"]
        data = self._tail.read_bytes()[: count * _RECORD.itemsize] if count else b""
        if not 0 <= count <= ROOM or len(data) != count * _RECORD.itemsize or crc32(data) != checksum:
            raise DamagedError("the newest entries are damaged")
        if count:
            os.truncate(self._tail, len(data))
        records = np.frombuffer(data, _RECORD)
        self._digests[:count], self._prints[:count] = records["digest"], records["print"]
        self._printed[:count] = records["printed"]
        self._count = self._written = count
        self._sum = checksum
        for row in range(count):
            self._numbers.setdefault(self._digests[row].tobytes(), row)
        self._clear_away({name for name, _ in state["segments"]} | {self._tail.name} | {_STATE})
        self.mark = int(state["mark"])

    def _clear_away(self, wanted: set[str]) -> None:
        """Remove what a kill left."""
        for path in self.folder.iterdir():
            if path.name not in wanted:
                path.unlink()

    def _write_tail(self) -> None:
        if self._written == self._count:
            return
        new = slice(self._written, self._count)
        records = np.zeros(self._count - self._written, _RECORD)
        records["digest"], records["print"] = self._digests[new], self._prints[new]
        records["printed"] = self._printed[new]
        data = records.tobytes()
        with self._tail.open("r+b" if self._written else "wb") as file:
            file.seek(self._written * _RECORD.itemsize)  # not the end: a commit that failed may have written more
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        self._sum = crc32(data, self._sum)
        self._written = self._count

    def _seal(self) -> None:
        """What lies in memory becomes a segment, and where there are four of a size, these become one."""
        name, rows = self._segment_of(self._base, self._count), slice(self._count)
        made = segments.write(name, self._base, self._digests[rows], self._prints[rows], self._printed[rows])
        self._garbage.append(self._tail)
        self._segments.append(made)
        self._base += self._count
        self._count = self._written = self._sum = 0
        self._tail = self._tail_of(self._base)
        self._numbers = {}
        while len(last := self._segments[-_TIER:]) == _TIER and _tier(last[0]) == _tier(last[-1]):
            size = sum(segment.entries for segment in last)
            if size > segments.MAX_ROWS:
                break
            self._segments[-_TIER:] = [segments.merge(self._segment_of(last[0].base, size), last)]
            self._garbage += [segment.path for segment in last]

    # The entries.

    def _add(self, asked: _Asked, i: int) -> None:
        row = self._count
        self._digests[row], self._prints[row], self._printed[row] = asked.digests[i], asked.prints[i], asked.printed[i]
        self._numbers.setdefault(asked.keys[i], row)
        self._count += 1

    def _look_in_segments(self, asked: _Asked) -> None:
        count = len(asked.keys)
        for segment in self._segments:
            find_exact(asked.digests, count, segment.digests, segment.starts, segment.places, segment.base, asked.exact)
        asked.apart[asked.exact >= 0] = -1
        flips = 1 if self.near is None or self.near < BANDS else BANDS + 1
        for segment in self._segments:
            if segment.printed:
                find_near(
                    asked.prints, count, segment.prints, segment.band_starts, segment.rows, flips, segment.base,
                    asked.apart, asked.found,
                )  # fmt: skip

    def _look_in_memory(self, asked: _Asked, i: int) -> Match | None:
        """Look at what is newest, and give the answer."""
        number = int(asked.exact[i])
        if number < 0 and (row := self._numbers.get(asked.keys[i], -1)) >= 0:
            number = self._base + row
        if number >= 0:
            return Match(Outcome.DUPLICATE, asked.keys[i], 0)
        scan_near(asked.prints, i, self._prints, self._printed, 0, self._count, self._base, asked.apart, asked.found)
        if asked.found[i] < 0:
            return None
        return Match(Outcome.NEAR_DUPLICATE, self._digest(int(asked.found[i])), int(asked.apart[i]))

    def _digest(self, number: int) -> bytes:
        if number >= self._base:
            return self._digests[number - self._base].tobytes()
        segment = self._segments[bisect_right(self._segments, number, key=lambda segment: segment.base) - 1]
        return segment.digests[number - segment.base].tobytes()


class _Asked:
    """Digests and fingerprints as arrays, and what was found so far: numbers in `exact` and `found`, -1 for none."""

    def __init__(self, digests: Sequence[bytes], fingerprints: Sequence[bytes | None], near: int | None) -> None:
        self.keys = digests
        if any(len(digest) != _DIGEST for digest in digests) or any(len(p or _NONE) != _PRINT for p in fingerprints):
            raise ValueError(f"a digest has {_DIGEST} bytes and a fingerprint {_PRINT}")
        self.digests = np.frombuffer(b"".join(digests), "<u8").reshape(-1, 2)
        self.prints = np.frombuffer(b"".join(p or _NONE for p in fingerprints), "<u8").reshape(-1, 4)
        self.printed = np.array([near is not None and bool(p) for p in fingerprints], np.bool_)
        if len(self.digests) != len(self.prints):
            raise ValueError(f"{len(self.digests)} digests and {len(self.prints)} fingerprints")
        self.exact = np.full(len(digests), -1, np.int64)
        self.found = np.full(len(digests), -1, np.int64)
        self.apart = np.where(self.printed, near or 0, -1)


def _tier(segment: Segment) -> int:
    return max(0, round(math.log(segment.entries / ROOM, _TIER)))
