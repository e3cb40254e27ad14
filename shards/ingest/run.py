"""`ingest`: from sources to a published data set. It may be killed at any moment, and goes on when it is called again.

Workers do units in any order, a bounded number ahead; this process decides them in their order, and has workers write
each shard as soon as its last sample is decided. A unit's images are removed when all shards that hold them are written,
so that the disk holds little more than the output. The ledger, the manifest and the word that all is complete come last.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from .. import rewrite
from ..addresses import redact
from ..errors import GristmillError
from ..storage import NO_SPACE, claimed
from .candidate import Outcome
from .config import IngestConfig
from .decide import PROBE, TRAIN, Decider, Shard
from .destination import Destination, is_remote
from .errors import IngestError
from .hook import find_filter
from .jobs import Jobs, Planned, Retried
from .known import Known
from .ledger import LEDGER, Generation, generations
from .pool import Pool, make_pool, wait_for_earlier
from .publish import first_shards, publish, reported, take_back
from .recall import plan_comparison, recall
from .report import IngestReport, IngestStats
from .sources import plan
from .spool import bytes_path, finished_units, read_rows, rows_path, spooled_units
from .tarring import shard_rows_path, write_shard
from .unit import work
from .workplace import WORK, Workplace, workplace


def ingest(
    sources: Sequence[str | Path],
    out: str | Path,
    config: IngestConfig | None = None,
    *,
    append: bool = False,
    retry_failed: bool = False,
    restart: bool = False,
    engine: str = "local",
    workers: int | None = None,
    work: str | Path | None = None,
    progress: Callable[[IngestStats], None] | None = None,
) -> IngestReport:
    """Bring `sources` into the data set `out/train` (and `out/probe`), with the ledger `out/ledger`.

    `out` is a folder, or s3:// or gs://; then `work` is a local folder, which mirrors it but for the tars.

    Called again after it was stopped, it goes on. `append` adds to a published data set, `retry_failed` takes up what
    failed for reasons that may have passed. Raises IngestError, with what to do.
    """
    config, names = config or IngestConfig(), [str(source) for source in sources]
    remote = str(out) if is_remote(str(out)) else None
    if remote is not None and work is None:
        raise IngestError(f"{redact(remote)} is not on this machine: name a local folder for the work with --work")
    root = Path(work if remote is not None and work is not None else out)
    kind = "retry" if retry_failed else "append" if append else "new"
    taken = IngestError(f"another ingest is writing to {root}: wait for it, or name another folder")
    try:
        with claimed(root, taken):
            if remote is not None:
                Destination(remote).check()
            if remote is not None and not (root / LEDGER).exists() and not (root / WORK).exists():
                Destination(remote).get_all(root)
            place = workplace(root)
            done = generations(root)
            if place.base.exists():
                place.make()
                wait_for_earlier(place.lock)
            if done:
                last = Workplace(root, done[-1].number)
                report = reported(last, kind, IngestStats()) if last.finished(kind, names, config) else None
                last.clear()
                if report is not None:
                    return report
            if restart and place.begun:
                take_back(place, remote)
            _possible(place, kind, names, config, done)
            place.make()
            place.begin(kind, names, config)
            return _Run(place, kind, names, config, done, remote, engine, workers, progress).run()
    except OSError as error:
        raise _explained(error, root) from error


def _possible(place: Workplace, kind: str, sources: list[str], config: IngestConfig, done: list[Generation]) -> None:
    root = place.root
    if config.filter is not None:
        find_filter(config.filter)
    if kind == "retry" and sources:
        raise IngestError("--retry-failed takes no sources: it takes up inputs that the data set's ledger names")
    if kind != "retry" and not sources:
        raise IngestError("name at least one source: a folder, a tar, a Parquet file or a list of urls")
    for split in (TRAIN, PROBE):
        if rewrite.pending(root / split) is not None:
            raise IngestError(
                f"{root / split} is being rewritten without removed samples, and that was interrupted: finish it first, by "
                f"`gristmill remove {root} --rewrite --reason ...`"
            )
    if place.begun:
        return
    if kind == "new" and done:
        raise IngestError(f"{root} holds a data set already: add to it with --append, or name another folder")
    if kind != "new" and not done:
        raise IngestError(
            f"{root} holds no data set that `gristmill ingest` made: begin without --append and --retry-failed"
        )
    strangers = sorted(path.name for path in root.iterdir() if path.name in (TRAIN, PROBE)) if not done else []
    if strangers:
        raise IngestError(f"{root / strangers[0]} is there already: name another folder, or remove it first")


def _explained(error: OSError, root: Path) -> IngestError:
    if error.errno in NO_SPACE:
        return IngestError(
            f"no space in {root} ({error.strerror}): make room and start the same command again, it goes on where it was"
        )
    where = error.filename or root
    return IngestError(
        f"{where} cannot be written or read ({error.strerror or error}): mend that and start the same command again"
    )


class _Run:
    """One start of one generation."""

    def __init__(
        self, place: Workplace, kind: str, sources: list[str], config: IngestConfig, done: list[Generation],
        remote: str | None, engine: str, workers: int | None, progress: Callable[[IngestStats], None] | None,
    ) -> None:  # fmt: skip
        self.place, self.kind, self.config, self.done = place, kind, config, done
        self.sources, self.remote, self.engine, self.workers = sources, remote, engine, workers
        self.stats = IngestStats()
        self._progress = progress or (lambda stats: None)
        self._shards: list[Shard] = []  # decided, and not yet given to a worker
        self._holding: dict[int, set[str]] = {}  # unit -> shards with its images that are not written yet
        self._undeleted = 0  # units below have no images any more

    def run(self) -> IngestReport:
        place = self.place
        try:
            jobs = self._jobs()
        except GristmillError:
            if not place.planned:  # nothing was begun that another command could spoil
                place.throw_away()
                if not self.done:
                    shutil.rmtree(place.base)
            raise
        self.stats.inputs = jobs.inputs
        self._progress(self.stats)
        workers = self.workers or (None if self.engine == "ray" else _fitting(jobs))
        pool = make_pool(self.engine, workers and min(workers, len(jobs)), place.lock)
        try:
            with Known(place.known_of(self.config.near), self.config.near) as known:
                decided = recall(place, known, self.config, pool, self.done)
                halves = (TRAIN, PROBE) if self.config.holdout > 0 else (TRAIN,)
                first = {split: number or 0 for split, number in first_shards(place).items() if split in halves}
                decider = Decider(self.config, known, place.spool, first, self._full)
                self._go_on(decider, decided)
                self._work(jobs, pool, decider, known, decided)
                report = publish(place, self.kind, jobs, self.config, self.done, self.stats, len(jobs), self.remote)
                if self.config.against:  # they count for this ingest alone
                    known.destroy()
                else:
                    known.commit((place.generation + 1) << 32)
                place.clear()
                return report
        finally:
            pool.close()

    def _jobs(self) -> Jobs:
        place = self.place
        plan_comparison(place, self.config)
        if self.kind == "retry":
            return Retried(place, place.hosts)
        base = sum(generation.inputs for generation in self.done if generation.about["kind"] != "retry")
        columns = {"keep": self.config.keep, "image": self.config.image_column, "url": self.config.url_column}
        found = plan(self.sources, place.inputs, unit=self.config.unit, **columns)
        return Planned(found, place.inputs, place.spool, base, hosts=place.hosts)

    def _full(self, shard: Shard) -> None:
        if not shard_rows_path(self.place.rows, shard.name).exists():
            self._shards.append(shard)
            for unit in {unit for unit, _ in shard.members}:
                self._holding.setdefault(unit, set()).add(shard.name)

    def _go_on(self, decider: Decider, decided: int) -> None:
        """Walk the decided units whose images are still there, so that the open shards are as they were."""
        spooled = spooled_units(self.place.spool)
        self._undeleted = min([*spooled, decided])

        def needed(shard: str) -> bool:
            return not shard_rows_path(self.place.rows, shard).exists()

        for unit in range(self._undeleted, decided):
            decider.again(unit, needed)

    def _work(self, jobs: Jobs, pool: Pool, decider: Decider, known: Known, decided: int) -> None:
        ready = finished_units(self.place.spool)
        self._count_earlier(jobs, ready, decided)
        ahead = 4 * pool.workers + 4
        waiting: dict[Any, tuple[str, Any]] = {}
        following = decided
        finished = False
        while True:
            while self._shards:
                shard = self._shards.pop(0)
                call = (write_shard, shard, self.place.spool, self.place.rows, self.place.root, self.remote)
                waiting[pool.submit(*call)] = ("shard", shard)
            while following < min(len(jobs), decided + ahead) and len(waiting) < 2 * pool.workers + 1:
                if following not in ready:
                    waiting[pool.submit(work, jobs[following], self.config)] = ("unit", following)
                following += 1
            while decided in ready and not self._shards:
                rows = read_rows(self.place.spool, decided)
                decider.decide(decided, rows)
                self.stats.decided += len(rows)
                self.stats.outcomes.update(str(row.outcome) for row in rows)
                self.stats.stored += sum(row.length for row in rows if row.outcome is Outcome.KEPT)
                ready.discard(decided)
                decided += 1
                if decided % 64 == 0:
                    known.commit((self.place.generation << 32) + decided + 1)
                self._progress(self.stats)
            if decided == len(jobs) and not finished:
                finished = True
                decider.finish()
            self.stats.units_in_flight = sum(kind == "unit" for kind, _ in waiting.values())
            if self._shards:
                continue
            if not waiting:
                if finished:
                    break
                continue  # all of the window was done before: move it on
            for handle in pool.wait(waiting):
                kind, what = waiting.pop(handle)
                result = pool.result(handle)
                if kind == "unit":
                    ready.add(what)
                    self.stats.take(result)
                else:
                    self.stats.shards += 1
                    self._written(what, decided, decider)
                self._progress(self.stats)
        self._written(None, decided, decider)

    def _count_earlier(self, jobs: Jobs, ready: Iterable[int], decided: int) -> None:
        self.stats.decided = sum(jobs[unit].count for unit in range(decided))
        self.stats.done = self.stats.decided + sum(jobs[unit].count for unit in ready if unit >= decided)
        self.stats.earlier = self.stats.done

    def _written(self, shard: Shard | None, decided: int, decider: Decider) -> None:
        """Remove images that no shard needs any more, in the order of the units."""
        if shard is not None:
            for unit in {unit for unit, _ in shard.members}:
                self._holding[unit].discard(shard.name)
        open_units = {unit for split in decider.splits.values() for unit, _ in split.members[:1]}
        stop = min([decided, *open_units])
        while self._undeleted < stop and not self._holding.get(self._undeleted):
            self._holding.pop(self._undeleted, None)
            bytes_path(self.place.spool, self._undeleted).unlink(missing_ok=True)
            rows_path(self.place.spool, self._undeleted).unlink(missing_ok=True)
            self._undeleted += 1


def _fitting(jobs: Jobs) -> int:
    """Processes for these units. The last of a unit's urls keep their process waiting, so that two share a core."""
    return len(os.sched_getaffinity(0)) * (2 if jobs[0].unit.kind == "urls" else 1)
