"""What the loop tells its metrics: a few calls at the places where something happened.

Each step hands over numbers that the loop has anyway. What costs more, or would wait for the device (the teacher's
sample, the counters of storage and cache, memory, the ledger of the wall clock), is looked at about once a second, and
less often where looking takes longer: a two-hundredth of the time, but once a minute in any case.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .communication import Communication
from .device import Device
from .disks import Disks
from .goodput import Goodput
from .metrics import Metrics
from .sample import Sample
from .work import Work

if TYPE_CHECKING:
    from ...pipeline.loader import Loader
    from ..guard import Verdict
    from ..run import Run
    from ..writer import Settled

PACE = 1.0  # seconds between two looks at what is not looked at in each step
SHARE = 1 / 200  # of the time that such looks may take
PAUSE = 60.0  # seconds between two looks at most: a teacher that nobody looks at seems frozen
# What the wall clock's seconds in these states are booked as; those of steps are told apart by their phases.
BOOKED = {"probing": "probe", "checkpointing": "checkpoint", "refreshing": "refresh"}


class Observer:
    """Of one process. `goodput`: the run's ledger, on rank 0 of a run that keeps one."""

    def __init__(self, run: Run, metrics: Metrics, goodput: Goodput | None = None) -> None:
        self.run, self.metrics, self.goodput = run, metrics, goodput
        self._device, self._work = Device(run.device), Work(run)
        self._sample = Sample(run.engine.teacher)
        self._communication = Communication() if run.world > 1 else None
        self._state, self._claimed, self._next = "starting", 0.0, 0.0
        recipe = run.recipe
        metrics.observe({"world": run.world}, "run/")
        if (peak := self._device.peak_flops(recipe.precision)) is not None:
            metrics.observe({"peak_flops": peak}, "device/")
        if run.rank == 0:
            metrics.observe({"images": run.end}, "run/")
            metrics.observe({"every": recipe.checkpoint.every}, "checkpoint/")
            if run.position:
                metrics.observe({"position": run.position}, "checkpoint/")
        if goodput is not None:
            metrics.observe({"attempts": goodput.attempts}, "run/")
            metrics.observe(goodput.interruptions, "interruptions/")
            metrics.observe(goodput.save(), "spent/")
        first = os.environ.get("LOCAL_RANK", "0") == "0" and recipe.metrics.port != "off"
        self._disks = Disks(places(run), lambda found: metrics.observe(found, "disk/")) if first else None

    def begin(self) -> None:
        """The first step is about to be taken."""
        if self.goodput is not None:
            self.goodput.begin()
        if self._communication is not None:
            self._communicated(self._communication)
        self._enter("training")

    @contextmanager
    def doing(self, state: str) -> Iterator[None]:
        """Around what is no part of a step."""
        before, claimed, began = self._state, self._claimed, time.perf_counter()
        self._enter(state)
        try:
            yield
        finally:
            self._enter(before)
            seconds = time.perf_counter() - began - (self._claimed - claimed)  # less what was done, and booked, inside
            self._claimed += seconds
            if self.goodput is not None:
                self.goodput.claim(BOOKED[state], seconds)

    def forward(self) -> AbstractContextManager[None]:
        """Around a micro-batch's forward, in which a rank does not wait for others.

        But it does under ZeRO 3, which gathers each layer's weights there, and where an objective gathers rows for its
        loss: a rank that is slow then shows in all ranks, and only by what it takes before and between these.
        """
        return self._device.timed()

    def step(self, verdict: Verdict, row: dict[str, Any], phases: dict[str, float], loader: Loader) -> None:
        """One step was decided. row: what the log has of it; phases: its seconds."""
        run, recipe = self.run, self.run.recipe
        bad = bool(verdict.bad)
        counted = {
            "position": run.position, "trained": run.cursor.trained, "progress": run.progress,
            "step": run.position // recipe.batch, "bad": verdict.bad, "bad_in_a_row": run.guard.in_a_row,
            "batch": recipe.batch, "crops": recipe.batch * run.inputs.student_crops,
            "tokens": self._work.tokens, "flops": self._work.flops(verdict.logs),
            "clipped": not bad and self._clipped(verdict, row["position"]), "teacher_updates": not bad,
            "phases": phases, "own_seconds": self._device.seconds() + phases.get("data_wait", 0.0),
        }  # fmt: skip
        self.metrics.observe_step(row | counted)
        self.metrics.observe_loader(loader.stats)
        if self.goodput is not None:
            self.goodput.step(row["position"], run.position, phases.get("data_wait", 0.0), bad=bad)
        now = time.perf_counter()
        if now >= self._next:
            self.look(loader)
            done = time.perf_counter()
            self._next = done + min(max(PACE, (done - now) / SHARE), PAUSE)

    def look(self, loader: Loader) -> None:
        """What is not looked at in each step."""
        used = loader.reader.usage()
        found = asdict(used)
        cache, remote = found.pop("cache"), found.pop("remote")
        self.metrics.observe(found, "storage/")
        if remote is not None:
            self.metrics.observe(remote.pop("retries"), "storage/retries/")
            self.metrics.observe(remote, "storage/")
        if cache is not None:
            self.metrics.observe(cache, "cache/")
        self.metrics.observe(self._sample.look(), "teacher/")
        self.metrics.observe(self._device.memory(), "cuda/")
        if self._communication is not None:
            self._communicated(self._communication)
        if self.goodput is not None:
            self.metrics.observe(self.goodput.save(), "spent/")

    def rolled_back(self) -> None:
        self.metrics.observe({"rollbacks": 1})

    def saved(self, settled: Settled) -> None:
        """A checkpoint is published (rank 0)."""
        self.metrics.observe_checkpoint(ok=True, seconds=settled.seconds, size=settled.bytes, position=settled.position)

    def unsaved(self) -> None:
        """A checkpoint could not be written."""
        self.metrics.observe_checkpoint(ok=False)

    def close(self, *, failed: bool) -> None:
        """The attempt ends."""
        self.metrics.observe_state("ending")
        if self._disks is not None:
            self._disks.close()
        if self._communication is not None:
            self._communication.end()
            self.metrics.observe(self._communication.counts(), "communication/")
        if self.goodput is not None:
            self.metrics.observe(self.goodput.end(failed=failed), "spent/")

    def _communicated(self, counted: Communication) -> None:
        counted.follow()
        self.metrics.observe(counted.counts(), "communication/")

    def _enter(self, state: str) -> None:
        self._state = state
        self.metrics.observe_state(state)

    def _clipped(self, verdict: Verdict, position: int) -> bool:
        config = self.run.recipe.optimizer
        longest = verdict.grad_norm if config.clip_by == "global" else verdict.largest
        return bool(config.clip) and longest > config.clip_at(position / self.run.end)


def places(run: Run) -> dict[str, Path]:
    """Where the run writes, as far as these are folders."""
    found, cache = {"run": run.folder}, run.recipe.stream.cache
    if (root := getattr(run.store, "root", None)) is not None and not run.store.remote:
        found["checkpoints"] = Path(root)
    if cache is not None:
        found["cache"] = Path(cache.folder)
    return found
