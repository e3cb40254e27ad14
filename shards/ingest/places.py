"""Where a source lies: on this machine, behind http(s), in S3 or in Google's storage; opened, listed, and shown.

Other schemes are refused: a source is data, and data starts no program. What is shown of a place went through `redact`;
the queries of urls, which may be as good as keys, go to their server alone.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
from typing import Any
from urllib.parse import parse_qsl, quote, unquote, urlsplit

from ..addresses import AddressError, beside, redact, scheme_of
from ..blob import Blob, LocalBlob
from ..remote import open_blob
from .buckets import SCHEMES, GoogleBlob, is_prefix, show_object
from .errors import IngestError

REMOTE = ("s3", "gs", "http", "https")
# What signs a url for a while, in the dialects of S3, Google, Azure and CloudFront: the same place without it.
_SIGNATURE = re.compile(
    r"(?i)(x-(amz|goog)-.*|awsaccesskeyid|googleaccessid|signature|expires|policy|key-pair-id|s[a-z]{1,3})"
)


def absolute(source: str) -> str:
    """A source as it can be opened from any folder. Raises IngestError for what is no place that can be read."""
    scheme = scheme_of(source)
    if scheme == "file":
        parts = urlsplit(source)
        if parts.netloc not in ("", "localhost") or not parts.path.startswith("/"):
            raise IngestError(f"{redact(source)} is no file of this machine: write file:///absolute/path")
        return os.path.abspath(unquote(parts.path))
    if not scheme:
        return os.path.abspath(source)
    if scheme not in REMOTE or not source.startswith(f"{scheme}://"):
        # Only the scheme is shown: what follows `pipe:` is a command, and may hold a key.
        raise IngestError(
            f"'{scheme}:...' is no source: sources are paths and s3://, gs://, http:// and https:// urls, nothing is "
            "ever run. Write ./ before the name of a file with a colon"
        )
    return source


def is_remote(place: str) -> bool:
    """Whether a place is reached by a url."""
    return scheme_of(place) in REMOTE


def join(root: str, inside: str) -> str:
    """The place of what lies at `inside` below `root`; the root itself for an empty one."""
    if not inside:
        return root
    return beside(root, quote(inside)) if is_remote(root) else os.path.join(root, inside)


def show(place: str) -> str:
    """A place as it may be written down anywhere: without secrets, and as text whatever bytes a file's name has."""
    if scheme_of(place) in SCHEMES:
        return show_object(place)
    return redact(place) if is_remote(place) else as_text(place)


def as_text(name: str) -> str:
    """A file's name as text: bytes that are no UTF-8 become `\\xNN`."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def name_of(place: str) -> str:
    """The last part of a path or url, decoded, without the query."""
    if is_remote(place):
        return unquote(place.partition("?")[0].rstrip("/").rpartition("/")[2])
    return os.path.basename(place)


def fingerprint(place: str) -> str:
    """A hash of a place, query and all but what signs it for a while: a fresh signature is no other source."""
    if is_remote(place) and "?" in place:
        before, _, query = place.partition("?")
        place = f"{before}?{sorted(pair for pair in parse_qsl(query) if not _SIGNATURE.fullmatch(pair[0]))}"
    return hashlib.blake2b(os.fsencode(place), digest_size=16).hexdigest()


def open_place(place: str) -> Blob:
    """A file or object. Nothing is asked of a server yet. Raises IngestError for an address that cannot be one."""
    try:
        if not is_remote(place):
            return LocalBlob(place)
        return GoogleBlob(place) if scheme_of(place) == "gs" else open_blob(place)
    except AddressError as error:
        raise IngestError(str(error)) from None


def close_place(blob: Blob) -> None:
    """Give back what a blob holds open."""
    if isinstance(blob, LocalBlob):
        blob.close()


class BlobFile(io.RawIOBase):
    """A blob as a file that pyarrow, gzip and codecs can read."""

    def __init__(self, blob: Blob) -> None:
        self._blob, self._at, self._size = blob, 0, blob.size()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        data = self.read(len(view)) or b""
        view[: len(data)] = data
        return len(data)

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._size - self._at)
        data = self._blob.read(self._at, left if size is None or size < 0 else min(size, left))
        self._at += len(data)
        return data


def is_folder(place: str) -> bool:
    """Whether a place holds others: a folder, or the beginning of keys in a bucket. Raises IngestError if there is none."""
    if not is_remote(place):
        if not os.path.lexists(place):
            raise IngestError(f"{show(place)} is not there: mend the path, or restore it")
        return os.path.isdir(place)
    if scheme_of(place) not in SCHEMES:
        return False
    open_place(join(place, "x"))  # the reader's own checks: options that it knows, and no keys in the url
    return is_prefix(place)
