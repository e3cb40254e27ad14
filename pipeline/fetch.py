"""Where a shard's bytes come from: a local file, the node's cache, or ranges over the network until it has landed there.

Local and cached shards are read by `preadv` straight into the reader's memory; a few descriptors stay open. A remote
shard is asked for range by range, many at a time, while the prefetcher brings whole shards, soonest first; from the
next batch on it is read from disk. What the network does is the blob's to retry (shards/retry.py); when that gives up,
StorageError ends the read. Another object under an old name is never read: a descriptor stays with the file that was
checked, a quick index is held against the headers of what lies there now, and the storage says when it changed.
"""

from __future__ import annotations

import os
import resource
import threading
import time
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial

from ..shards.addresses import redact
from ..shards.archive import ShardError
from ..shards.blob import Blob, LocalBlob
from ..shards.cache import Cache, Lease
from ..shards.errors import GristmillError
from ..shards.index import sample_shard
from ..shards.mirror import MirroredManifest
from ..shards.places import is_remote
from ..shards.prefetch import Prefetcher
from ..shards.remote import HttpBlob, open_blob
from ..shards.retry import RetryPolicy, Stopped
from ..shards.transfer import Transfer
from ..shards.verify import recheck
from .activity import Activity
from .crew import Crew
from .foresight import Foresight
from .library import Library
from .order import Ints, Locator
from .usage import FetchStats
from .views import CacheConfig

_GAP = 4096  # bytes between two members that are asked for together at least
_REMOTE_SHARE = 8  # of what a blob reads as quickly as it answers: latency costs others too, bandwidth costs money
_OPEN = 256  # descriptors kept, at most; and a quarter of what the process may have
_FAR = 16  # batches for which a cached shard that is not needed stays in use


class DamageError(GristmillError):
    """More damage than a run may read past, or a shard that is missing, unreadable or another one than indexed."""


