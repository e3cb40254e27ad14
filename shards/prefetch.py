"""Shards fetched before they are needed, by a few threads that follow the order of the stream.

The order is known, so there is nothing to guess: `upcoming()` names the shards from now on, soonest first, and each
thread takes the first one that is neither here nor on its way. Room is claimed in that order too, though servers answer
in any: else a shard that is needed later takes the last room, and gives it up again for the sooner one. A shard that
cannot be fetched is left alone for a while: whoever needs it reads it remotely, and is told then. One prefetcher for
each node is enough.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice

from .blob import Blob
from .cache import Cache
from .claim import Claim
from .errors import GristmillError
from .retry import Stopped

_LOOK = 1.0  # seconds after which threads look again without being woken
_LATER = 0.5  # seconds for which a shard that found no room, or is another process', is left alone
_TURN = 1.0  # seconds to wait for those that are needed sooner to claim their room
_MUCH_LATER = 60.0  # the same after an error
_FAR = 4096  # shards looked ahead, at most


@dataclass
class PrefetchStats:
    """Counters since the start. `in_flight` is of now; `last_error` is for people."""

    fetched: int = 0
    failed: int = 0
    left: int = 0  # not fetched for now: no room, or somebody else is at it
    in_flight: int = 0
    last_error: str = ""


class Prefetcher:
    """Background threads that fill a cache. A context manager; `close` ends fetches in progress, which stay resumable.

    `upcoming` is called from the threads, one at a time, and gives keys; `open` makes a key's blob. In a forked child it
    is closed from the start.
    """

    def __init__(
        self, cache: Cache, upcoming: Callable[[], Iterable[str]], open: Callable[[str], Blob], *, threads: int = 2
    ) -> None:
        self.cache, self.stats = cache, PrefetchStats()
        self._upcoming, self._open = upcoming, open
        self._stop, self._pid = threading.Event(), os.getpid()
        self._wake = threading.Condition()
        self._busy: set[str] = set()
        self._asking: dict[str, float] = {}  # keys that have not claimed their room yet, and when they are needed
        self._later: dict[str, tuple[float, str]] = {}
        self._blobs: dict[
            str, Blob
        ] = {}  # of shards left for later, so that they need not be asked again what they are
        self._crash: BaseException | None = None
        self._threads = [
            threading.Thread(target=self._run, name=f"gristmill-prefetch-{number}", daemon=True)
            for number in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def poke(self) -> None:
        """The stream went on: look again now. Raises what a thread died of, such as an error of `upcoming`."""
        if os.getpid() != self._pid:
            return
        if self._crash is not None:
            raise self._crash
        with self._wake:
            self._wake.notify_all()

    def close(self) -> None:
        """End the threads. Safe to call again."""
        if os.getpid() != self._pid:
            return
        self._stop.set()
        with self._wake:
            self._wake.notify_all()
        for thread in self._threads:
            thread.join()

    def __enter__(self) -> Prefetcher:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                key = self._next()
                if key is not None:
                    self._fetch(key)
        except Stopped:
            pass
        except BaseException as error:
            self._crash = error

    def _next(self) -> str | None:
        """The next key to fetch, now marked as being fetched; None after waiting in vain."""
        with self._wake:
            now = time.monotonic()
            self._later = {key: left for key, left in self._later.items() if left[0] > now}
            for key in islice(self._upcoming(), _FAR):
                if key in self._busy or key in self.cache:
                    continue
                left = self._later.get(key)
                if left is None:
                    self._busy.add(key)
                    self._asking[key] = self.cache.next_use(key)
                    self.stats.in_flight = len(self._busy)
                    return key
                if left[1] == "no room":  # then there is none for what is needed later
                    break
            if not self._stop.is_set():
                self._wake.wait(min([_LOOK, *(left[0] - now for left in self._later.values())]))
        return None

    def _fetch(self, key: str) -> None:
        word, pause, fetched = "failed", _MUCH_LATER, False
        try:
            blob = self._blobs.pop(key, None) or self._open(key)
            claim = self._claim(key, blob)
            if isinstance(claim, Claim):
                lease = self.cache.complete(claim, blob, self._stop)
                fetched = lease is not None
                if lease is not None:
                    lease.release()
            else:
                word, pause = claim, _LATER
                if len(self._blobs) < _FAR:
                    self._blobs[key] = blob
        except GristmillError as error:
            self.stats.last_error = str(error)
        except Stopped:
            word = "stopped"
            raise
        finally:
            with self._wake:
                self._busy.discard(key)
                self.stats.in_flight = len(self._busy)
                self.stats.fetched += fetched
                if not fetched:
                    self._later[key] = time.monotonic() + pause, word
                    self.stats.left += word not in ("failed", "stopped")
                    self.stats.failed += word == "failed"

    def _claim(self, key: str, blob: Blob) -> Claim | str:
        """Claim room, after those who are needed sooner, unless they take too long."""
        try:
            if (look := getattr(blob, "look", None)) is not None:
                look(self._stop)
            with self._wake:
                mine = self._asking[key]
                self._wake.wait_for(lambda: all(mine <= other for other in self._asking.values()), _TURN)
            return self.cache.claim(key, blob, needed=mine, stop=self._stop)
        finally:
            with self._wake:
                del self._asking[key]
                self._wake.notify_all()
