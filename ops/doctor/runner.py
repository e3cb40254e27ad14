"""Runs checks one after the other, each within its time, whatever they do.

A thread is left behind where it hangs; a process is killed, and left behind where not even that helps (a file system whose
server is gone). An exception is a finding, too: nothing here raises. One after the other, for they measure.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import NamedTuple

from .finding import Asked, Finding, State, said

REPORT = "give the same command again; if it stays, report it with the output of `gristmill doctor --json`"
SHORT = 10.0  # seconds for what only asks the kernel


class Check(NamedTuple):
    """`module:function` of this folder; the function takes Asked and gives a Finding or several.

    apart: in a process of its own. late: how bad it is not to answer. once: by one process of a host only.
    """

    name: str
    function: str
    apart: bool = False
    late: State = "bad"
    once: bool = False

    def resolve(self) -> Callable[[Asked], Finding | list[Finding]]:
        module, _, function = self.function.partition(":")
        return getattr(importlib.import_module(f"{__package__}.{module}"), function)


CHECKS = (
    Check("python", "versions:check_python"),
    Check("packages", "versions:check_packages"),
    Check("gpu", "devices:check_devices", apart=True),
    Check("dali", "loops:check_dali", apart=True, once=True),
    Check("numba", "loops:check_loops", apart=True, late="warn", once=True),
    Check("communication", "pair:check_communication", apart=True, once=True),
    Check("memory", "limits:check_memory"),
    Check("cpus", "limits:check_cpus"),
    Check("open files", "limits:check_files"),
    Check("shared memory", "limits:check_shared", once=True),
    Check("out", "disk:check_out", apart=True, once=True),
    Check("cache", "disk:check_cache", apart=True, once=True),
    Check("data", "data:check_data", apart=True, once=True),
    Check("port", "network:check_port", once=True),
    Check("host name", "network:check_name", late="warn", once=True),
    Check("peers", "network:check_peers", once=True),
    Check("clock", "clocks:check_clock", once=True),
    Check("text", "limits:check_text"),
    Check("compiler", "versions:check_compiler", once=True),
)
NAMES = tuple(check.name for check in CHECKS)


def examine(
    asked: Asked,
    only: Sequence[str] = (),
    *,
    first: bool = True,
    told: Callable[[str], object] | None = None,
) -> list[Finding]:
    """Findings of all checks, or of those named in `only`. first: this is the host's first process, which does it all.

    told: is called with a check's name before it, and with "" at the end.
    """
    found: list[Finding] = []
    for check in CHECKS:
        if (only and check.name not in only) or (check.once and not first):
            continue
        if asked.grouped and check.name == "communication":  # the group itself is asked (group.py)
            continue
        if told:
            told(check.name)
        found += run(check, asked)
    if told:
        told("")
    return found


def run(check: Check, asked: Asked) -> list[Finding]:
    """One check within its time; never raises."""
    try:
        return _apart(check, asked) if check.apart else _beside(check, asked)
    except Exception as error:  # a fault of ours, or a machine on which no process or thread can be started
        return [_failed(check, said(error))]


def _beside(check: Check, asked: Asked) -> list[Finding]:
    found: list[Finding] = []

    def work() -> None:
        found.extend(guarded(check, asked))

    seconds = min(asked.seconds, SHORT)
    thread = threading.Thread(target=work, name=f"doctor {check.name}", daemon=True)
    thread.start()
    thread.join(seconds)
    return found if not thread.is_alive() else [_late(check, seconds)]


def guarded(check: Check, asked: Asked) -> list[Finding]:
    """The check itself; an exception becomes a finding."""
    try:
        found = check.resolve()(asked)
    except Exception as error:
        return [_failed(check, said(error))]
    return found if isinstance(found, list) else [found]


def _apart(check: Check, asked: Asked) -> list[Finding]:
    """In a new process, which writes its findings into a file: a pipe would wait for what it leaves behind."""
    command = [sys.executable, "-P", "-m", f"{__package__}.apart", check.name]
    with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        given.write(asked.to_json().encode())
        given.seek(0)
        with _process(
            subprocess.Popen(command, stdin=given, stdout=out, stderr=err, start_new_session=True)
        ) as process:
            until = time.monotonic() + asked.seconds
            while process.poll() is None and time.monotonic() < until:
                time.sleep(0.02)
            code = process.poll()
        out.seek(0)
        try:
            found = [Finding.from_dict(tree) for tree in json.loads(out.read())]
        except (ValueError, TypeError):
            found = []
        if code is None:
            return [_late(check, asked.seconds)]
        if code or not found:
            err.seek(0)
            lines = err.read().decode(errors="replace").strip().splitlines()
            how_ended = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
            return [_failed(check, f"the process that looked ended {how_ended}" + (f": {lines[-1]}" if lines else ""))]
        return found


class _process:
    """Ends the process with all that it started, at the end; waits a moment only."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process

    def __enter__(self) -> subprocess.Popen[bytes]:
        return self.process

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(2.0)


def _late(check: Check, seconds: float) -> Finding:
    return Finding(
        check.name, check.late, f"no answer within {seconds:.0f} s", "a training would stand still there, too",
        "look at what is asked here (a driver, a disk, a name server that hangs); on a very busy machine give it more "
        "time with --timeout",
        {"seconds": seconds},
    )  # fmt: skip


def _failed(check: Check, why: str) -> Finding:
    return Finding(check.name, "bad", why, "it could not be looked at", REPORT)


def chosen(only: Sequence[str]) -> Iterator[str]:
    """Names of `only` that there are not."""
    return (name for name in only if name not in NAMES)
