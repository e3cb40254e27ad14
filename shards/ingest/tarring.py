"""One shard out of the spools of its units: a tar by webdataset's own writer, read back, then given its name.

Times, owners and modes are fixed, so that the same samples give the same bytes. The shard's rows for the manifest lie
beside it in the work folder until the manifest is published: a shard with rows is a written one.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..index import index_shard
from ..manifest import SAMPLE_FIELDS, Rows, rows_of_table
from ..storage import Draft, published
from ..writer import table_of
from .candidate import Row
from .decide import Shard
from .destination import Destination
from .errors import IngestError
from .spool import json_of, read_bytes, read_rows


def shard_rows_path(folder: Path, shard: str) -> Path:
    """Where the rows of a written shard lie."""
    return folder / (shard.replace("/", "-") + ".rows")


def write_shard(shard: Shard, spool: Path, rows_folder: Path, out: Path, remote: str | None = None) -> int:
    """Write `out / shard.name` and its rows; the tar's bytes. Done again, it gives the same. `remote`: then send it there.

    Raises OSError as the file system gives it, IngestError when the tar does not read back as it was written.
    """
    from webdataset.writer import TarWriter

    path = out / shard.name
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = Draft(path)
    written: list[Row] = []
    try:
        file: Any = draft  # as much of a file as it needs
        with TarWriter(file, mtime=0, user="gristmill", group="gristmill", encoder=False, compress=False) as tar:
            for unit, members in groupby(shard.members, key=lambda member: member[0]):
                known = read_rows(spool, unit)
                rows = [known[i] for _, i in members]
                for row, data in zip(
                    rows, read_bytes(spool, unit, [(row.offset, row.length) for row in rows]), strict=True
                ):
                    sample = {"__key__": row.digest.hex(), row.format: data}
                    if row.meta:
                        sample["json"] = json_of(row.meta).encode()
                    tar.write(sample)
                written += rows
        draft.sync()
        found = index_shard(draft.beside)
        if found.keys != [row.digest.hex() for row in written] or found.format != [row.format for row in written]:
            raise IngestError(
                f"{draft.beside} was not read back as it was written: check the disk, then start the same command again"
            )
        size = draft.tell()
        draft.finish()
    except BaseException:
        draft.give_up()
        raise
    rows = replace(
        found,
        crc32=np.array([row.crc32 for row in written], np.uint32),
        width=np.array([row.width for row in written], np.int32),
        height=np.array([row.height for row in written], np.int32),
        deep=True,
    )
    if remote is not None:
        Destination(remote).put(path, shard.name)
        path.unlink()
    with published(shard_rows_path(rows_folder, shard.name)) as file:
        table = table_of(rows)
        pq.write_table(
            table.replace_schema_metadata({"size": str(size), "shard": shard.name}), file, compression="zstd"
        )
    return size


def read_shard_rows(folder: Path, shard: str) -> tuple[int, Rows]:
    """Bytes of a written shard's tar, and its rows."""
    table = pq.read_table(shard_rows_path(folder, shard), use_threads=False)
    size = int((table.schema.metadata or {})[b"size"])
    return size, rows_of_table(table.cast(pa.schema(list(SAMPLE_FIELDS))))
