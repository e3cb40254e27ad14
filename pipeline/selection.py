"""Which samples of a data set a `where:` filter selects, in a bit each, and the k-th selected row of any shard.

Without a filter there is nothing here. With one, an order runs over the selected samples (their counts take the place
of the shards' sizes), and `select` finds the row that belongs to a rank. That takes a bit a sample, each shard padded
to blocks of 512, and a directory of one uint32 a block: 1.0625 bits a sample, 133 MB for 1e9. A look-up bisects the
shard's stretch of the directory and counts bits in one block: Jacobson's rank and select ("Space-efficient static
trees and graphs", FOCS 1989) with the constants of a cache line. Where the bits are many they lie in an unnamed file
beside the system's other temporary ones, of which a look-up reads a block: then only the directory is in memory, 8 MB
for 1e9, and the kernel keeps of the rest what is used, or gives it up.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import ArrayLike, NDArray

from ..shards.manifest import GROUPS, SAMPLES, Manifest, ManifestError
from .order import Ints
from .where import Where, WhereError

_WORDS = 8  # of 64 bits in a block
_BLOCK = 64 * _WORDS
_ROWS = 1 << 18  # rows whose columns are in memory at once
_IN_MEMORY = 1 << 24  # bytes of bits that are kept there
_PIECE = 1 << 20  # bytes that are written or read at a time


class _Bits:
    """Blocks of 64 bytes, `append`ed in order and then looked up: in memory, or in a file where they are many."""

    def __init__(self, blocks: int) -> None:
        self._file = tempfile.TemporaryFile() if blocks * _BLOCK // 8 > _IN_MEMORY else None  # noqa: SIM115
        self._memory = np.zeros((0 if self._file else blocks, _WORDS), "<u8")
        self._blocks, self._end = blocks, 0

    @property
    def nbytes(self) -> int:
        return self._memory.nbytes

    def append(self, blocks: NDArray[np.uint64]) -> None:
        if self._file is None:
            self._memory[self._end : self._end + len(blocks)] = blocks
        else:
            try:
                self._file.write(blocks.data)
                if self._end + len(blocks) == self._blocks:
                    self._file.flush()
            except OSError as error:
                raise WhereError(
                    f"where: its {self._blocks * _BLOCK // 8} bytes of bits cannot be kept in {tempfile.gettempdir()} "
                    f"({error.strerror}): make room there, or name another folder in TMPDIR"
                ) from error
        self._end += len(blocks)

    def blocks(self, numbers: Ints) -> NDArray[np.uint64]:
        """uint64 [n, 8] of these blocks [n]."""
        if self._file is None:
            return self._memory[numbers]
        handle, size = self._file.fileno(), _BLOCK // 8
        read = b"".join([os.pread(handle, size, size * number) for number in numbers.tolist()])
        return np.frombuffer(read, "<u8").reshape(-1, _WORDS)

    def pieces(self, blocks: int) -> Iterator[Any]:
        """The bytes of the first so many blocks."""
        if self._file is None:
            yield self._memory[:blocks].view(np.uint8).reshape(-1).data
            return
        for first in range(0, blocks * _BLOCK // 8, _PIECE):
            yield os.pread(self._file.fileno(), min(_PIECE, blocks * _BLOCK // 8 - first), first)


class Selection:
    """The selected rows of S shards. Build it with `select_rows`, or from masks (bool [n] a shard), in order."""

    def __init__(self, sizes: ArrayLike, masks: Iterator[NDArray[np.bool_]], text: str = "") -> None:
        sizes = np.asarray(sizes, np.int64)
        self.text = text
        self.unknown = 0  # rows that were left out because they lack a value that the filter asks for
        self.first = np.concatenate([[0], np.cumsum(-(-sizes // _BLOCK))]).astype(np.int64)  # block of each shard
        self.counts: Ints = np.zeros(len(sizes), np.int64)  # selected rows a shard
        self.directory = np.zeros(int(self.first[-1]), np.uint32)  # selected rows of the shard before each block
        self._bits = _Bits(int(self.first[-1]))
        for shard, mask in zip(range(len(sizes)), masks, strict=True):
            if mask.shape != (sizes[shard],):
                raise WhereError(f"where: shard {shard} has {sizes[shard]} rows, but {mask.shape} were judged")
            start, stop = int(self.first[shard]), int(self.first[shard + 1])
            blocks = np.zeros((stop - start, _WORDS), "<u8")
            packed = np.packbits(mask, bitorder="little")
            blocks.view(np.uint8).reshape(-1)[: len(packed)] = packed
            self._bits.append(blocks)
            ends = np.cumsum(np.bitwise_count(blocks).sum(axis=1))
            if len(ends):
                self.directory[start + 1 : stop] = ends[:-1]
                self.counts[shard] = ends[-1]

    @property
    def samples(self) -> int:
        """How many rows are selected."""
        return int(self.counts.sum())

    @property
    def nbytes(self) -> int:
        """Memory of bits (as far as they are there), directory and the tables of shards, in bytes."""
        return self._bits.nbytes + self.directory.nbytes + self.first.nbytes + self.counts.nbytes

    def select(self, shard: ArrayLike, rank: ArrayLike) -> Ints:
        """Row int64 [n] of the `rank`-th selected sample (from 0) of each shard; both int64 [n], rank < counts."""
        shard, rank = np.asarray(shard, np.int64), np.asarray(rank, np.int64)
        low, high = self.first[shard], self.first[shard + 1]
        while ((high - low) > 1).any():
            middle = (low + high) // 2
            right = (self.directory[np.minimum(middle, len(self.directory) - 1)] <= rank) & (middle > low)
            low, high = np.where(right, middle, low), np.where(right, high, np.maximum(middle, low + 1))
        block = self._bits.blocks(low)  # [n, 8]
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
        blocks = self._bits.blocks(self.first[shard] + row // _BLOCK)
        word = blocks[np.arange(len(blocks)), row % _BLOCK // 64]
        return ((word >> (row % 64).astype(np.uint64)) & np.uint64(1)).astype(bool)

    def digest(self, shards: int | None = None) -> str:
        """What the filter comes to over the first `shards` shards, as blake2b-64 hex.

        Of the rows, not of the text: another wording of the same choice gives the same stream, and a column that a
        later deep index filled or changed may give another one.
        """
        shards = len(self.counts) if shards is None else shards
        state = hashlib.blake2b(self.counts[:shards].astype("<i8").tobytes(), digest_size=8)
        for piece in self._bits.pieces(int(self.first[shards])):
            state.update(piece)
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
