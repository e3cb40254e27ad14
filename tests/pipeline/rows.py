"""Manifests of shards that nobody reads, for the tests of orders, filters and removals."""

from pathlib import Path

import numpy as np
from gristmill.shards.manifest import Manifest, Rows
from gristmill.shards.writer import write_manifest


def write_rows(root: Path, counts: list[int]) -> Manifest:
    """A manifest with so many samples a shard; sample i of shard s is `<folder>-<1000 s + i>`, of odd little sizes."""
    shards = []
    for shard, n in enumerate(counts):
        number = np.arange(n) + 1000 * shard
        rows = Rows(
            [f"{root.name}-{i:05d}" for i in number],
            np.arange(n) * 1024 + 512,
            number + 1,
            number.astype(np.uint32),
            (number % 7 + 1).astype(np.int32),
            (number % 5 + 1).astype(np.int32),
            ["jpg"] * n,
        )
        shards.append((f"{shard}.tar", 1024 * n, rows))
    write_manifest(root, shards)
    return Manifest.open(root)
