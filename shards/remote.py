"""Shards behind HTTP(S): ranged reads, checked against the object that was first seen, retried within one deadline.

What was received stays received: after a cut the next request asks for the rest. `If-Match` (or `If-Unmodified-Since`)
is sent along, so that a server refuses (412) to serve from an object that was put in the old one's place, and every
answer's own etag, date and size are compared as well, for many servers ignore the condition. `If-Range` would answer
that case with the whole new object, which nobody wants. Semantics: RFC 9110, sections 13 and 14.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

from .addresses import SCHEMES, Address, AddressError, parse_address, redact, scheme_of
from .blob import Blob, LocalBlob
from .client import Client
from .connections import Answer
from .retry import ChangedError, RetryPolicy, StorageError, Trouble
from .transfer import MAY_PASS, Transfer

_DENIED = {
    401: ("denied", "needs other credentials", "give user and password or a presigned url, or mend the server's rules"),
    403: ("denied", "is refused", "check credentials and rights, and whether a presigned url has run out"),
    404: ("missing", "is not there", "restore it or mend the url, then start the same command again"),
    410: ("missing", "is gone", "restore it or mend the url, then start the same command again"),
}


@dataclass(frozen=True)
class About:
    """What a server says of an object. `size` in bytes."""

    size: int
    etag: str | None
    modified: str | None

    @property
    def identity(self) -> str:
        if self.etag is not None:
            return f"etag {self.etag}+{self.size}"
        return f"modified {self.modified}+{self.size}" if self.modified is not None else f"size {self.size}"

    def agrees(self, other: About) -> bool:
        """Whether the other may be the same object: an etag or date that is missing contradicts nothing."""
        mine, its = (self.etag, other.etag) if self.etag and other.etag else (self.modified, other.modified)
        return self.size == other.size and (not mine or not its or mine == its)

    @property
    def condition(self) -> dict[str, str]:
        """The header that makes a server refuse another object. A weak etag never matches strongly (RFC 9110, 13.1.1)."""
        if self.etag is not None and not self.etag.startswith("W/"):
            return {"If-Match": self.etag}
        return {"If-Unmodified-Since": self.modified} if self.modified is not None else {}


def resumable(identity: str) -> bool:
    """Whether this identity vouches for equal bytes, so that half a download can be continued another day."""
    return not identity.startswith(("size ", "etag W/"))


class HttpBlob:
    """An object behind HTTP(S). Opens nothing before the first read. Safe to share between threads and forks.

    `url` is what may be shown: without password and query. With `identity`, from an index, anything else is an error.
    All methods raise StorageError after the policy's deadline, or at once for what will not pass.
    """

    leap = 1 << 20

    def __init__(self, url: str, client: Client, *, identity: str | None = None) -> None:
        self.url = redact(url)
        self.client = client
        self._address = parse_address(url)
        self._moved: Address | None = None
        self._expected = identity
        self._about: About | None = None

    def size(self) -> int:
        """Length in bytes. One short request, unless something was read before."""
        return self._known().size

    def identity(self) -> str:
        """The etag, else the date of the last change, and the size."""
        return self._known().identity

    def read(self, offset: int, length: int) -> bytes:
        """Bytes [offset, offset + length), fewer only where the object ends."""
        if self._about is not None:
            length = min(length, self._about.size - offset)
        if length <= 0:
            return b""
        found = bytearray()
        Transfer(self, offset, length, found.extend).run()
        return bytes(found)

    def download(self, sink: Callable[[memoryview], None], start: int = 0, stop: threading.Event | None = None) -> None:
        """Hand bytes [start, size) to `sink`, in order, in pieces that are good during the call only.

        Works with servers that ignore ranges too. `stop` calls it off with Stopped; the sink's own errors pass through.
        """
        size = self._known(stop).size
        if start < size:
            Transfer(self, start, size - start, sink, whole=True, stop=stop).run()

    def look(self, stop: threading.Event | None = None) -> None:
        """Find out size and identity, if nothing did yet. `stop` calls it off with Stopped."""
        self._known(stop)

    def _known(self, stop: threading.Event | None = None) -> About:
        if self._about is None:
            Transfer(self, 0, 1, lambda _: None, probe=True, stop=stop).run()
        assert self._about is not None
        return self._about

    def meet(self, answer: Answer, size: int) -> None:
        """Take note of what an answer says of the object. Raises ChangedError."""
        about, known = About(size, answer.headers["ETag"], answer.headers["Last-Modified"]), self._about
        if known is None:
            if self._expected is not None and self._expected != about.identity:
                raise ChangedError(self.url, self._expected, about.identity)
            self._about = about
        elif not known.agrees(about):
            raise ChangedError(self.url, known.identity, about.identity)

    def headers(self, address: Address, headers: dict[str, str]) -> dict[str, str]:
        """The headers to send to an address; a password goes to its own server only."""
        if self._address.authorization is not None and address.origin == self._address.origin:
            return {**headers, "Authorization": self._address.authorization}
        return headers

    def refusal(self, answer: Answer) -> Exception:
        """What an answer without content means: a Trouble, or an error for good."""
        status = answer.status
        answer.text()  # so that the connection can be kept
        if status in MAY_PASS:
            return Trouble(str(status), f"status {status}")
        if status in _DENIED:
            reason, problem, remedy = _DENIED[status]
            return StorageError(self.url, f"{problem} (status {status})", remedy, reason)
        return StorageError(
            self.url, f"cannot be read (status {status})", "check the url and the server", f"status {status}"
        )

    def moved(self, answer: Answer, address: Address) -> Address:
        """Where an answer sends us."""
        target = answer.headers["Location"]
        if not target:
            raise StorageError(self.url, "redirects to nowhere", "mend the server", "redirect")
        try:
            found = parse_address(urljoin(f"{address.scheme}://{address.host_header}{address.target}", target))
        except (AddressError, ValueError):
            raise StorageError(self.url, "redirects to what is no http address", "mend the url", "redirect") from None
        if address.scheme == "https" and found.scheme != "https":
            raise StorageError(self.url, f"redirects to {found.shown}, unencrypted", "name that url itself", "redirect")
        return found


@lru_cache(maxsize=64)
def client_for(policy: RetryPolicy) -> Client:
    """The process' one client for a policy: all blobs of a host share its connections and its limit."""
    return Client(policy)


