"""k-nearest-neighbour classification by weighted vote, the probe that needs no training and has nothing to tune.

The protocol is that of DINO and Mugs (Wu et al., arXiv 1805.01978, section 3.4): features of unit length, cosine
similarity s, the k nearest reference images vote for their class with weight exp(s / T). Similarities are computed in
blocks over queries and references with a running top-k, so that memory does not grow with the data set.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...models.products import product

BLOCK = 1024  # queries at once
REFERENCES = 65536  # references at once: 256 MiB of fp32 similarities a block


def unit(features: Tensor) -> Tensor:
    """Rows of [n, d] scaled to unit length, in fp32 or better; a zero row stays zero.

    Raises ValueError for another shape, no rows, or non-finite values: a vote among NaN would look like a result.
    """
    if features.ndim != 2 or not len(features):
        raise ValueError(f"features must be [n, d] with n > 0, not {tuple(features.shape)}")
    if not bool(torch.isfinite(features).all()):
        bad = int((~torch.isfinite(features)).any(1).sum())
        raise ValueError(f"{bad} of {len(features)} feature rows hold NaN or infinity, so they have no neighbours")
    return F.normalize(features if features.dtype == torch.float64 else features.float(), dim=1)


@torch.no_grad()
def nearest(
    reference: Tensor, query: Tensor | None = None, k: int = 20, *, block: int = BLOCK, references: int = REFERENCES
) -> tuple[Tensor, Tensor]:
    """The k most similar reference rows of each query: (cosine [n, k] descending, index int64 [n, k]).

    With `query=None` the references ask each other, and no row finds itself (leave one out). k is cut to what there is.
    """
    rows = unit(reference)
    alone = query is None
    asked = rows if query is None else unit(query).to(rows)
    k = min(k, len(rows) - alone)
    if k < 1:
        raise ValueError(f"no neighbours to find: {len(rows)} reference rows, k = {k}")
    similarity, index = [], []
    for start in range(0, len(asked), block):
        part = asked[start : start + block]
        best = part.new_full((len(part), 0), 0.0)
        where = torch.zeros((len(part), 0), dtype=torch.int64, device=part.device)
        for first in range(0, len(rows), references):
            scores = product(part, rows[first : first + references])
            if alone:
                own = torch.arange(start, start + len(part), device=part.device) - first
                inside = ((own >= 0) & (own < scores.shape[1])).nonzero()[:, 0]
                scores[inside, own[inside]] = -torch.inf
            values, places = scores.topk(min(k, scores.shape[1]), dim=1)
            best, where = torch.cat([best, values], 1), torch.cat([where, places + first], 1)
            best, keep = best.topk(min(k, best.shape[1]), dim=1)
            where = where.gather(1, keep)
        similarity.append(best)
        index.append(where)
    return torch.cat(similarity), torch.cat(index)


def vote(similarity: Tensor, labels: Tensor, classes: int, temperature: float) -> Tensor:
    """Votes [n, classes] of k neighbours with these similarities [n, k] and labels int64 [n, k].

    Weights are exp((s - s_max) / T): the common factor cancels and nothing overflows at small T.
    """
    weights = ((similarity - similarity.amax(1, keepdim=True)) / temperature).exp()
    return weights.new_zeros(len(labels), classes).scatter_add_(1, labels, weights)


@torch.no_grad()
def knn_predict(
    reference: Tensor,
    labels: Tensor,
    query: Tensor | None = None,
    *,
    k: int = 20,
    temperature: float = 0.07,
    block: int = BLOCK,
) -> Tensor:
    """Predicted class, int64 [n], of each query; labels are int64 [m] >= 0. Without `query`, leave one out.

    Of equal votes the lower class wins. k = 20 and T = 0.07 are DINO's defaults; Mugs reports the best of several k.
    """
    if labels.shape != (len(reference),) or int(labels.min()) < 0:
        raise ValueError(f"labels must be [{len(reference)}] and not negative, not {tuple(labels.shape)}")
    similarity, index = nearest(reference, query, k, block=block)
    labels = labels.to(index.device)
    classes = int(labels.max()) + 1
    parts = zip(similarity.split(block), index.split(block), strict=True)
    return torch.cat([vote(s, labels[i], classes, temperature).argmax(1) for s, i in parts])


def knn_accuracy(
    reference: Tensor,
    labels: Tensor,
    query: Tensor | None = None,
    query_labels: Tensor | None = None,
    *,
    k: int = 20,
    temperature: float = 0.07,
    block: int = BLOCK,
) -> float:
    """Share of queries whose predicted class is theirs, 0 to 1. Without `query`, leave one out."""
    if (query is None) != (query_labels is None):
        raise ValueError("query and query_labels come together, or both are left out for leave-one-out")
    predicted = knn_predict(reference, labels, query, k=k, temperature=temperature, block=block)
    truth = labels if query_labels is None else query_labels
    return float((predicted == truth.to(predicted.device)).double().mean())
