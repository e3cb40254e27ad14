"""A few daemon threads that do short jobs, and that can be left behind.

A read from storage that hangs cannot be called off: its thread sits in the kernel until the storage answers. The
standard library's executors join their threads when the interpreter ends, and would hang with it. These are daemons:
`close` waits a while, then gives up on those that are still inside a call. Whoever waits for jobs is let go at once.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from queue import SimpleQueue

from ..shards.retry import Stopped

Job = Callable[[], None]


class _Round:
    """Jobs that somebody waits for together."""

    def __init__(self, jobs: int) -> None:
        self.left = jobs
        self.error: BaseException | None = None


class Crew:
    """`threads` daemon threads, begun with the first job. Useless in a forked child, where they do not exist."""

    def __init__(self, threads: int, name: str) -> None:
        self.size, self.name = threads, name
        self._jobs: SimpleQueue[tuple[Job, _Round] | None] = SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._done = threading.Condition()
        self._closed, self._pid = False, os.getpid()

    def run(self, jobs: Sequence[Job]) -> None:
        """Do all jobs and wait for them; raises what one of them raised, and Stopped if the crew is closed meanwhile."""
        if not jobs:
            return
        round_ = _Round(len(jobs))
        with self._done:
            if self._closed:
                raise Stopped
            while len(self._threads) < min(self.size, len(jobs)):
                thread = threading.Thread(target=self._work, name=f"{self.name}-{len(self._threads)}", daemon=True)
                self._threads.append(thread)
                thread.start()
        for job in jobs:
            self._jobs.put((job, round_))
        with self._done:
            while round_.left and not self._closed:
                self._done.wait()
            if round_.left:
                raise Stopped
        if round_.error is not None:
            raise round_.error

    def close(self, seconds: float) -> bool:
        """Send everybody home; False if some thread did not come back in time and was left behind."""
        if os.getpid() != self._pid:
            return True
        with self._done:
            self._closed = True
            self._done.notify_all()
        for _ in self._threads:
            self._jobs.put(None)
        until = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def _work(self) -> None:
        while (item := self._jobs.get()) is not None:
            job, round_ = item
            error: BaseException | None = None
            if not self._closed:
                try:
                    job()
                except BaseException as failure:
                    error = failure
            with self._done:
                round_.left -= 1
                round_.error = round_.error or error
                if not round_.left:
                    self._done.notify_all()
            del item, job, round_, error
