"""The loop. batch -> teacher -> student -> losses -> backward -> verdict -> (step -> EMA -> commit) or skip -> cursor.

One process on a laptop runs what many nodes run. Nothing is remembered before the verdict: losses have no side
effects, and the optimizer, the teacher, the memories and the centres change only after all ranks agreed that the step
is good. The cursor moves either way: a bad step is decided, too. The next batch is fetched before the verdict is read,
while the device still works, so that a rank without data can say so in the same vector and nobody waits for it alone.
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from ..pipeline.loader import Batch, Loader
from ..shards.errors import GristmillError
from .capture import capture
from .checkpoint import CheckpointError
from .clock import Clock
from .evaluate.online import OnlineProbes
from .launch import flushing, join, leave
from .lost import Crew
from .monitor.goodput import Goodput
from .monitor.metrics import Metrics
from .monitor.observer import Observer
from .monitor.serving import serve
from .progress import Meter
from .recipe import Recipe
from .report.attempts import Attempts, why_ended
from .report.crops import save_crops
from .run import Run
from .schedule import cosine
from .watchdog import Watchdog
from .writer import ELSEWHERE

REQUEUE = 75  # exit code after SIGTERM or SIGUSR1 with a checkpoint written: start the same command again (EX_TEMPFAIL)
IMPATIENT = 2.0  # seconds after which another Ctrl-C is a wish of its own


class DataLossError(GristmillError):
    """Another rank could not read its part of a batch."""


@dataclass
class Ending:
    """How a run ended: `code` 0 when all images were seen, REQUEUE or 130 when it was asked to stop before."""

    code: int
    position: int


def train(recipe: Recipe, folder: Path, *, quiet: bool = False) -> Ending:
    """Train `recipe` in the run folder, or go on where its newest checkpoint stands."""
    with flushing():
        return _train(recipe, folder, quiet)


def _train(recipe: Recipe, folder: Path, quiet: bool) -> Ending:
    began = time.time()
    rank, world, device = join()
    crew = Crew(rank, world)
    asked, before = _listen()
    run = exporter = watch = attempts = loop = None
    try:
        run = Run(recipe, folder, rank, world, device)
        metrics = Metrics(recipe.name, run.topology())
        log = run.log
        watch = Watchdog(
            rank, world, deadline=recipe.watchdog, report=lambda text: log.write("event", event="stalled", why=text)
        )
        notes: list[str] = []
        exporter = serve(recipe.metrics, metrics.registry, rank=rank, world=world, folder=folder, notes=notes.append)
        with Meter("training", run.end, quiet=quiet or rank > 0) as meter:
            attempts = Attempts(folder) if rank == 0 else None  # reads the log before what is taken again is dropped
            goodput = Goodput(folder, attempts.before, started=began) if attempts else None
            metrics.observe_state("restoring")
            with watch.patience(3600.0):
                told = run.restore()
            if attempts:
                attempts.begin(run.position)
            for line in [*told, *notes]:
                meter.note(line)
            loop = Loop(run, metrics, meter, watch, asked, goodput)
            loop.run_to_end()
    except RuntimeError as error:
        lost = crew.explain(error, *(watch.here() if watch else ("start", 0)))
        if lost is None:
            crew.ends()
            raise
        raise lost from error
    except BaseException:
        crew.ends()
        raise
    finally:
        if watch:
            watch.close()
        if loop:
            loop.observer.close(failed=sys.exc_info()[0] is not None)
        if exporter:
            # One that never began to train was a mistake of whoever started it, who reads about it in the terminal.
            exporter.close(clean=loop is None or sys.exc_info()[0] in (None, KeyboardInterrupt))
        if run:
            if attempts:
                attempts.end(run.position, why_ended(asked, sys.exc_info()[1]))
            run.close()
        leave()
        for number, handler in before.items():
            signal.signal(number, handler)
    assert run is not None
    return Ending(0 if run.position >= run.end else 130 if asked[:1] == [signal.SIGINT] else REQUEUE, run.position)


class Loop:
    """The steps of a run, from where it stands to its end or to a wish to stop."""

    def __init__(
        self,
        run: Run,
        metrics: Metrics,
        meter: Meter,
        watch: Watchdog,
        asked: list[int],
        goodput: Goodput | None = None,
    ):
        self.run, self.meter, self.watch, self.asked = run, meter, watch, asked
        self.observer = Observer(run, metrics, goodput)
        self.probes = OnlineProbes(run, metrics, meter)
        self.captured = 0
        self.due = False  # a checkpoint
        self.clock = Clock()

    def run_to_end(self) -> None:
        run = self.run
        self.probe()
        if run.position == 0:
            self.save()  # a state to go back to, and a disk that refuses is known before the work
        loader = run.loader()
        feed = Ahead(loader, run.end)
        try:
            feed.fetch()
            if run.position < run.end:
                self.agree(run.total([float(feed.error is not None)])[0], feed)
            self.observer.begin()
            self.clock = Clock()
            while run.position < run.end:
                if self.step(feed, loader):
                    break
        finally:
            loader.close()

    def step(self, feed: Ahead, loader: Loader) -> bool:
        """One step; True when the run was asked to stop, with everything saved."""
        run, engine, clock = self.run, self.run.engine, self.clock
        self.refresh()
        start, batch = run.position, feed.take()
        if start == 0 and run.rank == 0:
            save_crops(run.folder / "crops.npz", {n: v.cpu().numpy() for n, v in batch.views.items()}, batch.keys)
        outcomes = []
        for part in range(run.inputs.parts):
            self.watch.at("forward", start)
            with self.observer.forward():
                outcomes.append(run.forward(batch, part))
            clock.lap("forward")
            self.watch.at("backward", start)
            engine.backward(outcomes[-1].loss)
            clock.lap("backward")
        self.watch.at("data", start)
        feed.fetch()
        clock.lap("data_wait")
        self.watch.at("verdict", start)
        flags = {"stop": float(bool(self.asked)), "fault": float(feed.error is not None)}
        flags |= dict(zip(("written", "failed"), run.writer.flags(), strict=True))
        rates = engine.set_rates(run.progress, run.recipe.batch / run.end)
        rates["momentum"] = cosine(*run.recipe.teacher.momentum, run.progress)
        verdict = run.guard.judge(outcomes, engine.squares(), partial=not engine.segments.replicated, flags=flags)
        clock.lap("verdict")

        good = not verdict.bad
        if good:
            self.watch.at("optimizer", start)
            good = engine.step(verdict.norms)
            verdict.bad = [] if good else ["optimizer"]
            clock.lap("optimizer")
        if good:
            engine.teacher.update(rates["momentum"])
            clock.lap("ema")
            run.commit(outcomes)
            clock.lap("commit")
        else:
            self.leave_out(batch, verdict)
        run.cursor = run.cursor.advance(run.recipe.batch, committed=good)
        if good:
            with self.watch.patience(3600.0):
                verdict.logs |= run.refit()
            clock.lap("refit")
        if run.guard.settle(verdict):
            self.go_back(verdict, batch)
        self.clock = Clock()  # what follows the step's line in the log is counted in the next one's
        self.observe(start, verdict, rates, clock, loader)
        self.clock.lap("metrics")

        stop = bool(verdict.flags["stop"])
        self.settle(verdict.flags["written"], verdict.flags["failed"])
        every = run.recipe.checkpoint.every
        ends = stop or bool(verdict.flags["fault"]) or run.position >= run.end
        self.due |= start // every < run.position // every
        if ends or (self.due and not verdict.bad):  # no state amid a bad streak: a rollback wants one from before it
            self.save(wait=ends)
        self.clock.lap("checkpoint")
        self.agree(verdict.flags["fault"], feed)
        self.probe()
        self.clock.pause()  # probes are booked on their own
        return stop

    def refresh(self) -> None:
        """A pass over the data for objectives that want one before this step."""
        if self.run.mixture.stale(self.run.info()):
            self._refresh()
        self.clock.lap("refresh")

    def _refresh(self) -> None:
        with self.watch.patience(24 * 3600.0), self.observer.doing("refreshing"):
            begin = time.perf_counter()
            for name, missing in self.run.refresh().items():
                seconds, position = time.perf_counter() - begin, self.run.position
                about = {"position": position, "objective": name, "missing": missing, "seconds": seconds}
                self.run.log.write("event", event="refreshed", **about)
                left = f" but {missing} that are left out or damaged" if missing else ""
                self.meter.note(f"{name}: all images{left} seen and clustered at image {position}, {seconds:.0f} s")

    def agree(self, faults: float, feed: Ahead) -> None:
        """All ranks stop when one has no data; that one says why."""
        if feed.error is not None:
            raise feed.error
        if faults:
            raise DataLossError(
                f"{faults:.0f} of {self.run.world} processes could not read their data; see their messages"
            )

    def leave_out(self, batch: Batch, verdict) -> None:
        """Forget a bad step, and say what was wrong, on which rank, and with which samples."""
        run = self.run
        run.engine.skip()
        places = run.suspects(batch, verdict) if verdict.bad != ["optimizer"] else []
        fed = run.everyones(batch.keys)
        keys = [fed[place] for place in places[:8]]
        where = sorted({rank for rank, _ in verdict.culprits})
        run.log.write(
            "event",
            event="skipped",
            position=run.position,
            bad=verdict.bad,
            ranks=where,
            keys=keys,
            samples=len(places),
        )
        ranks = f" on rank {', '.join(map(str, where))}" if run.world > 1 and where else ""
        what = "not finite" if verdict.bad != ["spike"] else "far above its mean"
        shown = ", ".join(keys[:3]) + (f" and {len(places) - 3} more" if len(places) > 3 else "")
        self.meter.note(
            f"step at image {run.position} left out: {', '.join(verdict.bad)} {what}{ranks} (samples {shown or 'unknown'})"
        )
        if self.captured < run.recipe.guard.captures:
            self.captured += 1
            with self.watch.patience(600.0):
                path = capture(run, batch, verdict, fed)
            if path:
                self.meter.note(f"captured; look at it with `gristmill replay {path}`")

    def go_back(self, verdict, batch: Batch) -> None:
        """Return to the last good state and leave out the window."""
        run = self.run
        run.guard.go_back(verdict, run.position - run.recipe.batch, batch.keys)
        with self.watch.patience(600.0):
            self.watch.at("checkpoint")
            if run.writer.busy:  # one that fails must not end a run that has an older one to go back to
                self._finish(must=False)
            position = run.go_back()
        self.observer.rolled_back()
        run.log.write("event", event="rollback", position=run.position, to=position)
        self.meter.note(f"{run.recipe.guard.patience} bad steps in a row: back to the state of image {position}")

    def observe(self, start: int, verdict, rates: dict[str, float], clock: Clock, loader: Loader) -> None:
        run = self.run
        row = {"position": start, "grad_norm": verdict.grad_norm, **rates, **verdict.logs}
        run.log.write("step", **row, bad=bool(verdict.bad), seconds=clock.seconds)
        self.observer.step(verdict, row, clock.seconds, loader)
        self.meter(run.position, text=f"loss {verdict.logs['loss']:.3f}")

    def probe(self) -> None:
        if self.run.position not in self.probes.due:
            return
        with self.watch.patience(3600.0), self.observer.doing("probing"):
            self.watch.at("probe")
            self.probes.maybe(self.run.position)

    def save(self, wait: bool = False) -> None:
        """Begin a checkpoint of the position reached; `wait` until it is whole on disk."""
        run = self.run
        with self.watch.patience(600.0), self.observer.doing("checkpointing"):
            self.watch.at("checkpoint")
            if run.writer.busy:
                self._finish(must=False)
            self.due = False
            run.writer.begin(run.position, run.content())
            if wait or not run.recipe.checkpoint.asynchronous:
                self._finish(must=wait)

    def _finish(self, must: bool) -> None:
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
            if settled.warning:
                self.meter.note(f"warning: {settled.warning}")

    def _unsaved(self, why: str, *, told: bool) -> None:
        """A disk that is full in mid-run costs this checkpoint, not the run; `told` where an error says why, too."""
        self.observer.unsaved()
        self.run.log.write("event", event="checkpoint_failed", position=self.run.position, why=why)
        if not told:
            self.meter.note(f"warning: {why}")
            if self.run.rank and not why.endswith(ELSEWHERE):  # only this rank knows what its disk said
                click.echo(f"warning: rank {self.run.rank}: {why}", err=True)


class Ahead:
    """One batch ahead of the step: what the loader gave, or why it could not."""

    def __init__(self, loader: Loader, end: int):
        self.loader: Iterator[Batch] = loader
        self.end = end
        self.batch: Batch | None = None
        self.error: GristmillError | None = None
        self._next = loader.position

    def fetch(self) -> None:
        """Have the next batch, if the run needs one."""
        if self._next >= self.end:
            return
        try:
            self.batch = next(self.loader)
            self._next = self.loader.position  # pyright: ignore[reportAttributeAccessIssue]
        except GristmillError as error:
            self.error = error

    def take(self) -> Batch:
        batch, self.batch = self.batch, None
        assert batch is not None
        return batch


def _listen() -> tuple[list[int], dict[int, Any]]:
    """Let SIGTERM, SIGUSR1 and Ctrl-C ask the loop to stop: the list holds the signals that came.

    Every one of them asks: a terminal and a launcher both pass on the same Ctrl-C, a scheduler and a launcher the same
    SIGTERM. SIGUSR1 is what Slurm is told to send ahead of the end of a job's time. Only a Ctrl-C that comes seconds
    after the first means that somebody does not want to wait, and ends at once.
    Also returns the handlers that were there before, by signal.
    """
    asked: list[int] = []
    since: list[float] = []

    def ask(number: int, frame: object) -> None:
        asked.append(number)
        since.append(time.monotonic())
        if number == signal.SIGINT and since[-1] - since[0] > IMPATIENT:
            raise KeyboardInterrupt

    return asked, {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
