"""Files that only ever grow, line by line: appended under a lock, synced, and whole again after a kill or a full disk.

Several processes may write one. What is appended is there entirely or not at all, except that a kill may leave a last
line without its end, which whoever holds the file next may cut off.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .blob import read_at


@contextmanager
def held(path: Path, flags: int) -> Iterator[int]:
    """Open a file with these flags and hold it against other writers. OSError passes through."""
    # The lock belongs to the open file: it is gone when the process is, however that ends.
    handle = os.open(path, flags, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield handle
    finally:
        os.close(handle)


def whole_lines(handle: int) -> bytes:
    """All lines of a held file, after a last one without its end was cut off. OSError passes through."""
    text = read_at(handle, 0, os.fstat(handle).st_size)
    whole = text.rfind(b"\n") + 1
    if whole < len(text):
        os.ftruncate(handle, whole)
    return text[:whole]


def append(handle: int, data: bytes) -> None:
    """Add to a held file that was opened with O_APPEND, lastingly, all or nothing. OSError passes through."""
    end = os.fstat(handle).st_size
    try:
        if os.write(handle, data) != len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(handle)
    except OSError:
        os.ftruncate(handle, end)
        raise
