"""The terms of panels, read over the exporter's own history instead of by Prometheus; the same forms, nothing else.

Every term gives a series of values on one grid of times for each set of labels. As in PromQL: arithmetic joins series of
equal labels, what is missing on one side is missing in the result, 0/0 is no number, and a fold leaves out what is missing.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable

import numpy as np

from .history import Labels, Series, View
from .panels_terms import Age, Agg, Both, Only, Quantile, Rate, Scaled, Take, Term, Top

_SIGNS: dict[str, Callable] = {"/": np.divide, "-": np.subtract, "+": np.add}
_ORDERS: dict[str, Callable] = {"==": operator.eq, ">": operator.gt}


def evaluate(term: Term, view: View, grid: np.ndarray, window: float) -> Series:
    """Values of the term at the times of `grid` [points], rates over `window` seconds before each."""
    match term:
        case Take(metric, where):
            return view.instant(metric, where, grid)
        case Rate(of):
            return view.rate(of.metric, of.where, grid, window)
        case Agg(fold, of, by):
            return _fold(fold, evaluate(of, view, grid, window), by)
        case Top(count, of):
            return _top(count, evaluate(of, view, grid, window))
        case Age(of):
            return {labels: grid - values for labels, values in evaluate(of, view, grid, window).items()}
        case Quantile(share, metric):
            counts = _fold("sum", view.rate(f"{metric}_bucket", (), grid, window), ("le",))
            return _quantile(share, counts)
        case Both(left, sign, right, spread):
            ours, theirs = evaluate(left, view, grid, window), evaluate(right, view, grid, window)
            if spread:
                theirs = dict.fromkeys(ours, theirs[()]) if () in theirs else {}
            with np.errstate(divide="ignore", invalid="ignore"):
                return {labels: _SIGNS[sign](ours[labels], theirs[labels]) for labels in ours if labels in theirs}
        case Only(of, order, than):
            found = evaluate(of, view, grid, window)
            with np.errstate(invalid="ignore"):
                return {labels: np.where(_ORDERS[order](v, than), v, np.nan) for labels, v in found.items()}
        case Scaled(of, factor):
            return {labels: factor * values for labels, values in evaluate(of, view, grid, window).items()}


def _fold(fold: str, series: Series, by: tuple[str, ...]) -> Series:
    groups: dict[Labels, list[np.ndarray]] = {}
    for labels, values in series.items():
        kept = tuple((label, value) for label, value in labels if label in by and value)
        groups.setdefault(kept, []).append(values)
    return {labels: _folded(fold, np.stack(parts)) for labels, parts in groups.items()}


def _folded(fold: str, table: np.ndarray) -> np.ndarray:
    """Over the series [series, points] that have a value; nan where none has."""
    there = np.isfinite(table)
    count = there.sum(axis=0)
    if fold in ("min", "max"):
        empty = math.inf if fold == "min" else -math.inf
        folded = getattr(np, fold)(np.where(there, table, empty), axis=0)
    else:
        total = np.where(there, table, 0.0).sum(axis=0)
        folded = {"sum": total, "count": count, "avg": total / np.maximum(count, 1)}[fold]
    return np.where(count > 0, folded, np.nan)


def _top(count: int, series: Series) -> Series:
    if len(series) <= count:
        return series
    table = np.stack(list(series.values()))
    ranked = np.argsort(np.argsort(-np.nan_to_num(table, nan=-math.inf), axis=0, kind="stable"), axis=0)
    table = np.where(ranked < count, table, np.nan)
    return {labels: row for labels, row in zip(series, table, strict=True) if np.isfinite(row).any()}


def _quantile(share: float, counts: Series) -> Series:
    """histogram_quantile: linear inside the bucket that the rank falls into, the last bound beyond it."""
    groups: dict[Labels, list[tuple[float, np.ndarray]]] = {}
    for labels, values in counts.items():
        bound = float(dict(labels)["le"])
        groups.setdefault(tuple(pair for pair in labels if pair[0] != "le"), []).append((bound, values))
    found: Series = {}
    for labels, parts in groups.items():
        parts.sort(key=lambda part: part[0])
        bounds = np.array([bound for bound, _ in parts])
        table = np.stack([values for _, values in parts])  # [bounds, points], cumulative
        rank = share * table[-1]
        at = np.minimum((table < rank).sum(axis=0), len(bounds) - 1)
        columns = np.arange(table.shape[1])
        below = np.where(at > 0, table[np.maximum(at - 1, 0), columns], 0.0)
        low = np.where(at > 0, bounds[np.maximum(at - 1, 0)], 0.0)
        with np.errstate(invalid="ignore", divide="ignore"):
            inside = low + (bounds[at] - low) * (rank - below) / (table[at, columns] - below)
        last = bounds[-2] if len(bounds) > 1 else np.nan
        found[labels] = np.where(table[-1] > 0, np.where(at == len(bounds) - 1, last, inside), np.nan)
    return found
