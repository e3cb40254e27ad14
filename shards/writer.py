"""Writing a manifest: rows stream to Parquet beside their place, and `dataset.json` makes them a data set at the end.

The order of the renames is what makes it atomic: an old `dataset.json` goes first and the new one comes last, so that
at every moment the folder is either a whole data set or none.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from .manifest import (
    DATASET,
    GROUPS,
    SAMPLE_FIELDS,
    SAMPLES,
    SCHEMA,
    SHARD_FIELDS,
    SHARDS,
    ManifestError,
    Rows,
    dataset_digest,
)
from .storage import PARTIAL, Draft, published, sync_folder


def table_of(rows: Rows) -> pa.Table:
    """The rows as Parquet holds them; what a quick index did not find is null."""

    def found(column: np.ndarray, unknown: np.ndarray | None = None) -> Any:
        return pa.array(column, mask=unknown) if rows.deep else pa.nulls(len(rows))

    undecoded = rows.width == 0

    columns = [
        rows.keys,
        rows.offset,
        rows.length,
        found(rows.crc32),
        found(rows.width, undecoded),
        found(rows.height, undecoded),
        rows.format,
    ]
    arrays = [pa.array(c).cast(f.type) for c, f in zip(columns, SAMPLE_FIELDS, strict=True)]
    return pa.Table.from_arrays(arrays, schema=SAMPLE_FIELDS)


class ManifestWriter:
    """Writes a manifest shard by shard, in memory that grows with the shards alone.

    Nothing of it is seen before `publish`; `discard` takes it back. A context manager that discards what was not
    published. OSError passes through.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        self._folder = self.root / (SAMPLES + PARTIAL)
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir(parents=True)
        self._shards: list[tuple[str, int, int, str, str | None]] = []
        self._file: Draft | None = None
        self._parquet: pq.ParquetWriter | None = None

    def __enter__(self) -> ManifestWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.discard()

    def add(self, url: str, size: int, rows: Rows, identity: str | None = None) -> None:
        """Append the shard `url` (relative to the root, or absolute) of `size` bytes."""
        if len(rows) == 0:
            raise ManifestError(f"shard {url} has no sample: leave it out of the data set")
        number, group = divmod(len(self._shards), GROUPS)
        if group == 0:
            self._close_file()
            self._file = Draft(self._folder / f"{number:05d}.parquet")
            self._parquet = pq.ParquetWriter(self._file, SAMPLE_FIELDS, compression="zstd")
        assert self._parquet is not None
        self._parquet.write_table(table_of(rows), row_group_size=len(rows))
        self._shards.append((url, len(rows), size, rows.digest(), identity))

    def _close_file(self) -> None:
        if self._parquet is not None and self._file is not None:
            self._parquet.close()
            self._file.finish()
            self._parquet = self._file = None

    def publish(self) -> str:
        """Make the data set seen, `dataset.json` last. Returns its digest."""
        self._close_file()
        sync_folder(self._folder)
        columns = list(zip(*self._shards, strict=True)) or [()] * 5
        digest = dataset_digest(columns[0], columns[3])
        # From here to the last line the folder is no data set: an old one of the same name must not claim new rows.
        (self.root / DATASET).unlink(missing_ok=True)
        with published(self.root / SHARDS) as file:
            arrays = [pa.array(c, f.type) for c, f in zip(columns, SHARD_FIELDS, strict=True)]
            pq.write_table(pa.Table.from_arrays(arrays, schema=SHARD_FIELDS), file, compression="zstd")
        shutil.rmtree(self.root / SAMPLES, ignore_errors=True)
        self._folder.rename(self.root / SAMPLES)
        sync_folder(self.root)
        about = {
            "schema": SCHEMA,
            "digest": digest,
            "shards": len(self._shards),
            "samples": sum(columns[1]),
            "bytes": sum(columns[2]),
        }
        with published(self.root / DATASET) as file:
            file.write((json.dumps(about, indent=1) + "\n").encode())
        return digest

    def discard(self) -> None:
        """Remove what was written and not published. After `publish` it does nothing."""
        if self._file is not None:
            self._file.give_up()
        self._parquet = self._file = None
        shutil.rmtree(self._folder, ignore_errors=True)


def write_manifest(root: str | Path, shards: Iterable[tuple[str, int, Rows]]) -> str:
    """Write the manifest of shards (url relative to `root`, bytes, rows), whole or not at all. Returns its digest.

    Raises OSError as the file system gives it, and ManifestError for a shard without samples.
    """
    with ManifestWriter(root) as writer:
        for url, size, rows in shards:
            writer.add(url, size, rows)
        return writer.publish()
