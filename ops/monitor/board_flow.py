"""What the top of the board says: how far the run is, the flow from storage to step, and what limits it, in words.

The rule is the loader's own (pipeline/stats.py), and the words are those of `gristmill status` (flow.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...pipeline.stats import Stats, bottleneck
from .flow import HIDDEN, REMEDIES, WORDS
from .panels import Query
from .panels_flow import FLOW
from .panels_run import HEAD

WINDOW = 60.0  # seconds that the rates of the flow are taken over: calm, and still today's
_LED = ("read_seconds", "storage_seconds", "augment_seconds", "starved_seconds", "blocked_seconds")
_COUNTERS = (*_LED, "hungry_seconds", "encoded_blocked_seconds")

Answer = list[dict[str, Any]]  # series of one query, as board.py sends them

TOP: dict[str, Query] = {name: Query(term, "") for name, term in {**HEAD, **FLOW}.items()}
TOP["state"] = Query(HEAD["state"], "{{state}}")


def top(answers: Mapping[str, Answer], rank_sees: str) -> dict[str, Any]:
    """Head and flow from the answers to TOP; rank_sees: what the numbers are of, for the words."""
    values = {name: _last(series) for name, series in answers.items()}
    head: dict[str, Any] = {name: values.get(name) for name in HEAD}
    head["state"] = next((one["name"] for one in answers["state"] if one["values"] and one["values"][-1] == 1), None)
    if all(values.get(name) is None for name in _LED):
        return {"head": head, "flow": None}
    spent = Stats()
    for name in _COUNTERS:
        setattr(spent, name, values.get(name) or 0.0)
    stage, wait = bottleneck(spent), values.get("data_wait")
    sentence = [f"What limits {rank_sees} is {WORDS[stage]}." if stage != "none" else "No batch was made just now."]
    if wait is not None and stage not in ("none", "consumer"):
        if wait < HIDDEN:
            sentence = [
                "Data does not hold up the step.",
                f"It waits {_percent(wait)} of its time; next in line is {WORDS[stage]}.",
            ]
        else:
            remedy = f"; what helps: {REMEDIES[stage]}" if stage in REMEDIES else ""
            sentence.append(f"The step waits {_percent(wait)} of its time{remedy}.")
    elif wait is not None and stage == "consumer":
        sentence.append(f"It waits {_percent(wait)} of its time for data.")
    sentence = [*sentence, ""][:2]
    return {
        "head": head,
        "flow": {
            "values": {name: values.get(name) for name in FLOW},
            "limit": {"consumer": "step", "none": ""}.get(stage, stage),
            "words": sentence,
        },
    }


def _last(series: Answer) -> float | None:
    return next((value for one in series for value in reversed(one["values"]) if value is not None), None)


def _percent(share: float) -> str:
    return f"{100 * share:.{0 if share >= 0.1 else 1}f}\N{NO-BREAK SPACE}%"
