"""Tars as sources: each image in them is a candidate, with what the sidecars of its sample say.

The index's own walk lists the members (archive.py: bounded headers, sizes that must fit), once, when the inputs are
frozen; after that every member is read by its place. A tar that is cut or damaged gives the members before, and one
input stands for the rest. Names are only ever names: nothing is written under them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from ..archive import Members, ShardError, _Walk, scan
from ..blob import Blob
from ..errors import GristmillError
from ..index import OUTSIDE, split_name
from .candidate import Candidate, Outcome
from .folders import IMAGES
from .places import close_place, is_remote, open_place, show
from .trouble import MAX_BYTES, problem_of, too_large
from .values import MAX_SIDECAR, SIDECARS, merge_sidecars

_PART = pa.struct([("suffix", pa.string()), ("offset", pa.int64()), ("length", pa.int64())])
# `problem` is that of the rest of the tar; such a row has no member.
MEMBERS = pa.schema(
    [
        ("name", pa.string()),
        ("offset", pa.int64()),
        ("length", pa.int64()),
        ("sides", pa.list_(_PART)),
        ("problem", pa.string()),
    ]
)
_AHEAD = 8 << 20  # bytes of a remote tar read at a time
OTHERS = "members of tars that are no image"

Side = tuple[int, int]


@dataclass
class Contents:
    """The images of a tar, in order; `problem` is why the rest of it, or all, cannot be read."""

    identity: str = ""
    names: list[str] = field(default_factory=list)
    images: list[tuple[int, int, int, dict[str, Side]]] = field(default_factory=list)  # name, offset, length, sidecars
    problem: str | None = None
    passed: Counter[str] = field(default_factory=Counter)

    def batches(self, size: int) -> Iterator[pa.RecordBatch]:
        """Rows of `MEMBERS`, `size` at a time."""
        for start in range(0, len(self.images), size):
            part = self.images[start : start + size]
            yield _batch([(self.names[name], offset, length, sides, None) for name, offset, length, sides in part])
        if self.problem is not None:
            yield _batch([("", 0, 0, {}, self.problem)])


def _batch(rows: list[tuple[str, int, int, dict[str, Side], str | None]]) -> pa.RecordBatch:
    names, offsets, lengths, sides, problems = zip(*rows, strict=True)
    parts = [[{"suffix": s, "offset": at, "length": n} for s, (at, n) in found.items()] for found in sides]
    return pa.RecordBatch.from_pydict(
        {"name": names, "offset": offsets, "length": lengths, "sides": parts, "problem": problems}, schema=MEMBERS
    )


def list_tar(place: str) -> Contents:
    """The images of a tar. Storage that does not answer raises StorageError; what is wrong with the tar is its `problem`."""
    blob = open_place(place)
    try:
        try:
            return _contents(scan(blob))
        except ShardError as error:
            if isinstance(error.__cause__, OSError):
                return Contents(problem=problem_of(error.__cause__)[1])
            if not error.offset:
                return Contents(problem=error.problem)
            found = _contents(_before(blob, error.offset))
            found.problem = f"{error.problem} at byte {error.offset}"
            return found
        except GristmillError as error:
            return Contents(problem=problem_of(error)[1])
    finally:
        close_place(blob)


class _Head:
    """The first bytes of a blob, as if there were no more."""

    def __init__(self, blob: Blob, size: int) -> None:
        self.url, self.leap, self._blob, self._size = blob.url, getattr(blob, "leap", 1 << 20), blob, size

    def size(self) -> int:
        return self._size

    def identity(self) -> str:
        return self._blob.identity()

    def read(self, offset: int, length: int) -> bytes:
        return self._blob.read(offset, max(0, min(length, self._size - offset)))


def _before(blob: Blob, offset: int) -> Members:
    """The members that end before `offset`, where a walk found the first trouble; none if nothing can be read."""
    walk = _Walk(_Head(blob, offset), blob.url, offset)
    try:
        found = walk.run()
    except ShardError:  # there is no end mark before the trouble, but every header up to there was checked
        table = np.concatenate(walk._tables, axis=1) if walk._tables else np.zeros((2, 0), np.int64)
        found = Members(walk._names, table[0], table[1], walk._others)
    found.identity = blob.identity()
    return found


def _contents(found: Members) -> Contents:
    contents = Contents(found.identity, found.names)
    group: list[tuple[int, int, int, dict[str, Side]]] = []
    sides: dict[str, Side] = {}
    current = ""
    images = used = 0
    for at, (name, offset, length) in enumerate(
        zip(found.names, found.offsets.tolist(), found.lengths.tolist(), strict=True)
    ):
        key, suffix = split_name(name)
        if not key or key != current:
            used += len(sides) if group else 0
            group, sides, current = [], {}, key
        if name.lower().endswith(IMAGES):
            images += 1
            group.append((at, offset, length, sides))  # which fills up until the key changes
            contents.images.append(group[-1])
        elif key and (suffix := suffix.lower()) in SIDECARS:
            sides[suffix] = (offset, length)
    used += len(sides) if group else 0
    contents.passed[OTHERS] = len(found) - images - used
    for kind, number in found.others.items():
        contents.passed[f"{kind} in tars"] += 0 if kind == "folders" else number
    contents.passed[OUTSIDE] = sum(name[:1] == "/" or ".." in name.split("/") for name in found.names)
    contents.passed = +contents.passed
    return contents


def read_members(place: str, identity: str, rows: list[dict[str, Any]]) -> Iterator[Candidate]:
    """The members of rows of `MEMBERS` as candidates, in order. Errors that are not the tar's pass through."""
    shown = show(place)
    blob = open_place(place)
    try:
        parts = [part for row in rows for part in (row, *row["sides"]) if row["problem"] is None]
        end = max((part["offset"] + part["length"] for part in parts), default=0)
        reader = _Ahead(blob, end, _AHEAD if is_remote(place) else 0)
        lost = _replaced(blob, identity)
        for row in rows:
            name = row["name"]
            labels = tuple(part for part in name.split("/")[:-1] if part not in ("", ".", ".."))
            candidate = Candidate(-1, f"{shown}::{name}" if name else shown, labels=labels)
            if row["problem"] is not None:
                candidate.problem = (Outcome.UNREADABLE, row["problem"])
            elif lost is not None:
                candidate.problem = lost
            elif row["length"] > MAX_BYTES:
                candidate.problem = too_large(row["length"])
            else:
                _fill(candidate, reader, row)
            yield candidate
    finally:
        close_place(blob)


