"""A bounded queue between two threads of the loader: in order, with the waiting on both sides counted.

The producer asks for its turn before it begins (a credit an item), so that what is in the works counts as well and a
burst does not drain the buffer at its end. An item that ends the stream, such as an error, stays at the head: whoever
comes for it gets it again, until a restart. What was begun before a restart is dropped when it arrives.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from typing import Generic, TypeVar

Item = TypeVar("Item")
_TICK = 1.0  # seconds after which a waiting side books its wait, so that the metrics show a stall while it lasts


class Buffer(Generic[Item]):
    """Up to `capacity` items. One producer, one consumer. Waits and depth are plain numbers."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.starved = self.blocked = self.dwell = 0.0  # seconds
        self.generation = 0
        self.closed = False
        self._items: deque[tuple[Item, float]] = deque()
        self._ended = False
        self._changed = threading.Condition()

    @property
    def depth(self) -> int:
        return len(self._items)

    def turn(self) -> int | None:
        """Producer: wait for room; the generation to work for, None if closed."""
        with self._changed:
            while not self.closed:
                full = len(self._items) >= self.capacity
                if not self._ended and not full:
                    return self.generation
                waited = self._wait(_TICK)
                self.blocked += waited if full and not self._ended else 0.0
        return None

    def put(self, generation: int, item: Item, *, last: bool = False) -> None:
        """Producer: add an item. `last`: nothing comes behind it."""
        with self._changed:
            if generation == self.generation and not self.closed:
                self._items.append((item, time.monotonic()))
                self._ended = last
            self._changed.notify_all()

    def first(self, seconds: float) -> Item | None:
        """Consumer: the head, waiting so long for it at most; None if there is none by then, or closed."""
        until = time.monotonic() + seconds
        with self._changed:
            while not self._items and not self.closed:
                left = until - time.monotonic()
                if left <= 0:
                    return None
                self.starved += self._wait(min(left, _TICK))
            return self._items[0][0] if self._items and not self.closed else None

    def pop(self) -> None:
        """Consumer: done with the head."""
        with self._changed:
            if self._items:
                self.dwell += time.monotonic() - self._items.popleft()[1]
            self._changed.notify_all()

    def restart(self, generation: int) -> None:
        """Drop everything; from now on only items of this generation are taken."""
        with self._changed:
            self.generation, self._ended = generation, False
            self._items.clear()
            self._changed.notify_all()

    def close(self) -> None:
        """Let everybody go."""
        with self._changed:
            self.closed = True
            self._items.clear()
            self._changed.notify_all()

    def _wait(self, seconds: float) -> float:
        begin = time.monotonic()
        self._changed.wait(seconds)
        return time.monotonic() - begin
