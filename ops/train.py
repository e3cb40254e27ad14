"""The loop. batch -> teacher -> student -> losses -> backward -> verdict -> (step -> EMA -> commit) or skip -> cursor.

One process on a laptop runs what many nodes run. Nothing is remembered before the verdict: losses have no side
effects, and the optimizer, the teacher, the memories and the centres change only after all ranks agreed that the step
is good. The cursor moves either way: a bad step is decided, too.
"""

from __future__ import annotations

import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..models.ema import ema_update, pairs
from ..shards.errors import GristmillError
from .checkpoint import CheckpointError
from .evaluate.online import OnlineProbes
from .launch import join, leave
from .monitor.exporter import Exporter
from .monitor.metrics import Metrics
from .progress import Meter
from .recipe import Recipe
from .report.crops import save_crops
from .run import Run
from .schedule import cosine

REQUEUE = 75  # exit code after SIGTERM with a checkpoint written: start the same command again (EX_TEMPFAIL)


@dataclass
class Ending:
    """How a run ended: `code` 0 when all images were seen, REQUEUE or 130 when it was asked to stop before."""

    code: int
    position: int


def train(recipe: Recipe, folder: Path, *, quiet: bool = False) -> Ending:
    """Train `recipe` in the run folder, or go on where its newest checkpoint stands."""
    # Sharp softmaxes are full of numbers below 1e-38, on which CPUs are a hundred times slower than on zeros. Set here
    # and not where a group is joined, since it holds for everything else in the process, too.
    torch.set_flush_denormal(True)
    rank, world, device = join()
    asked, before = _listen()
    run = Run(recipe, folder, rank, world, device)
    metrics = Metrics(recipe.name, run.topology())
    exporter = None
    try:
        if recipe.metrics.port != "off":
            exporter = Exporter(metrics.registry, recipe.metrics.port, recipe.metrics.address)
            (folder / "metrics.url").write_text(exporter.url + "\n")
        with Meter("training", run.steps * recipe.batch, quiet=quiet) as meter:
            for line in run.restore():
                meter.note(line)
            if exporter:
                meter.note(f"metrics: {exporter.url}")
            _loop(run, metrics, meter, asked)
    finally:
        if exporter:
            exporter.close()
            (folder / "metrics.url").unlink(missing_ok=True)
        run.close()
        leave()
        for number, handler in before.items():
            signal.signal(number, handler)
    done = run.position >= run.steps * recipe.batch
    return Ending(0 if done else 128 + 2 if asked == [signal.SIGINT] else REQUEUE, run.position)


def _loop(run: Run, metrics: Metrics, meter: Meter, asked: list[int]) -> None:
    recipe, engine, teacher, mixture = run.recipe, run.engine, run.teacher, run.mixture
    end, share = run.steps * recipe.batch, 1.0 / run.steps
    student_parameters, teacher_parameters = pairs(engine.module, teacher)
    crops = recipe.batch * run.info().student_crops
    probes = OnlineProbes(run, metrics, meter)
    probes.maybe(run.position)
    loader = run.loader()
    try:
        while run.position < end:
            clock = Clock()
            batch = _next(loader, run, metrics)
            if run.position == 0:
                save_crops(
                    run.folder / "crops.npz", {name: v.cpu().numpy() for name, v in batch.views.items()}, batch.keys
                )
            clock.lap("data_wait")
            with torch.no_grad(), engine.autocast():
                targets = teacher(run.crops(batch, run.teacher_views), mixture.teacher_context())
            clock.lap("teacher")
            outputs = engine(run.crops(batch, run.student_views), run.context())
            outcome = mixture.loss(outputs, targets, run.info())
            clock.lap("student")
            engine.backward(outcome.loss)
            clock.lap("backward")

            rates = engine.set_rates(run.progress, share)
            rates["momentum"] = cosine(*recipe.teacher.momentum, run.progress)
            gradients = [gradient for _, gradient in engine.gradients()]
            verdict = run.guard.judge(outcome, gradients, bool(asked))
            good = not verdict.bad
            if good:
                engine.clip(verdict.norms)
                engine.freeze_last_layer(run.progress)
                good = engine.step()
                verdict.bad = [] if good else ["optimizer"]
            if good:
                clock.lap("optimizer")
                ema_update((student_parameters, teacher_parameters), rates["momentum"])
                clock.lap("ema")
                mixture.commit(outcome)
                clock.lap("commit")
            else:
                engine.skip()
                run.log.write("event", event="skipped", position=run.position, bad=verdict.bad, keys=batch.keys[:8])
                meter.note(f"step at image {run.position} left out: {', '.join(verdict.bad)} not finite")

            start, run.cursor = run.position, run.cursor.advance(recipe.batch, committed=good)
            run.guard.count(verdict, start, batch.keys)
            logs = {name: float(value) for name, value in outcome.logs.items()}
            row = {"position": start, "grad_norm": verdict.grad_norm, **rates, **logs}
            run.log.write("step", **row, bad=bool(verdict.bad), seconds=clock.seconds)
            metrics.observe_step(
                row
                | {"position": run.position, "trained": run.cursor.trained, "progress": run.progress}
                | {"batch": recipe.batch, "crops": crops, "bad": verdict.bad, "phases": clock.seconds}
            )
            metrics.observe_loader(loader.stats)
            meter(run.position, text=f"loss {logs['loss']:.3f}")
            if verdict.stop or run.position >= end or start // (e := recipe.checkpoint.every) < run.position // e:
                _save(run, metrics, meter, must=verdict.stop or run.position >= end)
            probes.maybe(run.position)
            if verdict.stop:
                break
    finally:
        loader.close()


class Clock:
    """Seconds of each phase of a step. The phases add up to the step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, phase: str) -> None:
        now = time.perf_counter()
        self.seconds[phase] = now - self._last
        self._last = now


def _next(loader, run: Run, metrics: Metrics):
    """The next batch. Where the data is at fault, what was decided is saved before the run stops and says why."""
    try:
        return next(loader)
    except GristmillError:
        if run.position:
            run.save()
        raise


def _save(run: Run, metrics: Metrics, meter: Meter, must: bool) -> None:
    """Save; a disk that is full in mid-run costs this checkpoint, not the run."""
    try:
        path, seconds = run.save()
    except CheckpointError as error:
        metrics.observe_checkpoint(ok=False)
        run.log.write("event", event="checkpoint_failed", position=run.position, why=str(error))
        if must:
            raise
        meter.note(f"warning: {error}")
        return
    size = sum(file.stat().st_size for file in path.iterdir())
    metrics.observe_checkpoint(ok=True, seconds=seconds, size=size)


def _listen() -> tuple[list[int], dict[int, Any]]:
    """Let SIGTERM and Ctrl-C ask the loop to stop: the list holds the signal once it came, a second one ends at once.

    Also returns the handlers that were there before, by signal.
    """
    asked: list[int] = []

    def ask(number: int, frame: object) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    return asked, {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
