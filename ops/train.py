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
from dataclasses import dataclass
from pathlib import Path

from ..pipeline.loader import Batch, Loader
from ..shards.addresses import redact
from .about import describe_run
from .ahead import Ahead, DataLossError
from .capture import capture
from .clock import Clock
from .display import Display, Form
from .evaluate.online import OnlineProbes
from .launch import end_anyway, flushing, join, leave, let_the_watchdog_judge
from .lost import Crew
from .monitor.goodput import Goodput
from .monitor.metrics import Metrics
from .monitor.observer import Observer
from .monitor.serving import serve
from .recipe import Recipe
from .report.attempts import Attempts, read_attempts, why_ended
from .report.crops import save_crops
from .run import Run
from .runlog import Notes
from .saving import Saving
from .schedule import cosine
from .trackers import Trackers, check_trackers
from .watchdog import Watchdog
from .wishes import Wishes

__all__ = ["REQUEUE", "DataLossError", "Ending", "Loop", "train"]

REQUEUE = 75  # exit code after SIGTERM or SIGUSR1 with a checkpoint written: start the same command again (EX_TEMPFAIL)


@dataclass
class Ending:
    """How a run ended: `code` 0 when all images were seen, REQUEUE or 130 when it was asked to stop before."""

    code: int
    position: int


def train(recipe: Recipe, folder: Path, *, quiet: bool = False, form: Form = "auto") -> Ending:
    """Train `recipe` in the run folder, or go on where its newest checkpoint stands.

    form: how it is shown, on rank 0 (display.py). quiet: warnings only, whatever the form.
    """
    check_trackers(recipe.log)
    with flushing():
        return _train(recipe, folder, "quiet" if quiet else form)


