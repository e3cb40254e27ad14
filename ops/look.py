"""`gristmill order`: who sees what at a step, the proof that an epoch shows every image exactly once, and how well it mixes.

All of it asks the stream that training reads (pipeline/stream.py), filters, mixture and removed samples included, and
opens no shard. The proof counts; it does not trust the arithmetic that it is about.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import numpy as np

from ..pipeline.quality import WorkingSetError, check_together, compare, size, suggest, working_set
from ..pipeline.stream import Source, Stream
from ..shards.manifest import Manifest
from .progress import Meter

CHUNK = 1 << 20  # positions located at once while proving: 50 MB


def show_order(
    folders: Path | Sequence[Path],
    *,
    step: int,
    batch: int,
    ranks: int,
    seed: int,
    lanes: int,
    window: int,
    prove: bool,
    quality: bool = False,
    where: str = "",
    weights: Sequence[float] = (),
    ranks_per_node: int | None = None,
    cache: int | None = None,
    as_json: bool = False,
) -> int:
    """Print the images of one step by rank, or walk an epoch, or measure the shuffling; returns the exit code.

    Of several folders, `weights` (1 each by default) mix them. `cache` is the budget in bytes that the working set of a
    node with `ranks_per_node` ranks (default: all) must fit into: the exit code is 1 if it does not.
    """
    folders = [folders] if isinstance(folders, Path) else list(folders)
    if weights and len(weights) != len(folders):
        raise click.UsageError(f"{len(weights)} weights for {len(folders)} data sets: give one --weight for each")
    if batch % ranks:
        raise click.UsageError(f"--batch {batch} cannot be shared equally by --ranks {ranks}")
    if ranks_per_node is not None and ranks % ranks_per_node:
        raise click.UsageError(f"--ranks {ranks} is no multiple of --ranks-per-node {ranks_per_node}")
    manifests = [Manifest.open(folder) for folder in folders]
    sources = []
    for manifest, weight in zip(manifests, weights or [1.0] * len(folders), strict=True):
        with Meter("where", manifest.samples, quiet=as_json or not where) as meter:
            sources.append(Source.of(manifest, where=where, weight=weight, progress=meter))
    stream = Stream(sources, seed, lanes, window)
    about = _about(stream)
    good = True
    if prove:
        about["proof"], good = _prove(stream, quiet=as_json)
    if quality or cache is not None:
        about["quality"], fits = _quality(stream, manifests, batch, ranks, ranks_per_node or ranks, cache)
        good = good and fits
    if not prove and not quality and cache is None:
        about |= _step(stream, manifests, step, batch, ranks)
    if as_json:
        click.echo(json.dumps(about))
    else:
        for line in _lines(about):
            click.echo(line)
    return 0 if good else 1


def suggested(
    folders: Sequence[Path], lanes: int | None, window: int | None, cache: int | None = None
) -> dict[str, int]:
    """Lanes and window as given, else as suits the largest of the data sets and the cache."""
    if lanes is None or window is None:
        manifest = max((Manifest.open(folder) for folder in folders), key=lambda m: m.samples)
        found = suggest(manifest.counts, shard_bytes=manifest.shard_bytes, budget=cache)
        lanes, window = found[0] if lanes is None else lanes, found[1] if window is None else window
    return {"lanes": lanes, "window": window}


def _about(stream: Stream) -> dict[str, Any]:
    """What there is, a data set each."""
    return {
        "sources": [
            {
                "name": source.name,
                "shards": len(source.counts),
                "samples": int(source.counts.sum()),
                "selected": int(source.selected.sum()),
                "unknown": source.selection.unknown if source.selection else 0,
                "removed": source.removed.count if source.removed else 0,
                "weight": source.weight,
            }
            for source in stream.sources
        ]
    }


def _step(stream: Stream, manifests: list[Manifest], step: int, batch: int, ranks: int) -> dict[str, Any]:
    """The images of one step."""
    start = step * batch
    shards, rows = stream.locate(np.arange(start, start + batch))
    removed = stream.removed(shards, rows)
    sources, inside = stream.split(shards)
    images = []
    for index in range(batch):
        source, shard, row = int(sources[index]), int(inside[index]), int(rows[index])
        images.append(
            {
                "position": start + index,
                "rank": index // (batch // ranks),
                "source": stream.sources[source].name,
                "shard": manifests[source].urls[shard],
                "row": row,
                "key": manifests[source].rows(shard).keys[row],
                "removed": bool(removed[index]),
            }
        )
    epochs = stream.epochs(start)
    return {"step": step, "batch": batch, "epochs": epochs, "distinct_shards": len(np.unique(shards)), "images": images}


def _prove(stream: Stream, *, quiet: bool) -> tuple[list[dict[str, Any]], bool]:
    """Count every sample over each data set's first epoch, and that its own positions come one after the other."""
    proof = []
    with Meter("prove", stream.samples, quiet=quiet) as meter:
        done = 0
        for source, order in zip(stream.sources, stream.orders, strict=True):
            base = np.cumsum(source.counts) - source.counts
            seen = np.zeros(int(source.counts.sum()), np.uint8)
            for start in range(0, order.samples, CHUNK):
                stop = min(start + CHUNK, order.samples)
                shards, ranks = order.locate(np.arange(start, stop))
                # Two of a kind in one chunk must count twice, and 256 of them must not look like none.
                places, times = np.unique(base[shards] + source.rows(shards, ranks), return_counts=True)
                seen[places] = np.minimum(seen[places] + times, 255)
                meter(done + stop, stream.samples)
            done += order.samples
            wanted = np.zeros(len(seen), bool)
            for shard in range(len(source.counts)):
                rows = np.arange(source.counts[shard])
                inside = slice(int(base[shard]), int(base[shard] + source.counts[shard]))
                wanted[inside] = True if source.selection is None else source.selection.holds(shard, rows)
            proof.append(
                {
                    "name": source.name,
                    "positions": order.samples,
                    "once": int((seen[wanted] == 1).sum()),
                    "never": int((seen[wanted] == 0).sum()),
                    "more": int((seen[wanted] > 1).sum()),
                    "filtered": int((~wanted).sum()),
                    "filtered_but_seen": int((seen[~wanted] > 0).sum()),
                    "out_of_turn": 0,
                }
            )
    if len(stream.sources) > 1:
        reached = np.zeros(len(stream.sources), np.int64)
        for start in range(0, stream.samples, CHUNK):
            which, own = stream.mixing.at(np.arange(start, min(start + CHUNK, stream.samples)))
            for number, entry in enumerate(proof):
                mine = own[which == number]
                entry["out_of_turn"] += int((mine != reached[number] + np.arange(len(mine))).sum())
                reached[number] += len(mine)
        for number, entry in enumerate(proof):
            entry["share"] = float(reached[number] / stream.samples)
    good = all(
        entry["once"] == entry["positions"]
        and not entry["never"] + entry["more"] + entry["filtered_but_seen"] + entry["out_of_turn"]
        for entry in proof
    )
    return proof, good


