"""Where a shard lies: what may stand in a url, and what of it may be shown.

Only paths, file, http, https and s3 are addresses. The webdataset library would run `pipe:` in a shell; a list of shards
is data, and data must not start programs. Passwords and the queries of presigned urls are as good as keys, so nothing
that can reach a message, a log or a metric holds a url that did not go through `redact`.
"""

from __future__ import annotations

import base64
import re
from dataclasses import dataclass, field
from urllib.parse import quote, unquote, urlsplit

from .errors import GristmillError

SCHEMES = ("file", "http", "https", "s3")
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*(?=:)")
# Quotes too: passwords have been seen to hold them. A word is looked at once, however long it is.
_URL = re.compile(r"(?<![A-Za-z0-9+.-])[A-Za-z0-9+.-]*+://\S*")
_SAFE = "%/:@!$&'()*+,;=~-._"


class AddressError(GristmillError):
    """A url that cannot be read from here."""


def scheme_of(url: str) -> str:
    """`http` of `http://...`, in small letters; empty for a path."""
    found = _SCHEME.match(url)
    return found[0].lower() if found else ""


def beside(base: str, name: str) -> str:
    """The url of `name` in the folder with the url `base`; options behind a question mark stay at the end."""
    folder, mark, options = base.partition("?")
    return f"{folder.rstrip('/')}/{name}{mark}{options}"


def redact(text: str) -> str:
    """The text with every url in it stripped of user, password, query and fragment. Rather too much than too little."""
    return _URL.sub(lambda found: _redact_one(found[0]), text)


def _redact_one(url: str) -> str:
    scheme, _, rest = url.partition("://")
    before, mark, query = rest.partition("?")
    if "@" in query:  # of an unencoded password or of the query: nobody can tell which part is the host
        return f"{scheme}://..."
    user, _, host = before.rpartition("@")
    if user and _may_be_user(user):
        before = f"...@{host}" if "/" in user else host
    return f"{scheme}://{before.partition('#')[0]}" + ("?..." if mark else "")


def _may_be_user(text: str) -> bool:
    """Whether what stands before an @ could be a user and a password, however badly written."""
    return "/" not in text or ":" in text


@dataclass(frozen=True)
class Address:
    """One http or https url, taken apart. `target` goes into the request line; `repr` shows nothing secret."""

    scheme: str
    host: str  # lower case, without brackets
    port: int
    target: str = field(repr=False)  # path and query, percent-encoded
    authorization: str | None = field(default=None, repr=False)

    @property
    def origin(self) -> tuple[str, str, int]:
        """Scheme, host, port: what connections and limits are kept for."""
        return self.scheme, self.host, self.port

    @property
    def host_header(self) -> str:
        """As it stands in a request: with brackets around IPv6, and the port unless it is the scheme's own."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == (443 if self.scheme == "https" else 80) else f"{host}:{self.port}"

    @property
    def shown(self) -> str:
        """The url as it may be shown."""
        return f"{self.scheme}://{self.host_header}{self.target.partition('?')[0]}" + (
            "?..." if "?" in self.target else ""
        )


def parse_address(url: str) -> Address:
    """Take an http or https url apart. Raises AddressError, without a secret in it."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
        if parts.scheme not in ("http", "https") or not host:
            raise ValueError("no http or https url with a host")
        host = host if ":" in host else host.encode("idna").decode("ascii")
    except ValueError:
        raise AddressError(f"{redact(url)} is no usable address: check the host and the port in it") from None
    if re.search(r"[\s\x00-\x1f\x7f]", host):
        raise AddressError(f"{redact(url)!r} is no usable address: its host has a blank in it")
    target = quote(parts.path or "/", safe=_SAFE) + (
        "?" + quote(parts.query, safe=_SAFE + "?[]") if parts.query else ""
    )
    authorization = None
    if parts.username is not None:
        pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        authorization = "Basic " + base64.b64encode(pair.encode()).decode()
    return Address(parts.scheme, host.lower(), port or (443 if parts.scheme == "https" else 80), target, authorization)
