"""How a run gets on, from the lines of its log: losses and their means, images a second, data wait, time left.

Means and rates are taken over the last steps; the rate counts all of the wall clock, probes and checkpoints included, so
that the time left is the time that a person will wait.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable

from .runlog import Line

WINDOW = 64  # steps
SPAN = 300.0  # seconds over which images are counted, where these are more than WINDOW steps


class Pace:
    """end: images to see; batch: of a step, over all `world` processes. Feed it with `take`."""

    def __init__(self, end: int, batch: int, world: int, clock: Callable[[], float] = time.monotonic):
        self.end, self.batch, self.world, self._clock = end, batch, world, clock
        self.position = self.skipped = 0
        self.step: Line = {}  # the last one's line
        self.probes: dict[str, Line] = {}  # the last line by who was probed
        self.saved: tuple[int, float] | None = None  # position of the last checkpoint, and when
        self._past: dict[str, deque[float]] = {}
        self._waits: deque[tuple[float, float]] = deque(maxlen=WINDOW)
        self._times: deque[tuple[float, int]] = deque()

    def begin(self, position: int, trained: int) -> None:
        """Where the run stands before its first step; `trained` images of these were learned from."""
        self.position, self.skipped = position, (position - trained) // self.batch

    def take(self, line: Line) -> None:
        """Any line of the run's log."""
        kind = line["kind"]
        if kind == "step":
            self._take_step(line)
        elif kind == "probe":
            self.probes[line["who"]] = line
        elif kind == "checkpoint":
            self.saved = line["position"], self._clock()

    def _take_step(self, line: Line) -> None:
        now, spent = self._clock(), sum(line["seconds"].values())
        if not self._times:
            self._times.append((now - spent, line["position"]))
        self.step, self.position = line, line["position"] + self.batch
        self.skipped += bool(line["bad"])
        self._waits.append((line["seconds"].get("data_wait", 0.0), spent))
        self._times.append((now, self.position))
        while len(self._times) > WINDOW and now - self._times[0][0] > SPAN:
            self._times.popleft()
        if not line["bad"]:
            for name, value in self.losses.items():
                self._past.setdefault(name, deque(maxlen=WINDOW)).append(value)

    @property
    def losses(self) -> dict[str, float]:
        """The last step's, whole (`loss`) and by objective."""
        named = {name.removeprefix("loss/"): v for name, v in self.step.items() if name.startswith("loss/")}
        return {"loss": self.step["loss"], **named} if "loss" in self.step else named

    def mean(self, name: str) -> float:
        """Of a loss over the last good steps."""
        past = self._past.get(name)
        return sum(past) / len(past) if past else math.nan

    @property
    def rate(self) -> float:
        """Images a second, of all processes together."""
        if len(self._times) < 2:
            return 0.0
        (first, low), (last, high) = self._times[0], self._times[-1]
        return (high - low) / max(last - first, 1e-9)

    @property
    def left(self) -> float:
        """Seconds to the end of the run; NaN while nothing is known."""
        return (self.end - self.position) / self.rate if self.rate > 0 else math.nan

    @property
    def wait(self) -> float:
        """Share of the steps' time in which this process waited for data."""
        waited, spent = map(sum, zip(*self._waits, strict=True)) if self._waits else (0.0, 0.0)
        return waited / spent if spent else 0.0

    @property
    def age(self) -> float | None:
        """Seconds since this attempt wrote a checkpoint."""
        return None if self.saved is None else self._clock() - self.saved[1]


def duration(seconds: float) -> str:
    """To be read at a glance: 42 s, 12 min, 3 h 20 min, 2 d 4 h."""
    if not math.isfinite(seconds):
        return "?"
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 100:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min"
    days, hours = divmod(hours, 24)
    return f"{days} d {hours} h"
