"""Is a data set still what its manifest says? Shallow: files, sizes, headers. Deep: every checksum and every image.

Findings are returned, not raised, so that one look shows all of the damage; only a folder that is no data set raises.
Shards are looked at on threads, for decoders and checksums let go of the interpreter's lock.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from isal.isal_zlib import crc32

from .archive import ShardError
from .blob import Blob
from .checked import Checked
from .deep import images
from .errors import GristmillError
from .foreign import close_blob, open_place
from .images import ImageError, check_image
from .index import index_shard, sample_shard
from .index_report import read_skipped
from .manifest import Manifest, Rows
from .parallel import cores, in_order


@dataclass(frozen=True)
class Finding:
    """Something wrong with a shard (its url in the manifest), or with the sample `key` in it."""

    shard: str
    key: str | None
    problem: str


def verify(
    root: str | Path,
    deep: bool = False,
    *,
    workers: int | None = None,
    again: bool = False,
    progress: Callable[[int, int], None] | None = None,
    note: Callable[[str], None] | None = None,
) -> list[Finding]:
    """Compare a data set with its manifest; an empty list means that all is well. `progress(done, total)` counts shards.

    `workers` threads look at a shard each (one a core by default). A check that was interrupted is gone on with, unless
    `again`, and `note` is told so. Raises ManifestError if the folder is no data set.
    """
    manifest = Manifest.open(root)
    findings: list[Finding] = []
    with Checked(manifest, deep, again=again) as checked:
        if len(checked) and note is not None:
            when = time.strftime("%Y-%m-%d %H:%M", time.localtime(checked.since))
            note(
                f"going on with the check that began at {when}: {len(checked)} shards were sound (--again starts over)"
            )

        def look(shard: int) -> tuple[list[Finding], str]:
            seen: list[str] = []
            return list(_verify_shard(manifest, shard, deep, checked, seen)), "".join(seen)

        looks = in_order(look, range(len(manifest.urls)), workers or cores(), "gristmill-verify")
        for shard, (found, identity) in enumerate(looks):
            findings += found
            if identity and not found:
                checked.add(manifest.urls[shard], identity, manifest.rows(shard))
            if progress is not None:
                progress(shard + 1, len(manifest.urls))
        checked.done()
    known = {os.path.normpath(url) for url in {*manifest.urls, *read_skipped(manifest.root)}}
    strangers = sorted(path.name for path in manifest.root.glob("*.tar") if path.name not in known)
    return findings + [Finding(name, None, "in the folder, but not in the manifest") for name in strangers]


def open_shard(manifest: Manifest, shard: int) -> Blob:
    """A shard's bytes, wherever they lie."""
    return open_place(manifest.place(shard))


def recheck(manifest: Manifest, shard: int, blob: Blob | None = None) -> str | None:
    """What is wrong with a shard that was only indexed quickly and is not the same file any more; None if nothing is.

    A copy of a data set has other times than the one that was indexed. So where the identity differs, the headers
    decide: they must still give the same keys, offsets and lengths. Checksums make this needless. `blob`: the shard, if
    it is open already, or a copy of it.
    """
    own = blob is None
    blob = open_shard(manifest, shard) if blob is None else blob
    try:
        known = manifest.identities[shard]
        if known is None or manifest.rows(shard).deep or blob.identity() == known:
            return None
        found = sample_shard(blob).rows
    except ShardError as error:
        return f"was changed since it was indexed: byte {error.offset}: {error.problem}"
    finally:
        if own:
            close_blob(blob)
    if found.digest() != manifest.digests[shard]:
        return "was replaced since it was indexed: its keys, offsets or lengths are others"
    return None


def _verify_shard(manifest: Manifest, shard: int, deep: bool, checked: Checked, seen: list[str]) -> Iterator[Finding]:
    """Findings of one shard; its identity goes into `seen` if it was looked at now."""
    url = manifest.urls[shard]
    try:
        rows = manifest.rows(shard)
        blob = open_shard(manifest, shard)
    except GristmillError as error:
        yield Finding(url, None, str(error))
        return
    try:
        identity = blob.identity()
        if not checked.knows(url, identity, rows):
            yield from _verify_blob(manifest, shard, blob, rows, deep)
            seen.append(identity)
    except OSError as error:
        yield Finding(url, None, f"cannot be opened ({error.strerror})")
    except GristmillError as error:
        yield Finding(url, None, str(error))
    finally:
        close_blob(blob)


def _verify_blob(manifest: Manifest, shard: int, blob: Blob, rows: Rows, deep: bool) -> Iterator[Finding]:
    url, size = manifest.urls[shard], blob.size()
    if size != manifest.shard_bytes[shard]:
        yield Finding(url, None, f"{size} bytes long, {manifest.shard_bytes[shard]} by the manifest")
    try:
        found = index_shard(blob)
    except ShardError as error:
        yield Finding(url, None, f"byte {error.offset}: {error.problem}")
    else:
        yield from _compare(url, rows, found)
    if deep:
        yield from _decode(url, blob, rows)


def _compare(url: str, rows: Rows, found: Rows) -> Iterator[Finding]:
    if len(found) != len(rows):
        yield Finding(url, None, f"{len(found)} samples, {len(rows)} by the manifest")
    n = min(len(rows), len(found))
    moved = (rows.offset[:n] != found.offset[:n]) | (rows.length[:n] != found.length[:n])
    for row in range(n):
        if rows.keys[row] != found.keys[row]:
            yield Finding(url, rows.keys[row], f"the tar has {found.keys[row]!r} in its place")
        elif moved[row]:
            there = f"bytes {found.offset[row]} to {found.offset[row] + found.length[row]}"
            yield Finding(url, rows.keys[row], f"lies at {there}, not where the manifest says")


def _decode(url: str, blob: Blob, rows: Rows) -> Iterator[Finding]:
    for row, data in images(blob, rows):
        key, length = rows.keys[row], int(rows.length[row])
        if len(data) < length:
            yield Finding(url, key, f"cut short: {len(data)} of {length} bytes")
        elif rows.deep and crc32(data) != rows.crc32[row]:
            yield Finding(url, key, "bytes changed (crc32)")
        else:
            known = rows.deep and rows.width[row]
            yield from _look(url, key, data, (int(rows.width[row]), int(rows.height[row])) if known else None)


def _look(url: str, key: str, data: bytes, size: tuple[int, int] | None) -> Iterator[Finding]:
    try:
        image = check_image(data)
    except ImageError as error:
        yield Finding(url, key, str(error))
        return
    if image.reencoded is not None:
        yield Finding(url, key, f"DALI may not read it: {image.reencoded}")
    elif size is not None and (image.width, image.height) != size:
        yield Finding(url, key, f"{image.width} x {image.height} pixels, {size[0]} x {size[1]} by the manifest")
