"""The run folder's log: `metrics.jsonl`, one JSON object a line, and the folder's lock.

Kinds: `step` (losses, schedules, times), `probe` (one row of the table), `probe_cost`, `event` (skips, rollbacks, what
the run began with). On resume, lines at or beyond the resumed position are dropped first: those steps are taken again,
and a trace must not hold a step twice. Probes made at that very position stay when they are whole, for they are what
would be measured again. One process writes a run folder at a time; the lock is flock's, so none outlives its process.

Whoever shows or forwards a run (display, JSON lines, trackers) listens here: `also` gets every line that is written,
and those that are only told.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from ..shards.addresses import redact
from ..shards.errors import GristmillError
from ..shards.storage import NO_SPACE

Line = dict[str, Any]


class RunFolderError(GristmillError):
    """A run folder that cannot be used."""


@contextmanager
def writable(folder: Path) -> Iterator[None]:
    """Inside, what the system refuses is put down to the run folder; a full disk stays what it is."""
    try:
        yield
    except OSError as error:
        if error.errno in NO_SPACE:
            raise
        raise RunFolderError(
            f"--out {folder} cannot be a run folder ({error.strerror}); name a folder that can be written"
        ) from error


class Notes(Protocol):
    """Takes lines for whoever looks on."""

    def note(self, line: str) -> None: ...


class RunLog:
    """Appends lines to `metrics.jsonl`; `write` is buffered by the line, so a kill loses at most the last one."""

    def __init__(self, folder: Path):
        self.path = folder / "metrics.jsonl"
        with writable(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = (folder / ".lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise RunFolderError(
                f"another process is training in {folder}; wait for it, or name another folder with --out"
            ) from error
        with writable(folder):
            self._file = self.path.open("a", buffering=1)
        self.probed: set[int] = set()  # positions whose probes the log still holds after `rewind`
        self.also: list[Callable[[Line], object]] = []  # who else gets each line

    def write(self, kind: str, **values: Any) -> None:
        """Append a line, and tell it. Urls in its texts lose their passwords."""
        line = {"kind": kind, **{name: redact(v) if isinstance(v, str) else v for name, v in values.items()}}
        try:
            self._file.write(json.dumps(line) + "\n")
        except OSError as error:
            error.filename = str(self.path)  # a write through an open file names none
            raise
        self.tell(**line)

    def tell(self, kind: str, **values: Any) -> None:
        """A line for those who listen; the log does not keep it."""
        for listener in self.also:
            listener({"kind": kind, **values})

    def rewind(self, position: int) -> None:
        """Drop every line at or beyond `position`, and a torn last line."""
        lines = read_log(self.path)
        self.probed = {position for line in lines if line["kind"] == "probe_cost" and line.get("position") == position}
        kept = [
            line
            for line in lines
            if line.get("position", 0) < position
            or (line.get("position") in self.probed and line["kind"] in ("probe", "probe_cost"))
        ]
        beside = self.path.with_suffix(".jsonl.writing")
        with beside.open("w") as file:
            file.writelines(json.dumps(line) + "\n" for line in kept)
            file.flush()
            os.fsync(file.fileno())
        self._file.close()
        beside.replace(self.path)
        self._file = self.path.open("a", buffering=1)

    def close(self) -> None:
        self._file.close()
        self._lock.close()


class NoLog:
    """The log of every rank but the first: says nothing, since rank 0 says it for all."""

    def __init__(self, folder: Path):
        self.path = folder / "metrics.jsonl"
        self.probed: set[int] = set()
        self.also: list[Callable[[Line], object]] = []

    def write(self, kind: str, **values: Any) -> None:
        pass

    def tell(self, kind: str, **values: Any) -> None:
        pass

    def rewind(self, position: int) -> None:
        pass

    def close(self) -> None:
        pass


def read_log(path: Path) -> list[Line]:
    """All whole lines of a run's log; [] if there is none yet."""
    if not path.is_file():
        return []
    lines = []
    for text in path.read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            continue  # the line that a kill cut short
    return lines
