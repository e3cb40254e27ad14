"""`gristmill order`: who sees what at a step, and the proof that an epoch shows every image exactly once."""

from __future__ import annotations

from pathlib import Path

import click
import numpy as np

from ..pipeline.order import Order
from ..shards.manifest import Manifest

CHUNK = 1 << 20  # positions located at once while proving: 50 MB


def show_order(
    folder: Path, *, step: int, batch: int, ranks: int, seed: int, lanes: int, window: int, prove: bool
) -> int:
    """Print the images of one step by rank, or walk an epoch; returns the exit code."""
    manifest = Manifest.open(folder)
    order = Order(manifest.counts, seed, lanes, window)
    if prove:
        return _prove(manifest, order)
    if batch % ranks:
        raise click.UsageError(f"--batch {batch} cannot be shared equally by --ranks {ranks}")
    start = step * batch
    shards, rows = order.locate(np.arange(start, start + batch))
    click.echo(
        f"{folder}: {manifest.samples} images in {len(manifest.urls)} shards; step {step} reads positions "
        f"{start} to {start + batch - 1}, epoch {order.epoch(start)}; {len(np.unique(shards))} shards in one batch"
    )
    share = batch // ranks
    for index, (shard, row) in enumerate(zip(shards.tolist(), rows.tolist(), strict=True)):
        key = manifest.rows(shard).keys[row]
        click.echo(f"{start + index:>12}  rank {index // share:<4} {manifest.urls[shard]}  {key}")
    return 0


def _prove(manifest: Manifest, order: Order) -> int:
    """Count every sample over one epoch; exit code 0 only if each count is one."""
    base = np.concatenate([[0], np.cumsum(manifest.counts)[:-1]])
    seen = np.zeros(manifest.samples, np.uint8)
    for start in range(0, manifest.samples, CHUNK):
        shards, rows = order.locate(np.arange(start, min(start + CHUNK, manifest.samples)))
        np.add.at(seen, base[shards] + rows, 1)
    once = int((seen == 1).sum())
    click.echo(
        f"one epoch of {manifest.samples} positions: {once} images exactly once, {int((seen == 0).sum())} never, "
        f"{int((seen > 1).sum())} more than once"
    )
    return 0 if once == manifest.samples else 1
