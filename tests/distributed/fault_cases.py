"""Ranks of whole runs with one fault each, forked from a process that has imported everything (see test_faults.py).

An interpreter that imports torch, timm and DeepSpeed takes ten seconds of a core, a fork none: so faults on several
ranks stay affordable. Each rank is a process of its own, trains through the command line as a user's does, and comes to
its interpreter's real end. `serve` reads requests from stdin, one JSON object a line, and answers with `started` (pids
by rank) and `ended` (pid, code) lines. Called with arguments, this is one rank under torchrun: `fault_cases.py FAULTS
CLI-ARGUMENTS`. Faults are wrapped around the product's parts here; the product knows none of them.
"""

import gc
import json
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Callable
from typing import Any

from gristmill.ops.cli import main as gristmill
from gristmill.ops.launch import quiet_deepspeed
from gristmill.ops.run import Run
from gristmill.ops.train import train
from gristmill.pipeline.augment import dali
from gristmill.shards.errors import GristmillError

PRELOADED = (train, dali)  # what a command imports when it runs
SIGNALS = {"term": signal.SIGTERM, "kill": signal.SIGKILL, "stop": signal.SIGSTOP, "int": signal.SIGINT}


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
    at_image(at, lambda: os.kill(os.getppid(), SIGNALS[name]))


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


def serve() -> None:
    """Fork ranks as they are asked for, and tell how they end; end them all when stdin does."""
    quiet_deepspeed()
    gc.collect()
    gc.freeze()  # ranks need not look through all of this again
    alive: set[int] = set()
    tell(ready=True)
    while True:
        for pid in list(alive):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                alive.discard(pid)
                tell(ended=pid, code=os.waitstatus_to_exitcode(status))
        if not select.select([sys.stdin], [], [], 0.05)[0]:
            continue
        line = sys.stdin.readline()
        if not line:
            break
        request = json.loads(line)
        pids = []
        for rank in range(request["world"]):
            pid = os.fork()
            if not pid:
                return become(rank, request)
            pids.append(pid)
        alive.update(pids)
        tell(started=pids)
    for pid in alive:
        os.kill(pid, signal.SIGKILL)


def tell(**what: Any) -> None:
    print(json.dumps(what), flush=True)


def become(rank: int, request: dict[str, Any]) -> None:
    """Be a rank: its environment as torchrun sets it, its output in files, then the commands."""
    for number, name in ((0, "/dev/null"), (1, f"{request['log']}.{rank}.out"), (2, f"{request['log']}.{rank}.err")):
        file = os.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(file, number)
        os.close(file)
    os.environ.update(request["env"])
    if request["world"] > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
    run(request["faults"], request["commands"])


if __name__ == "__main__":
    if len(sys.argv) > 1:
        run(json.loads(sys.argv[1]), [sys.argv[2:]])
    else:
        serve()
