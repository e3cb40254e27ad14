"""In the order of the inputs: what is new is kept and given its shard, what came before is not.

One process decides, on digests and fingerprints alone, so that the outcome does not depend on who did which unit when.
What was decided about a unit is written down as its rows of the ledger, with the state of the open shards before it in
the file's metadata: whoever goes on after a kill walks from the oldest unit whose images are still needed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from ..storage import published
from .candidate import Outcome, Row
from .config import IngestConfig
from .known import Known
from .ledger import FIELDS
from .spool import json_of

TRAIN, PROBE = "train", "probe"
_BLOCK = 512


@dataclass
class Split:
    """The open shard of one half of the data: its number, and what it holds so far."""

    number: int = 0
    samples: int = 0
    bytes: int = 0
    members: list[tuple[int, int]] = field(default_factory=list)  # (unit, row of it)


@dataclass(frozen=True)
class Shard:
    """A shard that is decided: which rows of which units it holds, in order."""

    split: str
    number: int
    members: tuple[tuple[int, int], ...]

    @property
    def name(self) -> str:
        return f"{self.split}/{self.number:06d}.tar"


def decided_path(folder: Path, unit: int) -> Path:
    """The rows of the ledger of one unit."""
    return folder / f"{unit:08d}.ledger"


class Decider:
    """Decides units in order. `full` is called with each shard that is complete."""

    def __init__(
        self, config: IngestConfig, known: Known, folder: Path, first: dict[str, int], full: Callable[[Shard], None]
    ) -> None:
        self.config, self.known, self.folder, self.full = config, known, folder, full
        self.splits = {split: Split(number) for split, number in first.items()}
        self._bound = int(config.holdout * 2**64)

    def decide(self, unit: int, rows: list[Row]) -> None:
        """Decide one unit and write its rows down. OSError passes through."""
        before = {name: [split.number, split.samples, split.bytes] for name, split in self.splits.items()}
        offered = [i for i, row in enumerate(rows) if row.outcome is Outcome.KEPT]
        found = self.known.sift(
            [rows[i].digest for i in offered],
            [rows[i].fingerprint or None if self.config.near is not None else None for i in offered],
        )
        same: dict[int, tuple[bytes, int]] = {}
        for i, decision in zip(offered, found, strict=True):
            if decision is not None:
                rows[i].outcome = decision.outcome
                same[i] = (decision.digest, decision.distance)
        shards = [self._place(unit, i, row) if row.outcome is Outcome.KEPT else None for i, row in enumerate(rows)]
        self._write(unit, rows, same, shards, before)

    def again(self, unit: int, needed: Callable[[str], bool]) -> None:
        """Take up a unit that was decided before: fill the open shards with its rows. `needed`: shards not written yet."""
        file = pq.read_table(decided_path(self.folder, unit), use_threads=False)
        state = json.loads((file.schema.metadata or {})[b"before"])
        for name, split in self.splits.items():
            if [split.number, split.samples, split.bytes] != state[name]:
                split.number, split.samples, split.bytes = state[name]
        found = zip(*(file[name].to_pylist() for name in ("shard", "bytes", "meta")), strict=True)
        for i, (shard, size, meta) in enumerate(found):
            if shard is not None:
                name = shard.partition("/")[0]
                self._add(self.splits[name], name, unit, i, size, meta, keep=needed(shard))

    def finish(self) -> None:
        """Close the open shards."""
        for name, split in self.splits.items():
            if split.samples:
                self._close(name, split)

    def _place(self, unit: int, i: int, row: Row) -> str:
        name = PROBE if self._bound and _fraction(self.config.seed, row.digest) < self._bound else TRAIN
        shard = f"{name}/{self.splits[name].number:06d}.tar"
        self._add(self.splits[name], name, unit, i, row.length, json_of(row.meta), keep=True)
        return shard

    def _add(self, split: Split, name: str, unit: int, i: int, size: int, meta: str | None, *, keep: bool) -> None:
        split.samples += 1
        split.bytes += _BLOCK + -(-size // _BLOCK) * _BLOCK
        if meta:
            split.bytes += _BLOCK + -(-len(meta.encode()) // _BLOCK) * _BLOCK
        if keep:
            split.members.append((unit, i))
        if split.samples >= self.config.shard_samples or split.bytes >= self.config.shard_bytes:
            self._close(name, split)

    def _close(self, name: str, split: Split) -> None:
        if split.members:
            self.full(Shard(name, split.number, tuple(split.members)))
        split.number, split.samples, split.bytes, split.members = split.number + 1, 0, 0, []

    def _write(
        self, unit: int, rows: list[Row], same: dict[int, tuple[bytes, int]], shards: list[str | None], before: dict
    ) -> None:
        columns = [
            [row.number for row in rows],
            [row.locator for row in rows],
            [str(row.outcome) for row in rows],
            [row.detail or None for row in rows],
            [row.digest.hex() or None for row in rows],
            [same[i][0].hex() if i in same else None for i in range(len(rows))],
            [same[i][1] if i in same else None for i in range(len(rows))],
            shards,
            [row.format or None for row in rows],
            [row.width or None for row in rows],
            [row.height or None for row in rows],
            [row.length or None for row in rows],
            [row.received for row in rows],
            [row.changed or None for row in rows],
            [row.colours or None for row in rows],
            [row.fingerprint or None for row in rows],
            [list(row.labels) or None for row in rows],
            [json_of(row.meta) or None for row in rows],
        ]
        arrays = [pa.array(column, f.type) for column, f in zip(columns, FIELDS, strict=True)]
        schema = FIELDS.with_metadata({"before": json.dumps(before)})
        with published(decided_path(self.folder, unit)) as file:
            pq.write_table(pa.Table.from_arrays(arrays, schema=schema), file, compression="zstd")


def _fraction(seed: int, digest: bytes) -> int:
    """A number below 2**64 out of the sample's content and the seed: what decides on the holdout."""
    key = seed.to_bytes(16, "little", signed=True)
    return int.from_bytes(hashlib.blake2b(digest, digest_size=8, key=key).digest(), "little")
