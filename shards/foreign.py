"""Data sets made by others, indexed where they lie: a manifest for their tars, which stay as they are.

Shards are walked on threads and written down in order, a few ahead at most, so that memory does not grow with their
number. A shard that is damaged or compressed stops it, after all have been looked at, so that one run names them all;
`leave_out` goes on without them and lists them. Nothing is a data set before all of it is.

A quick index reads headers alone and takes down each shard's identity: time of change and size of a file, etag of an
object. Where that is still the same on the next run, the shard's rows are taken over, checksums included; where it is
not, `recheck` walks the headers again (they must give the same keys, offsets and lengths), and the reader holds every
sample's own header against the index.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from .addresses import redact, scheme_of
from .archive import ShardError
from .blob import Blob, LocalBlob
from .dali import write_idx
from .deep import deepen
from .errors import GristmillError
from .index import IMAGES, sample_shard
from .index_report import IndexReport, write_skipped
from .manifest import Manifest, ManifestError, Rows
from .parallel import cores, in_order
from .places import is_remote
from .remote import open_blob
from .storage import claimed
from .writer import ManifestWriter

_TOLD = 10  # problems spelled out in a message; the file has all of them


class IndexingError(GristmillError):
    """Shards that cannot be indexed. `problems` lists all of them: (shard, problem)."""

    def __init__(self, message: str, problems: list[tuple[str, str]] | None = None) -> None:
        super().__init__(message)
        self.problems = problems or []


@dataclass
class _Shard:
    """One shard's part of the report. `url` is what the manifest calls it."""

    url: str
    rows: Rows | None = None
    size: int = 0
    identity: str | None = None
    problem: str | None = None
    reused: bool = False
    counts: Counter[str] = field(default_factory=Counter)
    damaged: list[tuple[str, str]] = field(default_factory=list)
    odd: Counter[str] = field(default_factory=Counter)


def open_place(place: str) -> Blob:
    """A shard by its path or url."""
    return open_blob(place) if is_remote(place) else LocalBlob(place)


def close_blob(blob: Blob) -> None:
    """Give back what a blob holds open, if it holds anything."""
    if isinstance(blob, LocalBlob):
        blob.close()


def index_dataset(
    places: list[str],
    out: str | Path,
    *,
    deep: bool = False,
    idx: bool = False,
    leave_out: bool = False,
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    opener: Callable[[str], Blob] = open_place,
) -> IndexReport:
    """Write the manifest of shards (absolute paths or urls, see places.py) into the folder `out`.

    `idx` writes an index for DALI's reader beside each local shard below `out`, else into `out/idx`. `progress(done,
    total)` counts shards. Raises IndexingError; what a remote shard's storage raises passes through.
    """
    root = Path(out)
    taken = IndexingError(f"{root} is being written by another index or ingest: wait for it")
    try:
        with claimed(root, taken):
            return _index(places, root, deep, idx, leave_out, threads, progress, opener)
    except OSError as error:
        raise IndexingError(
            f"{root} cannot be written ({error.strerror or error}): make room or rights there, or name another folder "
            "with --out; nothing half-written was left"
        ) from error


def _index(
    places: list[str],
    root: Path,
    deep: bool,
    idx: bool,
    leave_out: bool,
    threads: int | None,
    progress: Callable[[int, int], None] | None,
    opener: Callable[[str], Blob],
) -> IndexReport:
    report = IndexReport(str(root))
    known = _Known(root)
    top = os.path.abspath(root)

    def work(numbered: tuple[int, str]) -> _Shard:
        number, place = numbered
        shard = _Shard(relative_url(place, top))
        blob = opener(place)
        try:
            _look(shard, blob, known, deep, idx_path(root, shard.url, number) if idx else None)
        except ShardError as error:
            shard.problem = f"byte {error.offset}: {error.problem}; {error.remedy}"
        finally:
            close_blob(blob)
        return shard

    if threads is None:
        threads = 16 if any(map(is_remote, places)) else cores()
    with ManifestWriter(root) as writer:
        for done, shard in enumerate(in_order(work, enumerate(places), threads, "gristmill-index"), start=1):
            _book(report, shard, writer)
            if progress is not None:
                progress(done, len(places))
        report.idx = report.shards if idx else 0
        if report.left_out and not leave_out:
            raise _refused(report.left_out, len(places))
        if not report.shards:
            looked = ", ".join(IMAGES)
            raise IndexingError(f"none of the {len(places)} shards has a sample with an image (looked for {looked})")
        write_skipped(root, report)
        report.digest = writer.publish()
    return report


