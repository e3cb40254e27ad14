"""What the threads of a reader are at, for who waits for them too long.

A thread that turns to a shard says so. One that goes into the compiled loop (native.py) over many samples cannot; the
loop itself notes in a few numbers, its frame, which sample it reads and since when, and looks there whether to go on.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from ..shards.retry import Stopped
from .order import Ints


class Activity:
    """`busy` by thread: (stage "read" for a disk, "cache" or "storage" for a network, shard, since when)."""

    def __init__(self, stop: threading.Event) -> None:
        self.busy: dict[int, tuple[str, int, float]] = {}
        self._loops: dict[int, tuple[Ints, Ints]] = {}  # by thread: shard of each sample, frame
        self._stop = stop

    @contextmanager
    def looping(self, shards: Ints) -> Iterator[Ints]:
        """This thread runs the compiled loop over samples of these shards int64 [n]; gives its frame, int64 [4].

        Raises Stopped, before or after, when the loop is not wanted any more.
        """
        me, frame = threading.get_ident(), np.array([0, time.monotonic_ns(), 0, 0], np.int64)
        self._loops[me] = shards, frame
        self.busy[me] = ("read", int(shards[0]), time.monotonic())
        try:
            if self._stop.is_set():
                raise Stopped
            yield frame
            if frame[3]:
                raise Stopped
        finally:
            del self._loops[me]

    def now(self) -> list[tuple[str, int, float]]:
        """What each thread is at, as in `busy`; of a compiled loop, the sample that it is reading."""
        found = []
        for thread, entry in list(self.busy.items()):
            if (loop := self._loops.get(thread)) is not None:
                shards, frame = loop
                entry = ("read", int(shards[frame[0]]), frame[1] / 1e9)
            found.append(entry)
        return found

    def call_off(self) -> None:
        """Let the loops end before their next samples; whoever sets `stop` calls it afterwards."""
        for _, frame in list(self._loops.values()):
            frame[3] = 1
