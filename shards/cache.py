"""Whole shards on the disk of a node, shared by its ranks, within a budget that is never exceeded.

A shard is fetched by one process while the others read what they need over the network; room is set aside before the
first byte, under one lock of the folder, so that all ranks together stay within the budget, and is made by giving up
what the order needs last (eviction.py), never what some process is using. A fetch that was killed is continued if the
object is still the same. The cache only ever spares work: whatever its disk does, the bytes can still be had remotely,
so a full or broken disk costs time, is counted, said once, and stops nothing.
"""

from __future__ import annotations

import errno
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from . import forks
from .blob import Blob
from .claim import Claim, DiskTrouble
from .entries import ABOUT, DEAD, PARTIAL, WHOLE, Entries, Hold, Record, digest_of
from .errors import GristmillError
from .eviction import Candidate, choose_victims
from .lease import CacheStats, Lease
from .remote import resumable
from .retry import ChangedError, Stopped
from .storage import NO_SPACE

_PATIENCE = 30.0  # seconds for the folder's lock, which is held for milliseconds


class CacheError(GristmillError):
    """A cache that cannot work at all."""


class Cache:
    """A bounded folder of whole shards. Safe between threads, between processes of a node, and across kills.

    `next_use(key)` says when a shard is needed next, in any unit that grows with time, infinity for never and for keys
    that it does not know; it has to speak for the node, not for one rank. `key` is the shard's url in the manifest: it is written down, so it may hold
    no secret. Raises CacheError if the folder cannot be used.
    """

    def __init__(
        self,
        folder: str | Path,
        budget_bytes: int,
        next_use: Callable[[str], float],
        *,
        say: Callable[[str], None] | None = None,
        disk_pause: float = 60.0,
    ) -> None:
        self.folder, self.budget, self.next_use = Path(folder), budget_bytes, next_use
        self.stats = CacheStats()
        self.disk_pause = disk_pause  # seconds without a new fetch after the disk failed
        self._say = say or (lambda text: warnings.warn(text, RuntimeWarning, stacklevel=4))
        self._said = False
        self._disk_back = 0.0
        self._count_lock = threading.Lock()
        try:
            self.entries = Entries(self.folder)
            if not os.access(self.folder, os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        except OSError as error:
            raise CacheError(
                f"{self.folder} cannot be a cache ({error.strerror}): name a folder on a local disk that can be written"
            ) from error
        forks.tell(self)

    def __contains__(self, key: str) -> bool:
        return self.entries.path(key).exists()

    def lookup(self, key: str, identity: str | None = None) -> Lease | None:
        """The shard if it is here and sound; asks no network. With `identity`, only if it is of that object."""
        lease = self._open(key, identity)
        if lease is not None:
            self._count(hits=1)
        return lease

    def fetch(
        self,
        key: str,
        blob: Blob,
        *,
        needed: float = -float("inf"),
        wait: float = 0.0,
        stop: threading.Event | None = None,
    ) -> Lease | None:
        """The shard, fetched if it is not here. None means: read from the blob (counted in `fallbacks`).

        `needed` is when the shard will be used; only what is used later makes room for it (by default it is needed now).
        `wait` seconds are spent on a fetch that another process is at. Raises StorageError, ChangedError, Stopped.
        """
        if (lease := self.lookup(key)) is not None:
            return lease
        self._count(misses=1)
        began, pause, waited = time.monotonic(), 0.01, False
        while True:
            claim = self.claim(key, blob, needed=needed, stop=stop)
            if isinstance(claim, Claim):
                return self.complete(claim, blob, stop)
            if claim == "there" and (lease := self._open(key, None)) is not None:
                return lease
            left = began + wait - time.monotonic() if claim in ("there", "busy") else 0.0
            if left <= 0:
                return self._fall_back(claim)
            self._count(waits=0 if waited else 1, wait_seconds=min(pause, left))
            waited = True
            if stop is None:
                time.sleep(min(pause, left))
            elif stop.wait(min(pause, left)):
                raise Stopped
            pause = min(2 * pause, 0.2)

    def claim(
        self, key: str, blob: Blob, *, needed: float = -float("inf"), stop: threading.Event | None = None
    ) -> Claim | str:
        """The first half of `fetch`: room set aside and the right to fetch, to be handed to `complete` in any case.

        Otherwise a word: `there` already, `busy` in another process, `no room`, `too large`, or no use of the `disk`.
        """
        if time.monotonic() < self._disk_back:
            return "disk"
        if (look := getattr(blob, "look", None)) is not None:
            look(stop)  # over a network, so that it can be called off
        try:
            return self._claim(key, blob.identity(), blob.size(), needed, stop)
        except OSError as error:
            self._disk_failed(error)
            return "disk"

    def complete(self, claim: Claim, blob: Blob, stop: threading.Event | None = None) -> Lease | None:
        """The second half of `fetch`: get what is missing and publish it. None if the disk fails."""
        key, hold, lease = claim.record.key, claim.hold, None
        try:
            record = claim.run(blob, stop, lambda count: self._count(received=count))
            with self.entries.locked(_PATIENCE, stop) as got:
                if not got:
                    return self._fall_back("busy")
                self.entries.publish(record, hold)
            lease = Lease(self.entries.path(key), record.size, hold)
            self._count(fetched=1, resumed_bytes=claim.start)
            return lease
        except DiskTrouble as trouble:
            self._give_up(key, hold)
            self._disk_failed(trouble.error)
            return self._fall_back("disk")
        except OSError as error:  # from publishing, so that all the bytes are there for the next who tries
            self._disk_failed(error)
            return self._fall_back("disk")
        except ChangedError:
            self._give_up(key, hold)
            raise
        finally:
            if lease is None:
                hold.close()

    @contextmanager
    def use(self, key: str, blob: Blob, *, wait: float = 0.0) -> Iterator[Path | None]:
        """`with cache.use(key, blob) as path:` the shard's file, safe until the block ends, or None as `fetch` says."""
        lease = self.fetch(key, blob, wait=wait)
        try:
            yield lease.path if lease else None
        finally:
            if lease:
                lease.release()

    def suspect(self, key: str) -> bool:
        """Some bytes of a cached shard proved wrong: is it the copy? Then the copy is dropped, and the answer is True.

        False: the copy is what was fetched, so the source itself is damaged. Release leases of the key before fetching
        it again.
        """
        lease = self._open(key, None)
        if lease is None:
            return True  # gone, or just found out and dropped
        with lease:
            record = self.entries.record(self.entries.name(key))
            with suppress(OSError):
                if record and digest_of(lease.hold.handle, lease.size).hexdigest() == record.digest:
                    return False
            self._drop(key, lease.hold, corrupt=1)
        return True

    def _open(self, key: str, identity: str | None) -> Lease | None:
        path, until = self.entries.path(key), time.monotonic() + 5
        while True:
            try:
                hold = Hold(path)
            except FileNotFoundError:
                return None
            except OSError as error:
                self._disk_failed(error)
                return None
            if hold.lock(exclusive=False) and hold.is_still(path):
                break
            hold.close()  # just published, or just being removed
            if time.monotonic() > until:
                return None
            time.sleep(0.001)
        try:
            sound = self._sound(key, hold, identity)
        except OSError as error:
            self._disk_failed(error)
            sound = False
        if sound:
            return Lease(path, os.fstat(hold.handle).st_size, hold)
        hold.close()
        return None

    def _sound(self, key: str, hold: Hold, identity: str | None) -> bool:
        """Whether a shard on disk is what was fetched, and of this object; drops it otherwise."""
        record, about = self.entries.record(self.entries.name(key)), os.fstat(hold.handle)
        if record is None or (about.st_size, about.st_mtime_ns) != (record.size, record.mtime_ns):
            self._drop(key, hold, corrupt=1)
            return False
        if identity is not None and identity != record.identity:
            self._drop(key, hold, replaced=1)
            return False
        if record.boot != self.entries.boot:
            if digest_of(hold.handle, record.size).hexdigest() != record.digest:
                self._drop(key, hold, corrupt=1)
                return False
            with self.entries.locked(_PATIENCE) as got:
                if got and hold.is_still(self.entries.path(key)):
                    self.entries.describe(replace(record, boot=self.entries.boot), sync=False)
        return True

    def _drop(self, key: str, hold: Hold, *, corrupt: int = 0, replaced: int = 0) -> None:
        inode = os.fstat(hold.handle).st_ino
        hold.lock(exclusive=True)  # if nobody else uses it, it can go at once
        hold.close()
        with self.entries.locked(_PATIENCE) as got:
            if got and self.entries.discard(key, inode):
                self._count(corrupt=corrupt, replaced=replaced)

    def _claim(self, key: str, identity: str, size: int, needed: float, stop: threading.Event | None) -> Claim | str:
        """Set room aside and become the one who fetches; otherwise a word that says why not. OSError from the disk."""
        entries = self.entries
        partial = entries.path(key, PARTIAL)
        with entries.locked(_PATIENCE, stop) as got:
            if not got:
                return "busy"
            if entries.path(key).exists():
                return "there"
            hold = Hold(partial, os.O_RDWR | os.O_CREAT)
            if not hold.lock(exclusive=True) or not hold.is_still(partial):
                hold.close()
                return "busy"
            try:
                here, old = os.fstat(hold.handle).st_size, entries.record(entries.name(key))
                record = Record(key, identity, size, entries.boot)
                same = old is not None and replace(old, digest="", mtime_ns=0) == record and resumable(identity)
                start = here if same and here <= size else 0
                if start == 0:
                    os.ftruncate(hold.handle, 0)
                elif old is not None:
                    record = replace(record, digest=old.digest)
                whole = size + entries.overhead(record)
                problem = "too large" if whole > self.budget else self._make_room(partial, whole, start, needed)
                if problem is None:
                    entries.describe(record, sync=False)
                    return Claim(record, hold, start)
                if start == 0:
                    partial.unlink(missing_ok=True)
                hold.close()
                return problem
            except BaseException:
                self._give_up(key, hold)
                hold.close()
                raise

    def _make_room(self, own: Path, whole: int, start: int, needed: float) -> str | None:
        """Give up what is needed last until `whole` bytes fit, on the disk as well. Lock held."""
        others = [found for found in self.entries.scan() if found.path != own]
        used = sum(found.bytes + found.reserved for found in others)
        promised = sum(found.reserved for found in others)
        short = max(used + whole - self.budget, whole - start + promised - self.entries.free_bytes())
        paths = {found.path.name: found.path for found in others}
        candidates = {
            found.path.name: Candidate(
                found.path.name, found.bytes, float("inf") if found.key is None else self.next_use(found.key)
            )
            for found in others
            if found.reserved == 0 and found.path.suffix != DEAD  # a dead one left by scan is in use
        }
        held: dict[str, Hold] = {}
        try:
            while True:
                victims = choose_victims(candidates.values(), short, needed)
                if victims is None:
                    return "no room"
                for victim in victims:
                    if victim.name in held:
                        continue
                    hold = self.entries.seize(paths[victim.name])
                    if hold is None:  # in use: choose again without it
                        del candidates[victim.name]
                        break
                    held[victim.name] = hold
                else:
                    break
            for victim in victims:
                path = paths[victim.name]
                path.unlink(missing_ok=True)
                path.with_suffix(ABOUT).unlink(missing_ok=True)
                self._count(evictions=int(path.suffix == WHOLE), evicted_bytes=victim.bytes)
        finally:
            for hold in held.values():
                hold.close()
        self.stats.used = used + whole - sum(victim.bytes for victim in victims)
        return None

    def _give_up(self, key: str, hold: Hold) -> None:
        """Nobody will continue this fetch. Its room is free at once, even while others have the file open."""
        with suppress(OSError):
            os.ftruncate(hold.handle, 0)
            self.entries.path(key, PARTIAL).unlink(missing_ok=True)

    def _disk_failed(self, error: OSError) -> None:
        """The cache's own disk does not do: say so once, go on without it, try again later."""
        self._disk_back = time.monotonic() + self.disk_pause
        with self._count_lock:
            said, self._said = self._said, True
        if not said:
            kind = "is full" if error.errno in NO_SPACE else f"fails ({error.strerror})"
            self._say(
                f"the disk of the cache {self.folder} {kind}: shards are read remotely meanwhile. Make room, or give the "
                f"cache less than its {self.budget:,} bytes"
            )

    def _fall_back(self, reason: str) -> None:
        with self._count_lock:
            self.stats.fallbacks[reason] += 1

    def _count(self, *, received: int = 0, **counts: float) -> None:
        with self._count_lock:
            self.stats.bytes += received
            for name, count in counts.items():
                setattr(self.stats, name, getattr(self.stats, name) + count)

    def after_fork(self) -> None:
        self._count_lock = threading.Lock()
