"""Retrieval: does an image find the other images of its instance (or class) first?

Mean average precision looks at the whole ranking by cosine similarity, recall@k at its head. Equal similarities are
one place in the ranking, as in scikit-learn's average precision, and recall takes its expectation over their order; so
features that collapsed to one point score what chance scores, whatever order the images are stored in.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...models.products import product
from .knn import unit

ELEMENTS = 1 << 22  # similarities sorted at once; the sort and its sums hold some 60 bytes for each


@dataclass(frozen=True)
class Retrieval:
    """`mean_average_precision` and `recall[k]`, 0 to 1, over the `queries` that have something to find.

    `lonely` queries have no other image of their class among the references and are left out.
    """

    mean_average_precision: float
    recall: dict[int, float]
    queries: int
    lonely: int


@torch.no_grad()
def retrieve(
    reference: Tensor,
    labels: Tensor,
    query: Tensor | None = None,
    query_labels: Tensor | None = None,
    *,
    recall_at: Sequence[int] = (1, 5),
    block: int | None = None,
) -> Retrieval:
    """Rank all references [m, d] for each query [n, d]; those with its label (int64 [m], [n]) are what it looks for.

    Without `query`, each reference looks for the others (leave one out). Memory is some 60 bytes x `block` x m.
    Raises ValueError if no query has anything to find.
    """
    if (query is None) != (query_labels is None):
        raise ValueError("query and query_labels come together, or both are left out for leave-one-out")
    rows = unit(reference)
    asked = rows if query is None else unit(query).to(rows)
    labels = labels.to(rows.device)
    wanted = labels if query_labels is None else query_labels.to(rows.device)
    if labels.shape != (len(rows),) or wanted.shape != (len(asked),):
        raise ValueError(f"{len(rows)} and {len(asked)} rows, but labels {tuple(labels.shape)}, {tuple(wanted.shape)}")
    block = block or max(1, ELEMENTS // len(rows))
    precisions, hits, lonely = [], {k: [] for k in recall_at}, 0
    for start in range(0, len(asked), block):
        scores = product(asked[start : start + block], rows)
        relevant = wanted[start : start + block, None] == labels
        if query is None:
            # Itself goes to the very end and counts as nothing found.
            own = torch.arange(len(scores), device=rows.device)
            scores[own, own + start] = -torch.inf
            relevant[own, own + start] = False
        has = relevant.any(1)
        lonely += int((~has).sum())
        if bool(has.any()):
            precision, rank = _rank(scores[has], relevant[has])
            precisions.append(precision)
            for k in recall_at:
                hits[k].append(_hit(k, *rank))
    if not precisions:
        raise ValueError(f"none of the {len(asked)} queries has a second image of its class to find")
    average = torch.cat(precisions)
    recall = {k: float(torch.cat(values).mean()) for k, values in hits.items()}
    return Retrieval(float(average.mean()), recall, len(average), lonely)


def _rank(scores: Tensor, relevant: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Average precision [b], and about the first place that holds a hit: references before it, in it, hits in it."""
    scores, order = scores.sort(dim=1, descending=True)
    found = relevant.gather(1, order).double()
    width = scores.shape[1]
    index = torch.arange(width, device=scores.device).expand_as(order)
    # Equal similarities share the place of the last of them: precision is read there for all.
    last_of_ties = torch.ones_like(relevant)
    last_of_ties[:, :-1] = scores[:, :-1] != scores[:, 1:]
    end = index.masked_fill(~last_of_ties, width).flip(1).cummin(1).values.flip(1)
    precision = found.cumsum(1).gather(1, end) / (end + 1)
    average = (precision * found).sum(1) / found.sum(1)
    best = found.argmax(1, keepdim=True)
    top = scores.gather(1, best)
    level = scores == top
    return average, ((scores > top).sum(1), level.sum(1), (found * level).sum(1))


def _hit(k: int, before: Tensor, ties: Tensor, hits: Tensor) -> Tensor:
    """Probability [b] that one of `hits` among `ties` equals is within the first k places: 1 - C(t-h, j) / C(t, j)."""
    ties, blanks = ties.double(), (ties - hits).double()
    drawn = torch.minimum((k - before).clamp(min=0).double(), ties)
    log_missed = (
        torch.lgamma(blanks + 1)
        - torch.lgamma((blanks - drawn).clamp(min=0) + 1)
        - torch.lgamma(ties + 1)
        + torch.lgamma(ties - drawn + 1)
    )
    return torch.where(drawn > blanks, 1.0, 1.0 - log_missed.exp())


def expected_average_precision(relevant: int, total: int) -> float:
    """Mean average precision of a uniformly random ranking of `total` references, `relevant` of them to be found.

    Exact: with N references, P relevant, and the harmonic number H_N, a place i holds a hit with probability P / N, and
    two given places with P (P - 1) / (N (N - 1)); summed, (H_N + (P - 1) (N - H_N) / (N - 1)) / N.
    """
    if not 0 < relevant <= total:
        raise ValueError(f"{relevant} relevant of {total} references: at least one, at most all")
    if total == 1:
        return 1.0
    harmonic = math.fsum(1.0 / np.arange(1, total + 1))
    return (harmonic + (relevant - 1) * (total - harmonic) / (total - 1)) / total
