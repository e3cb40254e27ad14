"""Logistic regression on frozen features: a linear probe without rates to tune, exact where the convex optimum is found.

scikit-learn's LogisticRegression (lbfgs, an L2 penalty of strength 1 / C) on rows of unit length; C is chosen on a part of the
training set that is held out, and what was chosen is trained on all of it. Semi-supervised: the same on 1 % and 10 % of the
labels, the same number of each class (SimCLR, arXiv 2002.05709, section 4.1), averaged over several draws.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...shards.errors import GristmillError
from .knn import unit
from .subsets import draw_balanced, draw_stratified


class LogisticError(GristmillError, ValueError):
    """What logistic regression cannot be trained with."""


@dataclass(frozen=True)
class LogisticOptions:
    """strengths: the grid of C; held_out: share of the training rows to choose it by; rows: so many are trained on at most,
    drawn evenly from the classes; iterations: of lbfgs at most.
    """

    strengths: tuple[float, ...] = (1e-2, 1e-1, 1.0, 1e1, 1e2, 1e3, 1e4)
    held_out: float = 0.2
    rows: int = 10_000
    iterations: int = 1000


@dataclass(frozen=True)
class SemiOptions(LogisticOptions):
    """shares: of the labels; draws: so many are averaged."""

    shares: tuple[float, ...] = (0.01, 0.1)
    draws: int = 3


def run_logistic(
    features: Tensor,
    labels: Tensor,
    query: Tensor,
    query_labels: Tensor,
    options: LogisticOptions | None = None,
    *,
    seed: int = 0,
) -> dict[str, float]:
    """`logistic_top1`, `logistic_top5`, the `logistic_c` that was chosen, and `logistic_rows` that were trained on.

    features [n, d], labels int64 [n] >= 0; query [m, d]. A query of a class that was not trained is wrong. Where no class has
    two rows, nothing can be held out and C is 1. Raises LogisticError for one class only, or without scikit-learn.
    """
    options = options or LogisticOptions()
    if len(labels) > options.rows:
        rows = draw_balanced(labels, options.rows / len(labels), seed)
        features, labels = features[rows], labels[rows]
    strength = _chosen(features, labels, options, seed)
    top1, top5 = _answered(_fitted(features, labels, strength, options), query, query_labels)
    return {"logistic_top1": top1, "logistic_top5": top5, "logistic_c": strength, "logistic_rows": float(len(labels))}


def run_semi(
    features: Tensor,
    labels: Tensor,
    query: Tensor,
    query_labels: Tensor,
    options: SemiOptions | None = None,
    *,
    seed: int = 0,
) -> dict[str, float]:
    """`semi_1_top1` and `semi_10_top1` with the spread over the draws, `semi_1_std` (for each of `shares`, in percent).

    Arguments and errors as `run_logistic`.
    """
    options = options or SemiOptions()
    scores: dict[str, float] = {}
    for share in options.shares:
        found = []
        for draw in range(options.draws):
            rows = draw_balanced(labels, share, seed + draw)
            few, theirs = features[rows], labels[rows]
            strength = _chosen(few, theirs, options, seed + draw)
            found.append(_answered(_fitted(few, theirs, strength, options), query, query_labels)[0])
        name = f"semi_{100 * share:g}"
        scores[f"{name}_top1"], scores[f"{name}_std"] = float(np.mean(found)), float(np.std(found))
    return scores


def _chosen(features: Tensor, labels: Tensor, options: LogisticOptions, seed: int) -> float:
    """The strength that answers the held-out part best; of equal ones the smallest, which trusts the features least."""
    if int(torch.bincount(labels).max()) < 2 or len(options.strengths) == 1:
        return options.strengths[0] if len(options.strengths) == 1 else 1.0
    held = torch.zeros(len(labels), dtype=torch.bool)
    held[draw_stratified(labels, options.held_out, seed)] = True
    if len(labels[~held].unique()) < 2:
        return 1.0
    scores = []
    for strength in sorted(options.strengths):
        model = _fitted(features[~held], labels[~held], strength, options)
        scores.append((_answered(model, features[held], labels[held])[0], strength))
    best = max(score for score, _ in scores)
    return next(strength for score, strength in scores if score == best)


def _fitted(features: Tensor, labels: Tensor, strength: float, options: LogisticOptions) -> Any:
    try:
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression
    except ImportError as error:
        raise LogisticError("logistic regression wants scikit-learn: `pip install 'gristmill[eval]'`") from error
    if len(labels.unique()) < 2:
        raise LogisticError("all training pictures are of one class: there is nothing to tell apart; give others")
    model = LogisticRegression(C=strength, max_iter=options.iterations)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # at a C that is too large for the data, which then loses
        return model.fit(unit(features).numpy(), labels.numpy())


def _answered(model: Any, query: Tensor, labels: Tensor) -> tuple[float, float]:
    """Share of queries whose class is the first, and among the first five, of what the model names."""
    scores = model.decision_function(unit(query).numpy())
    if scores.ndim == 1:  # two classes have one score
        scores = np.stack([-scores, scores], 1)
    order = np.argsort(-scores, axis=1, kind="stable")[:, :5]
    right = model.classes_[order] == labels.numpy()[:, None]
    return float(right[:, 0].mean()), float(right.any(1).mean())
