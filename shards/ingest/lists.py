"""Lists of urls: Parquet, CSV, TSV, JSON lines, or one a line; all but Parquet may be packed with gzip.

A list is read once, in pieces, when the inputs are frozen, and only cut up there; whether a row is a url that may be
fetched is looked at by the workers. A row that is none is an input all the same, with BAD_URL for its outcome: http and
https alone are fetched, for a list is data, and must not make anybody read files of this machine.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any, NamedTuple

import pyarrow as pa

from ..addresses import AddressError, parse_address, redact
from ..errors import GristmillError
from .candidate import Candidate, Outcome
from .errors import IngestError
from .places import BlobFile, close_place, name_of, open_place, show
from .tables import Columns, Table, column_of, kept, kept_scalars, url_column
from .trouble import DAMAGE, brief, problem_of
from .values import plain, text

# A row of a list. `url` as it stands there; `problem` where the rest of the list cannot be read, or there is no row.
URLS = pa.schema([("row", pa.int64()), ("url", pa.string()), ("meta", pa.string()), ("problem", pa.string())])
_LONGEST = 1 << 20  # characters of a line
_NO_URL = "\0"  # begins what can be no url: a line that is too long, text that is no UTF-8
_BAD_GZIP = (gzip.BadGzipFile, EOFError, zlib.error)
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


class Row(NamedTuple):
    """One row of a list as it was read. Rows are counted from 1 in text, where an editor shows them so, from 0 in tables."""

    row: int
    url: str | None
    meta: dict[str, Any]


def read_list(place: str, columns: Columns, size: int) -> Iterator[pa.RecordBatch]:
    """The rows of a list as batches of `URLS`, of `size` rows or fewer, in order. Memory holds some such batches.

    Raises IngestError for a list without a column of urls, or one that cannot be opened. Damage further on ends the
    list with a row that says so. Storage that does not answer raises StorageError.
    """
    name = name_of(place).lower()
    if name.endswith(".parquet"):
        yield from _read_parquet(place, columns, size)
        return
    with _text(place, name.endswith(".gz")) as lines:
        kind = name.removesuffix(".gz").rpartition(".")[2]
        if kind in ("csv", "tsv"):
            rows = _separated(lines, "\t" if kind == "tsv" else ",", columns, place)
        elif kind in ("jsonl", "ndjson"):
            rows = _json_lines(lines, columns, place)
        else:
            rows = (Row(number, line.strip(), {}) for number, line in lines if line.strip())
        last = 0
        while True:
            part: list[Row] = []
            damage = None
            try:
                part.extend(islice(rows, size))  # what came before an error stays in it
            except _BAD_GZIP as error:
                damage = brief(error)
            except OSError as error:
                raise IngestError(
                    f"{show(place)} cannot be read ({error.strerror or error}): mend that first"
                ) from error
            if part:
                last = part[-1].row
                yield _batch(part)
            if damage is not None:
                yield lost(last + 1, damage)
                return
            if not part:
                return


def lost(row: int, problem: str) -> pa.RecordBatch:
    """The one input that stands for what cannot be read from `row` on."""
    return pa.RecordBatch.from_pydict({"row": [row], "url": [None], "meta": [None], "problem": [problem]}, schema=URLS)


def _batch(rows: list[Row]) -> pa.RecordBatch:
    urls = [row.url for row in rows]
    try:
        found = pa.array(urls, pa.string())
    except UnicodeEncodeError:  # a byte that is no UTF-8: such a url is refused when it is looked at
        found = pa.array([None if url is None else _as_read(url) for url in urls], pa.string())
    meta = [json.dumps(row.meta) if row.meta else None for row in rows]
    nothing = pa.nulls(len(rows), pa.string())
    return pa.RecordBatch.from_arrays(
        [pa.array([row.row for row in rows], pa.int64()), found, pa.array(meta, pa.string()), nothing], schema=URLS
    )


def _as_read(url: str) -> str:
    written = text(url)
    return url if written == url else f"{_NO_URL}{written}"


@contextmanager
def _text(place: str, packed: bool) -> Iterator[Iterator[tuple[int, str]]]:
    """The lines of a file, with their numbers from 1. A line that is too long comes as `_NO_URL` alone."""
    blob = open_place(place)
    try:
        try:
            file: Any = io.BufferedReader(BlobFile(blob), 1 << 20)
        except OSError as error:
            raise IngestError(f"{show(place)} cannot be opened ({error.strerror or error}): mend the path") from error
        if file.peek(2)[:2] in (b"\xff\xfe", b"\xfe\xff"):
            raise IngestError(f"{show(place)} is UTF-16: convert it to UTF-8")
        if packed:
            file = io.BufferedReader(gzip.GzipFile(fileobj=file), 1 << 20)
        yield _lines(io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline=""))
    finally:
        close_place(blob)


def _lines(file: io.TextIOWrapper) -> Iterator[tuple[int, str]]:
    number = 0
    while line := file.readline(_LONGEST):
        number += 1
        if len(line) == _LONGEST and line[-1] not in "\r\n":
            while (rest := file.readline(_LONGEST)) and rest[-1] not in "\r\n":
                pass
            line = _NO_URL
        yield number, line


def _separated(lines: Iterator[tuple[int, str]], mark: str, columns: Columns, place: str) -> Iterator[Row]:
    at = 0

    def plain_lines() -> Iterator[str]:
        nonlocal at
        for number, line in lines:
            at = number
            yield line

    reader = csv.reader(plain_lines(), delimiter=mark)
    try:
        names = next(reader, [])
    except csv.Error:
        names = []
    if (taken := url_column(names, columns.url, place)) is None:
        raise _no_urls(place, names, columns)
    keep = kept(names, columns.keep, taken, place)
    url, beside = names.index(taken), [(name, names.index(name)) for name in keep]
    while True:
        first = at + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:  # a cell over 128 KiB, above all one whose quote is never closed
            yield Row(first, None, {"row_problem": str(error)})
            continue
        if cells:
            meta = {name: plain(cells[column]) for name, column in beside if column < len(cells)}
            yield Row(first, cells[url].strip() if url < len(cells) else None, meta)


def _json_lines(lines: Iterator[tuple[int, str]], columns: Columns, place: str) -> Iterator[Row]:
    taken: str | None = None
    keep: list[str] = []
    for number, line in lines:
        if not line.strip():
            continue
        try:
            found = json.loads(line)
        except (ValueError, RecursionError):
            yield Row(number, None, {})
            continue
        if not isinstance(found, dict):
            yield Row(number, found if isinstance(found, str) else None, {})
            continue
        if taken is None:  # the first object says which fields there are
            taken = url_column(list(found), columns.url, place)
            if taken is None:
                raise _no_urls(place, list(found), columns)
            keep = [] if "*" in columns.keep else kept(list(found), columns.keep, taken, place)
        names = [name for name in found if name != taken] if "*" in columns.keep else keep
        url = found.get(taken)
        yield Row(number, url.strip() if isinstance(url, str) else None, {n: plain(found.get(n)) for n in names})


def _no_urls(place: str, names: list[str], columns: Columns) -> IngestError:
    there = ", ".join(redact(name)[:60] for name in names[:20]) or "none"
    wanted = f"no column {columns.url!r}" if columns.url else "no column that is known to hold urls"
    return IngestError(
        f"{show(place)} has {wanted} (its first row names: {there}): say --url-column, or add a first row"
    )


def _read_parquet(place: str, columns: Columns, size: int) -> Iterator[pa.RecordBatch]:
    try:
        table = Table(place)
    except (OSError, *DAMAGE) as error:
        raise IngestError(
            f"{show(place)} cannot be opened ({problem_of(error)[1]}): restore it, or leave it out"
        ) from error
    with table:
        schema = table.schema
        taken = url_column(schema.names, columns.url, place)
        if taken is None:
            raise _no_urls(place, schema.names, columns)
        keep = kept_scalars(schema, columns.keep, taken, place)
        first = 0
        for group, rows in enumerate(table.groups()):
            row = first
            try:
                for batch in table.rows(group, [taken, *keep], size):
                    yield _frozen(batch, row, taken, keep)
                    row += len(batch)
            except (GristmillError, OSError, *DAMAGE) as error:
                yield lost(row, f"{first + rows - row} rows: {problem_of(error)[1]}")
            first += rows


def _frozen(batch: pa.RecordBatch, row: int, taken: str, keep: list[str]) -> pa.RecordBatch:
    """Rows of a Parquet list as they are frozen."""
    beside = [(name, column_of(batch, name).to_pylist()) for name in keep]
    meta = (
        [json.dumps({name: plain(values[at]) for name, values in beside}) for at in range(len(batch))] if keep else None
    )
    numbers = pa.array(range(row, row + len(batch)), pa.int64())
    nothing = pa.nulls(len(batch), pa.string())
    found = column_of(batch, taken).cast(pa.string())
    return pa.RecordBatch.from_arrays(
        [numbers, found, nothing if meta is None else pa.array(meta), nothing], schema=URLS
    )


def check_url(url: str | None) -> str:
    """A url that may be fetched, blanks in it encoded. Raises AddressError, in a few words without a secret."""
    if not url:
        raise AddressError("no url in this row")
    if _CONTROL.search(url):
        raise AddressError("a character that no url has")
    url = url.strip().replace(" ", "%20")
    if not url[:8].lower().startswith(("http://", "https://")):
        raise AddressError("no http or https url")
    try:
        parse_address(url)
    except AddressError:
        raise AddressError("no usable host or port in it") from None
    return url


def list_candidates(place: str, rows: list[dict[str, Any]]) -> Iterator[Candidate]:
    """Rows of `URLS` as candidates to be fetched, in order. A locator that lost a query says which row it was."""
    shown = show(place)
    for row in rows:
        where = f"{shown}#{row['row']}"
        candidate = Candidate(-1, where, meta=json.loads(row["meta"]) if row["meta"] else {})
        if row["problem"] is not None:
            candidate.problem = (Outcome.UNREADABLE, row["problem"])
        else:
            try:
                url = check_url(row["url"])
            except AddressError as error:
                candidate.problem = (Outcome.BAD_URL, str(error))
            else:
                candidate.url, safe = url, redact(url)
                candidate.locator = safe if safe == url else f"{safe} ({where})"
        yield candidate
