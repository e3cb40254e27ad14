"""Where checkpoints lie: what a store can do, and the one that is a folder. Each publishes all of one or nothing.

A folder is written beside its name (`.writing-<position>`), synced, read back, and renamed: atomic on every POSIX file
system. One that is there already is moved aside first, and read under that name until the new one has taken its place.
What a killed writer left is swept by the next one. Object stores, which cannot rename, are in objects.py.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Collection, Iterable
from contextlib import suppress
from pathlib import Path
from typing import IO, Protocol
from urllib.parse import unquote

from ..shards.storage import sync_folder
from .checkpoint import DIGEST, STATE, CheckpointError, digest_of

POSITION = re.compile(r"\d{12,}")


class Store(Protocol):
    """A place for checkpoints. OSError passes through; its message never holds a secret."""

    remote: bool  # whether a failure to read says more about the way there than about the data

    def shown(self, position: int) -> str:
        """How messages call a checkpoint."""
        ...

    def positions(self) -> list[int]:
        """Published checkpoints, newest first; their contents are not verified."""
        ...

    def read(self, position: int, name: str) -> bytes:
        """A small file of a published checkpoint."""
        ...

    def digest(self, position: int, name: str) -> str:
        """What the digest of a published file is now, blake2b-128."""
        ...

    def local(self, position: int, name: str, digest: str) -> str:
        """A path on this machine that holds a published file, valid until `release`."""
        ...

    def release(self) -> None:
        """Drop local copies."""
        ...

    def prepare(self) -> None:
        """Make the place, prove that it can be written, and remove what a killed writer left. One writer at a time."""
        ...

    def suffix(self, position: int) -> str:
        """What file names must end in so as not to touch a published checkpoint of the same position."""
        ...

    def put(self, position: int, name: str, chunks: Iterable[memoryview]) -> tuple[str, int]:
        """Write a file that is not published yet, lastingly and verified; returns (digest, bytes)."""
        ...

    def read_unpublished(self, position: int, name: str) -> bytes: ...

    def publish(self, position: int, state: str, spare: Collection[str]) -> None:
        """Make all files put for `position` a checkpoint, with `state` as its state.json, less the files in `spare`."""
        ...

    def discard(self, position: int, names: Iterable[str]) -> None:
        """Remove files that will not be published."""
        ...

    def remove(self, position: int) -> None:
        """Remove a published checkpoint; a kill in the middle never leaves it damaged."""
        ...

    def free(self) -> int | None:
        """Bytes that are free, where there is such a number."""
        ...


def open_store(where: str | Path) -> Store:
    """A folder's path, `file://`, or `s3://bucket/prefix?endpoint_override=...&scheme=...` and what else pyarrow knows."""
    text = str(where)
    if isinstance(where, Path) or "://" not in text:
        return LocalStore(Path(where))
    if text.startswith("file://"):
        return LocalStore(Path(unquote(text.removeprefix("file://"))))
    from .objects import ObjectStore  # pyarrow only for those who need it

    return ObjectStore(text)


class LocalStore:
    """A folder of any POSIX file system that all ranks share."""

    remote = False

    def __init__(self, root: Path):
        self.root = root

    def __str__(self) -> str:
        return str(self.root)

    def shown(self, position: int) -> str:
        return str(self.root / folder_name(position))

    def positions(self) -> list[int]:
        with suppress(FileNotFoundError):
            found = (entry.name.removeprefix(".replaced-") for entry in self.root.iterdir() if entry.is_dir())
            return sorted({int(name) for name in found if POSITION.fullmatch(name)}, reverse=True)
        return []

    def read(self, position: int, name: str) -> bytes:
        return (self._folder(position) / name).read_bytes()

    def digest(self, position: int, name: str) -> str:
        return _digest_file(self._folder(position) / name)

    def local(self, position: int, name: str, digest: str) -> str:
        return str(self._folder(position) / name)

    def release(self) -> None:
        """Nothing was copied."""

    def prepare(self) -> None:
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            for rest in self.root.glob(".replaced-*"):  # a kill between the two renames of `publish`
                final = self.root / rest.name.removeprefix(".replaced-")
                if not final.exists():
                    rest.rename(final)
            for pattern in (".writing-*", ".replaced-*", ".removing-*"):
                for rest in self.root.glob(pattern):
                    shutil.rmtree(rest)
            with tempfile.TemporaryFile(dir=self.root):
                pass
        except OSError as error:
            raise CheckpointError(
                f"checkpoints cannot be written to {self}: {error.strerror or error}; make it writable or name another place"
            ) from error

    def suffix(self, position: int) -> str:
        return ""  # written beside

    def put(self, position: int, name: str, chunks: Iterable[memoryview]) -> tuple[str, int]:
        path = self._draft(position) / name
        seen, size = hashlib.blake2b(digest_size=16), 0
        with self._create(path) as file:
            for chunk in chunks:
                file.write(chunk)
                seen.update(chunk)
                size += len(chunk)
            file.flush()
            os.fsync(file.fileno())
            # Without its pages in the cache, the file is read from where it lies.
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if _digest_file(path) != seen.hexdigest():
            raise OSError(errno.EIO, f"{name} reads back differently from what was written")
        return seen.hexdigest(), size

    def read_unpublished(self, position: int, name: str) -> bytes:
        draft = self._draft(position)
        try:
            return (draft / name).read_bytes()
        except FileNotFoundError:
            os.listdir(draft)  # lets a network file system look again; for each file of thousands it would take long
            return (draft / name).read_bytes()

    def publish(self, position: int, state: str, spare: Collection[str]) -> None:
        beside, final = self._draft(position), self.root / folder_name(position)
        self.put(position, STATE, [memoryview(state.encode())])
        self.put(position, DIGEST, [memoryview(digest_of(state.encode()).encode())])
        for name in spare:
            (beside / name).unlink(missing_ok=True)
        sync_folder(beside)
        replaced = self.root / f".replaced-{folder_name(position)}"
        if final.exists():
            final.rename(replaced)  # from here until the next rename it is read under this name
        beside.rename(final)
        sync_folder(self.root)
        with suppress(FileNotFoundError):
            shutil.rmtree(replaced)

    def discard(self, position: int, names: Iterable[str]) -> None:
        for name in names:
            with suppress(OSError):
                (self._draft(position) / name).unlink()
        with suppress(OSError):  # other ranks' files may be there still; the last one removes the folder
            self._draft(position).rmdir()

    def remove(self, position: int) -> None:
        aside = self.root / f".removing-{folder_name(position)}"
        shutil.rmtree(aside, ignore_errors=True)
        self._folder(position).rename(aside)
        shutil.rmtree(aside)

    def free(self) -> int | None:
        return shutil.disk_usage(self.root).free

    def _draft(self, position: int) -> Path:
        return self.root / f".writing-{folder_name(position)}"

    def _folder(self, position: int) -> Path:
        final = self.root / folder_name(position)
        replaced = self.root / f".replaced-{folder_name(position)}"
        return replaced if not final.is_dir() and replaced.is_dir() else final

    def _create(self, path: Path) -> IO[bytes]:
        while True:  # the folder may go just now, with the last file of a write that was given up
            path.parent.mkdir(parents=True, exist_ok=True)
            with suppress(FileNotFoundError):
                return path.open("wb")


def folder_name(position: int) -> str:
    """Fixed width, so that names sort as positions do."""
    return f"{position:012d}"


def _digest_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
