"""A cached shard in use, and what a cache counts."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from .blob import read_at
from .entries import Hold


@dataclass
class CacheStats:
    """Counters of this process. `used` is what the whole folder took, with what was set aside, when last looked at."""

    hits: int = 0
    misses: int = 0
    fetched: int = 0  # shards
    bytes: int = 0  # fetched
    resumed_bytes: int = 0  # not fetched again, for a killed fetch had left them
    evictions: int = 0
    evicted_bytes: int = 0
    waits: int = 0  # for another process' fetch
    wait_seconds: float = 0.0
    corrupt: int = 0  # found damaged, dropped
    replaced: int = 0  # found to be of another object, dropped
    fallbacks: Counter[str] = field(
        default_factory=Counter
    )  # shard left to remote reads: busy, too large, no room, disk
    used: int = 0


class Lease:
    """A cached shard in use: nobody removes it until `release`. A context manager. Not to be taken through a fork."""

    def __init__(self, path: Path, size: int, hold: Hold) -> None:
        self.path, self.size = path, size
        self.hold = hold

    def read(self, offset: int, length: int) -> bytes:
        """Bytes [offset, offset + length), fewer only at the end. OSError as the file system gives it."""
        return read_at(self.hold.handle, offset, length)

    def release(self) -> None:
        self.hold.close()

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()
