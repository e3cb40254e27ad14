"""Where the wall clock of a run went, over all its attempts: the states sum to the time since the run first began.

Prometheus wants counters that never fall, across restarts too: a counter that came back a second short would count as
begun anew, and all of it as growth. So what was booked is never taken back, and is in the run folder before it is shown:
time that turns out lost is booked when its steps are taken again, as far as any earlier attempt had come, and not
taken from the time in which they were taken first. What was not booked when a process died is lost up to when it was
last heard of, and down from then on. Within a process time runs on the monotonic clock.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ..report.attempts import Attempt
from .labels import CAUSES, SPENT

FILE = "goodput.json"


@dataclass
class Ledger:
    """Seconds by state, which sum to `until - began`, whatever is booked. Times are of the wall clock."""

    began: float
    until: float
    reached: int = 0  # images up to which steps were decided, by any attempt
    spent: dict[str, float] = field(default_factory=lambda: dict.fromkeys(SPENT, 0.0))

    def book(self, until: float, rest: str, claims: Mapping[str, float] | None = None) -> None:
        """Everything up to `until`: seconds by state as claimed, less in proportion where they are too many, the rest to `rest`."""
        span = max(0.0, until - self.until)
        asked = {state: seconds for state, seconds in (claims or {}).items() if 0.0 < seconds < math.inf}
        together = sum(asked.values())
        share = min(1.0, span / together) if together else 0.0
        for state, seconds in asked.items():
            self.spent[state] += seconds * share
        self.spent[rest] += max(0.0, span - together * share)
        self.until = max(self.until, until)


class Goodput:
    """The ledger of a run folder in the process that is training there, its rank 0.

    attempts: those before this one. started: when this one began, now if not given. `clock` gives the wall clock's
    time in seconds. `attempts` counts this one, too; `interruptions` by cause are those of the ones before.
    """

    def __init__(
        self,
        folder: Path,
        attempts: Sequence[Attempt],
        *,
        started: float | None = None,
        clock: Callable[[], float] | None = None,
    ) -> None:
        self.path = folder / FILE
        self.attempts = len(attempts) + 1
        self.interruptions: dict[str, int] = dict.fromkeys(CAUSES, 0)
        for attempt in attempts:
            if (cause := cause_of(attempt)) is not None:
                self.interruptions[cause] += 1
        self._clock = clock or _steady()
        now = self._clock()
        started = min(now, started or now)
        self.ledger = read_ledger(self.path) or _of_attempts(attempts) or Ledger(started, started)
        if attempts:
            last = attempts[-1]  # one that could say how it ended has booked all that it did
            self.ledger.book(min(started, last.ended or last.began), "down" if last.why else "lost")
        self.ledger.book(started, "down")
        self._before = self.ledger.reached
        self._claims: dict[str, float] = {}
        self._training = False

    def claim(self, state: str, seconds: float) -> None:
        """So many seconds, since what was booked last, went into `state`; booked with the next step."""
        self._claims[state] = self._claims.get(state, 0.0) + seconds

    def begin(self) -> None:
        """The first step is about to be taken."""
        self._training = True
        self._book("startup")

    def step(self, position: int, end: int, waited: float, *, bad: bool) -> None:
        """A step of the images from `position` to `end` was decided; `waited` of its seconds were for data."""
        if bad:
            self._book("bad")
        elif position < self._before:
            self._book("lost")
        else:
            self.claim("data_wait", waited)
            self._book("productive")
        self.ledger.reached = max(self.ledger.reached, end)

    def end(self, *, failed: bool) -> dict[str, float]:
        """The attempt ends: by an error, and then the step that was under way is lost, or as it was meant to."""
        self._book("lost" if failed and self._training else "startup")
        return self.save()

    def save(self) -> dict[str, float]:
        """Keep what is booked, and only then tell it: seconds by state. A folder that cannot be written costs the file."""
        beside = self.path.with_suffix(".json.writing")
        with suppress(OSError):
            beside.write_text(json.dumps(asdict(self.ledger)))
            os.replace(beside, self.path)
        return dict(self.ledger.spent)

    def _book(self, rest: str) -> None:
        claims, self._claims = self._claims, {}
        self.ledger.book(self._clock(), rest, claims)


def cause_of(attempt: Attempt) -> str | None:
    """Why an attempt that others followed had ended; None if it was through with all its images."""
    if not attempt.why:
        return "killed"
    if attempt.why == "done":
        return None
    return "signal" if attempt.why.startswith(("asked to stop", "KeyboardInterrupt")) else "error"


def read_ledger(path: Path) -> Ledger | None:
    """What an earlier process kept; None if there is nothing, or nothing that adds up."""
    with suppress(OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        told = json.loads(path.read_text(errors="replace"))
        spent = {state: float(told["spent"][state]) for state in SPENT}
        ledger = Ledger(float(told["began"]), float(told["until"]), int(told["reached"]), spent)
        span = ledger.until - ledger.began
        sound = all(0.0 <= seconds < math.inf for seconds in spent.values()) and 0.0 <= span < math.inf
        if sound and math.isclose(sum(spent.values()), span, rel_tol=1e-6, abs_tol=1e-3):
            return ledger
    return None


def _of_attempts(attempts: Sequence[Attempt]) -> Ledger | None:
    """What attempts.jsonl alone can tell of a run that kept no ledger, or whose ledger is damaged."""
    if not attempts:
        return None
    ledger, before = Ledger(attempts[0].began, attempts[0].began), None
    for attempt in attempts:
        ledger.book(attempt.began, "down")
        again = before.lost_seconds if before else 0.0
        ledger.book(attempt.began + attempt.seconds, "productive", {"lost": again})
        ledger.reached = max(ledger.reached, attempt.position + (before.lost_images if before else 0))
        before = attempt
    return ledger


def _steady() -> Callable[[], float]:
    """The wall clock as it is now, going on at the monotonic clock's pace: nobody sets it back."""
    wall, began = time.time(), time.monotonic()
    return lambda: wall + time.monotonic() - began
