"""How evenly batches fall on the ranks and nodes of a cluster: samples, bytes, shards, of the steps looked at."""

from __future__ import annotations

from typing import Any

import numpy as np

from ...pipeline.order import Ints
from .scale_order import Cluster

DRAWN = 512  # shards whose images' sizes are drawn; others repeat them, as the manifest of scale.py's `make` does
MEAN = 110e3  # bytes of an image file: ImageNet-1k's, as `gristmill plan` assumes
SPREAD = 0.6  # of the logarithm of a size


def image_sizes(per_shard: int) -> Ints:
    """Bytes of the images of the first shards, int64 [512, per_shard]: lognormal, the same at every call."""
    drawn = np.random.default_rng(0).standard_normal((DRAWN, per_shard))
    return np.clip(MEAN * np.exp(SPREAD * drawn - SPREAD**2 / 2), 2e3, 2e6).astype(np.int64)


class Balance:
    """Adds up what each rank reads, batch by batch; `add` takes batches as scale_order.batch gives them."""

    def __init__(self, cluster: Cluster, sizes: Ints) -> None:
        self.cluster, self._sizes, self.batches = cluster, sizes, 0
        self._samples = np.zeros(cluster.ranks, np.int64)
        self._bytes = np.zeros(cluster.ranks, np.int64)
        self._node_bytes: list[Ints] = []  # [nodes] of each step
        self._rank_worst: list[float] = []
        self._shards: list[Ints] = []  # [nodes], distinct ones of each step

    def add(self, shard: Ints, row: Ints) -> None:
        cluster = self.cluster
        size = self._sizes[shard % len(self._sizes), row]
        ranks = size.reshape(cluster.ranks, -1).sum(1)
        self._samples += cluster.batch // cluster.ranks
        self._bytes += ranks
        self._node_bytes.append(ranks.reshape(cluster.nodes, -1).sum(1))
        self._rank_worst.append(float(ranks.max() / ranks.mean()))
        by_node = np.sort(shard.reshape(cluster.nodes, -1), axis=1)
        self._shards.append(1 + (np.diff(by_node, axis=1) > 0).sum(1))
        self.batches += 1

    def found(self) -> dict[str, Any]:
        """Least, mean and most over ranks or nodes; `worst_step`: most over mean of one step, over all steps."""
        nodes = np.stack(self._node_bytes)
        steps = nodes.max(1) / nodes.mean(1)
        return {
            "batches": self.batches,
            "rank_samples": _three(self._samples),
            "rank_bytes": _three(self._bytes),
            "node_bytes": _three(nodes.sum(0)),
            "node_bytes_a_step": _three(nodes),
            "node_worst_step": {"mean": float(steps.mean()), "most": float(steps.max())},
            "rank_worst_step": {"mean": float(np.mean(self._rank_worst)), "most": max(self._rank_worst)},
            "node_shards_a_step": _three(np.stack(self._shards)),
        }


def over_a_stretch(shards: list[Ints], cluster: Cluster) -> dict[str, Any]:
    """Distinct shards that ranks and nodes meet over successive batches."""
    all_of_them = np.stack(shards)  # [batches, batch]
    found = {}
    for what, owners in (("rank", cluster.ranks), ("node", cluster.nodes)):
        own = np.sort(all_of_them.reshape(len(shards), owners, -1).swapaxes(0, 1).reshape(owners, -1), axis=1)
        found[f"{what}_shards"] = _three(1 + (np.diff(own, axis=1) > 0).sum(1))
    return {"batches": len(shards), **found}


def _three(values: Ints) -> dict[str, float]:
    mean = float(values.mean())
    return {
        "least": int(values.min()),
        "mean": mean,
        "most": int(values.max()),
        "most_over_mean": float(values.max()) / mean,
    }
