"""What a cache keeps on disk, and the locks by which the processes of a node agree about it.

For each shard `<name>.shard`, or `<name>.partial` while it is fetched, and beside it `<name>.json`: key, identity, size,
digest. All locks are flocks on open files, so the kernel lifts them when their process ends, however it ends: shared on
a shard in use, exclusive on a partial that is being fetched, exclusive on `lock` while something is claimed, published
or removed. A forked child closes what it inherited, or its parent's locks would live on in it.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from .storage import PARTIAL, sync_folder

WHOLE, DEAD, ABOUT = ".shard", ".dead", ".json"
_SLACK = 256  # bytes by which a description may grow until the shard is complete
_BOOT = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True)
class Record:
    """What is known of a cached shard. `digest` (blake2b-128 hex) and `mtime_ns` are there once it is complete."""

    key: str
    identity: str
    size: int
    boot: str  # what was written before a power cut may be gone from the disk: another boot checks again
    digest: str = ""
    mtime_ns: int = 0


class Hold:
    """An open file, locked or not, that lives no longer than its process."""

    def __init__(self, path: Path, flags: int = os.O_RDONLY) -> None:
        with _opening:
            self.handle = os.open(path, flags | os.O_CLOEXEC, 0o644)
            _holds.add(self)

    def lock(self, *, exclusive: bool) -> bool:
        """Take the lock if it is free (or change its kind); never waits."""
        try:
            fcntl.flock(self.handle, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def is_still(self, path: Path) -> bool:
        """Whether the open file is the one of this name: it may have been removed before it was locked."""
        try:
            there, here = path.stat(), os.fstat(self.handle)
        except FileNotFoundError:
            return False
        return (there.st_ino, there.st_dev) == (here.st_ino, here.st_dev)

    def close(self) -> None:
        with _opening:
            handle, self.handle = self.handle, -1
            _holds.discard(self)
        if handle >= 0:
            with suppress(OSError):
                fcntl.flock(handle, fcntl.LOCK_UN)  # a child forked at this very moment may still have it open
            os.close(handle)


_holds: weakref.WeakSet[Hold] = weakref.WeakSet()
_opening = threading.Lock()


def _in_child() -> None:
    global _opening
    _opening = threading.Lock()
    for hold in list(_holds):
        with suppress(OSError):
            os.close(hold.handle)
        hold.handle = -1
    _holds.clear()


os.register_at_fork(
    before=lambda: _opening.acquire(), after_in_parent=lambda: _opening.release(), after_in_child=_in_child
)


@dataclass(frozen=True)
class Found:
    """One shard of the folder, as `scan` saw it. `path` is the file that holds the bytes."""

    path: Path
    key: str | None
    bytes: int  # on disk now, with its description
    reserved: int  # bytes that it may still grow by: a fetch in progress


class Entries:
    """The folder. Methods that say so want the lock held."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        os.close(os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644))
        try:
            self.boot = _BOOT.read_text().strip()
        except OSError:
            self.boot = f"{time.time() - time.monotonic():.0f}"
        self._records: dict[str, tuple[tuple[int, int, int], Record | None]] = {}

    @contextmanager
    def locked(self, patience: float, stop: threading.Event | None = None) -> Iterator[bool]:
        """Hold the folder's lock; yields False if it was not to be had for `patience` seconds."""
        hold, until, pause = Hold(self.folder / "lock"), time.monotonic() + patience, 0.0005
        try:
            while not (got := hold.lock(exclusive=True)) and time.monotonic() < until:
                if stop is not None and stop.is_set():
                    break
                time.sleep(pause)
                pause = min(2 * pause, 0.02)
            yield got
        finally:
            hold.close()

    def name(self, key: str) -> str:
        """The file name, without suffix, of a key: any key will do, and none is visible."""
        return hashlib.blake2b(key.encode(), digest_size=16).hexdigest()

    def path(self, key: str, suffix: str = WHOLE) -> Path:
        return self.folder / (self.name(key) + suffix)

    def record(self, name: str) -> Record | None:
        """The description beside a shard; None if it is missing or no description."""
        path = self.folder / (name + ABOUT)
        try:
            about = path.stat()
            stamp = (about.st_ino, about.st_mtime_ns, about.st_size)
            known = self._records.get(name)
            if known is None or known[0] != stamp:
                known = self._records[name] = stamp, Record(**json.loads(path.read_bytes()))
            return known[1]
        except FileNotFoundError:
            self._records.pop(name, None)
        except (TypeError, ValueError):
            self._records.pop(name, None)
        return None

    def describe(self, record: Record, *, sync: bool) -> None:
        """Write a description in place of an older one. Lock held."""
        path = self.path(record.key, ABOUT)
        beside = path.with_name(path.name + PARTIAL)
        handle = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        try:
            write_all(handle, memoryview(_text(record)), 0)
            if sync:
                os.fsync(handle)
        finally:
            os.close(handle)
        os.replace(beside, path)

    def overhead(self, record: Record) -> int:
        """Bytes to set aside for a description, and for its successor beside it."""
        return 2 * (len(_text(record)) + _SLACK)

    def publish(self, record: Record, hold: Hold) -> None:
        """Give a fetched shard its name, lastingly; the exclusive lock on it becomes a shared one. Lock held."""
        self.describe(record, sync=True)
        os.replace(self.path(record.key, PARTIAL), self.path(record.key))
        sync_folder(self.folder)
        hold.lock(exclusive=False)

    def discard(self, key: str, inode: int) -> bool:
        """Take a shard out of use; False if that file is gone already. Its users keep it until they are done. Lock held."""
        path = self.path(key)
        try:
            if path.stat().st_ino != inode:
                return False
            dead = path.with_name(f"{path.stem}-{inode}{DEAD}")
            os.replace(path, dead)
        except FileNotFoundError:
            return False
        self.path(key, ABOUT).unlink(missing_ok=True)
        self.remove_unused(dead)
        return True

    def remove_unused(self, path: Path) -> bool:
        """Remove a file unless somebody holds it. Lock held."""
        hold = self.seize(path)
        if hold is None:
            return False
        path.unlink(missing_ok=True)
        hold.close()
        return True

    def seize(self, path: Path) -> Hold | None:
        """The exclusive lock on a file of the folder, or None if it is in use or gone. Lock held."""
        try:
            hold = Hold(path, os.O_RDWR)
        except FileNotFoundError:
            return None
        if hold.lock(exclusive=True):
            return hold
        hold.close()
        return None

    def scan(self) -> list[Found]:
        """All that takes room, after sweeping away what a kill left without use. Lock held."""
        sizes: dict[str, int] = {}
        for entry in os.scandir(self.folder):
            if entry.name != "lock":
                with suppress(FileNotFoundError):
                    sizes[entry.name] = entry.stat(follow_symlinks=False).st_size
        found: list[Found] = []
        for file in sorted(sizes):
            path = self.folder / file
            name, suffix = os.path.splitext(file)
            if file.endswith(ABOUT + PARTIAL):  # only who holds the lock writes these, and that is us
                path.unlink(missing_ok=True)
            elif suffix == ABOUT:
                if name + WHOLE not in sizes and name + PARTIAL not in sizes:
                    path.unlink(missing_ok=True)
            elif suffix == DEAD:
                if not self.remove_unused(path):
                    found.append(Found(path, None, sizes[file], 0))
            elif suffix in (WHOLE, PARTIAL):
                record = self.record(name)
                about = sizes.get(name + ABOUT, 0)
                reserved = 0
                if suffix == PARTIAL and (hold := self.seize(path)) is None:
                    # Somebody is fetching it, and will need all that was set aside.
                    whole = sizes[file] if record is None else record.size + self.overhead(record)
                    reserved = max(0, whole - sizes[file] - about)
                elif suffix == PARTIAL and hold is not None:
                    hold.close()
                found.append(Found(path, record.key if record else None, sizes[file] + about, reserved))
        return found

    def free_bytes(self) -> int:
        """What the disk has left for this user."""
        about = os.statvfs(self.folder)
        return about.f_bavail * about.f_frsize


def write_all(handle: int, data: memoryview, offset: int) -> None:
    """Write all of it, or raise OSError."""
    while data:
        count = os.pwrite(handle, data, offset)
        if count == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        data, offset = data[count:], offset + count


def digest_of(handle: int, size: int) -> hashlib.blake2b:
    """The hash of the first `size` bytes of an open file; of fewer if it is shorter."""
    state, done = hashlib.blake2b(digest_size=16), 0
    while done < size and (part := os.pread(handle, min(1 << 20, size - done), done)):
        state.update(part)
        done += len(part)
    return state


def _text(record: Record) -> bytes:
    return json.dumps(asdict(record)).encode()
