"""Wishes to stop: SIGTERM, SIGUSR1 and Ctrl-C ask the loop, which stops after its step, with a checkpoint.

Every one of them asks: a terminal and a launcher both pass on the same Ctrl-C, a scheduler and a launcher the same
SIGTERM. SIGUSR1 is what Slurm is told to send ahead of the end of a job's time. Only a Ctrl-C that comes seconds after
the first means that somebody does not want to wait, and ends at once. That a wish was heard is said by a thread: a
step may take minutes, and a handler must not print, for it may interrupt whoever is printing.
"""

from __future__ import annotations

import queue
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

IMPATIENT = 2.0  # seconds after which another Ctrl-C is a wish of its own
HEARD = {
    signal.SIGINT: "stopping after this step, with a checkpoint; Ctrl-C again to end at once",
    signal.SIGTERM: "SIGTERM: stopping after this step, with a checkpoint",
    signal.SIGUSR1: "SIGUSR1: stopping after this step, with a checkpoint",
}


class Wishes:
    """Hears them from when it is made until `close`. `asked`: the signals that came, in their order."""

    def __init__(self) -> None:
        self.asked: list[int] = []
        self._since: list[float] = []
        self._said: queue.SimpleQueue[str | None] = queue.SimpleQueue()  # its `put` is safe in a handler
        self._voice: threading.Thread | None = None
        self._before: dict[int, Any] = {number: signal.signal(number, self._ask) for number in HEARD}

    def tell(self, note: Callable[[str], object]) -> None:
        """Say in a line what was heard, the past included, until `close`. note: called from another thread."""

        def speak() -> None:
            while (line := self._said.get()) is not None:
                note(line)

        self._voice = threading.Thread(target=speak, name="wishes", daemon=True)
        self._voice.start()

    def close(self) -> None:
        """Give the signals back to whoever had them."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._said.put(None)
        if self._voice is not None:
            self._voice.join(5.0)

    def _ask(self, number: int, frame: object) -> None:
        self._since.append(time.monotonic())
        if not self.asked:
            self._said.put(HEARD[signal.Signals(number)])
        self.asked.append(number)
        if number == signal.SIGINT and self._since[-1] - self._since[0] > IMPATIENT:
            raise KeyboardInterrupt