@dataclass
class Opened:
    """A shard that can be read. `handle` if it is on a disk, else `blob`."""

    shard: int
    handle: int | None = None
    blob: Blob | None = None
    lease: Lease | None = None

    @property
    def gap(self) -> int:
        """Bytes between two members of a remote shard that are read along rather than asked for apart."""
        return max(_GAP, getattr(self.blob, "leap", 1 << 20) // _REMOTE_SHARE)

    def close(self) -> None:
        handle, self.handle = self.handle, None
        if handle is not None:
            os.close(handle)
        if self.lease is not None:
            self.lease.release()


class Fetcher:
    """Opens and reads the shards of a library. A shard must not be dealt with by two threads at once.

    With `cache` remote shards go there, as `order` needs them (`lanes`: those of it that this node reads). `busy` says
    what each thread is doing: (stage, shard, since when), stages being "read" (a disk), "cache", "storage" (a network).
    """

    def __init__(
        self,
        library: Library,
        order: Locator,
        *,
        cache: CacheConfig | None = None,
        policy: RetryPolicy | None = None,
        lanes: Ints | None = None,
    ) -> None:
        self.library = library
        self.policy = policy or RetryPolicy()
        self.stats = FetchStats()
        self.stop = threading.Event()
        self.activity = Activity(self.stop)
        self.busy = self.activity.busy
        self.most_open = min(_OPEN, max(16, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4))
        self.remote = False  # whether a network was asked for anything
        self.cache: Cache | None = None
        self.prefetcher: Prefetcher | None = None
        self._open: dict[int, Opened] = {}  # on a disk
        self._blobs: dict[int, Blob] = {}
        self._checked: dict[int, tuple[int, int, int, int]] = {}
        self._compared: set[int] = set()
        self._lock = threading.Lock()
        self._crew: Crew | None = None
        self._pid = os.getpid()
        self._foresight = Foresight(order, len(library), lanes)
        # Under which the cache knows a shard, for all runs of the node; empty for those that it does not hold.
        places = map(library.place, range(len(library) if cache else 0))
        self._keys = [redact(place) if is_remote(place) else "" for place in places]
        remote = {key: shard for shard, key in enumerate(self._keys) if key}
        if cache is not None and remote:
            self.cache = Cache(cache.folder, cache.bytes, _NextUse(remote, self._foresight))
            self.prefetcher = Prefetcher(
                self.cache,
                partial(self._upcoming, cache.bytes),
                lambda key: self._blob(remote[key]),
                threads=cache.threads,
            )
        _fetchers.add(self)

    def begin(self, shard: int) -> None:
        """This thread turns to a shard: first to its rows, which may come over the network too."""
        manifest, number = self.library.split(shard)
        mirrored = isinstance(manifest, MirroredManifest)
        self.busy[threading.get_ident()] = ("storage" if mirrored else "read", shard, time.monotonic())
        if mirrored:
            manifest.prepare(number, self.stop)

    def open(self, shard: int) -> Opened:
        """The shard, from where it can be read best now. DamageError if it is not there or not the one that was indexed."""
        if (found := self._open.get(shard)) is not None:
            self._count(found)
            return found
        place = self.library.place(shard)
        if not is_remote(place):
            found = self._open_local(shard, place)
        elif (found := self._open_cached(shard)) is None:
            found = self._open_remote(shard)
        self._count(found)
        if found.blob is not None:
            return found
        with self._lock:
            if not self.stop.is_set():
                self._open[shard] = found
                return found
        found.close()
        raise Stopped

    def _count(self, found: Opened) -> None:
        if self.cache is not None and (found.lease or found.blob):
            with self._lock:
                self.stats.cache_hits += found.lease is not None
                self.stats.cache_misses += found.lease is None

    def read_local(self, found: Opened, offset: int, target: memoryview) -> int:
        """Fill `target` from `offset` on; bytes read, fewer only where the shard ends."""
        handle, size, done = found.handle, len(target), 0
        assert handle is not None
        try:
            while done < size and (got := os.preadv(handle, (target[done:],), offset + done)):
                done += got
        except OSError as error:
            if self.stop.is_set():
                raise Stopped from None
            raise self.trouble(found.shard, f"cannot be read ({error.strerror})") from error
        return done

    def read_remote(self, wanted: list[tuple[Opened, int, memoryview]]) -> list[int]:
        """Many ranges at once: (shard, offset, target); bytes read of each. Raises StorageError, Stopped."""
        done = [0] * len(wanted)

        def one(number: int) -> None:
            found, offset, target = wanted[number]
            assert found.blob is not None
            with self._doing("storage", found.shard):
                done[number] = self._range(found.blob, offset, target)

        with self._lock:
            if self._crew is None:
                self._crew = Crew(self.policy.connections, "gristmill-fetch")
        self._crew.run([partial(one, number) for number in range(len(wanted))])
        self.stats.remote_bytes += sum(done)
        return done

    def mistrust(self, shard: int) -> bool:
        """Some bytes of the shard proved wrong. Whether another read may give others: then ask again."""
        found = self._open.get(shard)
        if found is None:
            return is_remote(self.library.place(shard))
        if found.lease is None or self.cache is None:
            return False
        self.thin([shard], all_of_them=True)
        return self.cache.suspect(self._keys[shard])

    def compare(self, shard: int) -> None:
        """Before damage is booked for good: DamageError if what lies there is a sound tar, but not the one indexed."""
        if shard in self._compared:
            return
        opened, (manifest, number) = self.open(shard), self.library.split(shard)
        with suppress(ShardError):  # the tar itself is damaged
            if sample_shard(opened.blob or f"/dev/fd/{opened.handle}").rows.digest() != manifest.digests[number]:
                self.thin([shard], all_of_them=True)
                raise self.trouble(shard, "was replaced since it was indexed: its keys, offsets or lengths are others")
        self._compared.add(shard)

    def settle(self, position: int, batch: int) -> None:
        """Between batches: the stream goes on at `position`; give back what is not needed for a while."""
        self._foresight.go(position)
        if self.prefetcher is not None:
            self.prefetcher.poke()
            far = position + _FAR * batch
            leased = [shard for shard, found in self._open.items() if found.lease is not None]
            self.thin([s for s in leased if self._foresight.next_use(s) > far], all_of_them=True)
        if len(self._open) > self.most_open:
            self.thin(list(self._open))

    def crowded(self) -> bool:
        """Whether more shards are open than should stay so."""
        return len(self._open) > self.most_open

    def thin(self, shards: Iterable[int], *, all_of_them: bool = False) -> None:
        """Close some of these shards, which nobody is reading, until few enough are open."""
        for shard in shards:
            if not all_of_them and len(self._open) <= self.most_open:
                return
            with self._lock:
                found = self._open.pop(shard, None)
            if found is not None:
                found.close()

    def halt(self) -> None:
        """Call off what waits for the network, and let nothing new begin."""
        self.stop.set()
        self.activity.call_off()

    def close(self, seconds: float) -> bool:
        """End threads and close shards; False if a thread hangs in a read and was left behind, with its shard."""
        self.halt()
        if os.getpid() != self._pid:
            return True
        if self.prefetcher is not None:
            self.prefetcher.close()
        gone = self._crew.close(seconds) if self._crew is not None else True
        hung = {shard for _, shard, _ in self.activity.now()}
        self.thin([shard for shard in self._open if shard not in hung], all_of_them=True)
        return gone

    def trouble(self, shard: int, problem: str) -> DamageError:
        library = self.library
        manifest, _ = library.split(shard)
        return DamageError(
            f"shard {library.name(shard)} {problem}: {redact(library.place(shard))}. Restore it or ingest again, then "
            f"resume; `gristmill verify {manifest.root}` checks the whole data set"
        )

    @contextmanager
    def _doing(self, stage: str, shard: int) -> Iterator[None]:
        me = threading.get_ident()
        before = self.busy.get(me)
        self.busy[me] = (stage, shard, time.monotonic())
        try:
            yield
        finally:
            if before is None:
                self.busy.pop(me, None)
            else:
                self.busy[me] = before

    def _open_local(self, shard: int, place: str) -> Opened:
        with self._doing("read", shard):
            try:
                handle = os.open(place.removeprefix("file://"), os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                raise self.trouble(shard, f"cannot be read ({error.strerror})") from error
            found = Opened(shard, handle)
            try:
                about = os.fstat(handle)
                self._same_size(shard, about.st_size)
                mark = (about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns)
                if self._checked.get(shard) != mark:
                    self._same_headers(shard, about.st_size, None)
                    self._checked[shard] = mark
            except OSError as error:
                found.close()
                raise self.trouble(shard, f"cannot be read ({error.strerror})") from error
            except BaseException:
                found.close()
                raise
            return found

    def _open_cached(self, shard: int) -> Opened | None:
        if self.cache is None:
            return None
        with self._doing("cache", shard):
            lease = self.cache.lookup(self._keys[shard])
            if lease is None:
                return None
            try:
                found = Opened(shard, os.open(lease.path, os.O_RDONLY | os.O_CLOEXEC), lease=lease)
            except OSError:
                lease.release()
                return None
            try:
                self._same_size(shard, lease.size)
                if shard not in self._checked:
                    with LocalBlob(lease.path) as blob:
                        self._same_headers(shard, lease.size, blob)
                    self._checked[shard] = (0, 0, 0, 0)
            except BaseException:
                found.close()
                raise
            return found

    def _open_remote(self, shard: int) -> Opened:
        with self._doing("storage", shard):
            blob = self._blob(shard)
            if isinstance(blob, HttpBlob):
                blob.look(self.stop)
            if shard not in self._checked:
                self._same_size(shard, blob.size())
                self._same_headers(shard, blob.size(), blob)
                self._checked[shard] = (0, 0, 0, 0)
            return Opened(shard, blob=blob)

    def _same_size(self, shard: int, size: int) -> None:
        # A shorter shard was truncated: what is left of it is good. A longer one is another shard.
        indexed = int(self.library.bytes[shard])
        if size > indexed:
            raise self.trouble(shard, f"was replaced: it has {size} bytes instead of {indexed}")

    def _same_headers(self, shard: int, size: int, blob: Blob | None) -> None:
        if size == int(self.library.bytes[shard]):
            manifest, number = self.library.split(shard)
            if (problem := recheck(manifest, number, blob)) is not None:
                raise self.trouble(shard, problem)

    def _range(self, blob: Blob, offset: int, target: memoryview) -> int:
        if self.stop.is_set():
            raise Stopped
        at = 0

        def sink(piece: memoryview) -> None:
            nonlocal at
            target[at : at + len(piece)] = piece
            at += len(piece)

        if isinstance(blob, HttpBlob):
            length = min(len(target), blob.size() - offset)
            if length > 0:
                Transfer(blob, offset, length, sink, stop=self.stop).run()
        else:
            sink(memoryview(blob.read(offset, len(target))))
        return at

    def _blob(self, shard: int) -> Blob:
        if shard not in self._blobs:
            self.remote = True
            self._blobs[shard] = open_blob(self.library.place(shard), policy=self.policy)
        return self._blobs[shard]

    def _upcoming(self, budget: int) -> Iterator[str]:
        """What the cache should hold from now on, soonest first."""
        for shard in self._foresight.soonest().tolist():
            if key := self._keys[shard]:
                budget -= int(self.library.bytes[shard])
                if budget < 0:
                    return
                yield key


class _NextUse:
    """The cache's question by key."""

    def __init__(self, keys: dict[str, int], foresight: Foresight) -> None:
        self._keys, self._foresight = keys, foresight

    def __call__(self, key: str) -> float:
        shard = self._keys.get(key)
        return float("inf") if shard is None else self._foresight.next_use(shard)


_fetchers: weakref.WeakSet[Fetcher] = weakref.WeakSet()


def _after_fork() -> None:
    """A child reads nothing; it gives back what it inherited, or files that were removed would live on in it."""
    for fetcher in list(_fetchers):
        fetcher.stop.set()
        opened, fetcher._open = fetcher._open, {}
        for found in opened.values():
            if found.handle is not None:
                os.close(found.handle)


os.register_at_fork(after_in_child=_after_fork)
