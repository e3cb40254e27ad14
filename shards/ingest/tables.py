"""Parquet with images in it, as Hugging Face writes it (`image: struct<bytes, path>`) or as one binary column.

Rows are read where they lie: a unit is some row groups, or a slice of a large one. Parquet has no way to the middle of
a row group, so a reader that has not come to its end is kept for the next slice; and pages are read as they come, not
a column of a row group at once, so that memory holds a page and a batch, however large the row groups are.
"""

from __future__ import annotations

import os
import threading
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ..errors import GristmillError, nearest
from .candidate import Candidate, Outcome
from .errors import IngestError
from .places import BlobFile, close_place, is_remote, open_place, show
from .trouble import DAMAGE, MAX_BYTES, Problem, problem_of, too_large
from .values import plain

_BATCH_BYTES = 32 << 20  # of decoded rows, by the file's own average
_URLS = ("url", "image_url", "img_url", "image_link", "image_uri", "imageurl", "link", "uri")


@dataclass(frozen=True)
class Columns:
    """Which columns of tables and lists are meant; None: the only one that can be. `keep` go along; `*` for all."""

    keep: tuple[str, ...] = ()
    image: str | None = None
    url: str | None = None


class Table:
    """An open Parquet file. A context manager. Raises what `DAMAGE` lists for damage, OSError, StorageError."""

    def __init__(self, place: str) -> None:
        self.place = place
        self.blob = open_place(place)
        try:
            # Not pyarrow's own opening of a path: a pipe under that name would stop the ingest for good.
            file = pa.PythonFile(BlobFile(self.blob), mode="r")
            # Read in pieces: by default it fetches a whole row group's columns before the first row.
            self.file = pq.ParquetFile(file, pre_buffer=False, buffer_size=(8 if is_remote(place) else 1) << 20)
            self.identity = self.blob.identity()
        except BaseException:
            close_place(self.blob)
            raise

    @property
    def schema(self) -> pa.Schema:
        return self.file.schema_arrow

    def groups(self) -> list[int]:
        """Rows of each row group."""
        about = self.file.metadata
        return [about.row_group(group).num_rows for group in range(about.num_row_groups)]

    def batch_rows(self, group: int, most: int) -> int:
        """Rows of a row group that are decoded at a time."""
        about = self.file.metadata.row_group(group)
        return max(1, min(most, _BATCH_BYTES * about.num_rows // max(1, about.total_byte_size)))

    def rows(self, group: int, columns: list[str], most: int) -> Iterator[pa.RecordBatch]:
        """The rows of a row group, some at a time."""
        size = self.batch_rows(group, most)
        return self.file.iter_batches(size, row_groups=[group], columns=columns, use_threads=False)

    def close(self) -> None:
        self.file.close(force=True)
        close_place(self.blob)

    def __enter__(self) -> Table:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def image_column(schema: pa.Schema, asked: str | None, place: str) -> str | None:
    """The column that holds images: the one asked for, if it is there, else the only one that can. Raises IngestError."""
    found = [column.name for column in schema if _holds_bytes(column.type)]
    if asked is not None:
        if asked in schema.names and asked not in found:
            raise IngestError(
                f"column {asked!r} of {show(place)} holds {schema.field(asked).type}, no image bytes: name another one"
            )
        return asked if asked in found else None
    if len(found) > 1:
        raise IngestError(f"{show(place)} has several columns of bytes ({', '.join(found)}): say --image-column")
    return found[0] if found else None


def url_column(names: list[str], asked: str | None, place: str) -> str | None:
    """The column that holds urls: the one asked for, if it is there, else one of the usual names. Raises IngestError."""
    if asked is not None:
        return asked if asked in names else None
    usual = [name for name in names if name.lower() in _URLS]
    first = [name for name in usual if name.lower() == "url"]
    if len(usual) > 1 and len(first) != 1:
        raise IngestError(f"{show(place)} has several columns of urls ({', '.join(usual)}): say --url-column")
    return (first or usual or [None])[0]


def kept(names: list[str], keep: tuple[str, ...], taken: str, place: str) -> list[str]:
    """The columns to keep out of those there are. Raises IngestError for one that is missing."""
    if "*" in keep:
        return [name for name in names if name != taken]
    for name in keep:
        if name not in names:
            raise IngestError(
                f"{show(place)} has no column {name!r} to keep; {nearest(name, names)}it has {', '.join(names)[:500]}"
            )
    return list(keep)


def kept_scalars(schema: pa.Schema, keep: tuple[str, ...], taken: str, place: str) -> list[str]:
    """The same for a Parquet file, where a column of bytes or of something composed cannot be kept."""
    odd = {column.name for column in schema if pa.types.is_nested(column.type) or _is_bytes(column.type)}
    if found := sorted(odd.intersection(keep)):
        raise IngestError(f"column {found[0]!r} of {show(place)} is no plain value and cannot be kept: leave it out")
    return [name for name in kept(schema.names, keep, taken, place) if name not in odd]


def cut(groups: list[int], unit: int) -> Iterator[tuple[int, int]]:
    """Units of a table as (first row, rows): whole row groups up to `unit` rows, a larger one in slices."""
    start = held = 0
    for rows in groups:
        if held and held + rows > unit:
            yield start, held
            start, held = start + held, 0
        held += rows
        while held > unit:
            yield start, unit
            start, held = start + unit, held - unit
    if held:
        yield start, held


def read_rows(place: str, identity: str, column: str, keep: list[str], start: int, count: int) -> Iterator[Candidate]:
    """Rows [start, start + count) of a table as candidates, in order. Errors that are not the table's pass through."""
    row, end = start, start + count
    problem: Problem | None = None
    try:
        reader = _take(place, identity, column, keep)
    except (OSError, GristmillError, *DAMAGE) as error:
        problem = problem_of(error)
    else:
        try:
            while row < end:
                for candidate in reader.read(row, end):
                    yield candidate
                    row += 1
        finally:
            _put(reader)
    for lost in range(row, end):
        yield Candidate(-1, f"{show(place)}#{lost}", problem=problem)


class _Reader:
    """One table, its rows asked for in ascending order, or from a row before by starting over."""

    def __init__(self, place: str, identity: str, column: str, keep: list[str]) -> None:
        self.key = (place, identity, column, tuple(keep))
        self.table = Table(place)
        if identity and self.table.identity != identity:
            self.table.close()
            raise OSError(None, "the table was replaced since it was listed")
        self._shown, self._column, self._keep = show(place), column, keep
        self._ends = list(accumulate(self.table.groups()))
        self._group, self._at = -1, 0  # the row group that is being read, and the next row in it
        self._batches: Iterator[pa.RecordBatch] = iter(())
        self._held: pa.RecordBatch | None = None

    def read(self, row: int, end: int) -> Iterator[Candidate]:
        """Candidates from `row` to `end`, or to where the row group ends that `row` lies in."""
        group = bisect_right(self._ends, row)
        if group == len(self._ends):
            raise ValueError("the table has fewer rows than when it was listed")
        first = self._ends[group - 1] if group else 0
        until = min(end, self._ends[group])
        if group != self._group or row - first < self._at:
            self._batches = self.table.rows(group, [self._column, *self._keep], 256)
            self._group, self._at, self._held = group, 0, None
        done = row
        try:
            for batch in self._slices(row - first, until - first):
                for candidate in self._candidates(batch, done):
                    done += 1
                    yield candidate
        except (OSError, GristmillError, *DAMAGE) as error:
            self._group = -1
            problem = problem_of(error)
            for lost in range(done, until):
                yield Candidate(-1, f"{self._shown}#{lost}", problem=problem)

    def _slices(self, low: int, high: int) -> Iterator[pa.RecordBatch]:
        while self._at < high:
            batch = self._held if self._held is not None else next(self._batches, None)
            if batch is None:
                raise ValueError("the row group ends before its rows do")
            first = self._at
            begin, stop = min(max(low - first, 0), len(batch)), min(high - first, len(batch))
            self._held = batch.slice(stop) if stop < len(batch) else None
            self._at = first + stop
            if begin < stop:
                yield batch.slice(begin, stop - begin)

    def _candidates(self, batch: pa.RecordBatch, row: int) -> Iterator[Candidate]:
        values = column_of(batch, self._column)
        if pa.types.is_struct(values.type):
            values = pc.struct_field(values, "bytes")
        if pa.types.is_binary_view(values.type):
            values = values.cast(pa.large_binary())
        sizes = pc.binary_length(values)
        beside = [(name, column_of(batch, name)) for name in self._keep]
        for at in range(len(batch)):
            meta = {name: plain(column[at].as_py()) for name, column in beside}
            candidate = Candidate(-1, f"{self._shown}#{row + at}", meta=meta)
            size = sizes[at].as_py()
            if not size:
                candidate.problem = (Outcome.UNREADABLE, "no bytes in this row")
            elif size > MAX_BYTES:
                candidate.problem = too_large(size)
            else:
                candidate.data = values[at].as_py()
            yield candidate


_parked: tuple[int, _Reader] | None = None  # the process, and its reader that has not come to its end
_lock = threading.Lock()


def column_of(batch: pa.RecordBatch, name: str) -> pa.Array:
    """A column by its name. Raises ValueError where there are several."""
    at = batch.schema.get_field_index(name)  # by name: pyarrow keeps the file's order, whatever is asked for
    if at < 0:
        raise ValueError(f"there are several columns {name!r}")
    return batch.column(at)


def _take(place: str, identity: str, column: str, keep: list[str]) -> _Reader:
    global _parked
    with _lock:
        parked, _parked = _parked, None
    if parked is not None and parked[0] == os.getpid():
        if parked[1].key == (place, identity, column, tuple(keep)):
            return parked[1]
        parked[1].table.close()
    return _Reader(place, identity, column, keep)


def _put(reader: _Reader) -> None:
    global _parked
    with _lock:
        before, _parked = _parked, (os.getpid(), reader)
    if before is not None and before[0] == os.getpid():
        before[1].table.close()


def _holds_bytes(kind: pa.DataType) -> bool:
    if isinstance(kind, pa.StructType):
        return kind.get_field_index("bytes") >= 0 and _is_bytes(kind.field("bytes").type)
    return _is_bytes(kind)


def _is_bytes(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)
