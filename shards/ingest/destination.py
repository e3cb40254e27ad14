"""Where shards go: a folder, or s3:// and gs://, to which whole files are sent from a local work folder.

Object stores show an object when its last byte has come, so a name stands for a whole file there too. What an upload meets
on its way (a refusal, a server that is away) is tried again with jittered pauses, up to a deadline; then the ingest stops
and may be called again. The ledger and the manifests are made in the work folder, which mirrors the destination but for
the tars, and sent at the end.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
from pyarrow import fs

from ..addresses import redact, scheme_of
from ..manifest import DATASET, SAMPLES, SHARDS
from ..retry import RetryPolicy, next_pause
from ..rewrite import REMOVED
from ..storage import published
from ..tombstones import TOMBSTONES
from .errors import IngestError
from .ledger import LEDGER

REMOTE = ("s3", "gs")
_PIECE = 8 << 20
_NUMBERED = re.compile(r"(\d+)\.tar")
# What no second try mends, as the AWS and Google libraries say it.
_FINAL = re.compile(
    r"ACCESS_DENIED|INVALID_ACCESS_KEY|SIGNATURE|NO_SUCH_BUCKET|InvalidAccessKeyId|NoSuchBucket|PermissionDenied|HTTP status 40[13]"
)


def is_remote(place: str) -> bool:
    """Whether files are sent there."""
    return scheme_of(place) in REMOTE


class Destination:
    """A folder behind a url. Errors name it without its query."""

    def __init__(self, url: str, policy: RetryPolicy | None = None) -> None:
        self.url, self.policy = redact(url), policy or RetryPolicy()
        try:
            if not url.partition("://")[2].partition("?")[0].strip("/"):
                raise ValueError("it names no bucket")
            self._fs, path = fs.FileSystem.from_uri(url)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise IngestError(
                f"{self.url} is no destination ({redact(str(error))}): write s3://bucket/folder or gs://bucket/folder"
            ) from error
        self._path = path.rstrip("/")

    def check(self) -> None:
        """Raise IngestError unless the bucket is there and these keys are taken: before any work, and not after a day of it."""
        try:
            found = self._fs.get_file_info(self._path.partition("/")[0])
            problem = "there is no such bucket" if found.type is fs.FileType.NotFound else ""
        except (OSError, pa.ArrowException) as error:
            problem = redact(str(error))[:300]
        if problem:
            raise IngestError(
                f"{self.url} cannot be written to ({problem}): see that the storage answers, has this bucket and takes these keys"
            )

    def put(self, path: Path, name: str) -> None:
        """Send a file, whole, under this name. IngestError when it was not taken within the deadline."""
        until, pause = time.monotonic() + self.policy.deadline, 0.0
        target, size = f"{self._path}/{name}", path.stat().st_size
        while True:
            try:
                with path.open("rb") as file, self._fs.open_output_stream(target) as out:
                    while piece := file.read(_PIECE):
                        out.write(piece)
                there = self._fs.get_file_info(target).size
                if there != size:
                    raise OSError(f"{there} of {size} bytes arrived")
                return
            except (OSError, pa.ArrowException) as error:
                pause = next_pause(self.policy, pause)
                final = _FINAL.search(str(error)) or isinstance(error, FileNotFoundError | PermissionError)
                if final or time.monotonic() + pause > until:
                    raise IngestError(
                        f"{self.url}/{name} could not be written ({redact(str(error))[:300]}): see that the storage answers and takes "
                        "these keys, then start the same command again, it goes on where it was"
                    ) from error
                time.sleep(pause)

    def remove_from(self, split: str, first: int, *, manifest: bool) -> None:
        """Remove the shards of a half from number `first` on, and before them, if asked to, its manifest."""
        folder = f"{self._path}/{split}"
        found = self._fs.get_file_info(fs.FileSelector(folder, recursive=True, allow_not_found=True))
        paths = [info.path for info in found if info.type is fs.FileType.File]
        inside = {path[len(folder) + 1 :]: path for path in paths}
        ours = [name for name in (DATASET, SHARDS) if manifest and name in inside]
        ours += [name for name in inside if manifest and name.startswith(f"{SAMPLES}/")]
        ours += [name for name in inside if (found := _NUMBERED.fullmatch(name)) and int(found[1]) >= first]
        for name in ours:
            self._fs.delete_file(inside[name])

    def get_all(self, root: Path) -> None:
        """Bring the manifests and the ledger of what was published there, for an ingest that goes on with them."""
        try:
            self._get_all(root)
        except (OSError, pa.ArrowException) as error:
            raise IngestError(
                f"{self.url} cannot be read ({redact(str(error))[:300]}): see that the storage answers and takes these keys"
            ) from error

    def _get_all(self, root: Path) -> None:
        found = self._fs.get_file_info(fs.FileSelector(self._path, recursive=True, allow_not_found=True))
        wanted = [
            info.path for info in found if info.type is fs.FileType.File and _is_ours(info.path[len(self._path) + 1 :])
        ]
        for path in sorted(wanted, key=lambda path: path.endswith(".json")):
            local = root / path[len(self._path) + 1 :]
            local.parent.mkdir(parents=True, exist_ok=True)
            with self._fs.open_input_stream(path) as source, published(local) as file:
                while piece := source.read(_PIECE):
                    file.write(piece)


def _is_ours(name: str) -> bool:
    first, _, rest = name.partition("/")
    return first == LEDGER or rest in (DATASET, SHARDS, TOMBSTONES, REMOVED) or rest.startswith(f"{SAMPLES}/")


def send(destination: Destination, root: Path, paths: Iterable[Path]) -> None:
    """Send files of the work folder to where they belong."""
    for path in paths:
        destination.put(path, path.relative_to(root).as_posix())
