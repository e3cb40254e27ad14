"""A data set as a recipe reads it: shards and their identity, less what a filter leaves out, less what was removed.

`Source.of(manifest)` is the usual way. The fields themselves are plain arrays and functions, so that a stream can be
made and looked at where there is no folder at all: a billion samples are a vector of counts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..shards.manifest import Manifest, dataset_digest
from ..shards.tombstones import Tombstones
from .order import Ints, Sequential
from .selection import Selection, select_rows


class Places:
    """Some samples, about which many are asked at once. `places` int64 [n, 2]: shard, row."""

    def __init__(self, places: Ints) -> None:
        self._numbers = np.sort((places[:, 0] << 32) | places[:, 1])

    def hold(self, shard: ArrayLike, row: ArrayLike) -> NDArray[np.bool_]:
        """Which of these samples are among them: bool [n]."""
        number = (np.asarray(shard, np.int64) << 32) | np.asarray(row, np.int64)
        if not len(self._numbers):
            return np.zeros(number.shape, bool)
        at = np.minimum(np.searchsorted(self._numbers, number), len(self._numbers) - 1)
        return self._numbers[at] == number


class Removals(NamedTuple):
    """Samples of a data set that were removed on request."""

    places: NDArray[np.int64]  # shard, row [n, 2]
    count: int
    digest: Callable[[int], str]  # of the first so many, in the order of removal


@dataclass(frozen=True)
class Source:
    """A data set and what of it is read. `of` makes one from a manifest; the rest is for streams without a folder."""

    name: str
    counts: Ints  # int64 [S], samples of each shard
    digest: Callable[[int], str]  # identity of the first n shards
    weight: float = 1.0
    selection: Selection | None = None
    removed: Removals | None = None

    @classmethod
    def of(
        cls,
        manifest: Manifest,
        *,
        where: str = "",
        weight: float = 1.0,
        name: str | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Source:
        """A manifest's samples, those for which `where` holds, without those in its tombstones file."""
        tombstones = Tombstones.of(manifest)
        return cls(
            name=name or str(manifest.root),
            counts=manifest.counts,
            digest=partial(_digest, manifest),
            weight=weight,
            selection=select_rows(manifest, where, progress=progress) if where.strip() else None,
            removed=Removals(tombstones.places(manifest.urls), tombstones.count, tombstones.digest)
            if tombstones.count
            else None,
        )

    @property
    def selected(self) -> Ints:
        """Samples of each shard that are read: int64 [S]."""
        return self.counts if self.selection is None else self.selection.counts

    def rows(self, shard: Ints, rank: Ints) -> Ints:
        """Row of the `rank`-th sample that is read of each shard: int64 [n]."""
        return rank if self.selection is None else self.selection.select(shard, rank)


@dataclass(frozen=True)
class Pool:
    """The samples of one data set that a substitute may be drawn from, numbered from 0 on."""

    sequence: Sequential
    source: Source
    first: int  # number of the data set's first shard

    @property
    def samples(self) -> int:
        return self.sequence.samples

    def locate(self, numbers: ArrayLike) -> tuple[Ints, Ints]:
        """(shard int64 [n], row int64 [n]) of each number int64 [n] below `samples`."""
        shard, rank = self.sequence.locate(numbers)
        return shard + self.first, self.source.rows(shard, rank)


def honoured(source: Source) -> tuple[int, str]:
    """Count and digest of a data set's tombstones."""
    return (source.removed.count, source.removed.digest(source.removed.count)) if source.removed else (0, "")


def _digest(manifest: Manifest, shards: int) -> str:
    if shards == len(manifest.counts):
        return manifest.digest
    return dataset_digest(manifest.urls[:shards], manifest.digests[:shards])
