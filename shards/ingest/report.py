"""What an ingest says of itself: while it runs, and at the end, where outcomes sum to inputs."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

from ..frequent import Frequent
from .candidate import Outcome
from .unit import UnitDone

_HOSTS = 1000  # remembered at a time


@dataclass
class IngestStats:
    """Counters of a running ingest, for progress and metrics."""

    inputs: int = 0
    done: int = 0  # inputs that workers are through with, those of an earlier start included
    earlier: int = 0  # of them, those of an earlier start
    decided: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)  # of the inputs decided in this start
    received: int = 0  # bytes, in this start
    stored: int = 0  # bytes of images kept in this start
    shards: int = 0  # written in this start
    units_in_flight: int = 0
    retries: Counter[str] = field(default_factory=Counter)
    hosts: Frequent = field(default_factory=lambda: Frequent(_HOSTS))  # failures by host, the worst ones
    began: float = field(default_factory=time.monotonic)

    def take(self, done: UnitDone) -> None:
        """Add what a worker reports."""
        self.done += done.inputs
        self.received += done.received
        self.retries.update(done.fetched.get("retries", {}))
        self.hosts.update({host: count for host, count, _ in done.fetched.get("hosts", ())})

    def line(self) -> str:
        """A few words beside a progress bar."""
        kept = self.outcomes.get("kept", 0)
        words = [f"{kept:,} kept", f"{self.received / 1e6 / max(1e-9, time.monotonic() - self.began):.1f} MB/s"]
        for host, count in self.hosts.counts.most_common(1):
            words.append(f"worst host {host} ({count})")
        return ", ".join(words)


@dataclass(frozen=True)
class IngestReport:
    """What became of the inputs of one ingest. `outcomes` sum to `inputs`; `train` and `probe` count what is new."""

    kind: str  # new, append, retry
    inputs: int
    outcomes: dict[str, int]
    changed: dict[str, int]  # images whose own bytes were not kept, by reason
    colours: dict[str, int]  # images taken that are no plain RGB, by what they are
    details: dict[str, int]  # the most frequent reasons of those not kept
    train: int
    probe: int
    shards: int  # new ones
    bytes: int  # of the new shards
    samples: int  # of the whole data set now
    seconds: float  # of this start
    earlier: int  # inputs that an earlier start was through with
    hosts: dict[str, int]  # the worst ones, with their failures

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def summary(self) -> str:
        """The counts in words, one line each."""
        lines = [
            f"{self.accepted} images taken ({self.bytes / 1e6:.1f} MB): {self.train} to train, {self.probe} to probe"
        ]
        lines += [f"{count} of them changed: {reason}" for reason, count in self.changed.items()]
        left = {outcome: count for outcome, count in self.outcomes.items() if outcome != Outcome.KEPT}
        lines += [f"{count} left out: {outcome}" for outcome, count in left.items()]
        return "\n".join(lines)

    @property
    def accepted(self) -> int:
        """Images taken."""
        return self.train + self.probe
