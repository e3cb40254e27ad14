"""Which samples of a data set a `where:` filter selects, in a bit each, and the k-th selected row of any shard.

Without a filter there is nothing here. With one, an order runs over the selected samples (their counts take the place
of the shards' sizes), and `select` finds the row that belongs to a rank. That takes a bit a sample, each shard padded
to blocks of 512, and a directory of one uint32 a block: 1.0625 bits a sample, 133 MB for 1e9. A look-up bisects the
shard's stretch of the directory and counts bits in one block: Jacobson's rank and select ("Space-efficient static
trees and graphs", FOCS 1989) with the constants of a cache line.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import ArrayLike, NDArray

from ..shards.manifest import GROUPS, SAMPLES, Manifest, ManifestError
from .order import Ints
from .where import Where, WhereError

_WORDS = 8  # of 64 bits in a block
_BLOCK = 64 * _WORDS
_ROWS = 1 << 20  # rows whose columns are in memory at once


class Selection:
    """The selected rows of S shards. Build it with `select_rows`, or from masks (bool [n] a shard), in order."""

    def __init__(self, sizes: ArrayLike, masks: Iterator[NDArray[np.bool_]], text: str = "") -> None:
        sizes = np.asarray(sizes, np.int64)
        self.text = text
        self.unknown = 0  # rows that were left out because they lack a value that the filter asks for
        self.first = np.concatenate([[0], np.cumsum(-(-sizes // _BLOCK))]).astype(np.int64)  # block of each shard
        self.counts: Ints = np.zeros(len(sizes), np.int64)  # selected rows a shard
        self.bits = np.zeros((int(self.first[-1]), _WORDS), "<u8")
        self.directory = np.zeros(len(self.bits), np.uint32)  # selected rows of the shard that lie before each block
        flat = self.bits.view(np.uint8).reshape(-1)
        for shard, mask in zip(range(len(sizes)), masks, strict=True):
            if mask.shape != (sizes[shard],):
                raise WhereError(f"where: shard {shard} has {sizes[shard]} rows, but {mask.shape} were judged")
            packed = np.packbits(mask, bitorder="little")
            start, stop = int(self.first[shard]), int(self.first[shard + 1])
            flat[start * _BLOCK // 8 :][: len(packed)] = packed
            ends = np.cumsum(np.bitwise_count(self.bits[start:stop]).sum(axis=1))
            if len(ends):
                self.directory[start + 1 : stop] = ends[:-1]
                self.counts[shard] = ends[-1]

    @property
    def samples(self) -> int:
        """How many rows are selected."""
        return int(self.counts.sum())

    @property
    def nbytes(self) -> int:
        """Memory of bits, directory and the tables of shards, in bytes."""
        return self.bits.nbytes + self.directory.nbytes + self.first.nbytes + self.counts.nbytes

    def select(self, shard: ArrayLike, rank: ArrayLike) -> Ints:
        """Row int64 [n] of the `rank`-th selected sample (from 0) of each shard; both int64 [n], rank < counts."""
        shard, rank = np.asarray(shard, np.int64), np.asarray(rank, np.int64)
        low, high = self.first[shard], self.first[shard + 1]
        while ((high - low) > 1).any():
            middle = (low + high) // 2
            right = (self.directory[np.minimum(middle, len(self.directory) - 1)] <= rank) & (middle > low)
            low, high = np.where(right, middle, low), np.where(right, high, np.maximum(middle, low + 1))
        block = self.bits[low]  # [n, 8]
        left = rank - self.directory[low]
        ends = np.cumsum(np.bitwise_count(block), axis=1, dtype=np.int64)
        word = (ends <= left[:, None]).sum(axis=1)
        slots = np.arange(len(left))
        left = left - np.where(word > 0, ends[slots, word - 1], 0)
        octets = np.ascontiguousarray(block[slots, word])[:, None].view(np.uint8)
        bits = np.cumsum(np.unpackbits(octets, axis=1, bitorder="little"), axis=1, dtype=np.uint8)
        bit = (bits <= left[:, None]).sum(axis=1)
        return (low - self.first[shard]) * _BLOCK + word * 64 + bit

    def holds(self, shard: ArrayLike, row: ArrayLike) -> NDArray[np.bool_]:
        """Whether each row is selected: bool [n] for shard, row int64 [n]."""
        shard, row = np.asarray(shard, np.int64), np.asarray(row, np.int64)
        word = self.bits[self.first[shard] + row // _BLOCK, row % _BLOCK // 64]
        return ((word >> (row % 64).astype(np.uint64)) & np.uint64(1)).astype(bool)

    def digest(self, shards: int | None = None) -> str:
        """What the filter comes to over the first `shards` shards, as blake2b-64 hex.

        Of the rows, not of the text: another wording of the same choice gives the same stream, and a column that a
        later deep index filled or changed may give another one.
        """
        shards = len(self.counts) if shards is None else shards
        state = hashlib.blake2b(self.counts[:shards].astype("<i8").tobytes(), digest_size=8)
        state.update(self.bits[: int(self.first[shards])].view(np.uint8).reshape(-1).data)
        return state.hexdigest()


@dataclass
class _File:
    """One Parquet file of sample rows, opened for some columns."""

    path: Path

    def schema(self) -> pa.Schema:
        return pq.read_schema(self.path)

    def stretches(self, counts: Ints, columns: list[str]) -> Iterator[tuple[list[int], pa.Table]]:
        """Runs of row groups of at most about a million rows: (rows of each group, their table)."""
        with pq.ParquetFile(self.path) as file:
            groups = np.arange(len(counts))
            ends = np.cumsum(counts)
            for run in np.split(groups, np.flatnonzero(np.diff((ends - 1) // _ROWS)) + 1):
                table = file.read_row_groups(run.tolist(), columns=columns, use_threads=False)
                yield counts[run].tolist(), table


def select_rows(manifest: Manifest, text: str, *, progress: Callable[[int, int], None] | None = None) -> Selection:
    """The samples of a data set for which the filter `text` holds, read from the manifest's columns.

    Reads the columns that the filter names, once; `progress(done, total)` counts rows. WhereError if the filter is wrong
    or selects nothing, ManifestError if the rows cannot be read.
    """
    files = [_File(manifest.root / SAMPLES / f"{n:05d}.parquet") for n in range(-(-len(manifest.counts) // GROUPS))]
    try:
        where = Where(text, files[0].schema())
        unknown = done = 0

        def masks() -> Iterator[NDArray[np.bool_]]:
            nonlocal unknown, done
            # A filter without a column still needs to know how many rows there are.
            columns = list(where.columns) or ["length"]
            for number, file in enumerate(files):
                for sizes, table in file.stretches(manifest.counts[number * GROUPS : (number + 1) * GROUPS], columns):
                    mask, missing = where(table)
                    unknown, done = unknown + missing, done + len(mask)
                    yield from np.split(mask, np.cumsum(sizes)[:-1])
                    if progress is not None:
                        progress(done, manifest.samples)

        selection = Selection(manifest.counts, masks(), where.text)
    except (OSError, pa.ArrowException, KeyError, IndexError) as error:
        raise ManifestError(
            f"the rows of {manifest.root} cannot be read ({error}): make or index the data set again"
        ) from error
    selection.unknown = unknown
    if selection.samples == 0:
        lacking = f"; {unknown} of them lack a value that it asks for (`gristmill index --deep` finds sizes)"
        raise WhereError(
            f"where: `{where.text}` selects none of the {manifest.samples} samples of {manifest.root}"
            f"{lacking if unknown else ''}. Loosen it or leave it out"
        )
    return selection
