"""All probes at once: one number per granularity, its chance level, and label-free signs where there are no labels.

Coarse and fine labels are asked by k-NN, the deepest one by retrieval (an instance has too few images to vote). Chance
is computed, not drawn: the share of the majority class, and the expected average precision of a random ranking. Numbers
appear under the same names for every `who` (teacher, pixels, random, chance), so that a table is a list of dicts.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Sequence

import numpy as np
import torch
from torch import Tensor

from ...objectives.health import feature_std, rank_me
from .knn import knn_accuracy, nearest, unit
from .retrieval import expected_average_precision, retrieve

Codes = Tensor | np.ndarray | None


class Probes(dict[str, float]):
    """Numbers by name; `skipped` says of each number that is not there why."""

    def __init__(self) -> None:
        super().__init__()
        self.skipped: dict[str, str] = {}


def run_probes(
    features_ref: Tensor,
    labels_ref: Codes,
    features_query: Tensor | None,
    labels_query: Codes,
    names: Sequence[str],
    *,
    k: int = 20,
    temperature: float = 0.07,
    only: Collection[str] = ("knn", "retrieval"),
) -> Probes:
    """Probe features [m, d] and [n, d] against labels [m, L] and [n, L], one column for each of `names`, coarse first.

    Labels are class codes that mean the same on both sides; negative is unknown and left out. One level gives
    `class_knn` and `class_retrieval`; more levels give `<level>_knn` for each but a third, and `<level>_retrieval` of
    the deepest level on which at least half of the queries have another image to find. No level: `label_free`.
    `features_query=None` asks the references themselves, leaving one out. `only`: of "knn" and "retrieval", these.
    """
    if not names:
        return label_free(features_ref if features_query is None else features_query, k=k)
    probes = Probes()
    for name, ref, query, keep_ref, keep_query, skip in _levels(probes, labels_ref, labels_query, names, "knn", only):
        if skip:
            probes.skipped[f"{name}_knn"] = skip
        elif features_query is None:
            probes[f"{name}_knn"] = knn_accuracy(features_ref[keep_ref], ref, k=k, temperature=temperature)
        else:
            probes[f"{name}_knn"] = knn_accuracy(
                features_ref[keep_ref], ref, features_query[keep_query], query, k=k, temperature=temperature
            )
    for name, ref, query, keep_ref, keep_query, _ in _levels(
        probes, labels_ref, labels_query, names, "retrieval", only
    ):
        if features_query is None:
            found = retrieve(features_ref[keep_ref], ref)
        else:
            found = retrieve(features_ref[keep_ref], ref, features_query[keep_query], query)
        probes[f"{name}_retrieval"] = found.mean_average_precision
    return probes


def chance_levels(
    labels_ref: Codes,
    labels_query: Codes,
    names: Sequence[str],
    *,
    rows: int | None = None,
    k: int = 20,
    only: Collection[str] = ("knn", "retrieval"),
) -> Probes:
    """What features without any knowledge reach, under the names that `run_probes` gives for the same labels.

    k-NN: the best constant answer, the share of the commonest class among the queries. Retrieval: the expectation over
    random rankings, averaged over the queries. Without labels, `rows` is the number of images asked, and the only
    number with a chance level is the neighbours' agreement, k / (rows - 1).
    """
    probes = Probes()
    if not names:
        if rows is not None and rows > 1:
            probes["neighbour_agreement"] = min(k, rows - 1) / (rows - 1)
        return probes
    for name, ref, query, _, _, skip in _levels(probes, labels_ref, labels_query, names, "knn", only):
        if skip:
            probes.skipped[f"{name}_knn"] = skip
        else:
            probes[f"{name}_knn"] = float(torch.bincount(ref if query is None else query).max()) / len(
                ref if query is None else query
            )
    for name, ref, query, _, _, _ in _levels(probes, labels_ref, labels_query, names, "retrieval", only):
        total, alone = len(ref), query is None
        sizes = Counter(ref.tolist())
        asked = Counter((ref if query is None else query).tolist())
        found = {label: sizes[label] - alone for label in asked if sizes[label] - alone > 0}
        weight = sum(asked[label] for label in found)
        probes[f"{name}_retrieval"] = (
            math.fsum(asked[label] * expected_average_precision(p, total - alone) for label, p in found.items())
            / weight
        )
    return probes


def label_free(features: Tensor, *, k: int = 20) -> Probes:
    """Signs of collapse in features [n, d]. They say that something was kept apart, never that it was the right thing.

    `rank_me` effective rank; `feature_std` of unit rows, near 0 when collapsed, near 1 when spread; `uniformity`
    (Wang and Isola, arXiv 2005.10242, eq. 2, t = 2; 0 is collapsed, more negative is more even);
    `neighbour_agreement`, the share of the k nearest neighbours that the even and the odd dimensions name alike.
    """
    probes = Probes()
    rows = unit(features)
    if len(rows) < 2:
        why = f"{len(rows)} image has nothing to be compared with"
        probes.skipped.update(dict.fromkeys(("rank_me", "feature_std", "uniformity", "neighbour_agreement"), why))
        return probes
    probes["rank_me"] = rank_me(features)
    probes["feature_std"] = feature_std(features)
    probes["uniformity"] = uniformity(rows)
    if features.shape[1] < 2:
        probes.skipped["neighbour_agreement"] = "features of one dimension have no two halves"
    else:
        probes["neighbour_agreement"] = neighbour_agreement(features[:, 0::2], features[:, 1::2], k)
    return probes


@torch.no_grad()
def uniformity(rows: Tensor, block: int = 1024) -> float:
    """log of the mean of exp(-2 |x - y|^2) over all pairs of different unit rows [n, d]."""
    parts = []
    for start in range(0, len(rows), block):
        exponent = (4.0 * (rows[start : start + block] @ rows.T) - 4.0).double()  # -2 |x - y|^2 of unit vectors
        own = torch.arange(len(exponent), device=rows.device)
        exponent[own, own + start] = -torch.inf
        parts.append(exponent.flatten().logsumexp(0))
    return float(torch.stack(parts).logsumexp(0)) - math.log(len(rows) * (len(rows) - 1))


def neighbour_agreement(one: Tensor, other: Tensor, k: int = 20) -> float:
    """Share of the k nearest neighbours that two features [n, d1], [n, d2] of the same images have in common."""
    _, here = nearest(one, k=k)
    _, there = nearest(other, k=k)
    return float((here[:, :, None] == there[:, None, :]).any(2).double().mean())


def levels_read(labels_ref: Codes, labels_query: Codes, names: Sequence[str]):
    """The levels that a vote reads, all but a third: (name, codes ref, codes query, kept rows ref and query, reason to skip)."""
    yield from _levels(Probes(), labels_ref, labels_query, names, "knn")


def _levels(
    probes: Probes,
    labels_ref: Codes,
    labels_query: Codes,
    names: Sequence[str],
    probe: str,
    only: Collection[str] = ("knn", "retrieval"),
):
    """The levels that a probe reads: (name, codes ref, codes query, kept rows ref, kept rows query, reason to skip)."""
    if probe not in only:
        return
    ref, query = _matrix(labels_ref, names), None if labels_query is None else _matrix(labels_query, names)
    columns = []
    for level, name in enumerate(names):
        keep_ref = (ref[:, level] >= 0).nonzero()[:, 0]
        keep_query = None if query is None else (query[:, level] >= 0).nonzero()[:, 0]
        r = ref[keep_ref, level]
        q = None if query is None else query[keep_query, level]
        classes = len(r.unique())
        skip = ""
        if not len(r) or (q is not None and not len(q)):
            skip = f"no image has a known {name}"
        elif classes < 2:
            skip = f"all references have the same {name}: there is nothing to tell apart"
        columns.append((name, r, q, keep_ref, keep_query, skip))
    if probe == "knn":
        yield from columns[:2]
        return
    for column in reversed(columns):
        name, r, q, _, _, skip = column
        why = skip
        if not skip:
            sizes = torch.bincount(r, minlength=int((r if q is None else q).max()) + 1)
            share = float((sizes[r] > 1).double().mean() if q is None else (sizes[q] > 0).double().mean())
            if share >= 0.5:
                yield column
                return
            why = f"only {share:.0%} of the queries have another image of their {name} to find"
        probes.skipped[f"{name}_retrieval"] = why


def _matrix(labels: Codes, names: Sequence[str]) -> Tensor:
    """Codes as int64 [n, L]; one level may come as [n]."""
    if labels is None:
        raise ValueError(f"labels of the references are missing, though {', '.join(names)} are asked for")
    codes = torch.as_tensor(labels).to(torch.int64).cpu()
    codes = codes[:, None] if codes.ndim == 1 else codes
    if codes.ndim != 2 or codes.shape[1] != len(names):
        raise ValueError(f"labels must be [n, {len(names)}] for {', '.join(names)}, not {tuple(codes.shape)}")
    return codes
