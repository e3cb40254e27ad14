"""A shard as something of known size that can be read anywhere: what the index and the reader ask of any storage.

A local file is one kind, an object behind HTTP or S3 another (remote.py, objects.py). Reading by position has no cursor,
so threads may share a blob; and a local one is read by `pread`, not mapped, for a mapped file that shrinks kills the
process. `identity` changes when the object does, as far as its storage can tell: it is what a quick index remembers.
"""

from __future__ import annotations

import os
import stat
import threading
from pathlib import Path
from typing import Protocol, runtime_checkable


@runtime_checkable
class Blob(Protocol):
    """Bytes under a name. Safe to share between threads.

    An optional attribute `leap` (int) says how many bytes are read about as quickly as a new request is answered; who
    looks for scattered pieces reads on over gaps shorter than that. Without it, 1 MiB is assumed.
    """

    url: str

    def size(self) -> int:
        """Length in bytes, as of when it was opened. OSError or a GristmillError if it cannot be told."""
        ...

    def read(self, offset: int, length: int) -> bytes:
        """Bytes [offset, offset + length), fewer only where the blob ends. OSError or a GristmillError."""
        ...

    def identity(self) -> str:
        """An etag, or the time of the last change and the size: equal as long as the blob was not replaced."""
        ...


def read_at(handle: int, offset: int, length: int) -> bytes:
    """Bytes [offset, offset + length) of an open file, fewer only at its end. OSError as the file system gives it."""
    parts: list[bytes] = []
    while length > 0 and (part := os.pread(handle, length, offset)):  # it may stop early, at 2 GiB or by a signal
        parts.append(part)
        offset, length = offset + len(part), length - len(part)
    return b"".join(parts)


class LocalBlob:
    """A file of this machine. Opens on first use and holds one descriptor until `close`; a context manager.

    OSError passes through as the file system gives it. Anything but a regular file is refused, so that a pipe under a
    shard's name cannot make an index wait for ever.
    """

    leap = 4096  # a page: about what the kernel copies while a call goes there and back

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.url = str(path)
        self._handle: int | None = None
        self._lock = threading.Lock()

    def _open(self) -> int:
        with self._lock:
            if self._handle is None:
                handle = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
                if not stat.S_ISREG(os.fstat(handle).st_mode):
                    os.close(handle)
                    raise OSError(None, "not a regular file", str(self.path))
                self._handle = handle
            return self._handle

    def size(self) -> int:
        return os.fstat(self._open()).st_size

    def read(self, offset: int, length: int) -> bytes:
        handle = self._handle
        if handle is None:
            handle = self._open()
        data = os.pread(handle, length, offset)
        if len(data) == length or not data:  # without another call: an index comes here for each header
            return data
        return data + read_at(handle, offset + len(data), length - len(data))

    def identity(self) -> str:
        about = os.fstat(self._open())
        return f"{about.st_mtime_ns}+{about.st_size}"

    def close(self) -> None:
        """Give the descriptor back. The blob may be used again, and opens anew."""
        with self._lock:
            if self._handle is not None:
                os.close(self._handle)
                self._handle = None

    def __enter__(self) -> LocalBlob:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