def _book(report: IndexReport, shard: _Shard, writer: ManifestWriter) -> None:
    if shard.problem is not None:
        report.left_out.append((redact(shard.url), shard.problem))
        return
    report.counts += shard.counts
    if shard.rows is None or not len(shard.rows):
        report.empty.append(redact(shard.url))
        return
    writer.add(shard.url, shard.size, shard.rows, shard.identity)
    report.shards += 1
    report.deep = shard.rows.deep and (report.deep or report.shards == 1)
    report.samples += len(shard.rows)
    report.bytes += shard.size
    report.reused += shard.reused
    report.damaged += [(redact(shard.url), key, reason) for key, reason in shard.damaged]
    report.odd += shard.odd


def _look(shard: _Shard, blob: Blob, known: _Known, deep: bool, idx: Path | None) -> None:
    """Fill in one shard's part: from the last index if nothing changed, else from the shard."""
    try:
        shard.identity, shard.size = blob.identity(), blob.size()
    except OSError as error:
        raise ShardError(blob.url, 0, f"cannot be opened ({error.strerror})") from error
    before, same = known.rows(shard.url, shard.identity)
    if before is not None and same and not idx and (before.deep or not deep):
        _take_over(shard, before)
        return
    found = sample_shard(blob)
    shard.rows, shard.counts = found.rows, found.counts
    shard.identity, shard.size = found.members.identity, found.members.size
    if before is not None and before.deep and before.digest() == found.rows.digest():
        _take_over(shard, before)
    elif deep and len(found.rows):
        try:
            depth = deepen(blob, found.rows)
        except OSError as error:
            raise ShardError(blob.url, 0, f"cannot be read ({error.strerror})") from error
        shard.rows, shard.damaged, shard.odd = depth.rows, depth.damaged, depth.odd
    if blob_changed(blob, shard.identity):
        raise ShardError(blob.url, 0, "was replaced while it was indexed", "wait for its writer, then index again")
    if idx is not None and len(found.rows):
        write_idx(idx, found)


def _take_over(shard: _Shard, rows: Rows) -> None:
    shard.rows, shard.reused = rows, True
    undecoded = [row for row, width in enumerate(rows.width.tolist()) if rows.deep and not width]
    shard.damaged = [(rows.keys[row], "did not decode at the last index") for row in undecoded]


def blob_changed(blob: Blob, identity: str) -> bool:
    """Whether a blob is another one than before. A file is asked by its name: the open one never changes its own."""
    if not isinstance(blob, LocalBlob):
        return blob.identity() != identity
    with LocalBlob(blob.path) as again:
        return again.identity() != identity


class _Known:
    """The rows of an index made before, by url."""

    def __init__(self, root: Path) -> None:
        self._shards: dict[str, int] = {}
        try:
            self._manifest = Manifest.open(root)
        except ManifestError:  # none, or not a whole one: then everything is looked at
            return
        self._shards = {url: shard for shard, url in enumerate(self._manifest.urls)}

    def rows(self, url: str, identity: str) -> tuple[Rows | None, bool]:
        """Rows, and whether the shard's identity is still the same. No rows if it is another one.

        What Gristmill's own ingest wrote has no identity but checksums: then the rows count if the headers agree.
        """
        shard = self._shards.get(url)
        if shard is None or self._manifest.identities[shard] not in (None, identity):
            return None, False
        try:
            return self._manifest.rows(shard), self._manifest.identities[shard] is not None
        except ManifestError:
            return None, False


def relative_url(place: str, top: str) -> str:
    """How the manifest in the folder `top` names a shard: relative where it lies below, else absolute."""
    if is_remote(place):
        return place
    relative = os.path.relpath(place, top)
    if relative.startswith(os.pardir + os.sep):
        return place
    return f"./{relative}" if scheme_of(relative) else relative  # `a:b.tar` is a file, no url


def idx_path(root: Path, url: str, number: int) -> Path:
    """Where the index of a shard for DALI's reader goes: beside it if it lies below the data set's folder."""
    if is_remote(url) or os.path.isabs(url):
        stem = url.partition("?")[0].rpartition("/")[2].removesuffix(".tar")
        return root / "idx" / f"{number:06d}-{stem}.idx"
    return (root / url).with_suffix(".idx")


def _refused(problems: list[tuple[str, str]], total: int) -> IndexingError:
    told = "".join(f"\n  {place}: {problem}" for place, problem in problems[:_TOLD])
    more = f"\n  and {len(problems) - _TOLD} more" if len(problems) > _TOLD else ""
    return IndexingError(
        f"{len(problems)} of {total} shards cannot be indexed; mend them, or go on without them by --leave-out:{told}{more}",
        problems,
    )
