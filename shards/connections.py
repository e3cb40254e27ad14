"""One connection to an HTTP server, and the answers that come in on it.

The standard library parses the answers; sending a GET and receiving bytes is done here, since only a receiver of its
own can hold a read to its limits: no byte for too long, too few bytes a second, the deadline over, called off. All four
hold while headers drip in as well. Proxies of the environment are not used.
"""

from __future__ import annotations

import http.client
import io
import select
import socket
import ssl
import time
from collections.abc import Iterator

from .addresses import Address
from .retry import Attempts, RetryPolicy, Stopped, StorageError, Trouble

_SLICE = 0.5  # seconds in one call of the kernel: how soon a stop is noticed
_IDLE = 20.0  # seconds; servers commonly hang up after 30 to 60
_PIECE = 1 << 16  # bytes asked for at a time; more does not come faster, and costs the allocator
_DRAIN = 65536  # bytes of an unwanted answer that are cheaper to read than a new connection


class Connection:
    """A socket, and how long the read that uses it may still wait."""

    def __init__(self, address: Address, policy: RetryPolicy, tls: ssl.SSLContext | None) -> None:
        self.sock: socket.socket = _connect(address, policy, tls)
        self.sock.settimeout(min(_SLICE, policy.stall_timeout / 4))
        self.idle_since = 0.0
        self.received = 0

    def ask(self, request: bytes, attempts: Attempts) -> http.client.HTTPResponse:
        """Send a request and read the head of the answer."""
        self.attempts, self.policy = attempts, attempts.policy
        self.received = 0
        self.began = self.last = time.monotonic()
        self.sock.sendall(request)
        # The standard library asks a socket for nothing but this file.
        response = http.client.HTTPResponse(self, method="GET")  # pyright: ignore[reportArgumentType]
        response.begin()
        return response

    def makefile(self, _mode: str) -> io.BufferedReader:
        return io.BufferedReader(_Incoming(self), 65536)

    def receive(self, into: memoryview) -> int:
        """Some bytes, at least one unless the server hung up. Raises Trouble for one that is too slow, and Stopped."""
        policy, attempts = self.policy, self.attempts
        while True:
            now = time.monotonic()
            if attempts.stop is not None and attempts.stop.is_set():
                raise Stopped
            if now - self.last >= policy.stall_timeout:
                raise Trouble("stalled", f"no byte for {policy.stall_timeout:g} s")
            if now >= attempts.until:
                raise Trouble("deadline", f"{self.received} bytes had come")
            spent = now - self.began
            if spent > policy.stall_timeout and self.received < policy.min_rate * spent:
                raise Trouble("slow", f"{self.received / spent:.0f} bytes/s, less than {policy.min_rate:.0f}")
            try:
                count = self.sock.recv_into(into)
            except TimeoutError:
                continue
            self.received += count
            self.last = time.monotonic()
            return count

    def usable(self) -> bool:
        """Whether an idle connection may serve again: not too old, and silent (a hang-up can be read)."""
        if time.monotonic() - self.idle_since > _IDLE:
            return False
        watch = select.poll()
        watch.register(self.sock, select.POLLIN)
        return not watch.poll(0)

    def close(self) -> None:
        self.sock.close()


class _Incoming(io.RawIOBase):
    """What http.client reads answers from. One for each answer; closing it leaves the connection open."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def readable(self) -> bool:
        return True

    def readinto(self, into: memoryview) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self._connection.receive(into)


class Answer:
    """A status, headers, and a body that is read piece by piece."""

    def __init__(self, response: http.client.HTTPResponse, connection: Connection) -> None:
        self._response, self.connection = response, connection
        self.status = response.status
        self.headers = response.headers
        self.length: int | None = response.length  # bytes still to come; None where the server did not say
        self.delimited = self.length is not None or bool(response.chunked)  # a cut body can be told from a whole one
        self.complete = self.length == 0
        self.ok = False  # set by whoever is content with it

    def pieces(self) -> Iterator[memoryview]:
        """The body, as it comes. Ends early if the connection was cut. Raises Trouble and Stopped.

        `read1` hands over what is there before it asks for more, so that a stall costs nothing that had arrived.
        """
        while not self.complete:
            try:
                if self.length is None:  # chunked, or up to the end of the connection
                    piece = self._response.read1(_PIECE)
                else:
                    piece = self._response.fp.read1(min(_PIECE, self.length))
            except (OSError, http.client.HTTPException) as error:
                raise trouble_of(error) from error
            if self.length is not None:
                self.length -= len(piece)
                self.complete = self.length == 0
            elif not piece:
                self.complete = self.delimited
            if not piece:
                return
            yield memoryview(piece)

    def text(self, most: int = _DRAIN) -> str:
        """A short body, such as an error's; what comes after `most` bytes is left."""
        found = b""
        if self.length is None or self.length <= most:
            for piece in self.pieces():
                found += piece
                if len(found) > most:
                    break
        return found.decode("utf-8", "replace")

    @property
    def reusable(self) -> bool:
        return self.complete and not self._response.will_close


def _connect(address: Address, policy: RetryPolicy, tls: ssl.SSLContext | None) -> socket.socket:
    try:
        sock = socket.create_connection((address.host, address.port), timeout=policy.connect_timeout)
        if tls is None:
            return sock
        try:
            return tls.wrap_socket(sock, server_hostname=address.host)
        except BaseException:
            sock.close()
            raise
    except ssl.SSLCertVerificationError as error:
        raise StorageError(
            address.shown,
            f"shows a certificate that is not to be trusted ({error.verify_message})",
            "mend it, or name its authority in SSL_CERT_FILE",
            "certificate",
        ) from error
    except ssl.SSLError as error:
        raise trouble_of(error) from error
    except socket.gaierror as error:
        raise Trouble("name", f"host {address.host} cannot be resolved ({error.strerror})") from error
    except TimeoutError as error:
        raise Trouble("connect", f"no connection within {policy.connect_timeout:g} s") from error
    except OSError as error:
        raise Trouble("connect", f"no connection ({error.strerror or type(error).__name__})") from error


def trouble_of(error: Exception) -> Trouble:
    """What went wrong with a connection, in words that count well."""
    if isinstance(error, ssl.SSLError):
        return Trouble("tls", f"encryption failed ({error.reason or type(error).__name__})")
    if isinstance(error, OSError | http.client.IncompleteRead):
        return Trouble("cut", f"connection lost ({getattr(error, 'strerror', None) or type(error).__name__})")
    return Trouble("protocol", f"no proper answer ({type(error).__name__})")