def _replaced(blob: Blob, identity: str) -> tuple[Outcome, str] | None:
    """The problem of all members of a tar that is gone, or another one by now."""
    try:
        same = blob.identity() == identity or not identity
    except (OSError, GristmillError) as error:
        return problem_of(error)
    return None if same else (Outcome.UNREADABLE, "the tar was replaced since its members were listed")


def _fill(candidate: Candidate, reader: _Ahead, row: dict[str, Any]) -> None:
    sides: dict[str, bytes | None] = {}
    try:
        for part in sorted([row, *row["sides"]], key=lambda part: part["offset"]):  # forward, as the tar lies
            suffix = part.get("suffix")
            if suffix is None:
                candidate.data = reader.read(part["offset"], part["length"])
            else:
                small = part["length"] <= MAX_SIDECAR
                sides[suffix] = reader.read(part["offset"], part["length"]) if small else None
    except (OSError, GristmillError) as error:
        candidate.data, candidate.problem = None, problem_of(error)
        return
    candidate.meta = merge_sidecars(sides)


class _Ahead:
    """Reads of a blob that mostly go forward and near to each other: `ahead` bytes are fetched at a time."""

    def __init__(self, blob: Blob, end: int, ahead: int) -> None:
        self._blob, self._end, self._ahead = blob, end, ahead
        self._start, self._window = 0, b""

    def read(self, offset: int, length: int) -> bytes:
        """Bytes [offset, offset + length). Raises OSError where the blob ends before."""
        at = offset - self._start
        if at < 0 or at + length > len(self._window):
            wanted = max(length, min(self._ahead, self._end - offset))
            self._start, at = offset, 0
            self._window = self._blob.read(offset, wanted)
        data = self._window[at : at + length]
        if len(data) < length:
            raise OSError(None, f"the tar ends {length - len(data)} bytes before its member does")
        return data
