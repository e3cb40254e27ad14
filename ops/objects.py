"""Checkpoints in an object store, through pyarrow.fs: S3 and what speaks its language, GCS.

There is no rename there, but a put is atomic: `state.json` comes last, and a position without one does not exist. Files
go up in one pass with their digest, in chunks, never further ahead of the store than FLUSH. They come down into a spool
file that has no name, so that not even `kill -9` leaves one behind, and are checked against their digest on the way.
URIs may hold secrets: no message, name or traceback repeats user, password or query.
"""

from __future__ import annotations

import errno
import hashlib
import json
import re
import secrets
import tempfile
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO
from urllib.parse import unquote

from pyarrow import ArrowException, fs

from .checkpoint import CHUNK, DIGEST, STATE, CheckpointError, digest_of
from .stores import POSITION, folder_name

FLUSH = 8 * CHUNK  # bytes that an upload may be ahead of the object store


class ObjectStore:
    """A prefix of an object store, through pyarrow.fs. `spool`: folder for local copies, the system's by default."""

    remote = True

    def __init__(self, uri: str, spool: Path | None = None):
        self._spool = spool
        self._hidden = _secrets(uri)
        self._copies: dict[tuple[int, str], tuple[IO[bytes], str]] = {}
        self._shown = _redacted(uri)
        try:
            with self._told():
                self._fs, self._root = fs.FileSystem.from_uri(uri)
        except OSError as error:
            raise CheckpointError(f"{self._shown} is no place for checkpoints: {error}") from None

    def __str__(self) -> str:
        return self._shown

    def shown(self, position: int) -> str:
        return f"{self._shown.rstrip('/')}/{folder_name(position)}"

    def positions(self) -> list[int]:
        with self._told():
            names = [folder_name(position) for position in self._folders()]
            marks = self._fs.get_file_info([f"{self._root}/{name}/{STATE}" for name in names])
        return [int(name) for name, mark in zip(names, marks, strict=True) if mark.is_file]

    def read(self, position: int, name: str) -> bytes:
        with self._told(), self._fs.open_input_file(self._path(position, name)) as file:
            return file.read()

    def digest(self, position: int, name: str) -> str:
        if (position, name) not in self._copies:
            copy = tempfile.TemporaryFile(dir=self._spool)  # noqa: SIM115 (kept until `release`)
            seen = hashlib.blake2b(digest_size=16)
            with self._told(), self._fs.open_input_file(self._path(position, name)) as file:
                while chunk := file.read(CHUNK):
                    seen.update(chunk)
                    copy.write(chunk)
            copy.flush()
            self._copies[position, name] = copy, seen.hexdigest()
        return self._copies[position, name][1]

    def local(self, position: int, name: str, digest: str) -> str:
        if self.digest(position, name) != digest:
            self._copies.pop((position, name))
            raise OSError(errno.EIO, "what arrived does not match its digest")
        return f"/proc/self/fd/{self._copies[position, name][0].fileno()}"

    def release(self) -> None:
        for file, _ in self._copies.values():
            file.close()
        self._copies.clear()

    def prepare(self) -> None:
        try:
            with self._told():
                if self._fs.type_name == "local":
                    self._fs.create_dir(self._root, recursive=True)
                proof = f"{self._root}/.writing"
                with self._fs.open_output_stream(proof) as stream:
                    stream.write(b"-")
                self._fs.delete_file(proof)
                published = set(self.positions())
                for position in self._folders():
                    if position not in published:
                        self._fs.delete_dir(f"{self._root}/{folder_name(position)}")
                    else:
                        self._drop_all_but_published(position)
        except OSError as error:
            raise CheckpointError(
                f"checkpoints cannot be written to {self}: {error}; look at the bucket, its keys and its address"
            ) from None

    def suffix(self, position: int) -> str:
        with self._told():
            there = self._fs.get_file_info(self._path(position, STATE)).is_file
        return f"-{secrets.token_hex(4)}" if there else ""

    def put(self, position: int, name: str, chunks: Iterable[memoryview]) -> tuple[str, int]:
        path = self._path(position, name)
        seen, size, ahead = hashlib.blake2b(digest_size=16), 0, 0
        with self._told():
            if self._fs.type_name == "local":
                self._fs.create_dir(f"{self._root}/{folder_name(position)}", recursive=True)
            with self._fs.open_output_stream(path) as stream:
                for chunk in chunks:
                    stream.write(chunk)
                    seen.update(chunk)
                    size, ahead = size + len(chunk), ahead + len(chunk)
                    if ahead >= FLUSH:  # waits for what is on its way, so that it does not pile up in memory
                        stream.flush()
                        ahead = 0
            arrived = self._fs.get_file_info(path).size
        if arrived != size:
            raise OSError(errno.EIO, f"{name} arrived with {arrived} of {size} bytes")
        return seen.hexdigest(), size

    def read_unpublished(self, position: int, name: str) -> bytes:
        return self.read(position, name)

    def publish(self, position: int, state: str, spare: Collection[str]) -> None:
        new = digest_of(state.encode())
        old = ""
        with suppress(FileNotFoundError):
            old = self.read(position, DIGEST).decode(errors="replace")
        # With a checkpoint there already, both are valid until the moment at which state.json changes.
        self.put(position, DIGEST, [memoryview(f"{old}\n{new}".strip().encode())])
        self.put(position, STATE, [memoryview(state.encode())])
        if old:
            self.put(position, DIGEST, [memoryview(new.encode())])
        with self._told():
            self._drop_all_but_published(position)

    def discard(self, position: int, names: Iterable[str]) -> None:
        for name in names:
            with suppress(OSError), self._told():
                self._fs.delete_file(self._path(position, name))

    def remove(self, position: int) -> None:
        with self._told():
            self._fs.delete_file(self._path(position, STATE))
            self._fs.delete_dir(f"{self._root}/{folder_name(position)}")

    def free(self) -> int | None:
        return None

    def _path(self, position: int, name: str) -> str:
        return f"{self._root}/{folder_name(position)}/{name}"

    def _folders(self) -> list[int]:
        selector = fs.FileSelector(self._root, allow_not_found=True)
        entries = [e.base_name for e in self._fs.get_file_info(selector) if e.type == fs.FileType.Directory]
        return sorted((int(name) for name in entries if POSITION.fullmatch(name)), reverse=True)

    def _drop_all_but_published(self, position: int) -> None:
        """Remove what `state.json` does not name: notes of the ranks, and files of a checkpoint that was replaced."""
        try:
            names = {STATE, DIGEST, *json.loads(self.read(position, STATE))["digests"]}
        except (ValueError, KeyError, TypeError):
            return  # damaged: left as it is, to be passed over with its name
        selector = fs.FileSelector(f"{self._root}/{folder_name(position)}")
        for entry in self._fs.get_file_info(selector):
            if entry.is_file and entry.base_name not in names:
                self._fs.delete_file(entry.path)

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Turn pyarrow's errors into OSError without secrets, and without the exceptions that hold them."""
        try:
            yield
        except FileNotFoundError as error:
            raise FileNotFoundError(errno.ENOENT, self._clean(error)) from None
        except (OSError, ArrowException) as error:
            raise OSError(getattr(error, "errno", None) or errno.EIO, self._clean(error)) from None

    def _clean(self, error: Exception) -> str:
        text = getattr(error, "strerror", None) or str(error)
        for hidden in self._hidden:
            text = text.replace(hidden, "***")
        return text


def _redacted(uri: str) -> str:
    """The URI without user, password and query, even where somebody forgot to quote a slash in a password."""
    scheme, _, rest = uri.partition("://")
    return f"{scheme}://{re.split(r'[?#]', rest.rpartition('@')[2])[0]}"


def _secrets(uri: str) -> list[str]:
    """What must not be repeated: the URI, user, password, query and its values; longest first, quoted or not."""
    before, _, after = uri.partition("://")[2].rpartition("@")
    query = re.split(r"[?#]", after, maxsplit=1)[1:]
    values = [value for text in query for pair in text.split("&") for value in pair.partition("=")[2:]]
    parts = [uri, before, *before.split(":", 1), *query, *(value for value in values if len(value) > 4)]
    return sorted({form for part in parts for form in (part, unquote(part)) if form}, key=len, reverse=True)
