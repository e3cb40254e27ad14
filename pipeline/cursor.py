"""The whole state of the data side, as one small JSON that every rank agrees on.

The stream is a pure function of a position, so resuming it takes the position and proof that the function is still the
same: the manifest's digest, the seed, the lanes and the window; of data sets that are filtered, mixed or still growing
also what the filter selects, the weights and the numbers of shards with the positions from which they hold, and which
removed samples were honoured. A plain data set's cursor has none of these. The cursor belongs to the training loop, which advances
it when a step is decided, committed or skipped; what is prefetched is not decided and leaves no trace here. Rank, world
size and batch size are not in it, which is what makes a resume elastic.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields, replace
from itertools import pairwise
from typing import Any

from ..shards.errors import GristmillError

VERSION = 1
MAX_SKIPPED = 16  # ranges; more is not bad luck but a run that diverges
MAX_BYTES = 1023  # of the JSON
_RANGE_BYTES = len("[1000000000000,1000000000000],")  # kept free for each range that may still be skipped

Ranges = tuple[tuple[int, int], ...]
Mixture = tuple[tuple[int, tuple[float, ...]], ...]
Grown = tuple[tuple[int, int, int], ...]
Removed = tuple[tuple[int, str], ...]


class CursorError(GristmillError, ValueError):
    """A cursor that is unreadable, does not fit the data or the recipe, or has skipped too much."""


@dataclass(frozen=True)
class Cursor:
    """Where a run stands in its stream. Positions and counts are in samples."""

    data: str  # the manifest's digest
    seed: int
    lanes: int
    window: int
    position: int = 0  # behind the last decided step; schedules read this
    trained: int = 0  # samples of committed steps
    skipped: Ranges = ()  # [start, stop) of steps that were left out, ascending, never touching
    mixture: Mixture = ()  # (from which position, weights of the data sets); empty with one data set
    quarantine: tuple[int, str] = (0, "")  # count and digest of the quarantine file: a record, never an input
    version: int = VERSION
    where: str = ""  # identities of what the filters select, one a data set, joined by "+"
    grown: Grown = ()  # (from which position, data set, number of its shards); empty if nobody counted
    removed: Removed = ()  # (count, digest) of each data set's tombstones that were honoured; more may be added

    def advance(self, n: int, committed: bool) -> Cursor:
        """The cursor after a step of n samples was committed or skipped; CursorError at the 17th separate skip."""
        if n < 0:
            raise CursorError(f"cannot advance by {n} samples: a stream only goes forward; load an older checkpoint")
        stop = self.position + n
        if committed or n == 0:
            return replace(self, position=stop, trained=self.trained + n)
        if self.skipped and self.skipped[-1][1] == self.position:
            skipped = (*self.skipped[:-1], (self.skipped[-1][0], stop))
        else:
            skipped = (*self.skipped, (self.position, stop))
        if len(skipped) > MAX_SKIPPED:
            raise CursorError(
                f"skipped: stop; steps were left out at more than {MAX_SKIPPED} places, the last one at position "
                f"{self.position}. Look at the objectives' logs, lower the learning rate, and resume from a checkpoint "
                "before the first of them"
            )
        return replace(self, position=stop, skipped=skipped)

    def noting(self, count: int, digest: str) -> Cursor:
        """The cursor with the quarantine's present count and digest on record."""
        return replace(self, quarantine=(count, digest))

    def fitting(self, field: str) -> Cursor:
        """This cursor, if its JSON leaves room for every range that may yet be skipped; CursorError naming `field`."""
        room = MAX_BYTES - len(self.to_json()) - (MAX_SKIPPED - len(self.skipped)) * _RANGE_BYTES
        if room < 0:
            raise CursorError(
                f"{field}: the cursor has no room for another change ({-room} bytes too many of {MAX_BYTES}). Begin a new "
                "run folder from this run's weights: its cursor starts empty"
            )
        return self

    def check(self, manifest_digest: str, seed: int, lanes: int, window: int, where: str = "") -> None:
        """CursorError, naming the field, unless this data and this recipe give the stream that the cursor is from."""
        for name, mine, theirs, remedy in (
            ("data", self.data, manifest_digest, "point the recipe at the data set that the run was started on"),
            ("seed", self.seed, seed, f"set seed={self.seed}"),
            ("lanes", self.lanes, lanes, f"set lanes={self.lanes}"),
            ("window", self.window, window, f"set window={self.window}"),
            ("where", self.where, where, "give the filter that the run was started with, and the same columns"),
        ):
            if mine != theirs:
                raise CursorError(
                    f"{name}: the checkpoint was written with {mine!r}, but this run has {theirs!r}, which is another "
                    f"stream. To resume, {remedy}; to begin anew, use a new run folder"
                )

    def to_json(self) -> str:
        """One line of JSON, under 1 kB. What a plain data set does not have is left out."""
        raw = {name: value for name, value in asdict(self).items() if value or name not in _OPTIONAL}
        return json.dumps(raw, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Cursor:
        """The cursor that `to_json` wrote; CursorError, naming the field, for anything else."""
        try:
            raw = json.loads(text)
        except json.JSONDecodeError as error:
            raise CursorError(f"the cursor is no JSON ({error}): take it from another checkpoint") from error
        if not isinstance(raw, dict) or raw.get("version") != VERSION:
            found = raw.get("version") if isinstance(raw, dict) else raw
            raise CursorError(
                f"version: expected {VERSION}, found {found!r}: use the release that wrote the checkpoint"
            )
        names = [field.name for field in fields(cls)]
        raw = _OPTIONAL | raw
        for name in [*names, *raw]:
            if name not in raw or name not in names:
                what = "missing" if name in names else "unknown"
                raise CursorError(f"{name}: {what} in the cursor: take it from another checkpoint, unchanged")
        for name, good in _SHAPES.items():
            if not good(raw[name]):
                raise CursorError(f"{name}: {raw[name]!r} is no value for it: take the cursor from another checkpoint")
        cursor = cls(
            **raw
            | {
                "skipped": tuple((start, stop) for start, stop in raw["skipped"]),
                "mixture": tuple((start, tuple(weights)) for start, weights in raw["mixture"]),
                "quarantine": tuple(raw["quarantine"]),
                "grown": tuple((start, source, shards) for start, source, shards in raw["grown"]),
                "removed": tuple((count, digest) for count, digest in raw["removed"]),
            }
        )
        if cursor.trained + sum(stop - start for start, stop in cursor.skipped) != cursor.position:
            raise CursorError("position: is not trained + skipped: take the cursor from another checkpoint, unchanged")
        return cursor


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


_OPTIONAL = {"where": "", "grown": [], "removed": []}


def _lists(value: Any, length: int) -> bool:
    return isinstance(value, list) and all(isinstance(item, list) and len(item) == length for item in value)


def _pairs(value: Any) -> bool:
    return _lists(value, 2)


def _grown(value: Any) -> bool:
    if not _lists(value, 3) or not all(_count(number) for entry in value for number in entry):
        return False
    mine = [[(start, shards) for start, which, shards in value if which == source] for _, source, _ in value]
    return all(entries[0][0] == 0 and all(a <= c and b < d for (a, b), (c, d) in pairwise(entries)) for entries in mine)


def _ranges(value: Any) -> bool:
    if not _pairs(value) or len(value) > MAX_SKIPPED or not all(_count(a) and _count(b) for a, b in value):
        return False
    edges = [edge for pair in value for edge in pair]
    return all(a < b for a, b in pairwise(edges))


def _mixture(value: Any) -> bool:
    return _pairs(value) and all(
        _count(start) and isinstance(weights, list) and all(isinstance(weight, int | float) for weight in weights)
        for start, weights in value
    )


def _record(value: Any) -> bool:
    return _pairs([value]) and _count(value[0]) and isinstance(value[1], str)


_SHAPES = {
    "data": lambda value: isinstance(value, str),
    "seed": _count,
    "lanes": _count,
    "window": _count,
    "position": _count,
    "trained": _count,
    "skipped": _ranges,
    "mixture": _mixture,
    "quarantine": _record,
    "where": lambda value: isinstance(value, str),
    "grown": _grown,
    "removed": lambda value: _pairs(value) and all(map(_record, value)),
}
