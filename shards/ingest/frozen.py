"""Inputs as they were listed once: Parquet files of rows, each row group a unit, and the table of all units.

A unit is read by its row group alone. A file has at most 500 of them, for what its footer costs is paid by each unit.
Rows are written as they come, so that a list of any length passes through in the memory of a few units. Urls may hold
what is as good as a key: files and folder are the owner's alone.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ..storage import PARTIAL, Draft, published, sync_folder
from .candidate import Unit
from .errors import IngestError

ROOTS, UNITS, PLAN = "roots.json", "units.parquet", "plan.json"
VERSION = 1
_GROUPS = 500
_UNIT_ROWS = 10_000  # rows of the table of units written at a time
_UNIT_SCHEMA = pa.schema(
    [
        ("kind", pa.string()),
        ("place", pa.string()),
        ("start", pa.int64()),
        ("count", pa.int64()),
        ("first", pa.int64()),
        ("detail", pa.string()),
    ]
)
_OURS = re.compile(rf"(roots\.json|units\.parquet|plan\.json|(files|tar|urls)-\d{{5}}\.parquet)({re.escape(PARTIAL)})?")


class _Sheet:
    """A Parquet file that is being written, for its owner alone."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self.name = path.name
        self._draft = Draft(path)
        os.chmod(self._draft.beside, 0o600)
        self._writer = pq.ParquetWriter(self._draft, schema, compression="zstd")
        self.groups = self.rows = 0

    def add(self, batch: pa.RecordBatch) -> None:
        self._writer.write_batch(batch, row_group_size=len(batch))
        self.groups += 1
        self.rows += len(batch)

    def finish(self) -> None:
        self._writer.close()
        self._draft.finish()

    def give_up(self) -> None:
        self._draft.give_up()


class Freezer:
    """Writes the inputs of a plan into a folder, in order. Nothing is a plan before `publish`; `discard` removes it all.

    `unit`: inputs in a unit, at most. OSError passes through.
    """

    def __init__(self, folder: Path, unit: int) -> None:
        self.folder, self.unit = folder, unit
        self.inputs = self.units = 0
        self.passed: Counter[str] = Counter()  # what is no input, by kind
        self._hash = hashlib.blake2b(digest_size=16)
        self._sheets: dict[str, _Sheet] = {}
        self._parts: Counter[str] = Counter()
        self._table: _Sheet | None = None
        self._rows: list[tuple[str, str, int, int, int, str]] = []
        self.discard()
        folder.chmod(0o700)

    def rows(self, kind: str, batches: Iterable[pa.RecordBatch], shown: str, detail: dict[str, Any]) -> None:
        """Take up inputs of one place, which is called `shown`; all batches have the schema of the first of this kind."""
        for batch in rechunk(batches, self.unit):
            sheet = self._sheet(kind, batch.schema)
            where = {"list": sheet.name, "group": sheet.groups}
            self._hash.update(repr((kind, shown, batch.to_pydict())).encode())
            self._add(kind, sheet.name, sheet.rows, len(batch), {**detail, **where})
            sheet.add(batch)

    def stretch(self, kind: str, shown: str, start: int, count: int, detail: dict[str, Any]) -> None:
        """Take up `count` inputs that are read where they lie."""
        self._hash.update(repr((kind, shown, start, count, sorted(detail.items()))).encode())
        self._add(kind, shown, start, count, detail)

    def _add(self, kind: str, place: str, start: int, count: int, detail: dict[str, Any]) -> None:
        self._rows.append((kind, place, start, count, self.inputs, json.dumps(detail)))
        self.inputs += count
        self.units += 1
        if len(self._rows) == _UNIT_ROWS:
            self._flush()

    def _sheet(self, kind: str, schema: pa.Schema) -> _Sheet:
        sheet = self._sheets.get(kind)
        if sheet is not None and sheet.groups == _GROUPS:
            sheet.finish()
            sheet = None
        if sheet is None:
            sheet = self._sheets[kind] = _Sheet(self.folder / f"{kind}-{self._parts[kind]:05d}.parquet", schema)
            self._parts[kind] += 1
        return sheet

    def _flush(self) -> None:
        if self._table is None:
            self._table = _Sheet(self.folder / UNITS, _UNIT_SCHEMA)
        if self._rows:
            columns = [pa.array(column) for column in zip(*self._rows, strict=True)]
            self._table.add(pa.RecordBatch.from_arrays(columns, schema=_UNIT_SCHEMA))
            self._rows = []

    def publish(self, about: dict[str, Any], roots: list[str]) -> None:
        """Close all files and say that the plan is there. `about` is what was asked for."""
        self._flush()
        assert self._table is not None
        for sheet in (*self._sheets.values(), self._table):
            sheet.finish()
        write_roots(self.folder, roots)
        told = {
            "inputs": self.inputs,
            "units": self.units,
            "passed": dict(self.passed),
            "digest": self._hash.hexdigest(),
        }
        _write(self.folder / PLAN, {"version": VERSION, **about, **told})

    def discard(self) -> None:
        """Remove what was written here, by this plan or one that was killed."""
        for sheet in (*self._sheets.values(), *([self._table] if self._table else [])):
            sheet.give_up()
        for entry in self.folder.iterdir():
            if _OURS.fullmatch(entry.name):
                entry.unlink()
        sync_folder(self.folder)


def rechunk(batches: Iterable[pa.RecordBatch], size: int) -> Iterator[pa.RecordBatch]:
    """The same rows in batches of `size`, the last one perhaps shorter."""
    pending: list[pa.RecordBatch] = []
    held = 0
    for batch in batches:
        while held + len(batch) >= size:
            pending.append(batch.slice(0, size - held))
            batch = batch.slice(size - held)
            yield pa.concat_batches(pending)
            pending, held = [], 0
        if len(batch):
            pending.append(batch)
            held += len(batch)
    if pending:
        yield pa.concat_batches(pending)


def write_roots(folder: Path, roots: list[str]) -> None:
    """Write down what the sources are, secrets included."""
    _write(folder / ROOTS, roots)


def _write(path: Path, value: Any) -> None:
    with published(path) as file:
        os.chmod(file.beside, 0o600)
        file.write(json.dumps(value, indent=1).encode())


def read_group(folder: Path, unit: Unit) -> list[dict[str, Any]]:
    """The rows of a unit. Raises IngestError if they are not there any more."""
    path = folder / str(unit.detail["list"])
    try:
        with pq.ParquetFile(path) as file:
            rows = file.read_row_group(unit.detail["group"], use_threads=False).to_pylist()
    except (OSError, ValueError, IndexError) as error:
        raise IngestError(f"{path} cannot be read ({error}): the ingest has lost its inputs, begin it anew") from error
    if len(rows) != unit.count:
        raise IngestError(f"{path} is damaged: the ingest has lost its inputs, begin it anew")
    return rows
