"""Work on threads whose results come back in the order of what was put in, a few ahead of who takes them at most.

What is made ahead lies in memory until it is taken, so that `map` over 100,000 shards, which submits them all, will not do.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def cores() -> int:
    """Threads for work that keeps a core busy: one for each core that this process may use, 16 at most."""
    return min(16, len(os.sched_getaffinity(0)))


def in_order(work: Callable[[Item], Result], items: Iterable[Item], threads: int, name: str) -> Iterator[Result]:
    """Results of `work` in the order of the items, made on threads, at most two a thread ahead of who takes them.

    `name` is what the threads are called. What `work` raises comes in its result's turn.
    """
    waiting: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix=name) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(work, item))
                if len(waiting) > 2 * threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for job in waiting:
                job.cancel()