def open_blob(url: str | Path, *, policy: RetryPolicy | None = None, identity: str | None = None) -> Blob:
    """A path, `file://`, `http(s)://` or `s3://bucket/key` as a Blob. Nothing is asked of a server yet.

    `identity`, if an index knows it, must be that of the object when it is read. Raises AddressError.
    """
    if isinstance(url, Path):
        return LocalBlob(url)
    scheme = scheme_of(url)
    if not scheme:
        return LocalBlob(url)
    if scheme == "file":
        parts = urlsplit(url)
        if parts.netloc not in ("", "localhost") or parts.query or parts.fragment or not parts.path.startswith("/"):
            raise AddressError(f"{redact(url)} is no file of this machine: write file:///absolute/path")
        return LocalBlob(os.path.abspath(unquote(parts.path)))
    client = client_for(policy or RetryPolicy())
    if scheme in ("http", "https"):
        return HttpBlob(url, client, identity=identity)
    if scheme == "s3":
        from .objects import S3Blob

        return S3Blob(url, client, identity=identity)
    # Only the scheme is shown: what follows `pipe:` is a command, and may hold a key.
    raise AddressError(
        f"'{scheme}:...' is no address of a shard: shards are read from paths and from "
        f"{', '.join(name + '://' for name in SCHEMES)}, nothing is ever run. Write ./ before a file's name with a colon"
    )
