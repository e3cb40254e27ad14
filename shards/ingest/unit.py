"""What one worker does with one unit: read, fetch, check, filter, fingerprint, spool. Any process, any machine.

What comes out depends on the unit, the settings and the servers' answers alone. Only the window of the fetcher, a batch
for the filter and a row for each input lie in memory.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..storage import published
from .candidate import Candidate, Outcome, Row, Unit
from .config import IngestConfig
from .fingerprint import fingerprint
from .hook import BATCH, Offered, ask
from .refine import Refined, Refused, refine
from .sources import read_unit
from .spool import bytes_path, write_rows

if TYPE_CHECKING:
    from .fetch import Fetcher

_FILTER_BYTES = 64 << 20


@dataclass(frozen=True)
class Job:
    """One unit, where its inputs are frozen, where its results go, and how its inputs are numbered."""

    unit: Unit
    inputs: str  # folder of the frozen inputs
    spool: str
    base: int = 0  # added to the numbers of the plan
    only: tuple[int, ...] | None = None  # numbers of the plan to take up again; None: all
    store: bool = True  # False: for comparison alone
    hosts: str | None = None  # folder of the slots that the workers of a node share

    @property
    def count(self) -> int:
        """Inputs that are done."""
        return self.unit.count if self.only is None else len(self.only)


@dataclass
class UnitDone:
    """What a worker reports; the rest lies in the spool."""

    unit: int
    inputs: int
    outcomes: dict[str, int] = field(default_factory=dict)
    received: int = 0
    stored: int = 0
    fetched: dict[str, Any] = field(default_factory=dict)  # a snapshot of FetchStats, of a unit of urls


def work(job: Job, config: IngestConfig) -> UnitDone:
    """Do one unit. Raises IngestError for what is wrong with the whole ingest, OSError when the spool cannot be written."""
    rows: list[Row] = []
    seen: dict[bytes, Row] = {}
    spool = Path(job.spool)
    fetcher = _fetcher(job, config) if job.unit.kind == "urls" else None
    try:
        with published(bytes_path(spool, job.unit.number)) as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's remarks on single files; what matters is in the rows
            candidates = _wanted(read_unit(job.unit, Path(job.inputs)), job.only)
            for row, refined in _filtered(_refined(candidates, fetcher, config, seen), config):
                row.number += job.base
                if refined is not None and row.outcome is Outcome.KEPT:
                    row.offset = file.tell()
                    if job.store:
                        file.write(refined.data)
                rows.append(row)
    finally:
        if fetcher is not None:
            fetcher.close()
    for row in rows:  # equal bytes within the unit were looked at once
        if row.outcome is Outcome.DUPLICATE:
            first = seen[row.digest]
            row.__dict__.update(
                replace(first, number=row.number, locator=row.locator, meta=row.meta, labels=row.labels).__dict__
            )
    write_rows(spool, job.unit.number, rows)
    done = UnitDone(job.unit.number, len(rows), fetched=_told(fetcher))
    for row in rows:
        done.outcomes[row.outcome] = done.outcomes.get(row.outcome, 0) + 1
        done.received += row.received
        done.stored += row.length
    return done


def _fetcher(job: Job, config: IngestConfig) -> Fetcher:
    from .fetch import Fetcher  # which brings aiohttp along

    return Fetcher(config.fetch, Path(job.hosts) if job.hosts else None)


def _told(fetcher: Fetcher | None) -> dict[str, Any]:
    return {} if fetcher is None else fetcher.stats.snapshot()


def _wanted(candidates: Iterable[Candidate], only: tuple[int, ...] | None) -> Iterator[Candidate]:
    if only is None:
        yield from candidates
        return
    wanted = set(only)
    for candidate in candidates:
        if candidate.number in wanted:
            yield candidate


def _refined(
    candidates: Iterator[Candidate], fetcher: Fetcher | None, config: IngestConfig, seen: dict[bytes, Row]
) -> Iterator[tuple[Row, Refined | None]]:
    """Every candidate as a row, with its image if there is a sound one. `DUPLICATE` stands for bytes seen in this unit."""
    for candidate in candidates if fetcher is None else fetcher.fetch(candidates):
        row = Row(candidate.number, candidate.locator, Outcome.KEPT, meta=candidate.meta, labels=candidate.labels)
        if candidate.problem is not None:
            row.outcome, row.detail = candidate.problem
            yield row, None
            continue
        data = candidate.data or b""
        candidate.data = None
        row.received = len(data)
        row.digest = hashlib.blake2b(data, digest_size=16).digest()
        if row.digest in seen:
            row.outcome = Outcome.DUPLICATE
            yield row, None
            continue
        seen[row.digest] = row
        try:
            refined = refine(data, config.refine)
        except Refused as refused:
            row.outcome, row.detail = refused.outcome, refused.detail
            yield row, None
            continue
        # Always: a later ingest into this data set may look for near duplicates.
        row.fingerprint = fingerprint(refined.grey)
        row.length, row.format, row.crc32 = len(refined.data), refined.format, refined.crc32
        row.width, row.height, row.changed = refined.width, refined.height, refined.changed or ""
        row.colours = refined.colours
        yield row, refined


def _filtered(
    found: Iterator[tuple[Row, Refined | None]], config: IngestConfig
) -> Iterator[tuple[Row, Refined | None]]:
    """The same, after the user's filter had its say, in batches."""
    if config.filter is None:
        yield from found
        return
    waiting: list[tuple[Row, Refined | None]] = []
    images = size = 0
    for row, refined in found:
        waiting.append((row, refined))
        if refined is not None:
            images, size = images + 1, size + len(refined.data)
        if images == BATCH or size > _FILTER_BYTES or len(waiting) > 16 * BATCH:
            yield from _asked(config.filter, waiting)
            waiting, images, size = [], 0, 0
    yield from _asked(config.filter, waiting)


def _asked(name: str, waiting: list[tuple[Row, Refined | None]]) -> list[tuple[Row, Refined | None]]:
    offered = [
        (row, Offered(image.data, image.format, image.width, image.height, row.locator, row.meta))
        for row, image in waiting
        if image is not None
    ]
    if offered:
        for (row, _), verdict in zip(offered, ask(name, [offer for _, offer in offered]), strict=True):
            if isinstance(verdict, dict):
                row.meta = {**row.meta, **verdict}
            elif verdict is False or isinstance(verdict, str):
                row.outcome, row.detail, row.length = Outcome.FILTERED, verdict or "", 0
    return waiting
