"""One data set's order while shards are appended to it, with a state of one line for each time that it grew.

Up to the position at which new shards are taken up the order stays as it was, bit for bit. If an epoch ends there, the
next one runs over all shards. If one is open, it is finished together with the newcomers: what is left of it and an
order over the new shards alone are dealt out in proportion, spread as evenly as integers allow (a Bresenham line), so
that this epoch too shows every sample exactly once, the new ones included. All of it is a pure function of
(counts, seed, lanes, window, taken, position): nothing has to be remembered of what was already read.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike

from .order import Ints, Order, OrderError, Sequential, derived, share

Taken = tuple[tuple[int, int], ...]

_NEWCOMERS = 2  # purpose of the seed of an order over new shards alone


@dataclass(frozen=True)
class _Era:
    """Epochs over the same shards, from `start` on, the first of them number `epoch`."""

    start: int
    epoch: int
    order: Order

    @property
    def ahead(self) -> int:
        """How far the order's own position is ahead of the stream's."""
        return self.epoch * self.order.samples - self.start

    def locate(self, positions: Ints) -> tuple[Ints, Ints]:
        return self.order.locate(positions + self.ahead)

    def opened(self, position: int) -> tuple[int, int]:
        """(number of the epoch that is open or begins at this position, samples left of one that is open)."""
        done, inside = divmod(position - self.start, self.order.samples)
        return self.epoch + done, -inside % self.order.samples


@dataclass(frozen=True)
class _Bridge:
    """The rest of an epoch, and the newcomers dealt out among it, from `start` up to `stop`."""

    start: int
    stop: int
    epoch: int
    old: _Era | _Bridge
    new: Order | None  # over the new shards alone; None if they are empty
    first: int  # number of the first of them

    def locate(self, positions: Ints) -> tuple[Ints, Ints]:
        if self.new is None:
            return self.old.locate(positions)
        slot, whole = positions - self.start, self.stop - self.start
        before = share(slot, self.new.samples, whole)
        fresh = share(slot + 1, self.new.samples, whole) > before
        shard, row = np.empty_like(slot), np.empty_like(slot)
        shard[fresh], row[fresh] = self.new.locate(before[fresh] + self.epoch * self.new.samples)
        shard[fresh] += self.first
        shard[~fresh], row[~fresh] = self.old.locate(self.start + (slot - before)[~fresh])
        return shard, row

    def opened(self, position: int) -> tuple[int, int]:
        return self.epoch, self.stop - position


class Grown:
    """The shuffled stream over shards of `counts` samples, of which only the first ones were there from the start.

    counts int64 [S]. taken: (from which position, number of shards), the first from 0 on, ascending in both; without
    it all shards are there from the start, and this is `Order(counts, seed, lanes, window)`. OrderError otherwise.
    """

    def __init__(
        self, counts: ArrayLike, seed: int, lanes: int = 64, window: int = 65536, taken: Taken | None = None
    ) -> None:
        self.counts = np.asarray(counts, np.int64)
        self.taken: Taken = ((0, len(self.counts)),) if taken is None else taken
        starts, shards = [start for start, _ in self.taken], [number for _, number in self.taken]
        if not starts or starts[0] != 0 or starts != sorted(starts) or shards != sorted(set(shards)):
            raise OrderError(f"taken: {self.taken} must begin at position 0 and ascend, in positions and in shards")
        if shards[-1] > len(self.counts):
            raise OrderError(f"taken: {shards[-1]} shards were taken up, but the data set has {len(self.counts)}")
        self.seed, self.lanes, self.window = seed, lanes, window
        self.samples = int(self.counts[: shards[-1]].sum())
        self._segments: list[_Era | _Bridge] = [_Era(0, 0, self._order(0, shards[0], seed))]
        for (start, number), before in zip(self.taken[1:], shards, strict=False):
            self._take_up(start, before, number)
        self._starts = np.array([segment.start for segment in self._segments], np.int64)

    def locate(self, positions: ArrayLike) -> tuple[Ints, Ints]:
        """(shard int64 [n], row int64 [n]) of each position int64 [n]; rows count from 0 inside their shard."""
        positions = np.asarray(positions, np.int64)
        if len(self._segments) == 1 or (positions.size and positions.min() < 0):
            return self._segments[0].locate(positions)  # which refuses what lies before the first
        shard, row = np.empty_like(positions), np.empty_like(positions)
        which = np.searchsorted(self._starts, positions, side="right") - 1
        for number in np.unique(which):
            here = which == number
            shard[here], row[here] = self._segments[number].locate(positions[here])
        return shard, row

    @property
    def latest(self) -> Order:
        """The order over all shards that are taken up."""
        return self._last.order

    def ahead(self, position: int) -> int | None:
        """How far `latest` is ahead of this position, where it is all that is read from there on; None before that."""
        return self._last.ahead if position >= self._last.start else None

    def epoch(self, position: int) -> int:
        """How often the whole data set, as far as it was there, was read before this position."""
        return self._segment(position).opened(position)[0]

    def next_epoch(self, position: int) -> int:
        """The first position from this one on at which an epoch begins."""
        while True:
            segment = self._segment(position)
            end = position + segment.opened(position)[1]
            later = self._starts[self._starts > segment.start]
            if not len(later) or end <= later[0]:
                return end
            position = int(later[0])  # the epoch grows on the way, and ends later

    def pool(self, position: int) -> Sequential:
        """What a substitute at this position is drawn from: the samples that are there by then."""
        return self._pools[max(i for i, (start, _) in enumerate(self.taken) if start <= position)]

    @cached_property
    def _pools(self) -> list[Sequential]:
        return [Sequential(self.counts[:number]) for _, number in self.taken]

    @property
    def _last(self) -> _Era:
        segment = self._segments[-1]
        assert isinstance(segment, _Era)  # behind every bridge there is one
        return segment

    def _order(self, first: int, stop: int, seed: int) -> Order:
        return Order(self.counts[first:stop], seed, self.lanes, self.window)

    def _segment(self, position: int) -> _Era | _Bridge:
        return self._segments[int(np.searchsorted(self._starts, position, side="right")) - 1]

    def _take_up(self, start: int, before: int, number: int) -> None:
        while self._segments[-1].start > start:  # what was to follow the bridge that is open now
            self._segments.pop()
        old = self._segments[-1]
        epoch, left = old.opened(start)
        whole = self._order(0, number, self.seed)
        if left:
            news = int(self.counts[before:number].sum())
            order = self._order(before, number, derived(self.seed, before, _NEWCOMERS)) if news else None
            self._segments.append(_Bridge(start, start + left + news, epoch, old, order, before))
            start, epoch = start + left + news, epoch + 1
        self._segments.append(_Era(start, epoch, whole))
