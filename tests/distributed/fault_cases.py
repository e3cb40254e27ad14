"""Run by zygote.py, or for torchrun by ferry.py (see test_faults.py): one rank of whole runs with one fault each, `FAULTS COMMANDS` in JSON.

It trains through the command line as a user does. Faults are wrapped around the product's parts here; the product knows
none of them.
"""

import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from typing import Any

from gristmill.ops.cli import main as gristmill
from gristmill.ops.run import Run
from gristmill.shards.errors import GristmillError

SIGNALS = {
    "term": signal.SIGTERM, "usr1": signal.SIGUSR1, "kill": signal.SIGKILL, "stop": signal.SIGSTOP, "int": signal.SIGINT,
}  # fmt: skip

PATIENCE = 200.0  # seconds


class UnreadableError(GristmillError):
    """What a disk that went away is to a rank."""


def at_image(at: int, act: Callable[[], object]) -> None:
    """Do something before the forward of the step that begins at image `at`."""
    forward = Run.forward

    def wrapped(self: Run, batch: Any, part: int) -> Any:
        if self.position == at and part == 0:
            act()
        return forward(self, batch, part)

    Run.forward = wrapped


def stand_until(*numbers: int, asked: Callable[[], object]) -> None:
    """Call `asked`, and wait until one of these signals has come; the loop's own handlers hear of it as well."""
    came: list[int] = []
    for number in numbers:
        before = signal.getsignal(number)
        assert callable(before)

        def hear(got: int, frame: object, before=before) -> None:
            before(got, frame)  # pyright: ignore[reportArgumentType]
            came.append(got)

        signal.signal(number, hear)
    asked()
    until = time.monotonic() + PATIENCE
    while not came and time.monotonic() < until:
        time.sleep(0.02)


def signalled(name: str, at: int, times: int = 1, pause: float = 0.0) -> None:
    """This rank gets a signal, perhaps several at once, after a pause in which a heartbeat shows where it stands."""

    def stand_here() -> None:
        time.sleep(pause)
        for _ in range(times):
            os.kill(os.getpid(), SIGNALS[name])

    at_image(at, stand_here)


def raises(at: int) -> None:
    """A fault of the program on this rank alone."""

    def divide() -> float:
        return at / 0

    at_image(at, divide)


def elsewhere() -> None:
    """This rank takes itself for one on another host."""
    socket.gethostname = lambda: "elsewhere"


def launcher_signalled(name: str, at: int) -> None:
    """Whoever started this rank (ferry.py) gets a signal, and this step waits until it has been passed on to the rank."""

    def stand() -> None:
        stand_until(SIGNALS[name], asked=lambda: os.kill(int(os.environ["LAUNCHER"]), SIGNALS[name]))

    at_image(at, stand)


def removed(path: str, at: int) -> None:
    """A file goes away, and makes room on its disk."""
    at_image(at, lambda: os.unlink(path))


def cut(paths: list[str], at: int) -> None:
    """Shards lose all but their first kilobyte while they are being read."""
    at_image(at, lambda: [os.truncate(path, 1024) for path in paths])


def unreadable(at: int) -> None:
    """The loader raises on this rank once it is asked for the batch at image `at`."""
    make = Run.loader

    def wrapped(self: Run) -> Any:
        loader = make(self)

        class Broken(type(loader)):
            def __next__(self) -> Any:
                if self.position == at:
                    raise UnreadableError("the disk of this rank went away: look at its mount")
                return super().__next__()

        loader.__class__ = Broken
        return loader

    Run.loader = wrapped


FAULTS: dict[str, Callable[..., None]] = {
    "signalled": signalled,
    "raises": raises,
    "elsewhere": elsewhere,
    "launcher signalled": launcher_signalled,
    "removed": removed,
    "cut": cut,
    "unreadable": unreadable,
}


def run(faults: list[dict[str, Any]], commands: list[list[str]]) -> None:
    """Commands one after the other in this process, the last one's code being its own.

    A fault {"what": ..., "rank": ..., "attempt": ...} strikes on that rank and restart of a group (default: 0 and 0).
    """
    here = {"rank": int(os.environ.get("RANK", "0")), "attempt": int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))}
    for fault in faults:
        if all(fault.pop(name, 0) == value for name, value in here.items()):
            FAULTS[fault.pop("what")](**fault)
    for command in commands:
        sys.argv[1:] = command
        try:
            gristmill()
        except SystemExit as ended:
            if ended.code or command is commands[-1]:
                raise


def main() -> None:
    run(json.loads(sys.argv[1]), json.loads(sys.argv[2]))


if __name__ == "__main__":
    main()
