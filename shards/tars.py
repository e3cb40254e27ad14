"""Writes one data set: tars by webdataset's own writer, each whole or absent, and their manifest.

A tar is written beside its place, synced, indexed, and only then given its name. Times, owners and modes are fixed, so
that the same samples give the same bytes. webdataset is imported on first use, since it brings torch along.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from .errors import GristmillError
from .images import CheckedImage
from .index import index_shard
from .manifest import DATASET, SAMPLES, SHARDS
from .storage import PARTIAL, Draft
from .writer import ManifestWriter

MAX_SHARD_BYTES = 3_000_000_000
_OURS = {SAMPLES, SHARDS, DATASET}


class TarsError(GristmillError):
    """A folder that cannot take a data set, or a shard that was not read back as it was written."""


def clear_leftovers(root: Path) -> None:
    """Remove what an interrupted ingest left in a data set's folder. Raises TarsError if anything else lies there."""
    if not root.is_dir():
        return
    entries = sorted(root.iterdir())
    for entry in entries:
        name = entry.name.removesuffix(PARTIAL)
        number = name.removesuffix(".tar")
        if name not in _OURS and not (number != name and number.isdigit()):
            raise TarsError(f"{entry} is none of Gristmill's files: name another output folder, or move it away")
    for entry in sorted(entries, key=lambda entry: entry.name != DATASET):  # so that it is no data set any more
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
    root.rmdir()


class TarsWriter:
    """Writes samples into `root/000000.tar` and so on. Nothing is a data set before `publish`.

    OSError passes through; after any error call `discard`, which removes all that was written.
    """

    def __init__(self, root: Path, *, shard_samples: int) -> None:
        clear_leftovers(root)
        root.mkdir(parents=True)
        self.root = root
        self.samples = self.bytes = 0
        self._shard_samples = shard_samples
        self._manifest = ManifestWriter(root)
        self._shards: Any = None
        self._file: Draft | None = None
        self._pending: list[tuple[str, str, int, int, int]] = []  # key, format, crc32, width, height

    def add(self, key: str, image: CheckedImage) -> None:
        """Append one sample. Its key must not hold a dot or a slash."""
        if self._shards is None:
            from webdataset.writer import ShardWriter

            self._shards = ShardWriter(
                "%06d.tar",  # the name alone: a folder's name may hold a percent sign
                maxcount=self._shard_samples,
                maxsize=MAX_SHARD_BYTES,
                opener=self._open,
                post=self._close,
                verbose=0,
                encoder=False,
                compress=False,
                mtime=0,
                user="gristmill",
                group="gristmill",
            )
        self._shards.write({"__key__": key, image.format: image.data})
        # Only now: the line above closes the shard before, if that is full.
        self._pending.append((key, image.format, image.crc32, image.width, image.height))
        self.samples += 1
        self.bytes += len(image.data)

    def _open(self, name: str) -> Draft:
        self._file = Draft(self.root / name)
        return self._file

    def _close(self, name: str) -> None:
        assert self._file is not None
        self._file.sync()
        rows = index_shard(self._file.beside)
        keys, formats, crc32, width, height = map(list, zip(*self._pending, strict=True))
        if rows.keys != keys or rows.format != formats:
            raise TarsError(f"{self._file.beside} was not read back as it was written: check the disk and ingest again")
        rows = replace(
            rows,
            crc32=np.array(crc32, np.uint32),
            width=np.array(width, np.int32),
            height=np.array(height, np.int32),
            deep=True,
        )
        self._file.finish()
        self._manifest.add(name, self._file.tell(), rows)
        self._pending = []

    def publish(self) -> str:
        """Close the last shard and make the data set seen. Returns its digest."""
        if self._shards is not None:
            self._shards.close()
        return self._manifest.publish()

    def discard(self) -> None:
        """Remove all of it, published or not."""
        if self._file is not None:
            self._file.give_up()
        self._manifest.discard()
        clear_leftovers(self.root)
