"""The ledger: one row for every input that an ingest ever met, and what became of it.

`ledger/000/00000.parquet` and on holds the rows of the first ingest, a row group a unit, `001` those of the next one
(an append or a retry), and `000.json` beside it, written last, says that they are complete. An input keeps its number for
good: where it was taken up again, its last row counts. Locators and details hold no secret.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..storage import published, sync_folder
from .candidate import PASSING, Outcome
from .errors import IngestError

LEDGER = "ledger"
UNITS = 256  # row groups a file
FIELDS = pa.schema(
    [
        ("input", pa.int64()),
        ("locator", pa.string()),
        ("outcome", pa.string()),
        ("detail", pa.string()),
        ("key", pa.string()),  # blake2b-128 of the source's bytes, hex; null where there were none
        ("duplicate_of", pa.string()),
        ("distance", pa.int16()),  # bits, of a near duplicate
        ("shard", pa.string()),  # train/000012.tar
        ("format", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("bytes", pa.int64()),  # as stored, or as they would have been
        ("received", pa.int64()),
        ("changed", pa.string()),  # why the stored bytes are not the source's own
        ("colours", pa.string()),  # how the source differs from plain RGB
        ("fingerprint", pa.binary()),
        ("labels", pa.list_(pa.string())),
        ("meta", pa.string()),
    ]
)


@dataclass(frozen=True)
class Generation:
    """One finished ingest: its number, the number of its first input, how many it met, and what it was."""

    number: int
    base: int
    inputs: int
    about: dict[str, Any]


def folder_of(root: Path, generation: int) -> Path:
    """Where the rows of one generation lie."""
    return root / LEDGER / f"{generation:03d}"


def generations(root: Path) -> list[Generation]:
    """The finished ones, in order. IngestError for a ledger that cannot be read."""
    found: list[Generation] = []
    for path in sorted((root / LEDGER).glob("[0-9][0-9][0-9].json")):
        try:
            about = json.loads(path.read_text(encoding="utf-8"))
            found.append(Generation(int(path.stem), about["base"], about["inputs"], about))
        except (OSError, ValueError, KeyError) as error:
            raise IngestError(
                f"{path} cannot be read ({error}): bring it back, the ledger is not whole without it"
            ) from error
    if [generation.number for generation in found] != list(range(len(found))):
        raise IngestError(f"{root / LEDGER} lacks one of its ingests: bring the missing files back")
    return found


def rows_of(root: Path, generation: int, columns: list[str] | None = None) -> Iterator[pa.Table]:
    """The rows of one generation, a unit at a time."""
    for path in sorted(folder_of(root, generation).glob("*.parquet")):
        with pq.ParquetFile(path) as file:
            for group in range(file.num_row_groups):
                yield file.read_row_group(group, columns=columns, use_threads=False)


def consolidate(root: Path, generation: int, tables: Iterable[Path]) -> None:
    """Bring the units' tables together, in order. Done again, it gives the same bytes. OSError passes through."""
    folder = folder_of(root, generation)
    folder.mkdir(parents=True, exist_ok=True)
    paths = list(tables)
    for number, start in enumerate(range(0, len(paths), UNITS)):
        with (
            published(folder / f"{number:05d}.parquet") as file,
            pq.ParquetWriter(file, FIELDS, compression="zstd") as writer,
        ):
            for path in paths[start : start + UNITS]:
                table = pq.read_table(path, schema=FIELDS, use_threads=False)
                writer.write_table(table.replace_schema_metadata(None), row_group_size=max(1, len(table)))


class _Sends(Protocol):
    def put(self, path: Path, name: str) -> None: ...


def close_generation(root: Path, generation: int, about: dict[str, Any], remote: _Sends | None = None) -> None:
    """Say that a generation is complete, first to whom it was sent: nobody here would send it again."""
    path = root / LEDGER / f"{generation:03d}.json"
    beside = path.with_suffix(".closing")
    with published(beside) as file:
        file.write((json.dumps(about, indent=1, sort_keys=True) + "\n").encode())
    if remote is not None:
        remote.put(beside, f"{LEDGER}/{path.name}")
    beside.replace(path)
    sync_folder(path.parent)


def last_rows(root: Path, columns: list[str]) -> Iterator[pa.Table]:
    """The row of every input, "input" among the columns; of one that was taken up again the last: 8 bytes are held for each.

    The last ingest's first, a unit at a time.
    """
    later = np.zeros(0, np.int64)
    for generation in reversed(generations(root)):
        again = [later]
        for table in rows_of(root, generation.number, columns):
            numbers = table["input"].to_numpy()
            if generation.about["kind"] == "retry":
                again.append(numbers)
            yield table.filter(pa.array(~np.isin(numbers, later))) if len(later) else table
        later = np.unique(np.concatenate(again))


def outcomes(root: Path) -> Counter[str]:
    """How many inputs ended how; they sum to the inputs. Of an input that was taken up again, the last row counts."""
    total: Counter[str] = Counter()
    for table in last_rows(root, ["input", "outcome"]):
        total.update(table["outcome"].to_pylist())
    return total


def failed(root: Path) -> dict[int, list[int]]:
    """Inputs whose failure may have passed, by the generation that brought them: what `--retry-failed` takes up."""
    known = generations(root)
    found: dict[int, list[int]] = {}
    for table in last_rows(root, ["input", "outcome"]):
        for number, outcome in zip(table["input"].to_pylist(), table["outcome"].to_pylist(), strict=True):
            if Outcome(outcome) in PASSING:
                found.setdefault(_bringer(known, number), []).append(number)
    return {generation: sorted(numbers) for generation, numbers in sorted(found.items())}


def _bringer(known: list[Generation], number: int) -> int:
    return next(
        generation.number
        for generation in known
        if generation.about["kind"] != "retry" and generation.base <= number < generation.base + generation.inputs
    )
