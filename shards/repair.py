"""A new data set out of what is sound in a damaged one, which is only read.

Sound shards are copied byte by byte; of the others, each sound sample goes into a new tar of the same name, by webdataset's
writer with fixed times and owners. Samples that were removed are left out. Everything that is lost is listed. A shard is
written whole or not at all, with its rows beside in `.repair`, so that a killed repair goes on with the next shard.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from .addresses import redact
from .archive import ShardError
from .blob import Blob
from .deep import deepen
from .errors import GristmillError
from .foreign import close_blob, open_place
from .index import index_shard
from .labels import LABELS
from .manifest import SAMPLE_FIELDS, Manifest, Rows, rows_of_table
from .parallel import cores, in_order
from .retry import StorageError
from .rewrite import REMOVED, removed
from .salvage import Lost, Saved, salvage
from .storage import Draft, claimed, published
from .tombstones import Tombstones
from .verify import Finding
from .writer import ManifestWriter, table_of

REPORT, LOST = "repair.json", "lost.tsv"
_WORK = ".repair"
_PIECE = 8 << 20


class RepairError(GristmillError):
    """A repair that cannot be made as asked for."""


@dataclass
class _Shard:
    """What became of one shard."""

    url: str
    out: str  # what it is called in the new data set
    size: int = 0
    copied: bool = False
    removed: int = 0  # left out on request
    problem: str | None = None  # with the shard as such
    lost: list[tuple[str, str]] = field(default_factory=list)  # key, or key.suffix of a file beside; problem
    changed: list[tuple[str, str]] = field(default_factory=list)  # key, why the image was encoded anew


@dataclass
class RepairReport:
    """What a repair found and wrote. `samples` of the new data set; `lost` of the old one."""

    out: str
    digest: str = ""
    shards: int = 0
    copied: int = 0
    samples: int = 0
    before: int = 0  # samples by the old manifest
    lost: int = 0
    removed: int = 0
    changed: int = 0
    dropped: list[str] = field(default_factory=list)  # shards of which nothing is left
    findings: list[Finding] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """For JSON, without the findings."""
        return {name: value for name, value in asdict(self).items() if name != "findings"}


def repair(
    root: str | Path,
    out: str | Path,
    *,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    last: bool = True,
) -> RepairReport:
    """Write what is sound of the data set `root` into the folder `out`, or go on with that.

    `progress(done, total)` counts shards. Unless it is the `last` of several, call `release` for all of them at the end: till
    then the same call comes to the same end. Raises ManifestError, RepairError; OSError passes through.
    """
    manifest, out = Manifest.open(root), Path(out)
    if out.resolve() == manifest.root.resolve() or manifest.root.resolve() in out.resolve().parents:
        raise RepairError(f"{out} is the data set itself, or lies in it: name a folder elsewhere")
    with claimed(out, RepairError(f"{out} is being written by another repair: wait for it")):
        work = _begin(manifest, out)
        stones = Tombstones.of(manifest)
        gone = {key for _, key, _ in stones}
        names = _names(manifest)

        def mend(shard: int) -> _Shard:
            return _mend(manifest, shard, names[shard], out, work, gone)

        threads = workers or cores()
        shards = []
        for done, one in enumerate(in_order(mend, range(len(names)), threads, "gristmill-repair"), start=1):
            shards.append(one)
            if progress is not None:
                progress(done, len(names))
        report = _publish(manifest, out, work, shards)
        if last:
            release(out)
        return report


def release(out: Path) -> None:
    """Remove what a finished repair needs no more."""
    shutil.rmtree(out / _WORK)


def _begin(manifest: Manifest, out: Path) -> Path:
    work = out / _WORK
    asked = {"data": manifest.digest, "root": str(manifest.root.resolve())}
    try:
        if json.loads((work / "request").read_text(encoding="utf-8")) != asked:
            raise RepairError(f"{out} holds an unfinished repair of another data set: finish or remove that first")
    except FileNotFoundError:
        if set(os.listdir(out)) - {_WORK}:
            raise RepairError(f"{out} is not empty: name a new folder, so that nothing is mixed up") from None
        work.mkdir(exist_ok=True)
        with published(work / "request") as file:
            file.write(json.dumps(asked).encode())
    return work


def _names(manifest: Manifest) -> list[str]:
    """What the shards are called in the new data set: as before where they lay inside."""
    inside = [os.path.normpath(url) for url in manifest.urls]
    names = []
    for shard, url in enumerate(manifest.urls):
        path = inside[shard]
        if url.startswith("./") or not (os.path.isabs(path) or path.startswith("..") or ":" in path):
            names.append(url)
        else:
            stem = re.sub(r"[^\w.-]", "_", url.partition("?")[0].rpartition("/")[2].removesuffix(".tar"))
            names.append(f"{shard:06d}-{stem}.tar")
    return names


def _mend(manifest: Manifest, shard: int, name: str, out: Path, work: Path, gone: set[str]) -> _Shard:
    """Write one shard anew, or take it as it was written before."""
    path, record = out / name, work / f"{shard:06d}.rows"
    if record.exists():
        before = _Shard(**json.loads((pq.read_schema(record).metadata or {})[b"about"]))
        if path.exists() or not before.size:
            return before
    path.parent.mkdir(parents=True, exist_ok=True)
    found = _Shard(redact(manifest.urls[shard]), name)
    rows = _mended(manifest, shard, path, found, gone)
    table = table_of(rows) if rows is not None else SAMPLE_FIELDS.empty_table()
    with published(record) as file:
        pq.write_table(table.replace_schema_metadata({"about": json.dumps(asdict(found))}), file, compression="zstd")
    return found


def _mended(manifest: Manifest, shard: int, path: Path, found: _Shard, gone: set[str]) -> Rows | None:
    try:
        rows = manifest.rows(shard)
    except GristmillError as error:
        rows, found.problem = None, f"the manifest's rows cannot be read ({error})"
    blob = None
    try:
        blob = open_place(manifest.place(shard))
        blob.size()
    except (OSError, GristmillError) as error:
        if isinstance(error, StorageError) and error.reason != "missing":  # then nothing is known about the shard
            raise RepairError(f"{found.url} does not answer ({error}): give the same command again later") from error
        found.problem = f"cannot be opened ({error.strerror if isinstance(error, OSError) else error})"
        found.lost += [(key, "its shard cannot be opened") for key in (rows.keys if rows is not None else ())]
        return None
    try:
        if rows is not None and gone.isdisjoint(rows.keys) and (whole := _whole(blob, manifest, shard, rows, found)):
            _copy(blob, path, found)
            return whole
        return _written(salvage(_Tolerant(blob), rows), path, found, gone)
    except StorageError as error:
        raise RepairError(f"{found.url} does not answer ({error}): give the same command again later") from error
    finally:
        close_blob(blob)


class _Tolerant:
    """A blob in which what the disk does not give is not there, as if it had been cut out."""

    def __init__(self, blob: Blob) -> None:
        self._blob, self.url = blob, blob.url
        self.size, self.identity = blob.size, blob.identity

    def read(self, offset: int, length: int) -> bytes:
        try:
            return self._blob.read(offset, length)
        except OSError:  # EIO: a bad sector
            return b""


def _whole(blob: Blob, manifest: Manifest, shard: int, rows: Rows, found: _Shard) -> Rows | None:
    """Rows with checksums and sizes of a shard that is just as the manifest says, and can be copied; else None."""
    try:
        if blob.size() != manifest.shard_bytes[shard]:
            raise ShardError(blob.url, 0, f"{blob.size()} bytes long, {manifest.shard_bytes[shard]} by the manifest")
        there = index_shard(blob)
        if there.digest() != rows.digest():
            raise ShardError(blob.url, 0, "its keys, offsets or lengths are not those of the manifest")
        depth = deepen(blob, rows)
    except OSError as error:
        found.problem = f"cannot be read ({error.strerror})"
        return None
    except ShardError as error:
        found.problem = f"byte {error.offset}: {error.problem}" if error.offset else error.problem
        return None
    sound = not depth.damaged and not depth.odd and not (rows.deep and (rows.crc32 != depth.rows.crc32).any())
    return depth.rows if sound else None


def _copy(blob: Blob, path: Path, found: _Shard) -> None:
    with published(path) as file:
        while part := blob.read(file.tell(), _PIECE):
            file.write(part)
        found.size = file.tell()
    found.copied = True


def _written(samples: Iterator[Saved | Lost], path: Path, found: _Shard, gone: set[str]) -> Rows | None:
    """Write a new tar of the samples that were saved; its rows, or None where there are none."""
    from webdataset.writer import TarWriter

    saved: list[Saved] = []
    draft = Draft(path)
    opened: Any = draft  # as much of a file as tarfile needs
    try:
        with TarWriter(opened, mtime=0, user="gristmill", group="gristmill", encoder=False, compress=False) as tar:
            for one in samples:
                if one.key in gone:
                    found.removed += 1
                elif isinstance(one, Lost):
                    found.lost.append((one.key, one.problem))
                else:
                    tar.write({"__key__": one.key, **one.sides, one.format: one.data})
                    if one.changed is not None:
                        found.changed.append((one.key, one.changed))
                    saved.append(replace(one, data=b"", sides={}))
        if not saved:
            draft.give_up()
            return None
        draft.sync()
        rows = index_shard(draft.beside)
        if rows.keys != [one.key for one in saved] or rows.format != [one.format for one in saved]:
            raise RepairError(f"{draft.beside} was not read back as it was written: check the disk, and repair again")
        found.size = draft.tell()
        draft.finish()
    except BaseException:
        draft.give_up()
        raise
    return replace(
        rows,
        crc32=np.array([one.crc32 for one in saved], np.uint32),
        width=np.array([one.width for one in saved], np.int32),
        height=np.array([one.height for one in saved], np.int32),
        deep=True,
    )


def _publish(manifest: Manifest, out: Path, work: Path, shards: list[_Shard]) -> RepairReport:
    report = RepairReport(str(out), before=manifest.samples)
    with ManifestWriter(out) as writer:
        for shard, one in enumerate(shards):
            table = pq.read_table(work / f"{shard:06d}.rows", use_threads=False)
            _book(report, one, len(table))
            if len(table):
                writer.add(one.out, one.size, rows_of_table(table.cast(pa.schema(list(SAMPLE_FIELDS)))))
        if not report.samples:
            raise RepairError(f"nothing of {manifest.root} can be saved: all of its {len(shards)} shards are lost")
        _list_lost(out, report)
        if lines := removed(manifest.root):
            with published(out / REMOVED) as file:
                file.write(b"".join(json.dumps(line, ensure_ascii=False).encode() + b"\n" for line in lines))
        for folder in (manifest.root, manifest.root.absolute().parent):
            if (folder / LABELS).is_file() and not (out / LABELS).exists():
                with published(out / LABELS) as file:
                    file.write((folder / LABELS).read_bytes())
        report.digest = writer.publish()
    with published(out / REPORT) as file:
        file.write((json.dumps({"from": str(manifest.root), **report.as_dict()}, indent=1) + "\n").encode())
    return report


def _book(report: RepairReport, one: _Shard, samples: int) -> None:
    report.shards += bool(samples)
    report.copied += one.copied
    report.samples += samples
    report.removed += one.removed
    report.changed += len(one.changed)
    if not samples:
        report.dropped.append(one.url)
    if one.problem is not None:
        report.findings.append(Finding(one.url, None, one.problem))
    report.findings += [Finding(one.url, key, problem) for key, problem in one.lost]
    report.findings += [Finding(one.url, key, f"encoded anew: {why}") for key, why in one.changed]


def _list_lost(out: Path, report: RepairReport) -> None:
    report.lost = report.before - report.samples - report.removed
    with published(out / LOST) as file:
        file.write(b"shard\tkey\tproblem\n")
        for finding in report.findings:
            parts = (finding.shard, finding.key or "-", finding.problem)
            file.write("\t".join(" ".join(part.split()) for part in parts).encode() + b"\n")
