"""Memory for encoded images, used again and again.

A batch's samples lie in one piece of memory each thread. Fresh memory of that size costs a page fault for every 4 kB,
which is as much as the copy itself. So a piece is taken back when the last array that looks into it is gone, and not
before: arrays keep their owner alive, and the owner's end is told by a weak reference.
"""

from __future__ import annotations

import weakref
from collections import deque

import numpy as np

_KEPT = 8
_ROUND = 1 << 16


class Slabs:
    """`take` gives uint8 [n] that nobody else has; it comes back by itself. Safe between threads."""

    def __init__(self) -> None:
        self._free: deque[np.ndarray] = deque(
            maxlen=_KEPT
        )  # its append is atomic, and a callback may come at any moment

    def take(self, size: int) -> np.ndarray:
        """uint8 [size], contents undefined."""
        slab = None
        for _ in range(len(self._free)):
            try:
                slab = self._free.popleft()
            except IndexError:
                break
            if len(slab) >= size:
                break
            slab = None
        if slab is None:
            slab = np.empty(-(-size // _ROUND) * _ROUND * 5 // 4, np.uint8)
        # Through a memoryview, or NumPy would make its views depend on the slab itself.
        owner = np.frombuffer(slab.data, np.uint8, size) if size else np.empty(0, np.uint8)
        weakref.finalize(owner, self._free.append, slab).atexit = False
        return owner
