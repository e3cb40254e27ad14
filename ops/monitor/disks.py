"""Room on the disks that a run writes to, looked at now and then by a thread of its own.

Asking a file system whose server hangs takes as long as it hangs: neither the training loop nor the thread that answers
Prometheus can wait for that. A place that cannot be asked keeps its last numbers.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

EVERY = 10.0  # seconds


class Disks:
    """Tells `tell({"<place>/free": bytes, "<place>/size": bytes})` at once, and every `every` seconds until `close`."""

    def __init__(
        self, places: Mapping[str, Path], tell: Callable[[dict[str, float]], object], every: float = EVERY
    ) -> None:
        self._places, self._tell, self._every = dict(places), tell, every
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="gristmill-disks", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread, or leave it behind in a call that hangs: it is a daemon."""
        self._closed.set()
        self._thread.join(timeout=1.0)

    def _watch(self) -> None:
        while True:
            self._tell(room(self._places))
            if self._closed.wait(self._every):
                return


def room(places: Mapping[str, Path]) -> dict[str, float]:
    """Bytes free to this user and in all, by place; of one that does not exist yet, those of the folder that it will be in."""
    found: dict[str, float] = {}
    for place, path in places.items():
        for folder in (path, *path.absolute().parents):
            try:
                disk = os.statvfs(folder)
            except FileNotFoundError:
                continue
            except OSError:
                break
            found |= {f"{place}/free": disk.f_bavail * disk.f_frsize, f"{place}/size": disk.f_blocks * disk.f_frsize}
            break
    return found
