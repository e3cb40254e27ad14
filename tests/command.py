"""`gristmill ...` as a user starts it, by the console script, or as a fork that runs the same command line in milliseconds.

A fork's process has imported what commands import: six seconds of imports for each start would show nothing more. It can
also stand still at a step, so that what a test does meanwhile happens there, however busy the machine is.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from .workers import Workers

GRISTMILL = Path(sys.executable).parent / "gristmill"
# No activated environment, no compiler, no ninja: the console script alone has to do.
BARE = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"} | {"PATH": "/nonexistent"}
MINUTES = 400.0  # seconds in which anything here ends, also on a busy machine: less than pytest gives a test


class Command:
    """One `gristmill ...` with its output and errors in files: the console script, or a fork that runs what it runs.

    `hold`: a fork's training stands still before the step that begins at this image, until `go`; what the test does
    meanwhile it does at a known step, however busy the machine is.
    """

    def __init__(
        self, folder: Path, arguments: tuple[object, ...], workers: Workers | None = None, hold: int | None = None
    ) -> None:
        self._files = [folder / name for name in ("out", "err")]
        self._there, self._go = folder / "there", folder / "go"
        given = list(map(str, arguments))
        if workers:
            held = None if hold is None else [hold, str(self._there), str(self._go), MINUTES]
            self._process = workers.start(FORK, arguments=given, files=list(map(str, self._files)), hold=held)
        else:
            with self._files[0].open("w") as out, self._files[1].open("w") as err:
                self._process = subprocess.Popen([GRISTMILL, *given], stdout=out, stderr=err, env=BARE)

    def poll(self) -> int | None:
        return self._process.poll()

    def signal(self, number: int) -> None:
        os.kill(self._process.pid, number)

    def until_held(self) -> None:
        wait(self, self._there.exists)

    def go(self) -> None:
        self._go.touch()

    def kill(self) -> None:
        """SIGKILL where it stands."""
        self.until_held()
        self.signal(signal.SIGKILL)
        assert self.finish()[0] == -signal.SIGKILL

    def finish(self) -> tuple[int, str, str]:
        """Its exit code, output and errors, once it has ended."""
        until = time.monotonic() + MINUTES
        try:
            while (code := self.poll()) is None and time.monotonic() < until:
                time.sleep(0.02)
        finally:
            self.end()
        out, err = (path.read_text() if path.exists() else "" for path in self._files)
        assert code is not None, (out[-3000:], err[-3000:])
        return code, out, err

    def end(self) -> None:
        """End it where it still runs: nobody waits for it any more."""
        if self.poll() is None:
            self._process.kill()


def wait(process: Command, happened: Callable[[], bool]) -> None:
    """Until it happened, which it must while the process runs."""
    until = time.monotonic() + MINUTES
    try:
        while not happened():
            assert process.poll() is None or happened(), process.finish()
            assert time.monotonic() < until
            time.sleep(0.02)
    except BaseException:
        process.end()
        raise


# How a fork's program ends, with `hold` of [image, file to make there, file to wait for, seconds], or None.
COMMAND = """
if hold:
    at, there, go, patience = hold
    forward = Run.forward

    def standing(self, batch, part):
        if self.position == at:
            open(there, "w").close()
            until = time.monotonic() + patience
            while not os.path.exists(go):
                if time.monotonic() > until:
                    os._exit(1)
                time.sleep(0.02)
        return forward(self, batch, part)

    Run.forward = standing
main(arguments, prog_name="gristmill")
"""
FORK = """
for number, file in enumerate(files, 1):
    os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), number)
"""
FORK += COMMAND
IMPORTS = """
import gc, os, time
from gristmill.ops import demo, train
from gristmill.ops.cli import main
from gristmill.ops.launch import quiet_deepspeed
from gristmill.ops.monitor import status
from gristmill.ops.run import Run
from gristmill.pipeline.augment import cpu, dali
from pyarrow import dataset, pandas_compat
quiet_deepspeed()
gc.collect()
gc.freeze()
"""


def in_forks(workers: Workers) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`subprocess.run` for programs that start `python -m gristmill.ops.cli ...` and look at its code and what it said."""

    def run(command: Sequence[str], **_: Any) -> subprocess.CompletedProcess[str]:
        assert list(command[:3]) == [sys.executable, "-m", "gristmill.ops.cli"]
        process = workers.start("main(arguments, prog_name='gristmill')", arguments=list(command[3:]))
        return subprocess.CompletedProcess(command, process.join(), process.output(), "")

    return run


@contextmanager
def forks() -> Iterator[Workers]:
    """What forks are taken from: its environment is as bare as the console script's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("OMP_NUM_THREADS", raising=False)
        patch.setenv("PATH", BARE["PATH"])
        started = Workers(IMPORTS)
    with started:
        yield started
