"""Removal for good: shards that hold removed samples are written anew without them, and the manifest with them.

All new files are made in `.rewrite` inside the data set, and one small file, `commit`, decides: before it the old data set
is untouched, after it the new one is put in place, step by step, by this process or the next. Nobody reads a mixture: while
files change places there is no `dataset.json`. Names of shards stay; keys, offsets and lengths do not, so that the data set
is another one to every cursor. Copies elsewhere (caches, backups, hard links) are out of reach.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from .archive import ShardError
from .blob import LocalBlob
from .collection import COMMITTED, REWRITE
from .cutting import cut_shard
from .dali import write_idx
from .errors import GristmillError
from .index import sample_shard
from .manifest import DATASET, SAMPLES, SHARDS, Manifest, Rows
from .storage import published, sync_folder
from .tombstones import Tombstones
from .writer import ManifestWriter

REMOVED = "removed.jsonl"  # what was removed for good: key, reason, digests of the data set before and of the request
_NEW, _TARS, _STAGED = "new", "tars", "staged"


class RewriteError(GristmillError):
    """Shards that cannot be written anew; nothing was changed."""


@dataclass(frozen=True)
class Rewritten:
    """What a rewriting does. `bytes` are those of the tars that it frees; `linked` counts tars with other names too."""

    request: str  # a digest of what was asked for: the same command finishes it
    before: str  # digest of the data set
    after: str
    samples: int
    replaced: dict[str, str]  # url of a shard -> its new tar in the work folder
    dropped: list[str]  # urls of shards of which nothing is left
    gone: dict[str, list[int]]  # url -> rows, ascending
    keys: list[str]
    tombstones: tuple[int, str]  # count and digest, before
    bytes: int
    linked: int
    inputs: list[int]  # of the ledger, to be forgotten besides those of the keys


def pending(root: Path) -> Rewritten | None:
    """The rewriting that was decided on and is not finished. RewriteError if it cannot be read."""
    return _read(root / REWRITE / COMMITTED)


def staged(root: Path) -> Rewritten | None:
    """The one that could be committed. RewriteError if it cannot be read."""
    return _read(root / REWRITE / _STAGED)


def _read(path: Path) -> Rewritten | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return Rewritten(**{**found, "tombstones": tuple(found["tombstones"])})
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise RewriteError(f"{path} cannot be read ({error}): mend its rights") from error


def stage(
    root: Path, request: str, inputs: Iterable[int] = (), progress: Callable[[int, int], None] | None = None
) -> Rewritten | None:
    """Write new tars and a new manifest beside, without the samples that have tombstones. None if there are none.

    Goes on with the tars that an earlier call has finished. `progress(done, total)` counts shards. Raises RewriteError
    for shards that are damaged, lie elsewhere, or find no room; OSError passes through.
    """
    manifest = Manifest.open(root)
    stones = Tombstones.of(manifest)
    places = stones.places(manifest.urls)
    if not len(places):
        return None
    gone = {int(shard): places[places[:, 0] == shard, 1].tolist() for shard in np.unique(places[:, 0])}
    if len(places) == manifest.samples:
        raise RewriteError(f"{root} would be left without a sample: remove the folder instead")
    _check_places(manifest, gone)
    work = root / REWRITE
    tars = {
        shard: work / _TARS / _name_of(manifest, shard, rows)
        for shard, rows in gone.items()
        if len(rows) < manifest.counts[shard]
    }
    (work / _STAGED).unlink(missing_ok=True)
    _make_room(manifest, work, tars)
    new: dict[int, tuple[int, Rows, str | None]] = {}
    for done, (shard, path) in enumerate(tars.items(), start=1):
        new[shard] = _write(manifest, shard, gone[shard], path)
        if progress is not None:
            progress(done, len(tars))
    shutil.rmtree(work / _NEW, ignore_errors=True)
    with ManifestWriter(work / _NEW) as writer:
        for shard, url in enumerate(manifest.urls):
            if shard in new:
                size, rows, identity = new[shard]
                writer.add(url, size, rows, identity)
            elif shard not in gone:
                writer.add(url, int(manifest.shard_bytes[shard]), manifest.rows(shard), manifest.identities[shard])
        after = writer.publish()
    reasons = {place: reason for place, _, reason in stones}
    told: list[dict[str, Any]] = []
    for shard, rows in gone.items():
        url, keys = manifest.urls[shard], manifest.rows(shard).keys
        about = {"before": manifest.digest, "request": request}
        told += [{"key": keys[row], "reason": reasons[url, row], **about} for row in rows]
    with published(work / _NEW / REMOVED) as file:
        file.write(b"".join(json.dumps(one, ensure_ascii=False).encode() + b"\n" for one in [*removed(root), *told]))
    freed = sum(int(manifest.shard_bytes[shard]) - (new[shard][0] if shard in new else 0) for shard in gone)
    ready = Rewritten(
        request=request,
        before=manifest.digest,
        after=after,
        samples=len(places),
        replaced={manifest.urls[shard]: path.name for shard, path in tars.items()},
        dropped=[manifest.urls[shard] for shard in gone if shard not in tars],
        gone={manifest.urls[shard]: rows for shard, rows in gone.items()},
        keys=sorted({one["key"] for one in told}),
        tombstones=(stones.count, stones.digest()),
        bytes=freed,
        linked=sum(manifest.path(shard).stat().st_nlink > 1 for shard in gone),
        inputs=sorted(inputs),
    )
    with published(work / _STAGED) as file:
        file.write(json.dumps(asdict(ready)).encode())
    return ready


def commit(root: Path) -> None:
    """What was staged counts from here on. OSError passes through."""
    os.replace(root / REWRITE / _STAGED, root / REWRITE / COMMITTED)
    sync_folder(root / REWRITE)


def finish(root: Path, decided: Rewritten) -> None:
    """Put what was committed in place. Done again after a kill, it goes on. OSError passes through."""
    work = root / REWRITE
    if (work / _NEW / DATASET).exists():  # the last one to move
        (root / DATASET).unlink(missing_ok=True)
        sync_folder(root)
        for url, name in decided.replaced.items():
            path = root / url
            if (work / _TARS / name).exists():
                os.replace(work / _TARS / name, path)
                sync_folder(path.parent)
            if (idx := path.with_suffix(".idx")).exists():
                write_idx(idx, sample_shard(path))
        for url in decided.dropped:
            (root / url).unlink(missing_ok=True)
            (root / url).with_suffix(".idx").unlink(missing_ok=True)
        if (work / _NEW / SAMPLES).exists():
            shutil.rmtree(root / SAMPLES, ignore_errors=True)
            os.replace(work / _NEW / SAMPLES, root / SAMPLES)
        for name in (SHARDS, REMOVED):
            if (work / _NEW / name).exists():
                os.replace(work / _NEW / name, root / name)
        Tombstones(root / "tombstones.jsonl").shift(decided.gone, *decided.tombstones)
        sync_folder(root)
        os.replace(work / _NEW / DATASET, root / DATASET)
        sync_folder(root)


def release(root: Path) -> None:
    """Forget a finished rewriting, or what an undecided one has left."""
    for name in (_NEW, _TARS):
        shutil.rmtree(root / REWRITE / name, ignore_errors=True)
    (root / REWRITE / COMMITTED).unlink(missing_ok=True)
    shutil.rmtree(root / REWRITE, ignore_errors=True)


def removed(root: Path) -> list[dict[str, Any]]:
    """What was removed for good so far, in order. RewriteError if the list cannot be read."""
    try:
        return [json.loads(line) for line in (root / REMOVED).read_bytes().splitlines()]
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise RewriteError(f"{root / REMOVED} cannot be read ({error}): restore it") from error


def _name_of(manifest: Manifest, shard: int, rows: Sequence[int]) -> str:
    """What a new tar is called in the work folder: another name for other samples."""
    text = json.dumps([manifest.digest, manifest.urls[shard], rows])
    return f"{shard:06d}-{hashlib.blake2b(text.encode(), digest_size=8).hexdigest()}.tar"


def _check_places(manifest: Manifest, shards: Iterable[int]) -> None:
    top = manifest.root.resolve()
    for shard in shards:
        path = manifest.path(shard)  # of a url or an absolute path, nothing below the root
        if path.is_symlink() or not path.resolve().is_relative_to(top):
            raise RewriteError(
                f"shard {manifest.urls[shard]!r} lies outside of {manifest.root} and cannot be written anew from here: its "
                "samples are removed and never read, but their bytes are still there; ask whoever owns the shard"
            )


def _make_room(manifest: Manifest, work: Path, tars: dict[int, Path]) -> None:
    """Remove what an earlier call has left and this one has no use for, and see that the rest fits on the disk."""
    (work / _TARS).mkdir(parents=True, exist_ok=True)
    wanted = {path.name for path in tars.values()}
    for path in (work / _TARS).iterdir():
        if path.name not in wanted:
            path.unlink()
    need = sum(int(manifest.shard_bytes[shard]) for shard, path in tars.items() if not path.exists())
    free = shutil.disk_usage(work).free
    if need > free:
        raise RewriteError(
            f"{len(tars)} shards have to be written anew, which takes up to {need / 1e6:,.1f} MB in {manifest.root}, and "
            f"{free / 1e6:,.1f} MB are free: make room, then give the same command again"
        )


def _write(manifest: Manifest, shard: int, gone: list[int], path: Path) -> tuple[int, Rows, str | None]:
    """One new tar: its bytes, its rows and its identity. What the deep index knew of its images still holds."""
    old = manifest.rows(shard)
    try:
        found = sample_shard(path) if path.exists() else cut_shard(manifest.path(shard), gone, path)
    except (ShardError, FileNotFoundError) as error:
        raise RewriteError(
            f"shard {manifest.urls[shard]} cannot be written anew ({error}): nothing was rewritten. Write what is sound of "
            "the data set to another folder by `gristmill verify --repair`, which leaves removed samples out"
        ) from error
    left = np.setdiff1d(np.arange(len(old)), gone)
    if found.rows.keys != [old.keys[row] for row in left] or (found.rows.length != old.length[left]).any():
        path.unlink()
        raise RewriteError(
            f"shard {manifest.urls[shard]} is not what the manifest says: nothing was rewritten; see `gristmill verify`"
        )
    rows = replace(found.rows, crc32=old.crc32[left], width=old.width[left], height=old.height[left], deep=old.deep)
    with LocalBlob(path) as blob:
        return blob.size(), rows, blob.identity() if manifest.identities[shard] is not None else None