def _train(recipe: Recipe, folder: Path, form: Form) -> Ending:
    began = time.time()
    rank, world, device = join()
    crew = Crew(rank, world)
    wishes = Wishes()
    display = Display("training", recipe.images // recipe.batch * recipe.batch, recipe.batch, world, form)
    run = exporter = watch = attempts = trackers = loop = None
    unfinished = False
    try:
        if rank == 0:
            display.start()
            wishes.tell(display.note)
        run = Run(recipe, folder, rank, world, device)
        run.log.also.append(display.take)
        metrics = Metrics(recipe.name, run.topology())
        log = run.log
        watch = Watchdog(
            rank, world, deadline=recipe.watchdog, report=lambda text: log.write("event", event="stalled", why=text)
        )
        if recipe.watchdog and world > 1:
            let_the_watchdog_judge()
        earlier = read_attempts(folder)
        unfinished = bool(earlier) and earlier[-1].why != "done"
        exporter = serve(recipe.metrics, metrics.registry, rank=rank, world=world, folder=folder, notes=display.note)
        attempts = Attempts(folder) if rank == 0 else None  # reads the log before what is taken again is dropped
        goodput = Goodput(folder, attempts.before, started=began) if attempts else None
        metrics.observe_state("restoring")
        with watch.patience(3600.0):
            told = run.restore()
        if attempts:
            attempts.begin(run.position)
            describe_run(run, started=began)
        for line in told:
            display.note(line)
        display.begin(run.position, trained=run.cursor.trained)
        with watch.patience(600.0):
            trackers = Trackers(run, display) if rank == 0 else None
        loop = Loop(run, metrics, display, watch, wishes.asked, goodput)
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
        error = sys.exc_info()[1]
        if error is not None and world > 1 and device.type == "cuda":
            end_anyway(error)
        if watch:
            watch.close()
        if loop:
            loop.observer.close(failed=error is not None)
        if trackers:
            trackers.close(failed=error is not None)
        if exporter:
            # One that never began to train was a mistake of whoever started it, who reads about it in the terminal; a
            # restart by a machine has nobody who reads: what an earlier attempt left unfinished keeps its alarm.
            mended = loop is None and not unfinished
            exporter.close(clean=error is None or isinstance(error, KeyboardInterrupt) or mended)
        if run:
            if attempts:
                attempts.end(run.position, redact(why_ended(wishes.asked, error)))
            run.close()
        display.close(_code(run, wishes.asked), run.position if run else 0, error)
        leave()
        wishes.close()  # after the others: a launcher may pass on the same Ctrl-C until the end
    assert run is not None
    return Ending(_code(run, wishes.asked), run.position)


def _code(run: Run | None, asked: list[int]) -> int:
    if run is not None and run.position >= run.end:
        return 0
    return 130 if asked[:1] == [signal.SIGINT] else REQUEUE


class Loop:
    """The steps of a run, from where it stands to its end or to a wish to stop."""

    def __init__(
        self,
        run: Run,
        metrics: Metrics,
        notes: Notes,
        watch: Watchdog,
        asked: list[int],
        goodput: Goodput | None = None,
    ):
        self.run, self.notes, self.watch, self.asked = run, notes, watch, asked
        self.observer = Observer(run, metrics, goodput)
        self.probes = OnlineProbes(run, metrics, notes)
        self.saving = Saving(run, self.observer, watch, notes)
        self.captured = 0
        self.clock = Clock()

    def run_to_end(self) -> None:
        run = self.run
        probed = set(self.probes.due)
        self.probe()
        if run.position == 0:
            self.saving.first(probed)
        loader = run.loader()
        feed = Ahead(loader, run.end)
        try:
            feed.fetch()
            if run.position < run.end:
                feed.agree(run.total([float(feed.error is not None)])[0], run.world)
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
            run.log.tell("crops", position=start)
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
        if stop and not self.asked:
            self.notes.note("another process was asked to stop: stopping, with a checkpoint")
        self.saving.settle(verdict.flags["written"], verdict.flags["failed"])
        every = run.recipe.checkpoint.every
        ends = stop or bool(verdict.flags["fault"]) or run.position >= run.end
        self.saving.due |= start // every < run.position // every
        if ends or (self.saving.due and not verdict.bad):  # no state amid a bad streak: a rollback wants an older one
            self.saving.save(wait=ends)
        self.clock.lap("checkpoint")
        feed.agree(verdict.flags["fault"], run.world)
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
            self.run.log.tell("state", state="refreshing")
            begin = time.perf_counter()
            for name, missing in self.run.refresh().items():
                seconds, position = time.perf_counter() - begin, self.run.position
                about = {"position": position, "objective": name, "missing": missing, "seconds": seconds}
                self.run.log.write("event", event="refreshed", **about)
                left = f" but {missing} that are left out or damaged" if missing else ""
                self.notes.note(f"{name}: all images{left} seen and clustered at image {position}, {seconds:.0f} s")
        self.run.log.tell("state", state="training")

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
        self.notes.note(
            f"step at image {run.position} left out: {', '.join(verdict.bad)} {what}{ranks} (samples {shown or 'unknown'})"
        )
        if self.captured < run.recipe.guard.captures:
            self.captured += 1
            with self.watch.patience(600.0):
                path = capture(run, batch, verdict, fed)
            if path:
                self.notes.note(f"captured; look at it with `gristmill replay {path}`")

    def go_back(self, verdict, batch: Batch) -> None:
        """Return to the last good state and leave out the window."""
        run = self.run
        run.guard.go_back(verdict, run.position - run.recipe.batch, batch.keys)
        with self.watch.patience(600.0):
            self.watch.at("checkpoint")
            if run.writer.busy:  # one that fails must not end a run that has an older one to go back to
                self.saving.finish(must=False)
            position = run.go_back()
        self.observer.rolled_back()
        run.log.write("event", event="rollback", position=run.position, to=position)
        self.notes.note(f"{run.recipe.guard.patience} bad steps in a row: back to the state of image {position}")

    def observe(self, start: int, verdict, rates: dict[str, float], clock: Clock, loader: Loader) -> None:
        run = self.run
        row = {"position": start, "grad_norm": verdict.grad_norm, **rates, **verdict.logs}
        run.log.write("step", **row, bad=bool(verdict.bad), seconds=clock.seconds)
        self.observer.step(verdict, row, clock.seconds, loader)

    def probe(self) -> None:
        if self.run.position not in self.probes.due:
            return
        with self.watch.patience(3600.0), self.observer.doing("probing"):
            self.run.log.tell("state", state="probing")
            self.watch.at("probe")
            self.probes.maybe(self.run.position)
        self.run.log.tell("state", state="training")
