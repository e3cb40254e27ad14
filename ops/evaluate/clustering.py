"""Do clusters of the features, found without labels, agree with the labels? Flat, and as a tree.

k-means of unit rows into as many clusters as there are classes: normalised mutual information, adjusted Rand index (Hubert
and Arabie 1985), purity. Where labels have several levels, a tree as HCSC builds it (arXiv 2202.00455, section 3.1): the finest
clusters first, then their centroids clustered into as many as the next level has classes. `hierarchy_purity_<level>` is the
share of pictures whose cluster of that level is mostly of their class.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...objectives.kmeans import kmeans
from ...shards.errors import GristmillError
from .knn import unit

Counts = NDArray[np.float64]


class ClusteringError(GristmillError, ValueError):
    """Pictures that cannot be clustered against their labels."""


@dataclass(frozen=True)
class ClusteringOptions:
    """iterations and attempts of k-means; the best attempt by its own objective counts."""

    iterations: int = 30
    attempts: int = 5


def run_clustering(
    features: Tensor,
    levels: Mapping[str, Tensor],
    level: str,
    options: ClusteringOptions | None = None,
    *,
    seed: int = 0,
) -> dict[str, float]:
    """`clustering_nmi`, `clustering_ari`, `clustering_purity` at `level`; with several levels `hierarchy_purity_<level>` each.

    features [n, d]; levels: int64 [n] each, coarse first, negative is unknown and left out. Raises ClusteringError for
    labels of one class.
    """
    options = options or ClusteringOptions()
    known = torch.stack(list(levels.values())).amin(0) >= 0 if len(levels) > 1 else levels[level] >= 0
    if not bool(known.any()) or len(levels[level][known].unique()) < 2:
        raise ClusteringError("clustering wants pictures of two classes at least; give labels that tell some apart")
    rows = unit(features)[known]
    labels = {name: codes[known].unique(return_inverse=True)[1] for name, codes in levels.items()}
    sizes = {name: int(codes.max()) + 1 for name, codes in labels.items()}

    def into(rows: Tensor, k: int, name: str) -> tuple[Tensor, Tensor]:
        found = kmeans(rows, k, seed=seed, name=name, niter=options.iterations, nredo=options.attempts, spherical=True)
        return found.centroids, found.assignment

    _, flat = into(rows, sizes[level], "clustering")
    counts = contingency(labels[level], flat)
    scores = {
        "clustering_nmi": mutual_information(counts),
        "clustering_ari": rand_index(counts),
        "clustering_purity": purity(counts),
    }
    if len(levels) > 1:
        centres, places = rows, torch.arange(len(rows))
        for name in reversed(list(labels)):  # finest first
            k = min(sizes[name], len(centres))
            centres, above = into(centres, k, f"hierarchy/{name}")
            places = above[places]
            scores[f"hierarchy_purity_{name}"] = purity(contingency(labels[name], places))
    return scores


def shuffled_clustering(levels: Mapping[str, Tensor], level: str, *, seed: int = 0) -> dict[str, float]:
    """What clusters of the classes' own sizes score that were dealt out blindly (drawn once, by `seed`)."""
    scores: dict[str, float] = {}
    draw = torch.Generator().manual_seed(seed)
    for name, codes in levels.items():
        codes = codes[codes >= 0]
        if not len(codes):
            continue
        counts = contingency(codes, codes[torch.randperm(len(codes), generator=draw)])
        if name == level:
            scores["clustering_nmi"], scores["clustering_ari"] = mutual_information(counts), rand_index(counts)
            scores["clustering_purity"] = purity(counts)
        if len(levels) > 1:
            scores[f"hierarchy_purity_{name}"] = purity(counts)
    return scores


def contingency(labels: Tensor, clusters: Tensor) -> Counts:
    """How many are of class i and in cluster j: int64 [n] and [n] to float64 [classes, clusters]."""
    wide = int(clusters.max()) + 1
    counts = torch.bincount(labels * wide + clusters, minlength=(int(labels.max()) + 1) * wide)
    return counts.view(-1, wide).double().numpy()


def purity(counts: Counts) -> float:
    """Share of the rows that are of the commonest class of their cluster."""
    return float(counts.max(0).sum() / counts.sum())


def mutual_information(counts: Counts) -> float:
    """Mutual information of classes and clusters over the mean of their entropies, 0 to 1; 1 where neither tells anything."""
    joint = counts / counts.sum()
    classes, clusters = joint.sum(1), joint.sum(0)
    there = joint > 0
    mutual = float((joint[there] * np.log(joint[there] / np.outer(classes, clusters)[there])).sum())
    mean = (_entropy(classes) + _entropy(clusters)) / 2
    return 1.0 if mean == 0 else max(0.0, mutual / mean)


def rand_index(counts: Counts) -> float:
    """Share of the pairs on which classes and clusters agree, less what chance agrees on: 0 at random, 1 at best."""
    pairs = (counts * (counts - 1)).sum() / 2
    classes, clusters = (((s := counts.sum(axis)) * (s - 1)).sum() / 2 for axis in (1, 0))
    total = counts.sum() * (counts.sum() - 1) / 2
    expected = classes * clusters / total if total else 0.0
    best = (classes + clusters) / 2
    return 1.0 if best == expected else float((pairs - expected) / (best - expected))


def _entropy(shares: Counts) -> float:
    shares = shares[shares > 0]
    return float(-(shares * np.log(shares)).sum())
