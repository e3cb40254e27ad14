"""The tables of docs/scale.md, made of the rows that a simulation wrote; they stand between two marks of the page."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...shards.errors import GristmillError

BEGIN, END = "<!-- tables: begin -->", "<!-- tables: end -->"
SHOWN = (8, 512, 4096)  # ranks of checkpoints; the others are in the picture
STAGES = {1: "ZeRO 1, 2", 3: "ZeRO 3"}
Row = dict[str, Any]


class PageError(GristmillError):
    """A page without the marks between which tables go."""


def fill(rows: list[Row], page: Path) -> None:
    """Write the tables between the marks of `page`."""
    before, begin, rest = page.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise PageError(f"{page} lacks {BEGIN} and {END}: put them where the tables go")
    page.write_text(before + begin + "\n" + "\n".join(lines(rows)) + "\n" + end + after)


def lines(rows: list[Row]) -> Iterator[str]:
    """All tables, of the parts that there are rows of."""
    of = {what: [row for row in rows if row["what"] == what] for what in {row["what"] for row in rows}}
    yield from _proof(of.get("proof", []), of.get("batches", []))
    yield from _balance(of.get("batches", []))
    yield from _working_sets(of.get("working set", []))
    yield from _nodes(of.get("node", []))
    yield from _ranks(of.get("rank", []), of.get("synthetic", []))
    yield from _monitor(of.get("monitor", []))
    yield from _checkpoints(of.get("checkpoints", []))


def _table(title: str, head: list[str], body: list[list[str]]) -> Iterator[str]:
    if body:
        yield from ("", f"**{title}**", "", f"| {' | '.join(head)} |", "| --- |" + " ---: |" * (len(head) - 1))
        yield from (f"| {' | '.join(line)} |" for line in body)


def _three(values: dict[str, float], unit: float = 1.0, form: str = ".0f") -> str:
    """Least, mean and most."""
    return " / ".join(f"{values[what] / unit:{form}}" for what in ("least", "mean", "most"))


def _proof(proofs: list[Row], batches: list[Row]) -> Iterator[str]:
    body = [
        [f"{p['lanes']:,} lanes, epoch {p['epoch']}", f"{p['shards']:,}", f"{p['windows']:,}", f"{p['read_whole']:,}"]
        for p in proofs
    ]
    yield from _table(
        "The order taken apart", ["", "shards", "windows, checked as a tiling", "samples read whole"], body
    )
    body = [
        [
            f"{b['ranks']:,} ranks, {b['lanes']:,} lanes", f"{b['batch']:,}", f"{b['from']:,}", f"{b['batches']:,}",
            f"{b['batches'] * b['batch']:,}", f"{b['ranks_compared']:,}", f"{1e3 * b['batch_cpu_s']:.0f} ms",
        ]
        for b in batches
    ]  # fmt: skip
    head = ["", "batch", "from", "batches", "samples, each once", "ranks compared one by one", "CPU a batch"]
    yield from _table("Batches looked at", head, body)


def _balance(batches: list[Row]) -> Iterator[str]:
    body = []
    for b in batches:
        rank, node, step = b["rank_bytes"], b["node_bytes"], b["node_bytes_a_step"]
        stretch = b["stretch"]
        body.append([
            f"{b['ranks']:,} ranks, {b['lanes']:,} lanes", f"{b['rank_samples']['most_over_mean']:.3f}",
            f"{rank['most_over_mean']:.3f}", f"{node['most_over_mean']:.3f}",
            _three(step, 1e6, ".1f"),
            f"{b['node_worst_step']['mean']:.2f}", f"{b['node_shards_a_step']['mean']:.1f}",
            _three(stretch["rank_shards"]), _three(stretch["node_shards"]),
        ])  # fmt: skip
    head = [
        "most over mean", "samples a rank", "bytes a rank", "bytes a node", "MB a node and step, least / mean / most",
        "busiest node of a step", "shards a node and step", "shards a rank in 64 steps", "shards a node in 64 steps",
    ]  # fmt: skip
    yield from _table("Balance", head, body)


def _working_sets(rows: list[Row]) -> Iterator[str]:
    body = [
        [
            f"{r['lanes']:,} x {r['window']:,}", f"{r['lanes_of_a_node']:,}", f"{r['working_set']['shards']:,}",
            f"{r['working_set']['bytes'] / 1e9:,.0f}", f"{r['epoch_bytes_of_a_node']['mean'] / 1e12:,.2f}",
            f"{r['times_fetched']:.2f}",
        ]
        for r in rows
    ]  # fmt: skip
    head = [
        "lanes x window",
        "lanes of a node",
        "shards open",
        "GB open",
        "TB a node and epoch into its cache",
        "data set fetched, times",
    ]
    yield from _table("What a node's cache must hold, and what it fetches", head, body)


def _nodes(nodes: list[Row]) -> Iterator[str]:
    body = []
    for node in nodes:
        for budget in sorted({row["budget"] for row in node["rows"]}):
            for epoch, rows in by_epoch(node, budget):
                turns = sum(row["turns"] for row in rows)
                share = sum(row["hits"] for row in rows) / turns
                samples = sum(row["steps"] for row in rows) * node["share"]
                fetched = sum(row["fetched"] for row in rows) / samples
                body.append([
                    f"{node['lanes']:,} lanes, {budget / 1e9:,.0f} GB, epoch {epoch}", f"{share:.1%}",
                    f"{fetched / 1e3:,.0f}", f"{(1 - share) * 110:,.0f}",
                ])  # fmt: skip
    head = ["a node's cache", "turns that hit", "kB into the cache for each sample read", "kB beside it, in ranges"]
    yield from _table("A node's cache at work", head, body)


def by_epoch(node: Row, budget: int) -> Iterator[tuple[int, list[Row]]]:
    """(epoch, its rows) of one cache of a node."""
    mine, samples = [row for row in node["rows"] if row["budget"] == budget], node["samples"]
    for epoch in sorted({row["position"] // samples for row in mine}):
        yield epoch, [row for row in mine if row["position"] // samples == epoch]


def _ranks(ranks: list[Row], synthetic: list[Row]) -> Iterator[str]:
    body = [
        [
            f"{r['lanes']:,} lanes",
            f"{r['manifest_MB'] - r['imports_MB']:.0f}", f"{r['stream_MB'] - r['manifest_MB']:.0f}",
            f"{r['fetcher_MB'] - r['stream_MB']:.0f}", f"{r['peak_MB'] - r['imports_MB']:.0f}",
            f"{r['manifest_s']:.1f}",
            f"{r['fetcher_s']:.1f}", f"{1e3 * r['look_cpu_s']:.0f}", f"{1e3 * r['batch_cpu_s']['median']:.2f}",
            f"{r['requests'] / r['samples']:.2f}",
            _three({"mean": r["range_bytes"]["median"], **r["range_bytes"]}, 1e3),
        ]
        for r in ranks
    ]  # fmt: skip
    head = [
        "one rank", "MB: manifest", "stream", "fetcher", "at the peak", "s: manifest", "fetcher",
        "CPU ms a batch: foresight", "places and ranges", "requests a sample without a cache",
        "kB a range, least / median / most",
    ]  # fmt: skip
    yield from _table("One rank's process, imports left out", head, body)
    body = [
        [f"{s['samples']:.0e} in {s['shards']:,} shards", f"{s['added_MB']:.0f}", f"{s['seek_and_2048_ids_s']:.2f}"]
        for s in synthetic
    ]
    yield from _table("The order alone, by size", ["samples", "MB", "s to seek and locate 2,048"], body)


def _monitor(rows: list[Row]) -> Iterator[str]:
    for r in rows:
        prometheus = r["prometheus"]
        body = [
            [
                "target files",
                f"{r['target_files']:,}, {r['target_bytes'] / 1e3:,.0f} kB; {r['targets_write_s']:.1f} s to write all",
            ],
            ["series of a rank with everything on", f"{r['series_of_a_rank']:,}"],
            ["series of all", f"{r['series']:,}"],
            [
                "a scrape of all nodes",
                f"{r['scrape_bytes'] / 1e6:,.0f} MB; {r['node_page_bytes'] / 1e3:,.0f} kB a node",
            ],
            ["samples a second, every 15 s", f"{r['samples_per_s']:,.0f}"],
        ]
        if "missing" not in prometheus:
            body += [
                ["a real Prometheus knows all targets after", f"{prometheus['targets_known_s']:.1f} s"],
                [
                    f"{prometheus['nodes_taken']} nodes taken in, {prometheus['series_held']:,} series",
                    f"{prometheus['resident_MB']:,.0f} MB, {prometheus['cpu_s']:.1f} CPU s "
                    f"in {prometheus['wall_s']:.0f} s",
                ],
            ]
        yield from _table("Watching", ["", f"{r['ranks']:,} ranks"], body)


def _checkpoints(tables: list[Row]) -> Iterator[str]:
    for found in tables:
        body = [
            [
                f"{r['recipe'].removeprefix('multigrain-')}, {STAGES[r['stage']]}, {r['ranks']:,} ranks",
                f"{r['rank_bytes']['mean'] / 1e6:,.1f}", f"{(r['bytes'] + r['whole_bytes']) / 1e9:.1f}",
                f"{r['files']:,}", f"{r['index_rows']:,.0f}", f"{r['state_bytes'] / 1e6:,.1f}",
                f"{r['stall_s']:.2f}", f"{r['writing_s']:.1f}",
                f"{r['publishing_s']:.1f}", f"{r['interval_s']:,.0f}",
            ]
            for r in found["rows"]
            if r["stage"] != 2 and r["ranks"] in SHOWN
        ]  # fmt: skip
        head = [
            "checkpoint", "MB a rank", "GB in all", "files", "rows of the index", "MB of state.json",
            "s: the step waits", "writing", "publishing", "from one to the next",
        ]  # fmt: skip
        yield from _table("Checkpoints: bytes by layout, times by the assumptions below", head, body)
        cost, notes = found["composing"], found["gathering_cpu_s"].items()
        body = [[f"{int(ranks):,} ranks", f"{seconds:.2f}"] for ranks, seconds in notes]
        yield from _table("Rank 0 reads the notes of all ranks, from a local disk", ["", "CPU s"], body)
        yield ""
        took = f"{cost['compose_s']:.1f} s to compose, each rank {cost['parse_s']:.1f} s to read"
        yield f"Of the index, a million rows take rank 0 {took}."
