"""A data set behind a url: its manifest is copied file by file, as needed; its shards stay where they are.

The small files come when it is opened, each time, for a data set may have grown; the rows of 512 shards at a time come
when one of them is first read, so that nothing depends on how large the data set is. Copies lie in a folder named after
the data set's digest, which several processes may share: each writes beside and renames.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import tempfile
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

from .addresses import beside, redact
from .manifest import DATASET, GROUPS, SAMPLES, SHARDS, Manifest, ManifestError, Rows
from .places import is_remote
from .remote import HttpBlob, open_blob
from .retry import RetryPolicy, StorageError
from .storage import PARTIAL
from .tombstones import TOMBSTONES


class MirroredManifest(Manifest):
    """A manifest whose files come from `base`, the url of its folder. Made by `open_manifest`."""

    policy: RetryPolicy | None = None

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._here: set[int] = set()
        self._copying = threading.Lock()

    def prepare(self, shard: int, stop: threading.Event | None = None) -> None:
        """Copy what `rows` of this shard needs, if it is not here yet. `stop` calls it off with Stopped."""
        number = shard // GROUPS
        if number in self._here:
            return
        with self._copying:
            name = f"{SAMPLES}/{number:05d}.parquet"
            if not (self.root / name).exists():
                assert self.base is not None
                _copy(self.base, name, self.root, self.policy, stop)
            self._here.add(number)

    def complete(self) -> None:
        """Copy all rows that are not here yet, for whoever reads the files themselves: a filter, for example."""
        for shard in range(0, len(self.urls), GROUPS):
            self.prepare(shard)

    def _load(self, shard: int) -> Rows:
        self.prepare(shard)
        return super()._load(shard)


def open_manifest(
    place: str | Path, folder: str | Path | None = None, *, policy: RetryPolicy | None = None, cache_rows: int = 1 << 22
) -> Manifest:
    """Open the data set in a folder, or behind the url of one (http, https, s3), whose manifest is copied into `folder`.

    Without `folder` the copy goes into the user's cache folder. Raises ManifestError, StorageError.
    """
    if isinstance(place, Path) or not is_remote(place):
        return Manifest.open(str(place).removeprefix("file://"), cache_rows=cache_rows)
    home = _home() if folder is None else Path(folder)
    try:
        about = _fetch(place, DATASET, policy)
    except StorageError as error:
        if error.reason != "missing":
            raise
        raise ManifestError(
            f"{redact(place)} is no data set ({DATASET} is missing there): name the url of a folder that `gristmill ingest` "
            "or `gristmill index` wrote"
        ) from error
    root = home / _named(place, about)
    try:
        root.mkdir(parents=True, exist_ok=True)
        _clear_away(root)
        if not (root / SHARDS).exists():
            _copy(place, SHARDS, root, policy)
        try:
            _write(root / TOMBSTONES, _fetch(place, TOMBSTONES, policy))
        except StorageError as error:
            if error.reason != "missing":
                raise
        _write(root / DATASET, about)
    except OSError as error:
        raise ManifestError(f"{root} cannot hold a copy of the manifest ({error.strerror}): make room there") from error
    manifest = MirroredManifest.open(root, cache_rows=cache_rows)
    assert isinstance(manifest, MirroredManifest)
    manifest.base, manifest.policy = place, policy
    return manifest


def _home() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gristmill" / "manifests"


def _named(place: str, about: bytes) -> str:
    """The folder of a copy: the place, without what is secret in it, and the data set's identity."""
    try:
        digest = str(json.loads(about)["digest"])
    except (ValueError, TypeError, KeyError) as error:
        raise ManifestError(f"{redact(place)}/{DATASET} is no manifest ({error!r}): make the data set again") from error
    return hashlib.blake2b(f"{redact(place)}\0{digest}".encode(), digest_size=12).hexdigest()


def _fetch(base: str, name: str, policy: RetryPolicy | None, stop: threading.Event | None = None) -> bytes:
    blob = open_blob(beside(base, name), policy=policy)
    assert isinstance(blob, HttpBlob)  # `base` is the url of a server
    found = bytearray()
    blob.download(found.extend, 0, stop)
    return bytes(found)


def _copy(base: str, name: str, root: Path, policy: RetryPolicy | None, stop: threading.Event | None = None) -> None:
    _write(root / name, _fetch(base, name, policy, stop))


def _write(path: Path, data: bytes) -> None:
    """All of it or nothing, whoever else writes the same file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        handle, beside_it = tempfile.mkstemp(prefix=path.name, suffix=PARTIAL, dir=path.parent)
        fcntl.flock(handle, fcntl.LOCK_EX)
        if os.fstat(handle).st_nlink:
            break
        os.close(handle)  # taken for a leftover before it was locked
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            os.replace(beside_it, path)
    except BaseException:
        os.unlink(beside_it)
        raise


def _clear_away(root: Path) -> None:
    """Remove what killed processes have left half-written. Whoever still writes holds a lock, gone with its process."""
    for path in [*root.glob(f"*{PARTIAL}"), *root.glob(f"{SAMPLES}/*{PARTIAL}")]:
        with suppress(OSError), path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
