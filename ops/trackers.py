"""Experiment trackers: what a run sends to TensorBoard or Weights & Biases, where the recipe's `log` asks for it.

They listen to the run's log like the display does, and get steps at most every `log.every` of them, whole multiples, so
that a run that goes on sends the same ones; probes; and once, if asked for, the first crops. A run that goes on writes
on in the same place and holds no step twice. A tracker that cannot be used any more (a full disk, a network that is gone)
is dropped with one warning: training never ends over it. One that is not installed is an error before anything begins.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Literal, Protocol

from pydantic import Field

from ..shards.addresses import redact
from ..shards.errors import GristmillError
from .objectives_config import Piece
from .runlog import Line, Notes, read_log

if TYPE_CHECKING:
    from PIL import Image

    from .run import Run


class TrackerError(GristmillError):
    """A tracker that the recipe asks for is not installed."""


class WandbConfig(Piece):
    """A run of Weights & Biases. The key is theirs to find (`wandb login`, WANDB_API_KEY), and is never written here."""

    project: str
    entity: str | None = None  # a user or a team; theirs by default
    name: str | None = None  # default: the run folder's
    mode: Literal["online", "offline"] | None = None  # default: WANDB_MODE, or else online


class LogConfig(Piece):
    """Who gets the numbers besides the run folder and Prometheus."""

    every: int = Field(default=10, ge=1)  # steps
    tensorboard: bool = False  # into the run folder's tensorboard/
    wandb: WandbConfig | None = None
    crops: bool = False  # one picture of the first batch's crops


class Tracker(Protocol):
    """One of them. Whatever it raises, it is dropped for."""

    name: str

    def take(self, kind: str, position: int, values: dict[str, float]) -> None:
        """Numbers of a step or a probe, after so many images."""
        ...

    def picture(self, name: str, image: Image.Image) -> None: ...

    def close(self, *, failed: bool) -> None: ...


def check_trackers(config: LogConfig) -> None:
    """Raise TrackerError if one is asked for that is not installed."""
    for name, asked in (("tensorboard", config.tensorboard), ("wandb", config.wandb)):
        if asked and importlib.util.find_spec(name) is None:
            raise TrackerError(
                f"log.{name}: {name} is not installed; `pip install {name}`, or leave it out with log.{name}="
                + ("false" if asked is True else "null")
            )


class Trackers:
    """Those that the recipe asks for, on rank 0 of a run that knows where it goes on."""

    def __init__(self, run: Run, notes: Notes) -> None:
        self.run, self.notes, self.config = run, notes, run.recipe.log
        self.alive: list[Tracker] = []
        if run.position >= run.end:
            return
        if self.config.tensorboard:
            self._add("TensorBoard", lambda: _tensorboard(run))
        if self.config.wandb is not None:
            self._add("Weights & Biases", lambda: _wandb(run))
        if not self.alive:
            return
        for line in read_log(run.log.path):  # probes of this very place, which are not written to the log again
            if line["kind"] == "probe" and line["position"] == run.position:
                self.take(line)
        run.log.also.append(self.take)

    def take(self, line: Line) -> None:
        """A line of the run's log."""
        kind = line["kind"]
        if kind == "step" and line["position"] // self.run.recipe.batch % self.config.every == 0:
            self._send(kind, line, "")
        elif kind == "probe":
            self._send(kind, line, f"probe/{line['who']}/")
        elif kind == "crops" and self.config.crops:
            self._picture()

    def close(self, *, failed: bool) -> None:
        """The attempt ends."""
        for tracker in list(self.alive):
            self._guarded(tracker, lambda tracker=tracker: tracker.close(failed=failed))
        self.alive = []

    def _send(self, kind: str, line: Line, prefix: str) -> None:
        values = {f"{prefix}{name}": value for name, value in numbers(line).items()}
        for tracker in list(self.alive):
            self._guarded(tracker, lambda tracker=tracker: tracker.take(kind, line["position"], values))

    def _picture(self) -> None:
        from .report.crops import load_crops, sheet

        views = load_crops(self.run.folder / "crops.npz")
        for tracker in list(self.alive):
            for name, crops in views.items():
                if tracker in self.alive:
                    self._guarded(tracker, lambda t=tracker, n=name, c=crops: t.picture(f"crops/{n}", sheet(c)))

    def _add(self, name: str, begin) -> None:
        try:
            self.alive.append(begin())
        except Exception as error:  # their errors are of many types, and none of them is worth a run
            self._warn(name, error)

    def _guarded(self, tracker: Tracker, do) -> None:
        try:
            do()
        except Exception as error:  # as above
            self.alive = [each for each in self.alive if each is not tracker]
            self._warn(tracker.name, error)

    def _warn(self, name: str, error: Exception) -> None:
        why = redact(" ".join(f"{type(error).__name__}: {error}".split()))[:300]
        self.notes.note(f"warning: {name} gets nothing any more ({why}); training goes on, metrics.jsonl has it all")


def numbers(line: Line) -> dict[str, float]:
    """What of a line can be drawn over the images: numbers by name, seconds by phase as `seconds/data_wait`."""
    found: dict[str, float] = {}
    for name, value in line.items():
        if isinstance(value, dict):
            found |= {f"{name}/{part}": float(number) for part, number in value.items()}
        elif name != "position" and isinstance(value, bool | int | float):
            found[name] = float(value)
    return found


def _tensorboard(run: Run) -> Tracker:
    from .tensorboard_events import TensorBoard

    return TensorBoard(run.folder / "tensorboard", run.position)


def _wandb(run: Run) -> Tracker:
    from .wandb_run import WandbRun

    return WandbRun(run)
