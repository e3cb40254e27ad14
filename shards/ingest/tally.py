"""What a fetcher counts: plain numbers, of bounded size however many hosts a crawl has.

The hosts that fail most are kept by Space-Saving (Metwally, Agrawal, El Abbadi, 2005): of `places` counters the
smallest one is handed to each newcomer, so that a host with more than 1 / places of all failures is surely among them,
and no count is too high by more than `error`.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

BOUNDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)  # seconds


class SpaceSaving:
    """The most frequent of a stream of words, in the memory of `places` of them."""

    def __init__(self, places: int = 200) -> None:
        self._places = places
        self._counts: dict[str, int] = {}
        self._errors: dict[str, int] = {}

    def add(self, word: str) -> None:
        if word in self._counts:
            self._counts[word] += 1
        elif len(self._counts) < self._places:
            self._counts[word], self._errors[word] = 1, 0
        else:
            least = min(self._counts, key=self._counts.__getitem__)
            count = self._counts.pop(least)
            del self._errors[least]
            self._counts[word], self._errors[word] = count + 1, count

    def worst(self, most: int = 10) -> list[tuple[str, int, int]]:
        """(word, count, by how much the count may be too high), the most frequent first."""
        ordered = sorted(self._counts, key=lambda word: (self._errors[word] - self._counts[word], word))
        return [(word, self._counts[word], self._errors[word]) for word in ordered[:most]]


@dataclass
class FetchStats:
    """Counters of one Fetcher since it was made. Written by its own thread; may be read by any."""

    requests: int = 0  # sent, those for redirects and second tries too
    bytes: int = 0  # of bodies, as received
    in_flight: int = 0  # requests at this moment
    outcomes: Counter[str] = field(default_factory=Counter)  # of urls: "fetched", or the value of an Outcome
    retries: Counter[str] = field(default_factory=Counter)  # by what made them necessary
    dropped: int = 0  # downloads begun again later, as there was no room for them
    seconds: list[int] = field(default_factory=lambda: [0] * (len(BOUNDS) + 1))  # requests by the time they took
    seconds_sum: float = 0.0
    odd: Counter[str] = field(default_factory=Counter)  # errors that should not be, by type
    hosts: SpaceSaving = field(default_factory=SpaceSaving)  # by urls that failed

    def took(self, seconds: float) -> None:
        self.seconds[bisect_left(BOUNDS, seconds)] += 1
        self.seconds_sum += seconds

    def snapshot(self) -> dict[str, Any]:
        """All of it as JSON values; `seconds` by upper bound, not cumulated."""
        return {
            "requests": self.requests,
            "bytes": self.bytes,
            "in_flight": self.in_flight,
            "outcomes": dict(self.outcomes),
            "retries": dict(self.retries),
            "dropped": self.dropped,
            "seconds": dict(zip([*map(str, BOUNDS), "inf"], self.seconds, strict=True)),
            "seconds_sum": self.seconds_sum,
            "odd": dict(self.odd),
            "hosts": [list(entry) for entry in self.hosts.worst()],
        }
