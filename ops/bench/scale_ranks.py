"""Thousands of ranks in one process: what each would read, hold, serve and write, from the code that it would run.

    python -m gristmill.ops.bench.scale --ranks 4096 --samples 1e10 --out R.jsonl --plot P.png --doc docs/scale.md

Parts: `order` (exactly once, balance), `elastic` (the same after the number of ranks changed), `cache`, `process` (one
rank's memory and time), `monitor`, `checkpoints`. `--only` does some and keeps the rows of the others in R.jsonl;
`--show` does none, and draws what is there. Progress is on stderr.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...pipeline.order import Ints
from ...pipeline.source import Source
from ...pipeline.stream import Stream
from . import scale, scale_cache, scale_checkpoints, scale_monitor, scale_order
from .scale_balance import Balance, image_sizes, over_a_stretch
from .scale_order import Cluster

PARTS = ("order", "elastic", "cache", "process", "monitor", "checkpoints")
WINDOW = 65536
STRETCH = 64  # successive batches over which distinct shards are counted


@dataclass(frozen=True)
class Scale:
    """What is simulated. `sampled` batches of the first cluster, an eighth of them of each other one."""

    ranks: int = 4096
    samples: int = 10**10
    shards: int = 10**6
    local: int = 8  # samples of a batch and rank
    sampled: int = 2048
    proved: int = 24  # windows that are read whole
    taken: int = 64  # nodes that a real Prometheus takes in
    worlds: tuple[int, ...] = (8, 64, 512, 2048, 4096)  # of checkpoints

    @property
    def cluster(self) -> Cluster:
        return Cluster(self.ranks, self.ranks * self.local)

    @property
    def others(self) -> list[Cluster]:
        """One node less, with as many samples a rank; and half of the ranks, with the same batch."""
        less = self.ranks - self.cluster.per_node
        return [Cluster(less, less * self.local), Cluster(self.ranks // 2, self.cluster.batch)]

    def counts(self) -> Ints:
        return np.full(self.shards, self.samples // self.shards, np.int64)

    def stream(self, lanes: int) -> Stream:
        return Stream([Source("synthetic", self.counts(), lambda n: f"{n:032x}")], 0, lanes, WINDOW)


def say(text: str) -> None:
    print(f"[{time.process_time():6.1f} s] {text}", file=sys.stderr, flush=True)


def positions(cluster: Cluster, samples: int, number: int, start: int = 0) -> list[int]:
    """Where batches begin that are looked at: runs at both ends of the first epoch, the rest spread over two."""
    run = max(2, number // 32)
    last = (samples - start) // cluster.batch  # the batch that reaches into the next epoch
    steps = {*range(run), *range(max(0, last - run), last + run)}
    picked = np.random.default_rng(cluster.ranks).integers(0, 2 * last, max(0, number - len(steps)))
    return sorted(start + step * cluster.batch for step in {*steps, *picked.tolist()})


def order_part(wanted: Scale) -> Iterator[dict[str, Any]]:
    """Proof, batches and balance with the default lanes, on all ranks from the start."""
    stream = wanted.stream(64)
    yield from _proved(wanted, stream)
    yield _batches(wanted, stream, wanted.cluster, wanted.sampled, 0)
    yield {"what": "memory", "peak_MB": scale.memory("VmHWM")}


def elastic_part(wanted: Scale) -> Iterator[dict[str, Any]]:
    """The same stream gone on with by other numbers of ranks; and one with as many lanes as a batch has samples."""
    stream, first = wanted.stream(64), wanted.cluster
    changed = wanted.samples // 2 // first.batch * first.batch
    for cluster in wanted.others:
        yield _batches(wanted, stream, cluster, wanted.sampled // 8, changed)
    lined = wanted.stream(first.batch)
    yield from _proved(wanted, lined)
    yield _batches(wanted, lined, first, wanted.sampled // 8, 0)


def _proved(wanted: Scale, stream: Stream) -> Iterator[dict[str, Any]]:
    order = stream.orders[0].latest
    for epoch in (0, 1):
        say(f"{order.lanes} lanes, epoch {epoch} taken apart")
        yield {"what": "proof", "epoch": epoch, **scale_order.prove(order, epoch, wanted.proved)}


def _batches(wanted: Scale, stream: Stream, cluster: Cluster, number: int, start: int) -> dict[str, Any]:
    """So many batches of a cluster that goes on at `start`: exactly once, as ranks read them, and how even they are."""
    order, balance = stream.orders[0].latest, Balance(cluster, image_sizes(wanted.samples // wanted.shards))
    looked, begin = positions(cluster, wanted.samples, number, start), time.process_time()
    for count, position in enumerate(looked):
        balance.add(*scale_order.batch(stream, order, cluster, position))
        if count % 256 == 0:
            say(f"{order.lanes} lanes, {cluster.ranks} ranks, batch {count} of {len(looked)}")
    seconds = (time.process_time() - begin) / len(looked)
    stretch = [stream.locate(cluster.union(start + n * cluster.batch))[0] for n in range(STRETCH)]
    ranks = np.arange(cluster.nodes) * cluster.per_node + np.arange(cluster.nodes) % cluster.per_node
    edge = start + (wanted.samples - start) // cluster.batch * cluster.batch - cluster.batch  # over the epoch's end
    return {
        "what": "batches", "lanes": order.lanes, "ranks": cluster.ranks, "nodes": cluster.nodes, "batch": cluster.batch,
        "from": start, "batch_cpu_s": seconds, **balance.found(), "stretch": over_a_stretch(stretch, cluster),
        "ranks_compared": len(ranks), "samples_compared": scale_order.as_ranks_read(stream, cluster, edge, 3, ranks),
    }  # fmt: skip


def cache_part(wanted: Scale) -> Iterator[dict[str, Any]]:
    """Working sets by lanes and window; then a node's cache through the windows of an epoch and into the next one."""
    cluster, counts = wanted.cluster, wanted.counts()
    sizes = image_sizes(wanted.samples // wanted.shards)
    whole = np.array([scale.places(row)[1] for row in sizes], np.int64)
    shard_bytes = whole[np.arange(wanted.shards) % len(whole)]
    lined = cluster.batch
    asked = [(64, 1024), (64, 8192), (64, WINDOW), (512, WINDOW), (4096, WINDOW)]
    for lanes, window in [*asked, (lined, 4096), (lined, 16384), (lined, WINDOW), (lined, 4 * WINDOW)]:
        say(f"cache: working set of {lanes} lanes, windows of {window}")
        yield {"what": "working set", **scale_cache.lined_up(counts, cluster, lanes, window, shard_bytes, nodes=4)}
    pace, node = scale_cache.Pace(), cluster.nodes // 5
    for lanes, in_window, windows in ((64, 8, 3), (lined, 18, 6)):
        stream = wanted.stream(lanes)
        lane = wanted.samples / lanes
        steps = max(1, round(lane / -(-lane // WINDOW) * lanes / cluster.batch / in_window))
        budgets = [int(2.5e11), int(5e11), int(1e12)]
        told = scale_cache.run(
            stream, cluster, node, shard_bytes, budgets, pace, start=0, stretches=in_window * windows, steps=steps
        )
        rows = []
        for count, row in enumerate(told):
            rows.append(row | {"steps": steps})
            if count % 36 == 0:
                say(f"cache: {lanes} lanes, stretch {count // len(budgets)} of {in_window * windows}")
        yield {
            "what": "node",
            "lanes": lanes,
            "node": node,
            "samples": wanted.samples,
            "share": cluster.batch // cluster.nodes,
            **asdict(pace),
            "rows": rows,
        }


def process_part(wanted: Scale) -> Iterator[dict[str, Any]]:
    """One rank with a whole manifest, and that memory follows the shards and not the samples."""
    with tempfile.TemporaryDirectory() as folder:
        say("process: a manifest of so many shards")
        _make(wanted, Path(folder))
        for lanes in (64, wanted.cluster.batch):
            say(f"process: one rank, {lanes} lanes")
            asked = (folder, wanted.ranks, wanted.cluster.batch, wanted.ranks // 3, lanes, WINDOW, 200)
            yield {"what": "rank", "lanes": lanes, **_apart("scale_process", *asked)}
    shards = (wanted.shards // 100, wanted.shards // 10, wanted.shards)
    for samples, number in [(wanted.samples // 100, shards[1]), *((wanted.samples, number) for number in shards)]:
        say(f"process: order of {samples} samples in {number} shards")
        yield {"what": "synthetic", "samples": samples, **_apart("scale", "synthetic", samples, number)}


def _make(of: Scale, folder: Path) -> None:
    """The manifest that a rank opens, behind a url where nothing answers."""
    per_shard = of.samples // of.shards
    scale.make(folder, of.shards, per_shard, image_sizes(per_shard), "http://127.0.0.1:9/")


def monitor_part(wanted: Scale) -> Iterator[dict[str, Any]]:
    say("monitor: target files, pages, Prometheus")
    yield {"what": "monitor", "ranks": wanted.ranks, **scale_monitor.measure(wanted.cluster, wanted.taken)}


def checkpoints_part(wanted: Scale) -> Iterator[dict[str, Any]]:
    say("checkpoints: files of every recipe, stage and number of ranks")
    found = scale_checkpoints.table(wanted.worlds, wanted.cluster.per_node, scale_checkpoints.Assumed())
    yield {"what": "checkpoints", **found}


def _apart(module: str, *arguments: Any) -> dict[str, Any]:
    command = [sys.executable, "-m", f"{__package__}.{module}", *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main(arguments: list[str]) -> None:
    """What the command line asks for."""
    given = argparse.ArgumentParser(
        prog="gristmill.ops.bench.scale", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    given.add_argument("--ranks", type=int, default=4096, help="in nodes of eight")
    given.add_argument("--samples", type=float, default=1e10, help="of the data set")
    given.add_argument("--shards", type=float, help="of the data set (default: 10,000 samples each)")
    given.add_argument("--sampled", type=int, default=2048, help="batches that are looked at")
    given.add_argument("--only", choices=PARTS, action="append", help="these parts")
    given.add_argument("--show", action="store_true", help="nothing new: plot and page of what --out holds")
    given.add_argument("--out", type=Path, help="JSON, a row a finding")
    given.add_argument("--plot", type=Path, help="draw the rows into this PNG")
    given.add_argument("--doc", type=Path, help="write the tables between the marks of this page")
    asked = given.parse_args(arguments)
    shards = int(asked.shards or asked.samples // 10_000)
    if asked.ranks < 16 or asked.ranks % 8:
        given.error(f"--ranks {asked.ranks}: name a multiple of 8, the ranks of a node, and two nodes at least")
    wanted = Scale(asked.ranks, int(asked.samples), shards, sampled=asked.sampled)
    if not 0 < shards <= wanted.samples or wanted.samples < 32 * wanted.cluster.batch:
        given.error(
            f"--samples {asked.samples:g} in {shards} shards: name a sample a shard at least, and the "
            f"{32 * wanted.cluster.batch} of 32 batches of {asked.ranks} ranks"
        )
    rows = [json.loads(line) for line in asked.out.read_text().splitlines()] if asked.out and asked.out.exists() else []
    parts = {"order": order_part, "cache": cache_part, "process": process_part, "monitor": monitor_part}
    parts |= {"elastic": elastic_part, "checkpoints": checkpoints_part}
    for part in PARTS:
        if asked.show or (asked.only and part not in asked.only):
            continue
        begin = time.perf_counter()
        found = [{"part": part, **row} for row in parts[part](wanted)]
        rows = [row for row in rows if row["part"] != part] + found
        rows.append({"part": part, "what": "took", "wall_s": time.perf_counter() - begin})
        if asked.out:
            asked.out.write_text("".join(json.dumps(row) + "\n" for row in rows))
        else:
            print("\n".join(map(json.dumps, found)))
        say(f"{part}: done")
    if asked.doc:
        from .scale_table import fill

        fill(rows, asked.doc)
    if asked.plot:
        from .scale_plot import draw

        draw(rows, asked.plot)
