"""The fetching of one shard into a cache, by the one process that claimed it: from the first byte or from where a kill
left it, hashed on the way, synced at the end. What the cache's disk does is told apart from what the network does."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace

from .blob import Blob
from .entries import Hold, Record, digest_of, write_all
from .retry import ChangedError, Stopped, StorageError

_PART = 8 << 20  # bytes at a time from a blob that cannot stream


class DiskTrouble(Exception):
    """The cache's own disk did not take or give the bytes."""

    def __init__(self, error: OSError) -> None:
        super().__init__(str(error))
        self.error = error


@dataclass
class Claim:
    """The right to fetch one shard: room is set aside, the partial is open and locked."""

    record: Record
    hold: Hold
    start: int  # bytes that are there already

    def run(self, blob: Blob, stop: threading.Event | None, received: Callable[[int], None]) -> Record:
        """Fetch the rest; the complete record. Raises DiskTrouble, StorageError, Stopped."""
        handle, size = self.hold.handle, self.record.size
        try:
            state = digest_of(handle, self.start)
            if self.start == size and self.record.digest not in ("", state.hexdigest()):
                self.start, state = 0, digest_of(handle, 0)
        except OSError as error:
            raise DiskTrouble(error) from error
        at = self.start

        def sink(piece: memoryview) -> None:
            nonlocal at
            if at + len(piece) > size:
                raise ChangedError(blob.url, f"{size} bytes long", "longer")
            state.update(piece)
            try:
                write_all(handle, piece, at)
            except OSError as error:
                raise DiskTrouble(error) from error
            at += len(piece)
            received(len(piece))

        _copy(blob, sink, at, size, stop)
        if at != size:
            raise ChangedError(blob.url, f"{size} bytes long", f"{at} bytes long")
        try:
            os.fsync(handle)
            return replace(self.record, digest=state.hexdigest(), mtime_ns=os.fstat(handle).st_mtime_ns)
        except OSError as error:
            raise DiskTrouble(error) from error


def _copy(blob: Blob, sink: Callable[[memoryview], None], start: int, size: int, stop: threading.Event | None) -> None:
    download = getattr(blob, "download", None)
    if download is not None:
        download(sink, start, stop)
        return
    while start < size:
        if stop is not None and stop.is_set():
            raise Stopped
        try:
            part = blob.read(start, min(_PART, size - start))
        except OSError as error:
            raise StorageError(
                blob.url, f"cannot be read ({error.strerror})", "restore it, then start again", "unreadable"
            ) from error
        if not part:
            return
        sink(memoryview(part))
        start += len(part)
