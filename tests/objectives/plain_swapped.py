"""SwAV and DeepCluster v2 written down plainly from their formulas (arXiv 2006.09882, section 3 and appendix).

One crop, one pair, one row at a time, in the precision that comes in; nothing of gristmill is used.
"""

import torch
from torch import Tensor


def sinkhorn(scores: Tensor, epsilon: float, iterations: int) -> Tensor:
    """Codes [n, K] of scores [n, K]: eq. 5, rows and columns scaled in turn, rows last."""
    q = torch.exp(scores / epsilon)
    n, k = q.shape
    q = q / q.sum()
    for _ in range(iterations):
        q = q / q.sum(0, keepdim=True) / k
        q = q / q.sum(1, keepdim=True) / n
    return q * n


def swapped_loss(
    scores: Tensor,
    assigning: int,
    *,
    temperature: float = 0.1,
    epsilon: float = 0.05,
    iterations: int = 3,
    queue: Tensor | None = None,
) -> Tensor:
    """Of scores [C, B, K]; the first `assigning` crops get codes, balanced with the queue's scores [assigning, Q, K]."""
    crops, batch, _ = scores.shape
    total = scores.new_zeros(())
    for i in range(assigning):
        with torch.no_grad():
            rows = scores[i] if queue is None else torch.cat([queue[i], scores[i]])
            codes = sinkhorn(rows, epsilon, iterations)[-batch:]
        over_crops = scores.new_zeros(())
        for v in range(crops):
            if v != i:
                foretold = torch.softmax(scores[v] / temperature, 1)
                over_crops = over_crops - (codes * foretold.log()).sum(1).mean()
        total = total + over_crops / (crops - 1)
    return total / assigning


def spherical_kmeans(rows: Tensor, start: Tensor, iterations: int) -> tuple[Tensor, list[int]]:
    """Centroids and each row's own after `iterations` moves; no cluster may lose all of its rows."""
    centroids = [c / c.norm() for c in start]
    for turn in range(iterations + 1):
        assignment = [max(range(len(centroids)), key=lambda k, x=x: float(x @ centroids[k])) for x in rows]
        if turn < iterations:
            for k in range(len(centroids)):
                mean = torch.stack([x for x, a in zip(rows, assignment, strict=True) if a == k]).mean(0)
                centroids[k] = mean / mean.norm()
    return torch.stack(centroids), assignment


def clusters_loss(rows: Tensor, centroids: list[Tensor], labels: list[list[int]], temperature: float = 0.1) -> Tensor:
    """Of unit rows [C, B, d]: each crop's cross-entropy against its image's cluster, mean over rows, then over heads."""
    losses = []
    for prototypes, label in zip(centroids, labels, strict=True):
        terms = [
            -torch.log_softmax(row @ prototypes.T / temperature, 0)[label[image]]
            for crop in rows
            for image, row in enumerate(crop)
        ]
        losses.append(torch.stack(terms).mean())
    return torch.stack(losses).mean()
