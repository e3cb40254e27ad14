"""How long to keep trying when storage does not answer, how to wait in between, and what to say in the end.

Pauses follow "decorrelated jitter" (Brooker, "Exponential Backoff and Jitter", AWS Architecture Blog, 2015): each is
drawn between the first pause and three times the last one, so that the ranks of a run do not come back all at once. A
server's Retry-After goes before it. One deadline covers all tries of a read; a long read has, on top, the time that it
takes at the slowest rate allowed. After it the run stops with StorageError: a shard that is away for a while must not
be replaced by another one, for that would be another stream (DESIGN promise 3). Whoever waits long is told so by a
warning of this module's logger, which Python prints on the error stream where nobody has set up logging.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from urllib.parse import urlsplit

from pydantic import BaseModel, Field

from .addresses import redact
from .errors import GristmillError

_log = logging.getLogger(__name__)
_told: dict[str, float] = {}  # host -> when it was last said that it is waited for: all threads wait for the same one
_telling = threading.Lock()


class RetryPolicy(BaseModel, frozen=True, extra="forbid"):
    """What a read from remote storage may take. Seconds and bytes per second."""

    deadline: float = Field(default=600.0, gt=0, description="seconds over all tries of one read")
    first_pause: float = Field(default=0.1, gt=0, description="shortest pause before a second try")
    longest_pause: float = Field(default=20.0, gt=0, description="longest pause between tries")
    connect_timeout: float = Field(default=10.0, gt=0, description="seconds to wait for a connection")
    stall_timeout: float = Field(default=30.0, gt=0, description="seconds without a byte that end a try")
    min_rate: float = Field(
        default=16384.0, gt=0, description="bytes/s; a try slower than this ends after a stall_timeout"
    )
    connections: int = Field(default=16, ge=1, description="simultaneous requests to one host, at most")
    tell_after: float = Field(default=10.0, ge=0, description="seconds of failed tries before a warning says so")
    tell_every: float = Field(default=60.0, ge=0, description="seconds between two such warnings about a host")


class StorageError(GristmillError):
    """Storage did not give what was asked. `reason` is one short word for counters; `url` holds no secret."""

    def __init__(self, url: str, problem: str, remedy: str, reason: str) -> None:
        super().__init__(redact(f"{url} {problem}; {remedy}"))
        self.url, self.reason = redact(url), reason


class ChangedError(StorageError):
    """The object is not the one that was read before."""

    def __init__(self, url: str, before: str, now: str) -> None:
        super().__init__(
            url,
            f"was replaced while it was in use: it was {before} and is {now}",
            "put the old object back, or index the data set again and start a new run with it",
            "changed",
        )


KINDS = ("throttled", "server", "timeout", "connection", "broken", "other")  # of trouble, for whoever counts it
_KIND = {
    **dict.fromkeys(("throttled", "429", "503"), "throttled"),
    **dict.fromkeys(("stalled", "slow", "deadline", "408", "504", "522", "524"), "timeout"),
    **dict.fromkeys(("connect", "name", "tls", "cut"), "connection"),
    **dict.fromkeys(("protocol", "short"), "broken"),
}


def kind_of(reason: str) -> str:
    """One of KINDS for a `reason` of Trouble, which may be a server's status."""
    server = len(reason) == 3 and reason.startswith("5") and reason.isdigit()
    return _KIND.get(reason, "server" if server else "other")


class Stopped(Exception):
    """A transfer was called off by its own side, in closing. Never seen by a user."""


class Trouble(Exception):
    """One try failed in a way that another may not. `reason` goes into counters, so it is one of few words."""

    def __init__(self, reason: str, detail: str, retry_after: float | None = None) -> None:
        super().__init__(detail)
        self.reason, self.retry_after = reason, retry_after


def chance() -> float:
    """A number in [0, 1) out of the system's entropy. Waiting is no part of the stream, and must differ between ranks."""
    return int.from_bytes(os.urandom(7), "big") / 2**56


def next_pause(policy: RetryPolicy, last: float, draw: Callable[[], float] = chance) -> float:
    """Seconds to wait after a failed try, given the last pause (0 for none): decorrelated jitter."""
    low, high = policy.first_pause, max(policy.first_pause, 3 * last)
    return min(policy.longest_pause, low + (high - low) * draw())


def retry_after_seconds(header: str | None, now: datetime | None = None) -> float | None:
    """What a Retry-After header asks for, in seconds or as an HTTP date; None if it says nothing that can be read."""
    if header is None:
        return None
    header = header.strip()
    if header.isascii() and header.isdigit():
        return float(header[:9])
    try:
        when = parsedate_to_datetime(header)
    except (ValueError, TypeError, IndexError):
        return None
    when = when if when.tzinfo else when.replace(tzinfo=UTC)
    return max(0.0, (when - (now or datetime.now(UTC))).total_seconds())


class Attempts:
    """The tries of one read: counts them, waits between them, and gives up when the time is over.

    `allowance` seconds are added to the deadline for a long transfer. `stop` calls it off: Stopped is raised then.
    """

    def __init__(
        self, policy: RetryPolicy, url: str, *, allowance: float = 0.0, stop: threading.Event | None = None
    ) -> None:
        self.policy, self.url, self.stop = policy, url, stop
        self.began = time.monotonic()
        self.limit = policy.deadline + allowance
        self.until = self.began + self.limit
        self.seen: Counter[str] = Counter()
        self._pause = 0.0

    def after(self, trouble: Trouble, *, progress: bool) -> None:
        """Wait as this trouble demands; a try that brought bytes begins with short pauses again.

        Raises StorageError when the time is over, or would be before the server wants to be asked again.
        """
        self.seen[trouble.reason] += 1
        self._pause = next_pause(self.policy, 0.0 if progress else self._pause)
        left = self.until - time.monotonic()
        pause = min(self._pause, left / 2)  # so that the last try still has time to succeed
        if trouble.retry_after is not None:
            # All who were sent away are told the same moment: come back a little later, each at his own.
            pause = trouble.retry_after + min(pause, 1.0)
        if left < self.policy.first_pause or pause >= left:
            raise self.given_up(trouble) from trouble
        self._tell(trouble, pause)
        self.sleep(pause)

    def _tell(self, trouble: Trouble, pause: float) -> None:
        """Say what is waited for, if by the end of this pause it has taken long."""
        now = time.monotonic()
        if now + pause - self.began < self.policy.tell_after:
            return
        host = urlsplit(self.url).netloc
        with _telling:
            if now - _told.get(host, -float("inf")) < self.policy.tell_every:
                return
            _told[host] = now
        why = redact(str(trouble))
        _log.warning(f"waiting for {redact(self.url)}: {why}; it gives up in {self.until - now:.0f} s")

    def sleep(self, seconds: float) -> None:
        """Wait. Raises Stopped."""
        if self.stop is None:
            time.sleep(seconds)
        elif self.stop.wait(seconds):
            raise Stopped

    def given_up(self, last: Trouble) -> StorageError:
        """What to tell: what was tried, how often, for how long, and how to go on."""
        tries = sum(self.seen.values())
        kinds = ", ".join(f"{count} x {reason}" for reason, count in self.seen.most_common())
        asked = "" if last.retry_after is None else f", and asks to be left alone for {last.retry_after:.0f} s"
        return StorageError(
            self.url,
            f"could not be read: {tries} tries in {time.monotonic() - self.began:.1f} s failed ({kinds}; last: {last}"
            f"{asked}), and the deadline is {self.limit:.1f} s",
            "see that the storage answers, or raise `deadline`; then start the same command again, it goes on from "
            "what was saved",
            "deadline",
        )
