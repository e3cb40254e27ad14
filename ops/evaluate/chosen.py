"""Probes by the names that a recipe lists (`probes.names`), on features that were computed once; each says what it cost.

"knn" and "retrieval" are in probes.py, "purity" is the share of an image's kind among its nearest neighbours, "linear"
a short linear probe (linear.py, one block, standardised, 20 epochs), "label_free" the signs of collapse, "correspondence"
the one for places, which needs pictures and the network itself. A set without labels gets "label_free" in place of
those that read them. What cannot be asked of a data set is in `skipped`, with the reason.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..recipe import ProbeName
from .linear import LinearOptions, linear_probe
from .probes import Codes, Probes, chance_levels, label_free, levels_read, run_probes
from .purity import expected_purity, neighbour_purity

LABELLED: tuple[ProbeName, ...] = ("knn", "retrieval", "purity", "linear")
LINEAR = LinearOptions(epochs=20, blocks=1, standardize=True)


@dataclass(frozen=True)
class Asked:
    """Features fp32 [m, d] of the references and [n, d] of the queries (None: they ask each other), and their labels.

    codes, query_codes: int64 [m, L] and [n, L], a column for each of `levels`, coarse first; none where there are no labels.
    """

    rows: Tensor
    codes: Codes
    query: Tensor | None
    query_codes: Codes
    levels: Sequence[str]
    k: int = 20
    temperature: float = 0.07
    seed: int = 0


def measure(
    names: Sequence[ProbeName], asked: Asked, places: Callable[[], dict[str, float]] | None = None
) -> tuple[Probes, dict[str, float]]:
    """The numbers of these probes, and seconds by name. places: gives those of "correspondence"; without, it is skipped."""
    found, cost = Probes(), dict[str, float]()
    for name in _possible(names, asked):
        begin = time.perf_counter()
        _ask(name, asked, found, places)
        cost[name] = cost.get(name, 0.0) + time.perf_counter() - begin
    return found, cost


def chance(names: Sequence[ProbeName], asked: Asked) -> Probes:
    """What no knowledge reaches, under the same names; a number without a chance level of its own is not there."""
    found = Probes()
    for name in _possible(names, asked):
        if name in ("knn", "retrieval"):
            found.update(chance_levels(asked.codes, asked.query_codes, asked.levels, only=(name,)))
        elif name == "purity":
            for level, ref, query, _, _, skip in levels_read(asked.codes, asked.query_codes, asked.levels):
                if not skip:
                    found[f"{level}_purity"] = expected_purity(ref, query)
        elif name == "linear" and asked.query is not None:
            known = chance_levels(asked.codes, asked.query_codes, asked.levels, only=("knn",))
            found.update({key.removesuffix("knn") + "linear": value for key, value in known.items()})
        elif name == "label_free":
            rows = len(asked.rows if asked.query is None else asked.query)
            found.update(chance_levels(None, None, (), rows=rows, k=asked.k))
    return found


def _possible(names: Sequence[ProbeName], asked: Asked) -> Iterator[ProbeName]:
    if asked.levels:
        yield from names
        return
    if any(name in (*LABELLED, "label_free") for name in names):
        yield "label_free"
    if "correspondence" in names:
        yield "correspondence"


def _ask(name: ProbeName, asked: Asked, found: Probes, places: Callable[[], dict[str, float]] | None) -> None:
    if name in ("knn", "retrieval"):
        own = run_probes(
            asked.rows, asked.codes, asked.query, asked.query_codes, asked.levels,
            k=asked.k, temperature=asked.temperature, only=(name,),
        )  # fmt: skip
        found.update(own)
        found.skipped.update(own.skipped)
    elif name == "label_free":
        own = label_free(asked.rows if asked.query is None else asked.query, k=asked.k)
        found.update(own)
        found.skipped.update(own.skipped)
    elif name == "correspondence":
        if places is None:
            found.skipped["correspondence_cell"] = "the pictures themselves are not at hand"
        else:
            found.update(places())
    else:
        for level, ref, query, keep, keep_query, skip in levels_read(asked.codes, asked.query_codes, asked.levels):
            key = f"{level}_{name}"
            rows, wanted = asked.rows[keep], None if asked.query is None else asked.query[keep_query]
            if skip:
                found.skipped[key] = skip
            elif name == "purity":
                found[key] = neighbour_purity(rows, ref, wanted, query, k=min(asked.k, len(rows) - 1))
            elif wanted is None or query is None:
                found.skipped[key] = "a linear probe wants held-out images: name a data set as probes.query"
            elif len(strange := set(query.tolist()) - set(ref.tolist())):
                found.skipped[key] = f"{len(strange)} classes of the queries are not among the references"
            else:
                found[key] = _linear(rows, ref, wanted, query, asked.seed)


def _linear(rows: Tensor, labels: Tensor, query: Tensor, wanted: Tensor, seed: int) -> float:
    classes = labels.unique()  # codes count all classes that the labels know, some of which no reference has
    labels, wanted = (torch.searchsorted(classes, each) for each in (labels, wanted))
    with torch.enable_grad():
        return linear_probe(rows, labels, query, wanted, LINEAR, seed=seed)["linear_top1"]
