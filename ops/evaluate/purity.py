"""Neighbour purity: how many of an image's nearest neighbours are of its kind, the probe of local groups.

A local group is an image with its nearest neighbours; what they are worth is the share of them that belong together.
Unlike a k-NN vote, which is right once the wanted class leads, each neighbour counts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .knn import nearest


@torch.no_grad()
def neighbour_purity(
    reference: Tensor,
    labels: Tensor,
    query: Tensor | None = None,
    query_labels: Tensor | None = None,
    *,
    k: int = 20,
) -> float:
    """Share of same-label rows among the k nearest references [m, d] of each query [n, d], 0 to 1, averaged.

    labels int64 [m] and [n]. Without `query` the references ask each other, leaving one out. ValueError if labels and
    rows differ in number.
    """
    wanted = _asked(reference, labels, query, query_labels)
    _, index = nearest(reference, query, k)
    return float((labels.to(index.device)[index] == wanted.to(index.device)[:, None]).double().mean())


def expected_purity(labels: Tensor, query_labels: Tensor | None = None) -> float:
    """Purity of neighbours drawn at random: the mean over the queries of their label's share of the references."""
    wanted = labels if query_labels is None else query_labels
    alone = int(query_labels is None)
    counts = torch.bincount(labels, minlength=int(wanted.max()) + 1)
    return float(((counts[wanted] - alone).double() / (len(labels) - alone)).mean())


def _asked(reference: Tensor, labels: Tensor, query: Tensor | None, query_labels: Tensor | None) -> Tensor:
    if (query is None) != (query_labels is None):
        raise ValueError("query and query_labels come together, or both are left out for leave-one-out")
    wanted = labels if query_labels is None else query_labels
    rows = len(reference), len(reference if query is None else query)
    if labels.shape != rows[:1] or wanted.shape != rows[1:]:
        raise ValueError(f"{rows[0]} and {rows[1]} rows, but labels {tuple(labels.shape)}, {tuple(wanted.shape)}")
    return wanted
