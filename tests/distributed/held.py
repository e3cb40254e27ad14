"""One rank as test_slurm.py has it, `FOLDER IMAGE COMMAND...`: it stands still before a step until it is asked to stop.

So the signal comes at a known image, however busy the machine is.
"""

import os
import signal
import sys
from pathlib import Path

from fault_cases import at_image, run, stand_until


def hold(folder: Path, at: int) -> None:
    """At image `at`, say so in a file, and wait for SIGTERM or SIGUSR1."""

    def stand() -> None:
        there = folder / f"there-{os.environ['RANK']}"
        stand_until(signal.SIGTERM, signal.SIGUSR1, asked=there.touch)

    at_image(at, stand)


def main() -> None:
    folder, at, *command = sys.argv[1:]
    hold(Path(folder), int(at))
    run([], [command])
