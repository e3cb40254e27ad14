"""Progress of long work: a live bar on a terminal, plain lines elsewhere (a log file should not hold cursor movements).

Plain lines come at most every `interval` seconds, and once at the end, so that a log stays short.
"""

from __future__ import annotations

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Meter:
    """One piece of long work: `meter(done, text)` moves it, `note(line)` prints beside it. Use as a context."""

    def __init__(self, title: str, total: int, *, unit: str = "images", quiet: bool = False, interval: float = 10.0):
        self.title, self.total, self.unit, self.interval = title, total, unit, interval
        self.quiet = quiet
        self.live = sys.stderr.isatty() and not quiet
        self._console = Console(stderr=True, highlight=False)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TextColumn(unit),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[text]}"),
            console=self._console,
            transient=True,
        )
        self._task = self._bar.add_task(title, total=total, text="")
        self._start = self._last = time.monotonic()
        self._first: int | None = None

    def __enter__(self) -> Meter:
        if self.live:
            self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self.live:
            self._bar.stop()

    def __call__(self, done: int, total: int | None = None, text: str = "") -> None:
        """done, total: in units since the start of the work; text: a few words beside the bar."""
        if total is not None:
            self.total = total
        if self._first is None:
            self._first = done
        if self.live:
            self._bar.update(self._task, completed=done, total=self.total, text=text)
            return
        now = time.monotonic()
        if not self.quiet and (now - self._last >= self.interval or done >= self.total):
            self._last = now
            rate = (done - self._first) / max(now - self._start, 1e-9)
            left = (self.total - done) / rate if rate > 0 else 0.0
            self.note(f"{self.title}: {done}/{self.total} {self.unit}, {rate:.0f}/s, {left:.0f} s left  {text}")

    def note(self, line: str) -> None:
        """A line of its own, above the bar where there is one."""
        if not self.quiet:
            self._console.print(line, markup=False, soft_wrap=True)
