"""Real processes for tests, started in milliseconds: one that has imported what is slow forks the others.

    with Workers("import numpy") as workers:
        one = workers.start("print(numpy.arange(n))", n=3)
        one.join(), one.output()

They are no children of the test, so that a SIGKILL hits exactly one of them, and threads of the test are not theirs.
However the test's process ends, they end with it: the kernel sees to that. Otherwise each ends with the exit code that a
script would have, once its threads have ended and what it registered to be called at exit was called; with `end=True` the
interpreter takes itself down as well, which takes half a second a process with torch.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

_PARENT = """
import atexit, ctypes, json, os, signal, sys, threading

def _end_with(parent):
    # PR_SET_PDEATHSIG; who is an orphan already would never hear of it.
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)

_end_with(int(sys.argv[1]))
exec(sys.argv[2])
_forker = os.getpid()

def _ended(code):
    # Its exit code, everything said. What is no Exception comes out of here, and ends the process as it would a script.
    try:
        exec(code, globals())
        exited = 0
    except SystemExit as error:
        exited = error.code or 0
        if not isinstance(exited, int):
            print(exited, file=sys.stderr)
            exited = 1
    except Exception:
        sys.excepthook(*sys.exc_info())
        exited = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return exited & 255

for line in sys.stdin:
    job = json.loads(line)
    if "code" in job:
        pid = os.fork()
        if pid == 0:
            _end_with(_forker)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.dup2(os.open(job["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
            os.dup2(1, 2)
            globals().update(job["values"])
            if not job["end"]:
                os._exit(_ended(job["code"]))
            exec(job["code"], globals())
            break
        answer = pid
    else:
        pid, status = os.waitpid(job["pid"], os.WNOHANG)
        answer = os.waitstatus_to_exitcode(status) if pid else None
    print(json.dumps([job["number"], answer]), flush=True)
"""


@dataclass
class Worker:
    """One process. Its standard output and errors go to a file."""

    pid: int
    _file: Path
    _workers: Workers
    _code: int | None = None

    def output(self) -> str:
        return self._file.read_text() if self._file.exists() else ""

    def poll(self, wait: bool = False) -> int | None:
        """Its exit code (negative: the signal that ended it), None while it runs.

        wait: until it has ended. That is done here and not by its parent, which must be able to answer a test that was
        interrupted and ends what it waited for.
        """
        if self._code is None:
            if wait:
                process = os.pidfd_open(self.pid)  # its number is not given away before it was asked for
                try:
                    select.select([process], [], [])
                finally:
                    os.close(process)
            self._code = self._workers.ask({"pid": self.pid})
        return self._code

    def join(self) -> int:
        code = self.poll(wait=True)
        assert code is not None
        return code

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)
            self.join()


class Workers:
    """Starts processes in which `imports` was executed already. A context manager; kills what still runs."""

    def __init__(self, imports: str) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._started: list[Worker] = []
        self._asked = 0
        command = [sys.executable, "-c", _PARENT, str(os.getpid()), textwrap.dedent(imports)]
        self._parent = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def start(self, code: str, *, end: bool = False, **values: Any) -> Worker:
        """Run code with these values (JSON) as globals. end: whether how the interpreter ends is to be seen."""
        file = Path(self._folder.name) / str(len(self._started))
        pid = self.ask({"code": textwrap.dedent(code), "end": end, "values": values, "output": str(file)})
        self._started.append(Worker(pid, file, self))
        return self._started[-1]

    def ask(self, job: dict[str, Any]) -> Any:
        assert self._parent.stdin is not None
        assert self._parent.stdout is not None
        self._asked += 1
        print(json.dumps(job | {"number": self._asked}), file=self._parent.stdin, flush=True)
        while True:  # a test that was interrupted here has left its answer
            number, answer = json.loads(self._parent.stdout.readline())
            if number == self._asked:
                return answer

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            for worker in self._started:
                worker.kill()
        finally:
            self._parent.communicate()
            self._folder.cleanup()
