"""What one rank of thousands costs its machine: memory and seconds of its data side, in a process of its own.

It opens a whole manifest, makes the stream and the fetcher of a recipe with a cache, and turns to batch after batch of
its own positions: rows are read out of Parquet, and ranges are planned by the reader's code, up to the moment at which
they would be asked for; nothing listens at the url. How large they are, and how many, is what comes out.

    python -m gristmill.ops.bench.scale_process DIR RANKS BATCH RANK LANES WINDOW BATCHES
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from ...pipeline.ahead import Ahead
from ...pipeline.fetch import Fetcher, Opened
from ...pipeline.foresight import Foresight
from ...pipeline.library import Library
from ...pipeline.share import Found, Share
from ...pipeline.slabs import Slabs
from ...pipeline.source import Source
from ...pipeline.stream import Stream
from ...pipeline.views import CacheConfig
from ...shards.blob import Blob
from ...shards.manifest import Manifest
from ...shards.retry import RetryPolicy
from .scale import memory
from .scale_cache import mine
from .scale_order import Cluster

CACHE = 1 << 40  # bytes


class _Nowhere(Blob):
    """An object of which no byte is ever asked for."""


class Planner(Fetcher):
    """A fetcher that writes down what it is asked for, instead of asking for it."""

    ranges: list[int]

    def open(self, shard: int) -> Opened:
        return Opened(shard, blob=_Nowhere.__new__(_Nowhere))

    def read_remote(self, wanted: list[tuple[Opened, int, memoryview]]) -> list[int]:
        self.ranges += [len(target) for _, _, target in wanted]
        return [len(target) for _, _, target in wanted]


def measure(
    root: Path, cluster: Cluster, rank: int, lanes: int, window: int, batches: int, share: float = 0.5
) -> dict[str, Any]:
    """Of rank `rank`, from `share` of the first epoch on."""
    found: dict[str, Any] = {"imports_MB": memory("VmRSS")}
    clock = [time.perf_counter()]

    def took(what: str) -> None:
        found[f"{what}_s"] = time.perf_counter() - clock[0]
        found[f"{what}_MB"] = memory("VmRSS")
        clock[0] = time.perf_counter()

    manifest = Manifest.open(root)
    took("manifest")
    first = Stream([Source.of(manifest)], 0, lanes, window)
    position = int(first.samples * share) // cluster.batch * cluster.batch
    stream = Stream([Source.of(manifest)], 0, lanes, window, cursor=first.cursor.advance(position, committed=True))
    stream.locate(cluster.of_rank(rank, position))
    took("stream")
    library = Library(manifest)
    with tempfile.TemporaryDirectory() as folder:
        config, policy = CacheConfig(folder=Path(folder), bytes=CACHE), RetryPolicy(deadline=0.01)
        own = mine(cluster, rank // cluster.per_node, lanes)
        cached = Fetcher(library, stream, cache=config, policy=policy, lanes=own)
        took("fetcher")
        cached.close(10)
    foresight = Foresight(stream, len(library), own)
    looks = []
    for number in range(3):
        foresight.go(position + number * cluster.batch)
        begin = time.process_time()
        foresight.next_use(0)
        looks.append(time.process_time() - begin)
    found |= {"first_look_cpu_s": looks[0], "look_cpu_s": min(looks[1:])}
    took("foresight")
    planner, ahead, slabs, seconds = Planner(library, stream), Ahead(stream), Slabs(), []
    planner.ranges = []
    for number in range(batches):
        begin = time.process_time()
        shard, row = ahead.locate(cluster.of_rank(rank, position + number * cluster.batch))
        one = Share(planner, slabs, Found(len(shard)), decode_check=False)
        for which in np.unique(shard).tolist():
            slots = np.flatnonzero(shard == which)
            slots = slots[np.argsort(row[slots], kind="stable")]
            one.add(which, slots.tolist(), row[slots], None)
        one.read()
        seconds.append(time.process_time() - begin)
    took("batches")
    planner.close(1)
    sizes = np.array(planner.ranges)
    return found | {
        "samples": batches * cluster.batch // cluster.ranks,
        "requests": len(sizes),
        "range_bytes": {"least": int(sizes.min()), "median": float(np.median(sizes)), "most": int(sizes.max())},
        "shards_with_rows": len(manifest._rows),
        "batch_cpu_s": {"median": float(np.median(seconds)), "first": seconds[0]},
        "peak_MB": memory("VmHWM"),
    }


if __name__ == "__main__":
    root, ranks, batch, rank, lanes, window, batches = sys.argv[1:]
    cluster = Cluster(int(ranks), int(batch))
    print(json.dumps(measure(Path(root), cluster, int(rank), int(lanes), int(window), int(batches))))
