"""Exactly once, at sizes that nobody can read through: an epoch's order taken apart, and thousands of ranks' batches.

`prove` goes along the order's construction (pipeline/order.py). What is a table is checked whole: lanes tile the epoch,
windows tile the lanes, the permutation of the shards has each shard once. What is a function is checked on some whole
windows, every sample of each: a keyed Feistel network is a bijection whatever its keys are, for each of its rounds can
be undone. `Cluster` asks the loader's own code which positions each rank reads, without starting its threads.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ...pipeline.ahead import Ahead
from ...pipeline.loader import Loader
from ...pipeline.order import Ints, Locator, Order, _Cut  # pyright: ignore[reportPrivateUsage]
from ...shards.errors import GristmillError


class NotOnceError(GristmillError):
    """Some sample would be read twice or not at all, or ranks would read something else than one process does."""


class _Slice(Loader):
    """A loader that only knows which positions are its own."""

    def __init__(self, rank: int, world: int, batch: int) -> None:
        self._rank, self._local, self._stop = rank, batch // world, None


@dataclass(frozen=True)
class Cluster:
    """`ranks` processes, `per_node` of them on a node, that share batches of `batch` samples."""

    ranks: int
    batch: int
    per_node: int = 8

    def __post_init__(self) -> None:
        if self.batch % self.ranks or self.ranks % self.per_node:
            raise NotOnceError(
                f"{self.batch} samples and {self.per_node} ranks a node do not divide {self.ranks} ranks"
            )

    @property
    def nodes(self) -> int:
        return self.ranks // self.per_node

    @cached_property
    def _slices(self) -> list[_Slice]:
        return [_Slice(rank, self.ranks, self.batch) for rank in range(self.ranks)]

    def of_rank(self, rank: int, position: int) -> Ints:
        """Positions int64 [batch / ranks] that a rank reads of the batch that begins at `position`."""
        return self._slices[rank]._positions(position)

    def union(self, position: int) -> Ints:
        """Those of all ranks, in their order: int64 [batch]."""
        return np.concatenate([one._positions(position) for one in self._slices])


def prove(order: Order, epoch: int, windows: int) -> dict[str, int]:
    """That every sample of an epoch has one position, as far as the head of this file says; `windows` are read whole.

    Returns what was checked. Raises NotOnceError.
    """
    lanes, lane = order._lanes(), np.arange(order.lanes)
    lengths = order.samples // order.lanes + (lane < order.samples % order.lanes)  # positions q with q % lanes == lane
    _tiles(lanes, order.lanes, order.samples, "lanes")
    _require(
        np.array_equal(lanes.length(lane), lengths), "a lane is longer than the number of its positions, or shorter"
    )
    number = 0
    for total, times in zip(*np.unique(lengths[lengths > 0], return_counts=True), strict=True):
        parts = -(-int(total) // order.window)
        cut = _Cut(np.asarray(total), np.asarray(parts))
        _tiles(cut, parts, int(total), "windows of a lane")
        _require(int(cut.length(np.arange(parts)).max()) <= 1 << order._bits, "a window is wider than its permutation")
        number += parts * int(times)
    axis = order._axis(epoch)
    found = np.bincount(axis.shards, minlength=len(order.counts))
    _require(len(found) == len(order.counts) and bool((found == 1).all()), "a shard is laid out twice, or not at all")
    _require(
        np.array_equal(axis.shards[axis.places], np.arange(len(order.counts))), "a shard is not where it is sought"
    )
    _require(np.array_equal(np.diff(axis.ends, prepend=0), order.counts[axis.shards]), "shards do not lie end to end")
    read = 0
    for one, off in _some_windows(order, windows):
        position = epoch * order.samples + off * order.lanes + one
        shard, row = order.locate(position)
        place = axis.ends[axis.places[shard]] - order.counts[shard] + row
        expected = int(lanes.start(np.asarray(one))) + off
        _require(np.array_equal(np.sort(place), expected), f"window at {off[0]} of lane {one} is no permutation")
        _require(
            np.array_equal(order.find(shard, row, epoch), position), f"window at {off[0]} of lane {one}: find differs"
        )
        read += len(off)
    return {"lanes": order.lanes, "windows": number, "shards": len(order.counts), "read_whole": read}


def _some_windows(order: Order, count: int) -> Iterator[tuple[int, Ints]]:
    """(lane, all offsets of one of its windows), evenly spread; the first and the last are among them."""
    lanes = np.linspace(0, min(order.lanes, order.samples) - 1, count).astype(int)
    for number, lane in enumerate(lanes.tolist()):
        total = int(order._lanes().length(np.asarray(lane)))
        cut = _Cut(np.asarray(total), np.asarray(-(-total // order.window)))
        window = np.asarray(number * (int(cut.parts) - 1) // max(1, count - 1))
        yield lane, int(cut.start(window)) + np.arange(int(cut.length(window)))


def _tiles(cut: _Cut, parts: int, total: int, what: str) -> None:
    """Pieces begin where those before them end, cover everything, and are found again from both of their ends."""
    part = np.arange(parts)
    start, length = cut.start(part), cut.length(part)
    ends = start + length
    _require(
        int(start[0]) == 0 and int(ends[-1]) == total and np.array_equal(start[1:], ends[:-1]), f"{what} leave gaps"
    )
    full = length > 0
    same = np.array_equal(cut.part(start[full]), part[full]) and np.array_equal(cut.part(ends[full] - 1), part[full])
    _require(same, f"{what} are not found by what lies in them")


def batch(stream: Locator, order: Order, cluster: Cluster, position: int) -> tuple[Ints, Ints]:
    """(shard, row) of a whole batch, in the order of the ranks. Raises NotOnceError.

    Checked: the ranks' positions are one process's, its samples differ from each other within an epoch, and each is
    sought by the inverse at the very position that gave it, so that no other position of the epoch reads it.
    """
    positions = cluster.union(position)
    once = np.array_equal(positions, np.arange(position, position + cluster.batch))
    _require(once, f"the ranks do not share the batch at {position} exactly")
    shard, row = stream.locate(positions)
    epochs = positions // order.samples
    for epoch in np.unique(epochs).tolist():
        here = epochs == epoch
        _require(
            np.array_equal(order.find(shard[here], row[here], epoch), positions[here]),
            f"a sample of the batch at {position} has another position too",
        )
        _require(
            len(np.unique((shard[here] << 32) | row[here])) == int(here.sum()), f"the batch at {position} repeats one"
        )
    return shard, row


def as_ranks_read(stream: Locator, cluster: Cluster, position: int, batches: int, ranks: Ints) -> int:
    """Successive batches as these ranks' readers look them up, against one process; how many samples. NotOnceError."""
    starts = [position + number * cluster.batch for number in range(batches)]
    whole = [stream.locate(np.arange(start, start + cluster.batch)) for start in starts]
    local = cluster.batch // cluster.ranks
    for rank in ranks.tolist():
        ahead, mine = Ahead(stream), slice(rank * local, (rank + 1) * local)
        for start, (shard, row) in zip(starts, whole, strict=True):
            found = ahead.locate(cluster.of_rank(rank, start))
            same = np.array_equal(found[0], shard[mine]) and np.array_equal(found[1], row[mine])
            _require(same, f"rank {rank} reads something else at {start} than one process does")
    return len(ranks) * batches * local


def everything(stream: Locator, order: Order, cluster: Cluster, start: int = 0) -> int:
    """Whole batches from `start` on to the end of its epoch, every position of them; how many samples. NotOnceError."""
    stop = (order.epoch(start) + 1) * order.samples
    seen = np.zeros(order.samples, np.int64)
    base = np.cumsum(order.counts) - order.counts
    for position in range(start, stop, cluster.batch):
        positions = cluster.union(position)
        shard, row = stream.locate(positions[positions < stop])
        np.add.at(seen, base[shard] + row, 1)
    early = order.locate(np.arange(order.epoch(start) * order.samples, start)) if start % order.samples else None
    if early is not None:
        np.add.at(seen, base[early[0]] + early[1], 1)
    twice, never = int((seen > 1).sum()), int((seen == 0).sum())
    _require(not twice and not never, f"of {order.samples} samples {twice} are read more than once and {never} never")
    return order.samples


def _require(good: bool, problem: str) -> None:
    if not good:
        raise NotOnceError(problem)
