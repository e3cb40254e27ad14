"""What was kept so far, before an ingest begins or goes on: the ledger's images, and those to compare with.

The index of them on disk (known.py) is a cache. It holds up to some unit of some generation; what comes after is taken from
the ledger's rows, and all of it where the index is missing or of another time.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from .candidate import Outcome
from .config import IngestConfig
from .decide import decided_path
from .jobs import Planned
from .known import Known
from .ledger import Generation, generations, rows_of
from .plan import Plan
from .pool import Pool
from .sources import plan
from .spool import bytes_path, finished_units, read_rows
from .unit import work
from .workplace import Workplace

_COLUMNS = ["outcome", "key", "fingerprint"]


def recall(place: Workplace, known: Known, config: IngestConfig, pool: Pool, done: list[Generation]) -> int:
    """Bring `known` up to the last decided unit; how many units are decided. OSError passes through."""
    start = place.generation << 32
    if known.mark >> 32 != place.generation:
        known.clear()
        for generation in done:
            for table in rows_of(place.root, generation.number, _COLUMNS):
                _add_kept(known, table)
        known.commit(start)
    if known.mark == start:
        for number, source in enumerate(config.against):
            _compare_with(_folder(place, number), source, known, config, pool)
        known.commit(start + 1)
    decided = _decided(place.spool)
    for unit in range(known.mark - start - 1, decided):
        _add_kept(known, pq.read_table(decided_path(place.spool, unit), columns=_COLUMNS, use_threads=False))
    return decided


def _decided(spool: Path) -> int:
    count = 0
    while decided_path(spool, count).exists():
        count += 1
    return count


def _add_kept(known: Known, table: pa.Table) -> None:
    for outcome, key, fingerprint in zip(*(table[name].to_pylist() for name in _COLUMNS), strict=True):
        if outcome == Outcome.KEPT:
            known.add(bytes.fromhex(key), fingerprint if known.near is not None else None)


def plan_comparison(place: Workplace, config: IngestConfig) -> None:
    """Find the sources to compare with, so that one that is not there is told before any work. GristmillError."""
    for number, source in enumerate(config.against):
        if not _ledgers(source):
            _planned(_folder(place, number), source, config)


def _folder(place: Workplace, number: int) -> Path:
    return place.folder / "against" / str(number)


def _ledgers(source: str) -> tuple[Path, list[Generation]] | None:
    """The ledger of a data set of ours, given as a whole or as one of its halves."""
    root = Path(source)
    for candidate in (root, root.parent) if root.is_dir() else ():
        if found := generations(candidate):
            return candidate, found
    return None


def _planned(folder: Path, source: str, config: IngestConfig) -> Plan:
    columns = {"image": config.image_column, "url": config.url_column}
    return plan([source], folder / "inputs", unit=config.unit, keep=(), **columns)


def _compare_with(folder: Path, source: str, known: Known, config: IngestConfig, pool: Pool) -> None:
    """Take up the images of a source, from its ledger if it is a data set of ours, else by reading them all."""
    if ours := _ledgers(source):
        for generation in ours[1]:
            for table in rows_of(ours[0], generation.number, _COLUMNS):
                _add_kept(known, table)
        return
    spool = folder / "spool"
    spool.mkdir(parents=True, exist_ok=True)
    jobs = Planned(_planned(folder, source, config), folder / "inputs", spool, 0, store=False)
    for unit in _all_done(jobs, spool, config, pool):
        for row in read_rows(spool, unit):
            if row.outcome is Outcome.KEPT:
                known.add(row.digest, row.fingerprint or None if known.near is not None else None)


def _all_done(jobs: Planned, spool: Path, config: IngestConfig, pool: Pool) -> Iterator[int]:
    """Do the units, and give them back in order."""
    plain = config.model_copy(update={"filter": None})  # what looks the same was seen, whatever the user thinks of it
    ready = finished_units(spool)
    waiting = {}
    following = 0
    for unit in range(len(jobs)):
        while True:
            while following < len(jobs) and len(waiting) < 2 * pool.workers and following < unit + 4 * pool.workers:
                if following not in ready:
                    waiting[pool.submit(work, jobs[following], plain)] = following
                following += 1
            if unit in ready:
                break
            for handle in pool.wait(waiting):
                number = waiting.pop(handle)
                pool.result(handle)
                ready.add(number)
        bytes_path(spool, unit).unlink(missing_ok=True)
        yield unit
