"""How a process reads its shards: bytes by where they lay, the network's troubles by kind, what the cache spared.

Parts keep plain numbers and know nothing of who shows them; here the numbers of one reader are put together.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..shards.remote import client_for
from ..shards.retry import KINDS, kind_of

if TYPE_CHECKING:
    from .fetch import Fetcher


@dataclass
class FetchStats:
    """Counters since the start. `seconds` are of calls to storage, those that ran side by side counted once."""

    local_bytes: int = 0  # from local shards
    cached_bytes: int = 0  # from the node's cache
    remote_bytes: int = 0  # in ranges
    seconds: float = 0.0
    refetched: int = 0  # samples whose bytes were wrong at first and right when they were fetched again
    # Of a batch's turns to remote shards, those that found the shard in the cache, and those that did not.
    cache_hits: int = 0
    cache_misses: int = 0


@dataclass
class CacheUse:
    """A node's cache as one process uses it; bytes."""

    hits: int = 0
    misses: int = 0
    fetched_bytes: int = 0  # by this process
    evicted_bytes: int = 0
    size: int = 0  # of the whole cache, when room was last made in it
    limit: int = 0


@dataclass
class RemoteUse:
    """What was asked of servers."""

    requests: int = 0
    throttled_seconds: float = 0.0  # that reads waited for their turn at a host
    retries: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))  # by kind of trouble


@dataclass
class Usage:
    """Counters of one reader since it was made, `cache` where it has one; `remote`, where its shards lie behind a network,
    are those of the process' client, which its other readers share."""

    local_bytes: int = 0
    cached_bytes: int = 0
    remote_bytes: int = 0
    refetched: int = 0
    remote: RemoteUse | None = None
    cache: CacheUse | None = None


def usage(fetcher: Fetcher) -> Usage:
    """The counters as they are now."""
    stats, cache = fetcher.stats, fetcher.cache
    found = Usage(stats.local_bytes, stats.cached_bytes, stats.remote_bytes, stats.refetched)
    if cache is not None or fetcher.remote:  # something was asked of a network, or will be
        told = client_for(fetcher.policy).stats
        found.remote = RemoteUse(told.requests, told.throttled_seconds)
        for reason, count in told.retries.items():
            found.remote.retries[kind_of(reason)] += count
    if cache is not None:
        own = cache.stats
        found.cache = CacheUse(
            stats.cache_hits, stats.cache_misses, own.bytes, own.evicted_bytes, own.used, cache.budget
        )
    return found
