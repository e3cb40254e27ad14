"""What a worker leaves of one unit: the bytes of its images, one after the other, and a row for every input.

`00000012.bin` is finished before `00000012.parquet`, so that a unit with rows is a complete one; a unit that was killed
leaves nothing that counts. Rows are read a unit at a time, images one by one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from ..storage import published
from .candidate import Outcome, Row

FIELDS = pa.schema(
    [
        ("number", pa.int64()),
        ("locator", pa.string()),
        ("outcome", pa.string()),
        ("detail", pa.string()),
        ("digest", pa.binary()),
        ("fingerprint", pa.binary()),
        ("offset", pa.int64()),
        ("length", pa.int64()),
        ("format", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("crc32", pa.uint32()),
        ("changed", pa.string()),
        ("colours", pa.string()),
        ("received", pa.int64()),
        ("meta", pa.string()),
        ("labels", pa.list_(pa.string())),
    ]
)


def bytes_path(folder: Path, unit: int) -> Path:
    """Where a unit's images lie."""
    return folder / f"{unit:08d}.bin"


def rows_path(folder: Path, unit: int) -> Path:
    """Where a unit's rows lie."""
    return folder / f"{unit:08d}.parquet"


def json_of(meta: dict) -> str:
    """What came along, as one line of JSON with sorted keys; empty for nothing."""
    return json.dumps(meta, sort_keys=True, ensure_ascii=False, separators=(",", ":")) if meta else ""


def write_rows(folder: Path, unit: int, rows: Sequence[Row]) -> None:
    """Finish a unit. OSError passes through."""
    columns = {name: [getattr(row, name) for row in rows] for name in FIELDS.names if name != "meta"}
    columns["outcome"] = [str(row.outcome) for row in rows]
    columns["meta"] = [json_of(row.meta) for row in rows]
    with published(rows_path(folder, unit)) as file:
        pq.write_table(
            pa.table({name: columns[name] for name in FIELDS.names}, schema=FIELDS), file, compression="zstd"
        )


def read_rows(folder: Path, unit: int) -> list[Row]:
    """The rows of a finished unit, in the order of its inputs."""
    table = pq.read_table(rows_path(folder, unit), schema=FIELDS, use_threads=False).to_pydict()
    table["outcome"] = [Outcome(value) for value in table["outcome"]]
    table["meta"] = [json.loads(value) if value else {} for value in table["meta"]]
    table["labels"] = [tuple(value) for value in table["labels"]]
    return [Row(**dict(zip(table, values, strict=True))) for values in zip(*table.values(), strict=True)]


def finished_units(folder: Path) -> set[int]:
    """The units with rows."""
    return {
        int(entry.name[:8]) for entry in os.scandir(folder) if len(entry.name) == 16 and entry.name.endswith(".parquet")
    }


def spooled_units(folder: Path) -> list[int]:
    """The units whose images are still there, in order."""
    return sorted(
        int(entry.name[:8]) for entry in os.scandir(folder) if len(entry.name) == 12 and entry.name.endswith(".bin")
    )


def read_bytes(folder: Path, unit: int, places: Sequence[tuple[int, int]]) -> Iterator[bytes]:
    """The images at these (offset, length), one at a time."""
    with bytes_path(folder, unit).open("rb", buffering=0) as file:
        for offset, length in places:
            data = os.pread(file.fileno(), length, offset)
            if len(data) != length:
                raise OSError(5, f"{bytes_path(folder, unit)} is shorter than it was written")
            yield data
