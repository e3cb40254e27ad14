"""What an order answers, asked for many batches at once.

An order answers a few thousand positions in a fraction of the time that it takes for as many in small batches: its cost
is in NumPy's calls, and in walks of which the longest of a block decides. A rank reads batches that follow each other
at a fixed distance (its own slice of every global batch), so the batches to come are known as soon as two were read.
"""

from __future__ import annotations

import numpy as np

from .order import Ints, Locator

BLOCK = 8192  # positions


class Ahead:
    """`locate` gives what `order.locate` gives. Not safe between threads."""

    def __init__(self, order: Locator) -> None:
        self._order = order
        self._last = -1  # where the batch before began
        self._known: dict[tuple[int, int], tuple[Ints, Ints]] = {}  # by (first position, positions)

    def locate(self, positions: Ints) -> tuple[Ints, Ints]:
        """(shard int64 [n], row int64 [n]) of each position int64 [n]."""
        n = len(positions)
        if not 0 < n < BLOCK or (np.diff(positions) != 1).any():
            return self._order.locate(positions)
        first, before = int(positions[0]), self._last
        self._last = first
        found = self._known.pop((first, n), None)
        if found is None:
            distance = first - before if 0 <= before <= first - n else n
            # Not over several epochs: each has keys and a table of its own.
            starts = first + distance * np.arange(max(1, min(BLOCK // n, self._order.samples // distance)))
            shards, rows = self._order.locate((starts[:, None] + np.arange(n)).ravel())
            batches = zip(starts.tolist(), shards.reshape(-1, n), rows.reshape(-1, n), strict=True)
            self._known = {(start, n): (shard, row) for start, shard, row in batches}
            found = self._known.pop((first, n))
        return found