def _quality(
    stream: Stream,
    manifests: list[Manifest],
    batch: int,
    ranks: int,
    ranks_per_node: int,
    cache: int | None,
) -> tuple[list[dict[str, Any]], bool]:
    """Shuffle quality and working set of each data set, and whether a cache that is given holds them."""
    answers, fits = [], True
    orders, shard_bytes = [order.latest for order in stream.orders], [manifest.shard_bytes for manifest in manifests]
    how: dict[str, Any] = {"batch": batch, "ranks": ranks, "ranks_per_node": ranks_per_node}
    for source, order, sizes in zip(stream.sources, orders, shard_bytes, strict=True):
        held = working_set(order, sizes, **how if len(orders) == 1 else {})
        lanes, window = suggest(source.selected, shard_bytes=sizes, budget=cache)
        answers.append(
            {
                "name": source.name,
                "measures": [asdict(row) for row in compare(order, batch=batch)],
                "working_set": asdict(held),
                "suggested": {"lanes": lanes, "window": window},
            }
        )
    if cache is not None:
        try:
            check_together(orders, shard_bytes, cache, **how)
        except WorkingSetError as error:
            answers[0]["refused"], fits = str(error), False
    return answers, fits


def _lines(about: dict[str, Any]) -> list[str]:
    """The same for people."""
    lines = []
    for source in about["sources"]:
        parts = [f"{source['name']}: {source['samples']} images in {source['shards']} shards"]
        if source["selected"] != source["samples"]:
            parts.append(f"{source['selected']} selected")
        if source["unknown"]:
            parts.append(f"{source['unknown']} left out for want of a value (`gristmill index --deep` finds sizes)")
        if source["removed"]:
            parts.append(f"{source['removed']} removed, their slots filled by others")
        if len(about["sources"]) > 1:
            parts.append(f"weight {source['weight']:g}")
        lines.append("; ".join(parts))
    if "images" in about:
        first, last = about["images"][0]["position"], about["images"][-1]["position"]
        epochs = ", ".join(map(str, about["epochs"]))
        lines.append(
            f"step {about['step']} reads positions {first} to {last}, epoch {epochs}; {about['distinct_shards']} shards in "
            "one batch"
        )
        several = len(about["sources"]) > 1
        for image in about["images"]:
            where = f"{image['source']}/{image['shard']}" if several else image["shard"]
            gone = "  (removed: a substitute takes its slot)" if image["removed"] else ""
            lines.append(f"{image['position']:>12}  rank {image['rank']:<4} {where}  {image['key']}{gone}")
    for entry in about.get("proof", []):
        lines.append(
            f"{entry['name']}: one epoch of {entry['positions']} positions: {entry['once']} images exactly once, "
            f"{entry['never']} never, {entry['more']} more than once"
        )
        if entry["filtered"]:
            lines.append(f"  {entry['filtered']} filtered out, {entry['filtered_but_seen']} of them seen")
        if "share" in entry:
            lines.append(f"  share of the mixture {entry['share']:.4f}; {entry['out_of_turn']} positions out of turn")
    for entry in about.get("quality", []):
        lines += _table(entry)
    return lines


def _table(entry: dict[str, Any]) -> list[str]:
    rows = entry["measures"]
    held, hint = entry["working_set"], entry["suggested"]
    lines = [
        f"{entry['name']}: first {rows[0]['samples']} positions in batches of {rows[0]['batch']}; displacement and spread "
        "are 1 for a full permutation",
        f"{'':24}{'shards/batch':>13}{'entropy, bits':>15}{'displacement':>14}{'spread':>9}{'lag entropy, bits':>19}",
    ]
    lines += [
        f"{row['name']:24}{row['shards']:13.1f}{row['shard_entropy']:15.2f}{row['displacement']:14.3f}"
        f"{row['spread']:9.4f}{row['lag_entropy']:19.2f}"
        for row in rows
    ]
    lines.append(
        f"working set of a node: {held['shards']} shards, {size(held['bytes'])} ({held['lanes']} lanes); suggested for "
        f"this data set: lanes={hint['lanes']} window={hint['window']}"
    )
    if "refused" in entry:
        lines.append(f"refused: {entry['refused']}")
    return lines
