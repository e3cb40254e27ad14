"""Objects in buckets as pyarrow's file systems know them: S3 listed, Google's storage listed and read.

S3 is read by our own reader (objects.py says why). A file system is made anew in each process, for its threads do not
survive a fork. Keys come from where the readers of shards take them, never out of a url.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, unquote, urlsplit

from ..addresses import redact, scheme_of
from ..credentials import Credentials
from ..retry import StorageError
from .errors import IngestError

if TYPE_CHECKING:
    from pyarrow.fs import FileInfo, FileSystem

SCHEMES = ("s3", "gs")
Listing = tuple[list[str], list[str]]  # names of objects, and of folders
_PATIENCE = timedelta(seconds=120)  # of the library's own retries; by itself it has 15 minutes
_GS_OPTIONS = {"endpoint_override", "scheme", "anonymous"}


def show_object(place: str) -> str:
    """The url of an object without its options."""
    return redact(place.partition("?")[0])


class GoogleBlob:
    """`gs://bucket/key`, with options `?endpoint_override=host:port&scheme=http&anonymous=true`."""

    leap = 1 << 20

    def __init__(self, url: str) -> None:
        self.url = show_object(url)
        self._place, self._about = url, None
        self._path = _bucket_path(url)
        if not self._path.partition("/")[2]:
            raise IngestError(f"{self.url} names no object: write gs://bucket/key")

    def size(self) -> int:
        """Length in bytes. Raises StorageError."""
        return int(self._known().size)

    def identity(self) -> str:
        """Time of the last change, and size."""
        about = self._known()
        return f"modified {about.mtime_ns}+{about.size}"

    def _known(self) -> FileInfo:
        from pyarrow.fs import FileType

        if self._about is None:
            try:
                about = file_system(self._place).get_file_info(self._path)
            except OSError as error:
                raise self._error(error) from None
            if about.type != FileType.File:
                raise StorageError(self.url, "is not there", "restore it or mend the url", "missing")
            self._about = about
        return self._about

    def read(self, offset: int, length: int) -> bytes:
        """Bytes [offset, offset + length), fewer only where the object ends. Raises StorageError."""
        length = min(length, self.size() - offset)
        if length <= 0:
            return b""
        try:
            with file_system(self._place).open_input_file(self._path) as file:
                return file.read_at(length, offset)
        except OSError as error:
            raise self._error(error) from None

    def _error(self, error: OSError) -> StorageError:
        reason = "missing" if isinstance(error, FileNotFoundError) else "storage"
        return StorageError(
            self.url, f"cannot be read ({_brief(error)})", "check its name, the credentials and their rights", reason
        )


def file_system(place: str) -> FileSystem:
    """pyarrow's file system for an s3:// or gs:// url, one a process. Raises IngestError for options it does not know."""
    scheme, query = scheme_of(place), place.partition("?")[2]
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
    return _file_system(scheme, query, endpoint, os.getpid())


@lru_cache(maxsize=16)
def _file_system(scheme: str, query: str, endpoint: str, process: int) -> FileSystem:
    from pyarrow import fs

    options = {name: values[-1] for name, values in parse_qs(query, keep_blank_values=True).items()}
    anonymous = options.get("anonymous") == "true"
    if scheme == "gs":
        if unknown := sorted(options.keys() - _GS_OPTIONS):
            known = ", ".join(sorted(_GS_OPTIONS))
            raise IngestError(f"a gs:// url has an option {unknown[0]!r} that is not known; there are {known}")
        given: dict[str, Any] = {name: options[name] for name in ("endpoint_override", "scheme") if name in options}
        return fs.GcsFileSystem(anonymous=anonymous, retry_time_limit=_PATIENCE, **given)
    endpoint = options.get("endpoint_override") or endpoint
    protocol, mark, host = endpoint.rpartition("://")
    given = {"scheme": protocol if mark else options.get("scheme", "https"), "background_writes": False}
    if endpoint:
        given["endpoint_override"] = host.rstrip("/")
    if region := options.get("region") or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION"):
        given["region"] = region
    elif endpoint:
        given["region"] = "us-east-1"
    if anonymous:
        return fs.S3FileSystem(anonymous=True, **given)
    keys = Credentials(options.get("profile")).get()
    return fs.S3FileSystem(access_key=keys.access, secret_key=keys.secret, session_token=keys.token or None, **given)


def is_prefix(place: str) -> bool:
    """Whether a url is the beginning of keys, and no object. Raises IngestError if it is neither."""
    from pyarrow.fs import FileType

    try:
        kind = file_system(place).get_file_info(_bucket_path(place)).type
    except OSError as error:
        raise _unlisted(place, error) from None
    if kind == FileType.NotFound:
        raise IngestError(f"{show_object(place)} is not there: check the bucket's name, the prefix and the endpoint")
    return kind == FileType.Directory


def lister(place: str) -> Callable[[str], Listing]:
    """What gives the names right below a folder of a prefix: objects, and folders. It raises IngestError.

    S3 is asked folder by folder. Of Google's storage pyarrow shows only folders that somebody made as objects, unless it
    lists everything: so that is done, once, and held.
    """
    if scheme_of(place) == "s3":
        return partial(_list_folder, place)
    tree: dict[str, Listing] = {"": ([], [])}
    base = f"{_bucket_path(place)}/"
    for one in _select(place, base, recursive=True):
        inside, _, name = one.removeprefix(base).rpartition("/")
        _grow(tree, inside)[0].append(name)
    return tree.__getitem__


def _grow(tree: dict[str, Listing], inside: str) -> Listing:
    if inside not in tree:
        tree[inside] = [], []
        above, _, name = inside.rpartition("/")
        _grow(tree, above)[1].append(name)
    return tree[inside]


def _list_folder(place: str, inside: str) -> Listing:
    base = _bucket_path(place)
    found = _select(place, f"{base}/{inside}" if inside else base, recursive=False)
    names = [one.rstrip("/").rpartition("/")[2] for one in found]
    return (
        [name for name, one in zip(names, found, strict=True) if one[-1] != "/"],
        [name for name, one in zip(names, found, strict=True) if one[-1] == "/"],
    )


def _select(place: str, folder: str, *, recursive: bool) -> list[str]:
    """Paths below a folder; those of folders end with a slash, and are left out of a recursive listing."""
    from pyarrow.fs import FileSelector, FileType

    try:
        found = file_system(place).get_file_info(FileSelector(folder.rstrip("/"), recursive=recursive))
    except OSError as error:
        raise _unlisted(place, error) from None
    paths = [one.path if one.type == FileType.File else f"{one.path}/" for one in found]
    return [path for path in paths if path[-1] != "/"] if recursive else paths


def _bucket_path(place: str) -> str:
    parts = urlsplit(place, allow_fragments=False)
    if "@" in parts.netloc or not parts.netloc:
        raise IngestError(f"{redact(place)} is no url of a bucket: write {parts.scheme}://bucket/prefix, without keys")
    return (parts.netloc + unquote(parts.path)).rstrip("/")


def _unlisted(place: str, error: OSError) -> IngestError:
    return IngestError(
        f"{show_object(place)} cannot be listed ({_brief(error)}): check the endpoint, the credentials and their rights"
    )


def _brief(error: OSError) -> str:
    return redact(" ".join(str(error).split()))[:300]
