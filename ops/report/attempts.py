"""The attempts that a run took: `attempts.jsonl`, a line when one begins and a line when it ends.

The log itself cannot tell: a resumed run drops the steps that it takes again. So each attempt notes, before that happens,
what the one before it had done beyond the checkpoint, and when that one was last heard of; a killed one needs no line of
its own. Times are of the wall clock, in seconds since 1970.
"""

from __future__ import annotations

import json
import math
import signal
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click

FILE = "attempts.jsonl"


@dataclass(frozen=True)
class Attempt:
    """One attempt: from when to when, from which position; what the next one took again; why it ended, if it said so."""

    began: float
    ended: float | None  # None: it goes on, or nobody came after it
    position: int
    lost_images: int = 0
    lost_seconds: float = 0.0
    why: str = ""

    @property
    def seconds(self) -> float:
        return max(0.0, (self.ended or self.began) - self.began)


class Attempts:
    """Notes the attempts of a run folder. Make it before the log is cut, then `begin`, and `end` in any case.

    `before`: those that were; the last one of them ended when it was last heard of, if it could not say so itself.
    """

    def __init__(self, folder: Path):
        self.path = folder / FILE
        log = folder / "metrics.jsonl"
        self._steps = _steps(log)
        self._heard = log.stat().st_mtime if log.is_file() else None
        self.before = read_attempts(folder)
        if self.before and self.before[-1].ended is None:
            last = self.before[-1]
            self.before[-1] = replace(last, ended=max(last.began, self._heard or last.began))
        self._begun = False

    def begin(self, position: int) -> None:
        """Training goes on from `position`; steps at or beyond it are lost."""
        lost = [(at, seconds) for at, seconds in self._steps if at >= position]
        gap = self._steps[-1][0] - self._steps[-2][0] if len(self._steps) > 1 else 0
        images = lost[-1][0] - position + gap if lost else 0
        about = {"lost_images": images, "lost_seconds": round(sum(s for _, s in lost), 3), "heard": self._heard}
        self._begun, self._steps = True, []  # of a long run they are many, and were wanted for this alone
        self._note("began", position=position, **about)

    def end(self, position: int, why: str) -> None:
        """Training ended at `position`: done, asked to stop, or an error's text. Nothing if it never began."""
        if self._begun:
            self._note("ended", position=position, why=why[:300])

    def _note(self, what: str, **values: Any) -> None:
        try:
            with self.path.open("a") as file:
                file.write(json.dumps({"what": what, "time": time.time(), **values}) + "\n")
        except OSError as error:  # a full disk, for one: the run has better to do than to end over this
            click.echo(f"warning: {self.path} cannot be written: {error.strerror or error}", err=True)


def read_attempts(folder: Path) -> list[Attempt]:
    """All attempts in order; lines that cannot be read are passed over. [] without a file."""
    try:
        text = (folder / FILE).read_text(errors="replace")
    except OSError:
        return []
    found: list[Attempt] = []
    for raw in text.splitlines():
        try:
            line = json.loads(raw)
            what, at, position = line["what"], float(line["time"]), int(line["position"])
            if not math.isfinite(at):
                continue
            if what == "began":
                images, seconds = int(line.get("lost_images") or 0), float(line.get("lost_seconds") or 0.0)
                if found:
                    before = found[-1]
                    ended = before.ended or max(before.began, min(at, float(line.get("heard") or before.began)))
                    found[-1] = Attempt(before.began, ended, before.position, images, seconds, before.why)
                found.append(Attempt(at, None, position))
            elif what == "ended" and found:
                found[-1] = Attempt(found[-1].began, at, found[-1].position, why=str(line.get("why", "")))
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
            continue
    return found


def why_ended(asked: list[int], error: BaseException | None) -> str:
    """In words: an error, the signals that asked for it, or else that all is done."""
    if error is not None:
        return f"{type(error).__name__}: {error}"
    return f"asked to stop by {signal.Signals(asked[0]).name}" if asked else "done"


def _steps(log: Path) -> list[tuple[int, float]]:
    """(position, seconds) of the log's steps, in its order."""
    found = []
    if log.is_file():
        with log.open(errors="replace") as file:
            for raw in file:
                try:
                    line = json.loads(raw)
                    if line["kind"] == "step":
                        found.append((int(line["position"]), float(sum(line["seconds"].values()))))
                except (ValueError, KeyError, TypeError, AttributeError):
                    continue
    return found
