"""One rank as test_slurm.py has it, `FOLDER IMAGE COMMAND...`: it stands still before a step until it is asked to stop.

So the signal comes at a known image, however busy the machine is.
"""

import os
import signal
import sys
import time
from pathlib import Path

from fault_cases import at_image, run

PATIENCE = 200.0  # seconds


def hold(folder: Path, at: int) -> None:
    """At image `at`, say so in a file, and wait for SIGTERM or SIGUSR1."""

    def stand() -> None:
        came: list[int] = []
        for number in (signal.SIGTERM, signal.SIGUSR1):
            before = signal.getsignal(number)
            assert callable(before)  # the loop's own

            def ask(got: int, frame: object, before=before) -> None:
                before(got, frame)  # pyright: ignore[reportArgumentType]
                came.append(got)

            signal.signal(number, ask)
        (folder / f"there-{os.environ['RANK']}").touch()
        until = time.monotonic() + PATIENCE
        while not came and time.monotonic() < until:
            time.sleep(0.02)

    at_image(at, stand)


def main() -> None:
    folder, at, *command = sys.argv[1:]
    hold(Path(folder), int(at))
    run([], [command])
