"""A cache for tests, the shards that it may hold, and a look at what it takes."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from pathlib import Path

from gristmill.shards.cache import Cache, Lease
from gristmill.shards.retry import RetryPolicy

SIZE = 100_000
ENTRY = SIZE + 1200  # with its description, and room for a second one while it is renewed
QUICK = RetryPolicy(deadline=15.0, first_pause=0.005, longest_pause=0.05, stall_timeout=1.0, min_rate=1e6)


def content(number: int, size: int = SIZE) -> bytes:
    return (b"%08d" % number) * (size // 8)


def cache_at(folder: Path, entries: float = 10, next_use: Callable[[str], float] = float, **more) -> Cache:
    """Keys are numbers here, and by default a shard is needed at the time of its number."""
    return Cache(folder, int(entries * ENTRY), next_use, **more)


def fetched(lease: Lease | None) -> Lease:
    assert lease is not None
    return lease


def taken(folder: Path) -> int:
    """Bytes of the folder at one moment: under its lock, so that nothing is removed between two looks."""
    with (folder / "lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        total = 0
        for entry in os.scandir(folder):
            try:
                total += entry.stat().st_size
            except FileNotFoundError:  # a fetch that is given up needs no lock to get smaller
                continue
        return total


def flip(cache: Cache, key: str) -> None:
    """Change one byte, and nothing else that could be seen."""
    path = cache.entries.path(key)
    about = path.stat()
    with path.open("r+b") as file:
        file.seek(777)
        byte = file.read(1)
        file.seek(777)
        file.write(bytes([byte[0] ^ 4]))
    os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns))
