"""The end of an ingest: ledger, labels and manifests, in an order in which a kill leaves what can be done again.

Before an old manifest is touched, links to its files are set aside: whoever goes on takes the old rows from there.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow.parquet as pq

from ..frequent import Frequent
from ..labels import LABELS, write_some
from ..manifest import DATASET, SAMPLES, SHARDS, Manifest
from ..storage import PARTIAL, published, sync_folder
from ..writer import ManifestWriter
from .candidate import Outcome
from .config import IngestConfig
from .decide import PROBE, TRAIN, decided_path
from .destination import Destination, send
from .errors import IngestError
from .jobs import Jobs
from .ledger import LEDGER, Generation, close_generation, consolidate, rows_of
from .report import IngestReport, IngestStats
from .tarring import read_shard_rows, shard_rows_path
from .workplace import Workplace


@dataclass
class _Counts:
    """Inputs of one ingest by outcome; of those kept, by what was changed and by colours; of the others, by reason."""

    outcomes: Counter[str] = field(default_factory=Counter)
    changed: Counter[str] = field(default_factory=Counter)
    colours: Counter[str] = field(default_factory=Counter)
    details: Frequent = field(default_factory=lambda: Frequent(10_000))


def first_shards(place: Workplace) -> dict[str, int | None]:
    """The number of this generation's first shard in each half: one more than those of the published data set.

    None where there was no data set. Written down when first asked for, before anything of this generation is published.
    """
    if not place.first.exists():
        found = {split: _shards_in(place.root / split) for split in (TRAIN, PROBE)}
        with published(place.first) as file:
            file.write(json.dumps(found).encode())
    return json.loads(place.first.read_text(encoding="utf-8"))


def _shards_in(folder: Path) -> int | None:
    if not (folder / DATASET).exists():
        return None
    return 1 + max((int(Path(url).stem) for url in Manifest.open(folder).urls if Path(url).stem.isdigit()), default=-1)


def publish(
    place: Workplace,
    kind: str,
    jobs: Jobs,
    config: IngestConfig,
    done: list[Generation],
    stats: IngestStats,
    units: int,
    remote: str | None,
) -> IngestReport:
    """Publish what was written. Raises IngestError when nothing was kept at all, OSError as the file system gives it."""
    consolidate(place.root, place.generation, (decided_path(place.spool, unit) for unit in range(units)))
    counts = _counted(place)
    for split in (TRAIN, PROBE):
        _publish_split(place, split)
    if not done and not _new_shards(place, TRAIN):
        why = (
            "the holdout took all of them"
            if counts.outcomes.get(Outcome.KEPT)
            else ", ".join(f"{n} {why}" for why, n in counts.details.counts.most_common(3))
        )
        shutil.rmtree(place.root / "ledger", ignore_errors=True)
        raise IngestError(
            f"none of the {jobs.inputs} inputs goes to {TRAIN} ({why}): bring other images or change the settings, with --restart"
        )
    _write_labels(place.root, place.generation + 1)
    report = _report(place, kind, stats, counts)
    about = {
        "base": jobs.base,
        "changed": report.changed,
        "colours": report.colours,
        "inputs": report.inputs,
        "kind": kind,
        "outcomes": report.outcomes,
        "request": {name: value for name, value in place.asked().items() if name != "kind"},
    }
    if remote is not None:
        _send(place, remote)
    close_generation(place.root, place.generation, about, Destination(remote) if remote is not None else None)
    return report


def reported(place: Workplace, kind: str, stats: IngestStats) -> IngestReport:
    """What `publish` said of a generation that is complete and was not cleared away."""
    stats.inputs = stats.earlier = sum(rows.num_rows for rows in rows_of(place.root, place.generation, ["input"]))
    return _report(place, kind, stats, _counted(place))


def _report(place: Workplace, kind: str, stats: IngestStats, counts: _Counts) -> IngestReport:
    new = {split: _new_shards(place, split) for split in (TRAIN, PROBE)}
    rows = {name: pq.read_metadata(shard_rows_path(place.rows, name)) for names in new.values() for name in names}
    roots = [place.root / split for split in new]
    return IngestReport(
        kind=kind,
        inputs=counts.outcomes.total(),
        outcomes=dict(sorted(counts.outcomes.items())),
        changed=dict(sorted(counts.changed.items())),
        colours=dict(sorted(counts.colours.items())),
        details=dict(counts.details.counts.most_common(10)),
        train=sum(rows[name].num_rows for name in new[TRAIN]),
        probe=sum(rows[name].num_rows for name in new[PROBE]),
        shards=len(rows),
        bytes=sum(int(found.metadata[b"size"]) for found in rows.values()),
        samples=sum(Manifest.open(root).samples for root in roots if (root / DATASET).exists()),
        seconds=time.monotonic() - stats.began,
        earlier=stats.earlier,
        hosts=dict(stats.hosts.counts.most_common(10)),
    )


def _counted(place: Workplace) -> _Counts:
    found = _Counts()
    for table in rows_of(place.root, place.generation, ["outcome", "detail", "changed", "colours"]):
        rows = list(zip(*(table[name].to_pylist() for name in table.column_names), strict=True))
        kept = [row for row in rows if row[0] == Outcome.KEPT]
        found.outcomes.update(outcome for outcome, *_ in rows)
        found.changed.update(reason for *_, reason, _ in kept if reason)
        found.colours.update(kind for *_, kind in kept if kind)
        left = [row for row in rows if row[0] != Outcome.KEPT]
        found.details.update(f"{outcome}: {detail}" if detail else outcome for outcome, detail, *_ in left)
    return found


def _new_shards(place: Workplace, split: str) -> list[str]:
    first, names = first_shards(place)[split] or 0, []
    while shard_rows_path(place.rows, name := f"{split}/{first + len(names):06d}.tar").exists():
        names.append(name)
    return names


def _publish_split(place: Workplace, split: str) -> None:
    root, before, first = place.root / split, place.before / split, first_shards(place)[split]
    names = _new_shards(place, split)
    if not names:
        return
    if first is not None and not (before / DATASET).exists():
        _set_aside(root, before)
    with ManifestWriter(root) as writer:
        if first is not None:
            _add_old(writer, before)
        for name in names:
            length, rows = read_shard_rows(place.rows, name)
            writer.add(Path(name).name, length, rows)
        writer.publish()


def _add_old(writer: ManifestWriter, before: Path) -> None:
    old = Manifest.open(before)
    for shard, url in enumerate(old.urls):
        writer.add(url, int(old.shard_bytes[shard]), old.rows(shard), old.identities[shard])


def take_back(place: Workplace, remote: str | None) -> None:
    """Undo an unfinished generation: manifests are what they were before it, then its shards and its work go.

    May be killed, and done again. OSError passes through; IngestError where the storage does not answer.
    """
    destination = Destination(remote) if remote is not None else None
    firsts = first_shards(place)
    for split, first in firsts.items():
        root, before = place.root / split, place.before / split
        if first is None:
            (root / DATASET).unlink(missing_ok=True)
            (root / SHARDS).unlink(missing_ok=True)
            for folder in (SAMPLES, SAMPLES + PARTIAL):
                shutil.rmtree(root / folder, ignore_errors=True)
        elif (before / DATASET).exists():
            with ManifestWriter(root) as writer:
                _add_old(writer, before)
                writer.publish()
            if destination is not None:
                send(destination, place.root, _manifest_files(root))
        for path in root.glob("*.tar*"):
            if path.name.partition(".")[0].isdigit() and int(path.name.partition(".")[0]) >= (first or 0):
                path.unlink()
        if first is None and root.exists():
            root.rmdir()
    if destination is not None:
        for split, first in firsts.items():
            destination.remove_from(split, first or 0, manifest=first is None)
    if place.generation:
        _write_labels(place.root, place.generation)
    else:
        (place.root / LABELS).unlink(missing_ok=True)
    place.throw_away()


def _set_aside(root: Path, before: Path) -> None:
    """Link the manifest's files, `dataset.json` last."""
    shutil.rmtree(before, ignore_errors=True)
    (before / SAMPLES).mkdir(parents=True)
    for path in _manifest_files(root):
        os.link(path, before / path.relative_to(root))
    sync_folder(before)


def _write_labels(root: Path, count: int) -> None:
    """`labels.parquet`: what the folders of the sources of so many generations say, as labels.py reads it."""

    def kept() -> Iterator[tuple[list[str], list[list[str]]]]:
        for number in range(count):
            for table in rows_of(root, number, ["outcome", "key", "labels"]):
                rows = [
                    (k, lab or [])
                    for o, k, lab in zip(*(table[n].to_pylist() for n in ("outcome", "key", "labels")), strict=True)
                    if o == Outcome.KEPT
                ]
                yield [key for key, _ in rows], [folders for _, folders in rows]

    write_some(root, kept)


def _manifest_files(root: Path) -> list[Path]:
    return [*sorted((root / SAMPLES).iterdir()), root / SHARDS, root / DATASET]


def _send(place: Workplace, remote: str) -> None:
    """Send what was published in the work folder, what makes it a data set last."""
    root = place.root
    paths = [*sorted((root / LEDGER / f"{place.generation:03d}").iterdir()), root / LABELS]
    for split in (TRAIN, PROBE):
        if (root / split / DATASET).exists():
            paths += _manifest_files(root / split)
    send(Destination(remote), root, paths)
