"""The exporter's own recent history: what the board shows where there is no Prometheus.

Every five seconds the registry's samples that panels read are copied into two rings: one of half an hour as sampled, one
of twelve hours a minute apart. Memory is bounded: at most SERIES series of SLOTS doubles, 8.9 MB, and half of that for
what a run has; series beyond are counted, not kept. Rates come from counters as they do in Prometheus, a restart of a
counter included; only that they are the slope between the samples of the window and not extrapolated to its edges.
"""

from __future__ import annotations

import math
import re
import threading
import time
from collections.abc import Iterable

import numpy as np
from prometheus_client import CollectorRegistry

EVERY = 5.0  # seconds between two samples
RINGS = ((EVERY, 360), (60.0, 720))  # seconds between two samples that are kept, how many: 30 minutes, 12 hours
SLOTS = sum(slots for _, slots in RINGS)
SERIES = 1024
GAP = 2.5  # sample intervals after which a value no longer counts as current

Labels = tuple[tuple[str, str], ...]  # sorted
Series = dict[Labels, np.ndarray]  # a value at each point of a grid; NaN: none


class Ring:
    """The last `slots` samples of all series, at least `every` seconds apart."""

    def __init__(self, every: float, slots: int, slack: float):
        self.every, self.slots, self.slack = every, slots, slack
        self.times = np.full(slots, np.nan)
        self.values = np.full((0, slots), np.nan)
        self.taken = 0

    def due(self, now: float) -> bool:
        """A tick may come a little early; without slack the next one would be a whole tick late."""
        return not self.taken or now - self.times[(self.taken - 1) % self.slots] >= self.every - self.slack

    def put(self, now: float, rows: list[int], values: list[float], held: int) -> None:
        if held > len(self.values):
            more = max(held, min(2 * len(self.values), SERIES)) - len(self.values)
            self.values = np.concatenate([self.values, np.full((more, self.slots), np.nan)])
        slot = self.taken % self.slots
        self.times[slot] = now
        self.values[:, slot] = np.nan
        self.values[rows, slot] = values
        self.taken += 1

    def order(self) -> np.ndarray:
        """Slots from the oldest sample to the newest."""
        count = min(self.taken, self.slots)
        return np.arange(self.taken - count, self.taken) % self.slots


class History:
    """Samples of `registry` whose names are in `wanted`; `sample` is called by the exporter's clock.

    every: seconds between two samples, for tests; labels: of the target, which Prometheus would add (run, rank).
    """

    def __init__(
        self,
        registry: CollectorRegistry,
        wanted: Iterable[str],
        labels: dict[str, str] | None = None,
        every: float = EVERY,
    ):
        self.registry, self.wanted, self.labels, self.every = registry, frozenset(wanted), labels or {}, every
        self.rings = [Ring(gap * every / EVERY, slots, every / 2) for gap, slots in RINGS]
        self.dropped = 0  # series that found no room
        self._rows: dict[tuple[str, ...], int] = {}
        self._named: dict[str, list[tuple[int, Labels]]] = {}
        self._lock = threading.Lock()

    def sample(self, now: float | None = None) -> None:
        """Copy the registry's values as they are now."""
        rows, values, dropped = [], [], 0
        now = time.time() if now is None else now
        with self._lock:
            for family in self.registry.collect():
                for sample in family.samples:
                    if sample.name not in self.wanted:
                        continue
                    row = self._rows.get((sample.name, *sample.labels.values()))
                    if row is None and (row := self._place(sample.name, sample.labels)) is None:
                        dropped += 1
                        continue
                    rows.append(row)
                    values.append(float(sample.value))
            self.dropped = dropped
            for ring in self.rings:
                if ring.due(now):
                    ring.put(now, rows, values, len(self._rows))

    def _place(self, name: str, labels: dict[str, str]) -> int | None:
        row = len(self._rows)
        if row >= SERIES:
            return None
        self._rows[(name, *labels.values())] = row
        self._named.setdefault(name, []).append((row, tuple(sorted({**self.labels, **labels}.items()))))
        return row

    def since(self) -> float | None:
        """Time of the oldest sample that is kept, or None."""
        with self._lock:
            starts = [float(ring.times[ring.order()[0]]) for ring in self.rings if ring.taken]
        return min(starts, default=None)

    def view(self, start: float, end: float) -> View:
        """The finest ring that goes back to `start`, or else as far as any does."""
        with self._lock:
            reach = [ring.times[ring.order()[0]] if ring.taken else math.inf for ring in self.rings]
        oldest = min(reach)
        far = [ring for ring, first in zip(self.rings, reach, strict=True) if first <= max(start, oldest) + ring.every]
        return View(self, far[0] if far else self.rings[-1])


class View:
    """One ring, asked for values on a grid of times (rising, [points])."""

    def __init__(self, history: History, ring: Ring):
        self.history, self.ring, self.every = history, ring, ring.every

    def instant(self, name: str, where: tuple[tuple[str, str], ...], grid: np.ndarray) -> Series:
        """The sample before each time, while it is current."""
        labels, times, values = self._read(name, where)
        if not labels:
            return {}
        at = np.searchsorted(times, grid, side="right") - 1
        current = (at >= 0) & (grid - times[at] <= GAP * self.every)
        found = np.where(current, values[:, at], np.nan)
        return dict(zip(labels, found, strict=True))

    def rate(self, name: str, where: tuple[tuple[str, str], ...], grid: np.ndarray, window: float) -> Series:
        """Growth a second between the first and the last sample of the window before each time."""
        labels, times, values = self._read(name, where)
        if not labels or len(times) < 2:
            return {}
        there = np.isfinite(values)
        # A value that is missing in between is taken as the one before, one that fell as begun anew.
        last = np.maximum.accumulate(np.where(there, np.arange(len(times)), -1), axis=1)
        filled = np.take_along_axis(values, np.maximum(last, 0), axis=1)
        filled = np.where(last < 0, np.nan, filled)
        growth = np.diff(filled, axis=1)
        growth = np.where(growth < 0, filled[:, 1:], growth)
        total = np.concatenate([np.zeros((len(labels), 1)), np.cumsum(np.nan_to_num(growth), axis=1)], axis=1)
        first, final = there.argmax(axis=1), last[:, -1]
        low = np.searchsorted(times, grid - window, side="left")
        high = np.searchsorted(times, grid, side="right") - 1
        low = np.clip(low[None, :], first[:, None], len(times) - 1)
        high = np.clip(high[None, :], 0, final[:, None].clip(0))
        enough = (high > low) & (final >= 0)[:, None]
        rows = np.arange(len(labels))[:, None]
        with np.errstate(invalid="ignore", divide="ignore"):
            slope = (total[rows, high] - total[rows, low]) / (times[high] - times[low])
        return dict(zip(labels, np.where(enough, slope, np.nan), strict=True))

    def _read(self, name: str, where: tuple[tuple[str, str], ...]) -> tuple[list[Labels], np.ndarray, np.ndarray]:
        """(labels of the series, times [n], values [series, n])."""
        with self.history._lock:
            order = self.ring.order()
            chosen = [
                (row, labels)
                for row, labels in self.history._named.get(name, ())
                if row < len(self.ring.values) and all(_fits(dict(labels), label, regex) for label, regex in where)
            ]
            rows = np.array([row for row, _ in chosen], dtype=np.intp)
            values = self.ring.values[rows[:, None], order]
            return [labels for _, labels in chosen], self.ring.times[order], values


def _fits(labels: dict[str, str], label: str, pattern: str) -> bool:
    return re.fullmatch(pattern, labels.get(label, "")) is not None
