"""When each shard is needed next, for a cache that gives up what is needed last and fetches what is needed soonest.

The order is known, so this is no guess. A shard is open while one of the windows that it lies in is (order.py): between
two positions that are worked out for all shards of an epoch at once. A mixture runs through each data set's order at
the pace of its weight. Until shards that were taken up in mid-epoch have an epoch of their own the windows of two orders
interleave; there, the next positions are simply looked up. Only the cache goes by this: what is read does not depend on it.
"""

from __future__ import annotations

import threading
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from .mixing import proportions
from .order import Ints, Locator, Order, Sequential
from .stream import Stream

AHEAD = 1 << 17  # positions that are looked up where they cannot be worked out
_KEPT = 2  # epochs of each order, whose spans are looked at: the one that is open and the next


class Foresight:
    """Next uses of the shards of an order as seen from the position last given to `go`. Safe between threads.

    `lanes`: those that this node reads (of one data set that is not mixed), if it is not all of them.
    """

    def __init__(self, order: Locator, shards: int, lanes: Ints | None = None) -> None:
        self.order, self.shards, self.lanes = order, shards, lanes
        self.position = 0
        self._at = -1
        self._next: NDArray[np.float64] = np.zeros(shards)
        self._soonest: Ints = np.zeros(0, np.int64)
        orders = len(order.sources) if isinstance(order, Stream) else 1
        self._spans = lru_cache(maxsize=_KEPT * orders)(self._open_spans)
        self._lock = threading.Lock()

    def go(self, position: int) -> None:
        """The stream is at this position now."""
        self.position = position

    def next_use(self, shard: int) -> float:
        """Position at which the shard is needed next, not before the present one; infinity for not in sight."""
        return float(self._look()[0][shard])

    def soonest(self) -> Ints:
        """Shards that are needed, soonest first: int64 [n]."""
        return self._look()[1]

    def _look(self) -> tuple[NDArray[np.float64], Ints]:
        with self._lock:
            position = self.position
            if position != self._at:
                self._next = self._compute(position)
                order = np.argsort(self._next, kind="stable")
                self._soonest = order[np.isfinite(self._next[order])]
                self._at = position
            return self._next, self._soonest

    def _compute(self, position: int) -> NDArray[np.float64]:
        order = self.order
        if isinstance(order, Order):
            return self._of(order, position)
        if isinstance(order, Sequential):
            start = np.cumsum(order.counts) - order.counts
            now = position % order.samples
            past = start + order.counts <= now
            ahead = np.where(past, start + order.samples, np.maximum(start, now)) - now
            return np.where(order.counts > 0, position + ahead, np.inf)
        found = self._of_stream(order, position) if isinstance(order, Stream) else None
        return self._looked_up(position) if found is None else found

    def _of_stream(self, stream: Stream, position: int) -> NDArray[np.float64] | None:
        found = np.full(self.shards, np.inf)
        counts = stream.mixing.counts(position).tolist()
        weights = stream.cursor.mixture[-1][1] if stream.cursor.mixture else (1.0,)
        parts = proportions(weights, len(stream.sources))
        for grown, part, count, first in zip(stream.orders, parts, counts, stream.first.tolist(), strict=False):
            if part:
                if (ahead := grown.ahead(count)) is None:
                    return None
                own = count + ahead
                here = slice(first, first + len(grown.latest.counts))
                found[here] = position + (self._of(grown.latest, own, ahead) - own) * (sum(parts) / part)
        return found

    def _of(self, order: Order, position: int, ahead: int = 0) -> NDArray[np.float64]:
        """position: the order's own, which is `ahead` of the stream's."""
        found = np.full(len(order.counts), np.inf)
        epoch = position // order.samples
        for e in (epoch, epoch + 1):
            shard, first, last = self._spans(order, e, ahead)
            open_ = last >= position
            np.minimum.at(found, shard[open_], np.maximum(first[open_], position))
        return found

    def _open_spans(self, order: Order, epoch: int, ahead: int) -> tuple[Ints, Ints, Ints]:
        shard, lane, first, last = order.open_spans(epoch)
        if self.lanes is None:
            return shard, first, last
        # A node's lanes go by the stream's position. An epoch that is no whole number of turns through the lanes begins
        # the next one in another lane.
        turned = (lane + epoch * order.samples - ahead) % order.lanes
        mine = np.isin(turned, self.lanes) | (lane < 0)
        return shard[mine], first[mine], last[mine]

    def _looked_up(self, position: int) -> NDArray[np.float64]:
        found = np.full(self.shards, np.inf)
        shard, _ = self.order.locate(np.arange(position, position + min(AHEAD, 2 * self.order.samples)))
        which, first = np.unique(shard, return_index=True)
        found[which] = position + first
        return found
