"""One request and its answer: the image's bytes, where else to ask, or what went wrong in one word of `Outcome`.

aiohttp speaks HTTP: well kept, its parser is a fuzzed C library, and it lets a resolver and a socket factory of our own
decide what is connected to. All comfort that would act behind our back is off: proxies of the environment, redirects,
cookies, decompression (a bomb stays as small as it came). A text that came from a server never gets into a detail.
"""

from __future__ import annotations

import asyncio
import errno
import socket
import ssl
import time
from collections.abc import Mapping
from contextlib import suppress

import aiohttp

from ..addresses import redact
from ..retry import retry_after_seconds
from .candidate import Outcome
from .fetch_config import FetchConfig
from .hosts import Host, Turn
from .robots import forbidden, token_of
from .room import Hold, NoRoom
from .tally import FetchStats
from .target import BadUrl, Target
from .vetting import Blocked, Vetting

_DRAIN = 32768  # bytes of an unwanted answer that are cheaper to read than a new connection
_IDLE = 4.0  # seconds for which a connection waits for another request
_OURS = {
    errno.EMFILE,
    errno.ENFILE,
    errno.ENOBUFS,
    errno.ENOMEM,
    errno.EADDRNOTAVAIL,
    errno.ENETUNREACH,
    errno.ENETDOWN,
}
_TEMPORARY = {408, 425, 429}
_NOT_AGAIN = {501, 505}


class Failed(Exception):
    """A request that brought no image. `again`: another try may; `missed`: the host could not be reached."""

    def __init__(
        self,
        outcome: Outcome,
        detail: str,
        *,
        again: bool = False,
        retry_after: float | None = None,
        missed: bool = False,
    ) -> None:
        self.outcome, self.detail = outcome, redact(detail)[:200]
        super().__init__(self.detail)
        self.again, self.retry_after, self.missed = again, retry_after, missed


