"""How many requests one host gets at a time: fewer when it says that it has enough, more again when it copes.

Additive increase, multiplicative decrease, as TCP does (Chiu and Jain, 1989): a 429 or 503 halves the limit, once for
all the requests that were on their way by then; each success adds 1 / limit, so about one request more for each round
of them. One Throttle serves all the threads of a process; the ranks of a run find their shares independently.
"""

from __future__ import annotations

import threading
import time

from .retry import Attempts, Trouble


class Throttle:
    """The limit for one host, between 1 and `most` simultaneous requests; a fair number of plain counters beside it."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.limit = float(most)
        self.in_flight = 0
        self.waited = 0.0  # seconds spent waiting for a turn
        self.decreases = 0
        self._not_before = 0.0  # a Retry-After holds for the host, not only for whoever received it
        self._cut = 0.0
        self._turn = threading.Condition()

    def enter(self, attempts: Attempts) -> float:
        """Wait for a turn; the moment it came, for `leave`. Raises Trouble when the time of the read is over."""
        asked = time.monotonic()
        with self._turn:
            while True:
                now = time.monotonic()
                if now >= self._not_before and self.in_flight < int(self.limit):
                    break
                if now >= attempts.until or self._not_before >= attempts.until:
                    held = self._not_before - now
                    raise Trouble("throttled", "no turn among this host's requests", held if held > 0 else None)
                if attempts.stop is not None and attempts.stop.is_set():
                    attempts.sleep(0)
                pause = self._not_before - now if now < self._not_before else attempts.until - now
                self._turn.wait(min(pause, 0.5))
            self.in_flight += 1
            self.waited += now - asked
        return now

    def leave(self, began: float, *, throttled: bool, ok: bool, retry_after: float | None = None) -> None:
        """Give the turn back, and say how it went."""
        now = time.monotonic()
        with self._turn:
            self.in_flight -= 1
            if throttled:
                if began >= self._cut:  # else it was sent before the last cut, which has answered it already
                    self.limit = max(1.0, self.limit / 2)
                    self._cut = now
                    self.decreases += 1
                if retry_after is not None:
                    self._not_before = max(self._not_before, now + retry_after)
            elif ok:
                self.limit = min(float(self.most), self.limit + 1 / self.limit)
            self._turn.notify_all()
