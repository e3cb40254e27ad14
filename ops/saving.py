"""Saving a run: checkpoints are begun at a step, settled at later ones, and told to whoever watches.

The first one is written whole before the first step, read back and loaded (doctor/dry.py): a disk that refuses, or
gives back something else, is known before the work.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import click

from .checkpoint import CheckpointError
from .doctor.dry import dry_run
from .monitor.observer import Observer
from .run import Run
from .runlog import Notes
from .watchdog import Watchdog
from .writer import ELSEWHERE


class Saving:
    """The checkpoints of a run, on this rank. Everything here is collective."""

    def __init__(self, run: Run, observer: Observer, watch: Watchdog, notes: Notes):
        self.run, self.observer, self.watch, self.notes = run, observer, watch, notes
        self.due = False  # a checkpoint

    def first(self, probed: Collection[int]) -> None:
        """A state to go back to, written and tried out before the first step. probed: positions with a probe."""
        self.save(wait=True)
        with self.watch.patience(3600.0), self.observer.doing("checkpointing"):
            self.watch.at("checkpoint")
            for line in dry_run(self.run, probed):
                self.notes.note(line)

    def save(self, wait: bool = False) -> None:
        """Begin a checkpoint of the position reached; `wait` until it is whole on disk."""
        run = self.run
        with self.watch.patience(600.0), self.observer.doing("checkpointing"):
            self.watch.at("checkpoint")
            if run.writer.busy:
                self.finish(must=False)
            self.due = False
            run.writer.begin(run.position, run.content())
            if wait or not run.recipe.checkpoint.asynchronous:
                self.finish(must=wait)

    def finish(self, must: bool) -> None:
        """Wait for the one under way; `must`: raise CheckpointError if it cannot be written."""
        try:
            self._saved(self.run.writer.finish(self.run.total))
        except CheckpointError as error:
            self._unsaved(str(error), told=must)
            if must:
                raise

    def settle(self, written: float, failed: float) -> None:
        """Publish the checkpoint under way once every rank has written its part."""
        settled = self.run.writer.settle(written, failed)
        if settled is not None:
            self._unsaved(settled.failure, told=False) if settled.failure else self._saved(settled)

    def _saved(self, settled: Any) -> None:
        if settled is not None and self.run.rank == 0:
            self.observer.saved(settled)
            about = {"position": settled.position, "seconds": settled.seconds, "bytes": settled.bytes}
            self.run.log.tell("checkpoint", **about)
            if settled.warning:
                self.notes.note(f"warning: {settled.warning}")

    def _unsaved(self, why: str, *, told: bool) -> None:
        """A disk that is full in mid-run costs this checkpoint, not the run; `told` where an error says why, too."""
        self.observer.unsaved()
        self.run.log.write("event", event="checkpoint_failed", position=self.run.position, why=why)
        if not told:
            self.notes.note(f"warning: {why}")
            if self.run.rank and not why.endswith(ELSEWHERE):  # only this rank knows what its disk said
                click.echo(f"warning: rank {self.run.rank}: {why}", err=True)
