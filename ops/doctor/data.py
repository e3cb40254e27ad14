"""--data: the data set opens, its first shard is there, and bytes come fast enough, from a folder or from a url."""

from __future__ import annotations

import statistics
import time
from pathlib import Path

from ...shards.errors import GristmillError
from ...shards.places import is_remote
from .finding import Asked, Finding, said, size

PIECE = 128 << 10  # bytes, an image
PIECES = 8
STRETCH = 16 << 20  # bytes read in one go
SLOW = 0.25  # seconds that a read of PIECE may take
WHY = "each step waits for its images"


def check_data(asked: Asked) -> Finding:
    """Open the manifest, then read of the first shard: a few pieces, then a stretch."""
    if not asked.data:
        return Finding("data", "skipped", "not asked", WHY, "name the data set with --data URL|DIR")
    from ...shards.mirror import open_manifest
    from ...shards.remote import open_blob
    from ...shards.retry import RetryPolicy

    remote = is_remote(asked.data)
    patience = max(1.0, min(15.0, asked.seconds / 3))
    policy = RetryPolicy(deadline=patience, connect_timeout=min(5.0, patience), stall_timeout=min(5.0, patience))
    place = asked.data if remote else Path(asked.data.removeprefix("file://"))
    try:
        begin = time.perf_counter()
        manifest = open_manifest(place, policy=policy)
        opening = time.perf_counter() - begin
        if not manifest.urls:
            remedy = "make it again with `gristmill ingest` or `gristmill index`"
            return Finding("data", "bad", "the data set has no shards", WHY, remedy)
        blob = open_blob(manifest.place(0) if remote else manifest.path(0), policy=policy)
        total = blob.size()
        seconds = []
        for number in range(PIECES):
            at = max(0, total - PIECE) * number // PIECES
            begin = time.perf_counter()
            blob.read(at, PIECE)
            seconds.append(time.perf_counter() - begin)
        begin = time.perf_counter()
        got = len(blob.read(0, min(STRETCH, total)))
        rate = got / max(time.perf_counter() - begin, 1e-9)
    except GristmillError as error:
        remedy = "mend the address, the network or the keys, as the message says, and look again"
        return Finding("data", "bad", str(error), WHY, remedy)
    except OSError as error:
        remedy = "look whether the disk is mounted here and this user may read it"
        return Finding("data", "bad", f"its first shard cannot be read: {said(error)}", WHY, remedy)
    middle = statistics.median(seconds)
    found = f"{len(manifest.urls):,} shards; opened in {opening:.2g} s, a read of {size(PIECE)} takes {1000 * middle:.3g} ms "
    found += f"(at worst {1000 * max(seconds):.3g}), then {size(rate)}/s"
    figures = {
        "shards": len(manifest.urls), "opened_seconds": opening, "read_seconds": middle, "slowest_seconds": max(seconds),
        "bytes_per_s": rate, "first_shard_bytes": total,
    }  # fmt: skip
    if middle > SLOW:
        more = (
            "add stream.cache.folder and stream.cache.bytes, and" if remote else "copy the shards to a faster disk, or"
        )
        remedy = f"{more} raise stream.reader_threads and stream.prefetch"
        return Finding("data", "warn", found, WHY, remedy, figures)
    return Finding("data", "ok", found, WHY, "", figures)
