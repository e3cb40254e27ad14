"""Where the time of a step goes: laps that leave nothing out."""

import time


class Clock:
    """Seconds of each phase of a step. The phases add up to the step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, phase: str) -> None:
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._last
        self._last = now

    def pause(self) -> None:
        """Do not count what passed since the last lap."""
        self._last = time.perf_counter()
