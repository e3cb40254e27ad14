"""Tables of `gristmill bench learning`: mean and spread of each arm over the seeds, and its average rank over the probes.

Ranks are taken within a seed and a data set, so that their spread says how much of an arm's place is luck. Baselines are
shown and not ranked, but for the network before its first step, which an arm may well not beat.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from rich.table import Table

from .learning import ARMS, BASELINES
from .learning_exam import GRANULARITIES, ranks, spread

UNRANKED = ("chance", "pixels")


def summary(pieces: list[dict]) -> dict[str, Any]:
    """By data set and arm: each probe's and the average rank's (mean, spread over seeds); "all" joins the data sets' ranks.

    A rank is there for seeds of which every arm's piece is there; what is missing is listed.
    """
    scores: dict[str, dict[int, dict[str, dict[str, float]]]] = defaultdict(lambda: defaultdict(dict))
    for piece in pieces:
        scores[piece["set"]][piece["seed"]].update(piece["scores"])
    there = {arm for piece in pieces for arm in piece["scores"]}
    arms = [arm for arm in (*BASELINES, *ARMS) if arm in there] + sorted(there - {*BASELINES, *ARMS})
    found: dict[str, Any] = {"sets": {}, "missing": []}
    joined: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for name, seeds in scores.items():
        lacking = {seed: [arm for arm in arms if arm not in rows] for seed, rows in seeds.items()}
        found["missing"] += [f"{name}, seed {seed}: {arm}" for seed, gone in lacking.items() for arm in gone]
        rows: dict[str, dict[str, Any]] = {}
        ranked = defaultdict(list)
        for seed, by_arm in seeds.items():
            if not lacking[seed]:
                for arm, rank in ranks({a: row for a, row in by_arm.items() if a not in UNRANKED}).items():
                    ranked[arm].append(rank)
                    joined[arm][seed].append(rank)
        for arm in arms:
            values = [row[arm] for row in seeds.values() if arm in row]
            if not values:
                continue
            rows[arm] = {probe: spread([each[probe] for each in values]) for probe in GRANULARITIES}
            if ranked[arm]:
                rows[arm]["rank"] = spread(ranked[arm])
        found["sets"][name] = {"seeds": sorted(seeds), "arms": rows}
    most = max((len(each) for by_seed in joined.values() for each in by_seed.values()), default=0)
    found["all"] = {
        arm: spread([sum(each) / most for each in by_seed.values() if len(each) == most])
        for arm, by_seed in joined.items()
        if any(len(each) == most for each in by_seed.values())
    }
    return found


def tables(found: dict[str, Any]) -> list[Table]:
    """A table a data set, and one of ranks over all of them; the best arm of each column is bold."""
    made = []
    for name, part in found["sets"].items():
        seeds = ", ".join(map(str, part["seeds"]))
        table = Table(title=f"{name}: %, mean and spread over seeds {seeds}", title_justify="left")
        table.add_column("arm")
        for column in (*GRANULARITIES, "average rank"):
            table.add_column(column, justify="right")
        arms = {arm: row for arm, row in part["arms"].items() if arm not in UNRANKED}
        best = {probe: max((row[probe][0] for row in arms.values()), default=0.0) for probe in GRANULARITIES}
        for arm, row in part["arms"].items():
            cells = []
            for probe in GRANULARITIES:
                mean, off = row[probe]
                text = f"{100 * mean:.1f}" + (f" ± {100 * off:.1f}" if len(part["seeds"]) > 1 else "")
                cells.append(f"[bold]{text}[/bold]" if arm in arms and mean == best[probe] else text)
            table.add_row(arm, *cells, _rank(row.get("rank")))
        made.append(table)
    if len(found["sets"]) > 1 and found["all"]:
        table = Table(title="average rank over all data sets' probes", title_justify="left")
        table.add_column("arm")
        table.add_column("average rank", justify="right")
        for arm, value in sorted(found["all"].items(), key=lambda each: each[1][0]):
            table.add_row(arm, _rank(value))
        made.append(table)
    return made


def _rank(value: tuple[float, float] | None) -> str:
    return "" if value is None else f"{value[0]:.2f} ± {value[1]:.2f}"
