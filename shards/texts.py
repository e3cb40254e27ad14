"""Many short texts as one: the keys of a shard, the names of a hundred thousand shards.

A Python string takes some fifty bytes beside its characters, and a list eight more. Here a text takes its characters
and four bytes; or one byte, where a few texts come again and again. To their readers both are sequences like any other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

_AT_ONCE = 4096  # texts that exist at a time when all are run through


class _Compact(Sequence[Any]):
    """A slice is a list, and whatever holds the same is equal."""

    def _some(self, first: int, stop: int) -> list[Any]:
        raise NotImplementedError

    def __getitem__(self, row: Any) -> Any:
        if isinstance(row, slice):
            first, stop, step = row.indices(len(self))
            return self._some(first, stop) if step == 1 else [self[i] for i in range(first, stop, step)]
        row = range(len(self))[row]  # IndexError, and negative ones
        return self._some(row, row + 1)[0]

    def __iter__(self) -> Iterator[Any]:
        for first in range(0, len(self), _AT_ONCE):
            yield from self._some(first, min(first + _AT_ONCE, len(self)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or len(self) != len(other):
            return False
        return all(one == another for one, another in zip(self, other, strict=True))

    __hash__ = None  # pyright: ignore[reportAssignmentType]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self)} texts)"


class Texts(_Compact):
    """The texts of an Arrow column of strings, none of them null."""

    def __init__(self, column: pa.ChunkedArray) -> None:
        array = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], pa.string())
        if array.null_count:
            raise ValueError(f"{array.null_count} of {len(array)} texts are null")
        _, offsets, characters = array.buffers()
        ends = np.zeros(len(array) + 1, np.uint32)
        if len(array):
            ends[:] = np.frombuffer(offsets, np.int32)[array.offset : array.offset + len(array) + 1]
        encoded = b"" if characters is None else bytes(memoryview(characters)[int(ends[0]) : int(ends[-1])])
        self._text, self._ends = encoded.decode(), ends - ends[0]
        if len(self._text) != len(encoded):  # not all of them are one byte long
            self._ends[1:] = np.cumsum(pc.utf8_length(array).to_numpy())

    def __len__(self) -> int:
        return len(self._ends) - 1

    def pick(self, rows: np.ndarray) -> list[str]:
        """The texts of these rows, int64 [n], faster than one by one."""
        text, ends = self._text, self._ends
        return [text[a:b] for a, b in zip(ends[rows].tolist(), ends[rows + 1].tolist(), strict=True)]

    def _some(self, first: int, stop: int) -> list[str]:
        text, ends = self._text, self._ends[first : stop + 1].tolist()
        return [text[a:b] for a, b in pairwise(ends)]


class Few(_Compact):
    """The texts of an Arrow column in which at most 255 different ones and null occur; `of` makes another sequence where not."""

    def __init__(self, texts: list[str | None], which: np.ndarray) -> None:
        self._texts, self._which = texts, which  # uint8 [n]

    @classmethod
    def of(cls, column: pa.ChunkedArray) -> Sequence[str | None]:
        encoded = pa.concat_arrays(column.chunks).dictionary_encode() if column.num_chunks else None
        if encoded is None or len(encoded.dictionary) > 255:
            return column.to_pylist() if column.null_count or encoded is None else Texts(column)
        texts = [*encoded.dictionary.to_pylist(), None]
        return cls(texts, encoded.indices.fill_null(len(texts) - 1).to_numpy(zero_copy_only=False).astype(np.uint8))

    def __len__(self) -> int:
        return len(self._which)

    def _some(self, first: int, stop: int) -> list[str | None]:
        texts = self._texts
        return [texts[i] for i in self._which[first:stop].tolist()]
