"""Which addresses a list of urls may make this machine connect to: those that anybody can reach, and no others.

A list is data by strangers. Without this, a url or a redirect in it could ask what runs beside this process: a cloud's
metadata, a database without password. A name is resolved once, all that it resolves to is checked, and the connection
goes to an address that was checked (`socket_for` is the last to look, after everything that could still change it), so
a name that resolves to something else the second time gains nothing. A name of which any address is refused is refused
as a whole: hosts of the public web have no private addresses, and the outcome must not hang on the answer's order.
Source of the ranges: IANA's special-purpose address registries, cloud vendors' documentation.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from aiohttp.abc import AbstractResolver, ResolveResult

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address
Lookup = Callable[[str, int], Iterable[str]]  # host, port -> addresses; raises socket.gaierror

# On top of what `ipaddress` of this or that Python says is not global.
_REFUSED_V4 = {
    ipaddress.ip_network(network): why
    for network, why in {
        "0.0.0.0/8": "unspecified",
        "100.64.0.0/10": "shared by a carrier's customers",
        "168.63.129.16/32": "metadata of a cloud",
        "169.254.0.0/16": "link-local",  # with it 169.254.169.254, the metadata of most clouds
        "192.0.0.0/24": "special",
        "192.88.99.0/24": "a relay",
        "224.0.0.0/4": "multicast",
        "240.0.0.0/4": "reserved",
    }.items()
}
# All that is global is in 2000::/3, but for translated IPv4.
_GLOBAL_V6 = ipaddress.ip_network("2000::/3")
_TRANSLATED = ipaddress.ip_network("64:ff9b::/96")  # NAT64
_REFUSED_V6 = {
    ipaddress.ip_network(network): why
    for network, why in {
        "2001::/23": "special",  # with it Teredo, which holds any IPv4
        "2001:db8::/32": "for documentation",
        "2002::/16": "6to4, which holds any IPv4",
        "3fff::/20": "for documentation",
    }.items()
}


class Blocked(Exception):
    """An address that must not be connected to; the message is short and holds no secret."""


def refusal(address: IPAddress) -> str:
    """Why an address is not one of the public internet; empty if it is."""
    if isinstance(address, ipaddress.IPv4Address):
        if address.is_loopback:
            return "loopback"
        found = next((why for network, why in _REFUSED_V4.items() if address in network), "")
        return found or ("" if address.is_global else "private")
    if address.ipv4_mapped is not None:
        return refusal(address.ipv4_mapped)
    if address.scope_id is not None:
        return "of one link"
    if address in _TRANSLATED:
        return refusal(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
    for name in ("loopback", "unspecified", "multicast"):
        if getattr(address, f"is_{name}"):
            return name
    if address.is_link_local or address.is_site_local:
        return "link-local"
    if address not in _GLOBAL_V6:
        return "private"
    found = next((why for network, why in _REFUSED_V6.items() if address in network), "")
    if not found and (int(address) >> 32) & 0xFCFFFFFF == 0x5EFE:  # ISATAP: an IPv4 address in the last four bytes
        return refusal(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
    return found or ("" if address.is_global else "private")


def literal(host: str) -> IPAddress | None:
    """The address that a host of a url is, as browsers read it: 127.1, 0x7f000001 and 2130706433 too; None for a name.

    Raises ValueError for what ends in a number and is no address.
    """
    if ":" in host:
        return ipaddress.IPv6Address(host)
    last = host.rstrip(".").rpartition(".")[2]
    if not (last.isdigit() or (last[:2] == "0x" and all(letter in "0123456789abcdef" for letter in last[2:]))):
        return None
    try:
        return ipaddress.IPv4Address(socket.inet_aton(host.rstrip(".")))
    except OSError:
        raise ValueError("no address, though it ends in a number") from None


def _system_lookup(host: str, port: int) -> list[str]:
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_ADDRCONFIG)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


class Vetting(AbstractResolver):
    """Resolves and checks. `allowed` addresses count as public: for tests, whose servers can only be on loopback.

    Lookups run in threads, for the system's resolver knows no other way; one that hangs ends with its own time limit.
    """

    def __init__(
        self,
        *,
        allow_private: bool = False,
        allowed: Iterable[str] = (),
        lookup: Lookup = _system_lookup,
        threads: int = 32,
    ) -> None:
        self.allow_private = allow_private
        self._allowed = frozenset(ipaddress.ip_address(address) for address in allowed)
        self._lookup, self._threads = lookup, threads
        self._pool: ThreadPoolExecutor | None = None

    def check(self, address: IPAddress, host: str = "") -> None:
        """Raises Blocked."""
        why = "" if self.allow_private or address in self._allowed else refusal(address)
        if why:
            name = f"{host[:60]} is " if host and host != str(address) else ""
            raise Blocked(f"{name}{address}, which is {why}")

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        """All addresses of a host, none of which is refused. Raises Blocked and OSError."""
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._threads, "gristmill-names")
        try:
            found = await asyncio.get_running_loop().run_in_executor(self._pool, self._find, host, port)
        except UnicodeError as error:
            raise socket.gaierror(socket.EAI_NONAME, "no name") from error
        for address in found:
            self.check(address, host)
        return [
            ResolveResult(
                hostname=host,
                host=str(address),
                port=port,
                family=socket.AF_INET if address.version == 4 else socket.AF_INET6,
                proto=socket.IPPROTO_TCP,
                flags=socket.AI_NUMERICHOST,
            )
            for address in found
            if family in (socket.AF_UNSPEC, socket.AF_INET if address.version == 4 else socket.AF_INET6)
        ]

    def _find(self, host: str, port: int) -> list[IPAddress]:
        found = [ipaddress.ip_address(address) for address in self._lookup(host, port)]
        if not found:
            raise socket.gaierror(socket.EAI_NONAME, "no address")
        return found

    def socket_for(self, info: tuple[Any, ...]) -> socket.socket:
        """A socket for the address that is about to be connected to. Raises Blocked if it must not be."""
        family, kind, protocol, _, where = info
        self.check(ipaddress.ip_address(where[0]))
        return socket.socket(family, kind, protocol)

    async def close(self) -> None:
        """Forget lookups that have not begun, and wait for those that have."""
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown(wait=False, cancel_futures=True)
            await asyncio.to_thread(pool.shutdown)
