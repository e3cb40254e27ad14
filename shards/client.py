"""What all reads of a process through one policy share: kept-alive connections, a limit for each host, counters.

A host gets as many connections as its limit lets through (throttle.py), and idle ones are taken up again, last used
first. After a fork the child starts with none: two processes on one socket would read each other's answers.
"""

from __future__ import annotations

import http.client
import ssl
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from . import forks
from .addresses import Address
from .connections import Answer, Connection, trouble_of
from .retry import Attempts, RetryPolicy, retry_after_seconds
from .throttle import Throttle


@dataclass
class RemoteStats:
    """Counters of one Client since it was made. `in_flight` and `limit` are of now; `limit` is the lowest of all hosts."""

    requests: int = 0
    connections: int = 0  # opened
    bytes: int = 0  # of bodies, as received
    retries: Counter[str] = field(default_factory=Counter)  # by reason
    failures: Counter[str] = field(default_factory=Counter)  # StorageErrors, by reason
    throttled: int = 0  # times that a limit was lowered
    throttled_seconds: float = 0.0  # waited for a turn
    in_flight: int = 0
    limit: float = 0.0


class Client:
    """All that reads through one policy share: connections, limits by host, counters. Safe between threads and forks."""

    def __init__(self, policy: RetryPolicy) -> None:
        self.policy = policy
        self._tls: ssl.SSLContext | None = None
        self.after_fork()
        forks.tell(self)

    def after_fork(self) -> None:
        """Begin anew, without connections and with counters at zero."""
        self._lock = threading.Lock()
        self._stats = RemoteStats()
        self._idle: dict[tuple[str, str, int], list[Connection]] = {}
        self._throttles: dict[tuple[str, str, int], Throttle] = {}

    @contextmanager
    def get(self, address: Address, headers: dict[str, str], attempts: Attempts) -> Iterator[Answer]:
        """One GET. Raises Trouble for what may pass, StorageError for what will not, Stopped."""
        throttle = self.throttle(address)
        entered = throttle.enter(attempts)
        answer = None
        try:
            answer = self._ask(address, _request(address, headers), attempts)
            yield answer
        finally:
            refused = answer is not None and answer.status in (429, 503)
            wanted = retry_after_seconds(answer.headers["Retry-After"]) if refused and answer is not None else None
            try:
                if answer is not None:
                    self._put_back(address, answer)  # first: whoever is let in next may want the connection
            finally:
                throttle.leave(entered, throttled=refused, ok=answer is not None and answer.ok, retry_after=wanted)

    def _put_back(self, address: Address, answer: Answer) -> None:
        if not answer.reusable:
            answer.connection.close()
            return
        answer.connection.idle_since = time.monotonic()
        with self._lock:
            self._idle.setdefault(address.origin, []).append(answer.connection)

    def _ask(self, address: Address, request: bytes, attempts: Attempts) -> Answer:
        while (connection := self._idle_one(address)) is not None:
            try:
                self.count(requests=1)
                return Answer(connection.ask(request, attempts), connection)
            except (OSError, http.client.HTTPException) as error:
                connection.close()
                # A server may hang up at this very moment. Without a byte of an answer that is no failure of the server's.
                if connection.received:
                    raise trouble_of(error) from error
            except BaseException:
                connection.close()
                raise
        connection = Connection(address, self.policy, self._context(address))
        self.count(connections=1, requests=1)
        try:
            return Answer(connection.ask(request, attempts), connection)
        except BaseException as error:
            connection.close()
            if isinstance(error, OSError | http.client.HTTPException):
                raise trouble_of(error) from error
            raise

    def _idle_one(self, address: Address) -> Connection | None:
        while True:
            with self._lock:
                idle = self._idle.get(address.origin)
                connection = idle.pop() if idle else None
            if connection is None or connection.usable():
                return connection
            connection.close()

    def _context(self, address: Address) -> ssl.SSLContext | None:
        if address.scheme != "https":
            return None
        if self._tls is None:
            self._tls = ssl.create_default_context()
        return self._tls

    def throttle(self, address: Address) -> Throttle:
        """The limit of this address' host."""
        with self._lock:
            if address.origin not in self._throttles:
                self._throttles[address.origin] = Throttle(self.policy.connections)
            return self._throttles[address.origin]

    def count(
        self, *, requests: int = 0, connections: int = 0, received: int = 0, retry: str = "", failure: str = ""
    ) -> None:
        """Add to the counters."""
        with self._lock:
            self._stats.requests += requests
            self._stats.connections += connections
            self._stats.bytes += received
            if retry:
                self._stats.retries[retry] += 1
            if failure:
                self._stats.failures[failure] += 1

    @property
    def stats(self) -> RemoteStats:
        """The counters as they are now: a copy."""
        with self._lock:
            now, throttles = self._stats, list(self._throttles.values())
            return RemoteStats(
                now.requests,
                now.connections,
                now.bytes,
                Counter(now.retries),
                Counter(now.failures),
                throttled=sum(throttle.decreases for throttle in throttles),
                throttled_seconds=sum(throttle.waited for throttle in throttles),
                in_flight=sum(throttle.in_flight for throttle in throttles),
                limit=min((throttle.limit for throttle in throttles), default=float(self.policy.connections)),
            )

    def close(self) -> None:
        """Close the connections that nobody uses. The client may be used again."""
        with self._lock:
            idle, self._idle = self._idle, {}
        for connections in idle.values():
            for connection in connections:
                connection.close()


def _request(address: Address, headers: dict[str, str]) -> bytes:
    lines = [f"GET {address.target} HTTP/1.1", f"Host: {address.host_header}"]
    # Stored bytes are wanted, whatever a server may like to pack: offsets count those.
    lines += ["Accept-Encoding: identity", "User-Agent: gristmill", "Connection: keep-alive"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    if any(char in line for line in lines for char in "\r\n"):
        raise ValueError("a line break in a request's header")
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")