class Exchange:
    """The session that all requests of a fetcher go through. Lives and dies in one event loop."""

    def __init__(self, config: FetchConfig, vetting: Vetting, stats: FetchStats) -> None:
        self._config, self._vetting, self._stats = config, vetting, stats
        self._token = token_of(config.user_agent)
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                limit=0,  # fetch.py and hosts.py count
                resolver=vetting,
                socket_factory=vetting.socket_for,
                ttl_dns_cache=60,
                ssl=ssl.create_default_context(),  # heeds SSL_CERT_FILE
                keepalive_timeout=_IDLE,
            ),
            headers={"User-Agent": config.user_agent, "Accept": "image/*,*/*;q=0.5", "Accept-Encoding": "identity"},
            timeout=aiohttp.ClientTimeout(
                total=None, connect=config.connect_timeout, sock_connect=None, sock_read=config.stall_timeout
            ),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            trust_env=False,
            max_line_size=8190,
            max_field_size=8190,
            max_headers=128,
        )

    async def close(self) -> None:
        await self._session.close()
        await self._vetting.close()

    async def ask(self, target: Target, host: Host, turn: Turn, hold: Hold, *, keep: bool) -> bytes | Target:
        """The bytes that are there, or where a redirect leads. `keep`: the host will soon be asked again.

        Raises Failed and NoRoom.
        """
        config, answered, began = self._config, False, time.monotonic()
        headers: Mapping[str, str] = {
            **({} if target.authorization is None else {"Authorization": target.authorization}),
            **({} if keep else {"Connection": "close"}),
        }
        self._stats.requests += 1
        self._stats.in_flight += 1
        try:
            async with asyncio.timeout(config.timeout):
                if target.address is not None:
                    self._vetting.check(target.address)
                async with self._session.get(target.url, headers=headers, allow_redirects=False) as answer:
                    answered = True
                    host.reached(target.port)
                    return await self._read(answer, target, turn, hold, keep)
        except NoRoom:
            self._stats.dropped += 1
            raise
        except Failed as failed:
            if failed.retry_after is not None and failed.retry_after > config.longest_pause:
                host.sent_away(target.port, failed.outcome, min(failed.retry_after, config.give_up_seconds))
            raise
        except Exception as error:
            failed = self._failure(error, answered)
            if failed.missed:
                host.missed(target.port, failed.outcome, config.give_up_after, config.give_up_seconds)
            raise failed from None
        finally:
            self._stats.in_flight -= 1
            self._stats.took(time.monotonic() - began)

    async def _read(
        self, answer: aiohttp.ClientResponse, target: Target, turn: Turn, hold: Hold, keep: bool
    ) -> bytes | Target:
        status = answer.status
        if self._config.respect_robots and status < 400:
            rule = forbidden(answer.headers.getall("X-Robots-Tag", []), self._token)
            if rule:
                raise Failed(Outcome.OPTED_OUT, f"X-Robots-Tag: {rule}")
        if status in (200, 203):
            data = await self._body(answer, hold)
            turn.ok = True
            return data
        if keep and answer.content_length is not None and answer.content_length <= _DRAIN:
            with suppress(Exception):
                async with asyncio.timeout(2):
                    await answer.read()
        if status in (301, 302, 303, 307, 308) and "Location" in answer.headers:
            turn.ok = True
            try:
                return target.redirected(answer.headers["Location"])
            except BadUrl as error:
                raise Failed(Outcome.BAD_URL, str(error)) from None
        if status in _TEMPORARY or status >= 500:
            wait = retry_after_seconds(answer.headers.get("Retry-After"))
            turn.throttled = status in (429, 503)
            again, detail = status not in _NOT_AGAIN, f"status {status}"
            if wait is not None and wait > self._config.longest_pause:
                again, detail = False, f"status {status}, not to be asked again for {wait:.0f} s"
            elif turn.throttled:
                turn.retry_after = wait
            raise Failed(Outcome.SERVER_ERROR, detail, again=again, retry_after=wait)
        raise Failed(Outcome.GONE, f"status {status}")

    async def _body(self, answer: aiohttp.ClientResponse, hold: Hold) -> bytes:
        config, length = self._config, answer.content_length
        if length is not None:
            if length > config.max_bytes:
                raise Failed(Outcome.TOO_LARGE, f"{length} bytes announced, more than {config.max_bytes}")
            hold.need(length)
        pieces, size, began = [], 0, time.monotonic()
        async for piece in answer.content.iter_any():
            size += len(piece)
            self._stats.bytes += len(piece)
            if size > config.max_bytes:
                raise Failed(Outcome.TOO_LARGE, f"more than {config.max_bytes} bytes")
            try:
                hold.need(size)
            except NoRoom:
                # The next try must not end one piece further on, and so on.
                raise NoRoom(min(2 * size, config.max_bytes)) from None
            spent = time.monotonic() - began
            if spent > config.stall_timeout and size < config.min_rate * spent:
                detail = f"{size / spent:.0f} bytes/s, less than {config.min_rate:.0f}"
                raise Failed(Outcome.TIMED_OUT, detail, again=True)
            pieces.append(piece)
        if length is not None and size != length:
            raise Failed(Outcome.CUT, f"{size} of {length} bytes came", again=True)
        return b"".join(pieces)

    def _failure(self, error: Exception, answered: bool) -> Failed:
        """What an exception means, without a word of what it says: it may hold the url, or what a server sent."""
        config, name = self._config, type(error).__name__
        match error:
            case Blocked():
                return Failed(Outcome.BLOCKED_ADDRESS, str(error))
            case aiohttp.ConnectionTimeoutError():
                detail = f"no connection within {config.connect_timeout:g} s"
                return Failed(Outcome.NO_CONNECTION, detail, again=True, missed=True)
            case aiohttp.SocketTimeoutError():
                detail = f"no byte for {config.stall_timeout:g} s"
                return Failed(Outcome.TIMED_OUT, detail, again=True, missed=not answered)
            case TimeoutError():
                detail = f"not done within {config.timeout:g} s"
                return Failed(Outcome.TIMED_OUT, detail, again=True, missed=not answered)
            case aiohttp.ClientConnectorDNSError():
                again = error.errno == socket.EAI_AGAIN
                detail = "the name cannot be resolved now" if again else "no such name"
                return Failed(Outcome.NO_HOST, detail, again=again, missed=True)
            case aiohttp.ClientConnectorCertificateError():
                return Failed(Outcome.NO_CONNECTION, "its certificate is not to be trusted")
            case aiohttp.ClientSSLError() | ssl.SSLError():
                return Failed(Outcome.NO_CONNECTION, "encryption failed")
            case aiohttp.ClientConnectorError():
                ours = error.os_error.errno in _OURS
                why = errno.errorcode.get(error.os_error.errno or 0, type(error.os_error).__name__)
                return Failed(Outcome.NO_CONNECTION, f"no connection ({why})", again=True, missed=not ours)
            case aiohttp.ClientPayloadError():
                return Failed(Outcome.CUT, "the body ended too soon", again=True)
            case aiohttp.ServerConnectionError() | OSError() | aiohttp.ClientConnectionError():
                return Failed(Outcome.CUT, "connection lost", again=True)
            case aiohttp.ClientResponseError():
                return Failed(Outcome.SERVER_ERROR, "no proper HTTP answer", again=True)
            case aiohttp.InvalidURL():
                return Failed(Outcome.BAD_URL, "no usable address")
        self._stats.odd[name] += 1
        return Failed(Outcome.UNREADABLE, f"the fetch failed ({name})")
