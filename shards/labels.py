"""Labels: what the folders of the source say about its images. Training never reads them; probes do.

The folder tree above an image names its classes, from coarse to fine. They lie in one side file beside the data sets,
keyed by content, so that a data set itself stays unlabelled. A class is named by its whole path: the class `x` in `a/x`
is not the one in `b/x`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path, PurePath

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from .errors import GristmillError
from .storage import published

LABELS = "labels.parquet"
_LEVELS: tuple[tuple[str, ...], ...] = ((), ("class",), ("coarse", "fine"), ("coarse", "fine", "instance"))


class LabelsError(GristmillError):
    """Labels that cannot be read, or that the data at hand does not have."""


def write_labels(root: str | Path, keys: Sequence[str], paths: Sequence[PurePath]) -> None:
    """Write `root/labels.parquet` for n images, given their keys and their paths relative to the source folder.

    As `write_some`, of which this is the form for images that fit into memory.
    """
    # Names of a file system may be any bytes; Parquet takes text only.
    folders = [os.fsencode(path).decode("utf-8", "backslashreplace").split("/")[:-1] for path in paths]
    write_some(root, lambda: [(keys, folders)])


def write_some(root: str | Path, images: Callable[[], Iterable[tuple[Sequence[str], Sequence[Sequence[str]]]]]) -> None:
    """Write `root/labels.parquet`; `images()` gives keys and the folders above each image, some at a time, and is called twice.

    The deepest image decides on the number of levels (at most three; folders below them say nothing). An image that
    lies above a level has no class there. Raises OSError as the file system gives it.
    """
    depth = max((len(parts) for _, folders in images() for parts in folders), default=0)
    names = _LEVELS[min(3, depth)]
    schema = pa.schema([(name, pa.string()) for name in ("key", *names)])
    with published(Path(root) / LABELS) as file, pq.ParquetWriter(file, schema, compression="zstd") as writer:
        for keys, folders in images():
            columns: list[Sequence[str | None]] = [keys]
            for level in range(1, len(names) + 1):
                columns += [["/".join(parts[:level]) if len(parts) >= level else None for parts in folders]]
            writer.write_table(pa.table([pa.array(column, pa.string()) for column in columns], schema=schema))


class Labels:
    """The labels of a source. `names` are its levels, coarse to fine, and may be empty."""

    def __init__(self, path: Path, table: pa.Table) -> None:
        self.path = path
        self.names: list[str] = table.column_names[1:]
        self._keys = table["key"].combine_chunks()
        self._classes: dict[str, list[str]] = {}
        self._codes: dict[str, np.ndarray] = {}
        for name in self.names:
            column = table[name].combine_chunks()
            classes = sorted(value for value in column.unique().to_pylist() if value is not None)
            codes = pc.call_function("index_in", [column], pc.SetLookupOptions(pa.array(classes, pa.string())))
            self._classes[name] = classes
            self._codes[name] = codes.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)

    @classmethod
    def open(cls, root: str | Path) -> Labels | None:
        """The labels of the data set in `root`: in that folder or the one above it. None where there are none.

        Raises LabelsError if the file is there but cannot be read.
        """
        folder = Path(root)
        path = next((path for path in (folder / LABELS, folder.absolute().parent / LABELS) if path.is_file()), None)
        if path is None:
            return None
        try:
            table = pq.read_table(path)
        except (OSError, pa.ArrowException) as error:
            raise LabelsError(f"{path} cannot be read ({error}): run `gristmill ingest` again, or remove it") from error
        if tuple(table.column_names[1:]) not in _LEVELS or table.column_names[0] != "key":
            raise LabelsError(f"{path} has other columns than labels have: run `gristmill ingest` again, or remove it")
        return cls(path, table)

    def classes(self, name: str) -> list[str]:
        """The classes of a level, sorted: what the codes count."""
        self._check(name)
        return list(self._classes[name])

    def codes(self, keys: Sequence[str], name: str) -> np.ndarray:
        """Class of each of n keys at a level, as indices into `classes(name)`, int64 [n]; -1 where it has none.

        Raises LabelsError for a level or a key that the labels do not know.
        """
        self._check(name)
        found = pc.call_function("index_in", [pa.array(keys, pa.string())], pc.SetLookupOptions(self._keys))
        if found.null_count:
            stranger = keys[found.is_null().to_pylist().index(True)]
            raise LabelsError(
                f"{self.path} does not know sample {stranger}: labels and data set are not of one ingest; run it again"
            )
        return self._codes[name][found.to_numpy(zero_copy_only=False)]

    def _check(self, name: str) -> None:
        if name not in self._classes:
            have = ", ".join(self.names) or "none, since its source had no subfolders"
            raise LabelsError(f"{self.path} has no level {name!r}; it has {have}")
