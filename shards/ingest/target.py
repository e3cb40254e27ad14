"""A url that is about to be asked, in the parts that a request is made of, and where a redirect leads from there.

addresses.py takes it apart; what goes out is put together from the parts, so that no two readers of one text can differ
on which host it names. A user and password in a url go to that origin and to no other; a redirect may not bring any.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from urllib.parse import quote, urljoin, urlsplit

from yarl import URL

from ..addresses import AddressError, parse_address
from .vetting import IPAddress, literal

_LONGEST = 8000  # characters of a url
_NAME = re.compile(r"[a-z0-9_-]+(\.[a-z0-9_-]+)*")
_ASCII = "".join(map(chr, range(33, 127)))


class BadUrl(Exception):
    """A url that cannot be asked; the message is short and holds none of it."""


@dataclass(frozen=True)
class Target:
    """`address` is set where the host is no name. `repr` shows nothing secret."""

    host: str
    port: int
    address: IPAddress | None
    url: URL = field(repr=False)  # without user, password, fragment
    authorization: str | None = field(default=None, repr=False)

    @property
    def origin(self) -> tuple[str, str, int]:
        return self.url.scheme, self.host, self.port

    def redirected(self, location: str) -> Target:
        """Where a Location header leads. Raises BadUrl."""
        # What is not ASCII was read as UTF-8 or kept as it came; both go back to their bytes.
        location = quote(location.strip().encode("utf-8", "surrogateescape"), safe=_ASCII)
        try:
            there = parse(urljoin(str(self.url), location))
        except BadUrl as error:
            raise BadUrl(f"redirected to {error}") from None
        except ValueError:
            raise BadUrl("redirected to no usable address") from None
        if there.authorization is not None:
            raise BadUrl("redirected to a url with a user in it")
        same = there.origin == self.origin
        return Target(there.host, there.port, there.address, there.url, self.authorization if same else None)


def parse(text: str) -> Target:
    """Take a url apart. Raises BadUrl."""
    if len(text) > _LONGEST:
        raise BadUrl(f"a url of more than {_LONGEST} characters")
    try:
        scheme = urlsplit(text).scheme
        if scheme not in ("http", "https"):
            raise BadUrl("a url that is neither http nor https")
        parts = parse_address(text)
    except (AddressError, ValueError):  # a UnicodeError is a ValueError
        raise BadUrl("no usable address") from None
    try:
        address = literal(parts.host)
    except ValueError:
        raise BadUrl("a host that is no name and no address") from None
    host = parts.host.rstrip(".") if address is None else str(address)
    if address is None and (len(host) > 253 or not _NAME.fullmatch(host)):
        raise BadUrl("a host that is no name and no address")
    if "%" in host:
        raise BadUrl("a host with a zone, which means something on one machine only")
    path, _, query = parts.target.partition("?")
    url = URL.build(scheme=scheme, host=host, port=parts.port, path=path, query_string=query, encoded=True)
    return Target(host, parts.port, address, url, parts.authorization)
