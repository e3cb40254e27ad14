"""Files that are complete or absent: written beside under `.partial`, synced, then renamed into place.

A rename within a folder is atomic on every POSIX file system, and it lasts only once the folder itself was synced. A
reader therefore never sees half a file, and a kill or a full disk leaves nothing but a `.partial`, which the failing
call removes itself where it still can, and the next run where it cannot.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PARTIAL = ".partial"
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # what a disk, a quota and a limit answer that are used up


def sync_folder(folder: Path) -> None:
    """Make the names in a folder last."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class Draft:
    """A binary file that is being written beside its place, as much of a file as tarfile and Arrow need.

    Those two write once more when they are collected, long after an error. So closing is left to `finish` or `give_up`,
    and what comes after them is dropped.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.beside = path.with_name(path.name + PARTIAL)
        self._file = self.beside.open("wb", buffering=1 << 20)
        self._at = 0
        self.closed = False

    def write(self, data: bytes) -> int:
        if not self.closed:
            self._file.write(data)
        size = memoryview(data).nbytes
        self._at += size
        return size

    def tell(self) -> int:
        return self._at

    def flush(self) -> None:
        if not self.closed:
            self._file.flush()

    def close(self) -> None:
        """Does nothing: see the class."""

    def seekable(self) -> bool:
        return False

    def readable(self) -> bool:
        return False

    def writable(self) -> bool:
        return True

    def sync(self) -> None:
        """Make the bytes last, still beside their place. Nothing can be written afterwards. OSError passes through."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self.closed = True

    def finish(self) -> None:
        """Give the file its name, lastingly. OSError passes through."""
        if not self.closed:
            self.sync()
        os.replace(self.beside, self.path)
        sync_folder(self.path.parent)

    def give_up(self) -> None:
        """Remove the file, unless it was finished."""
        self.closed = True
        with suppress(OSError):  # what a full disk did not take is not wanted any more
            self._file.close()
        self.beside.unlink(missing_ok=True)


@contextmanager
def published(path: Path) -> Iterator[Draft]:
    """Open a binary file for writing that appears under `path` only if the block ends well.

    Raises OSError as the file system gives it (ENOSPC above all), after the half-written file was removed.
    """
    draft = Draft(path)
    try:
        yield draft
        draft.finish()
    except BaseException:
        draft.give_up()
        raise


@contextmanager
def claimed(folder: Path, taken: Exception) -> Iterator[None]:
    """Make a folder and hold it against other processes; take it away again if it was made here and nothing came of it.

    Raises `taken` while another process holds it; OSError passes through.
    """
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)  # a lock on the folder itself: gone with the process, and leaves no file
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise taken from None
        try:
            yield
        except BaseException:
            if made and not any(folder.iterdir()):
                folder.rmdir()
            raise
    finally:
        os.close(handle)
