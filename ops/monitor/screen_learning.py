"""What a run learns, as a section of the terminal view: losses, signs of life, memories, the teacher, probes."""

from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from .glyphs import Packed, bar, heading, number, pairs, percent, table
from .labels import WHO


def learning(run: dict[str, Any], width: int) -> list[RenderableType]:
    """Loss of every objective with its signs of life."""
    rows = table()
    rows.add_row("loss", Packed(pairs({"all": run["loss"]["all"], "gradient": run["schedules"]["gradient_norm"]})))
    for objective in sorted({*run["loss"], *run["signs"]} - {"all"}):
        weight = run["weights"].get(objective)
        line = pairs({"loss": run["loss"].get(objective), "weight": weight if weight != 1 else None})
        rows.add_row(Text(f"  {objective}"), Packed([*line, *pairs(run["signs"].get(objective, {}))]))
    short = {"learning_rate": "lr", "weight_decay": "weight decay", "teacher_momentum": "momentum"}
    applied = {short[name]: value for name, value in run["schedules"].items() if name in short}
    rows.add_row("applied", Packed(pairs(applied | {"teacher differs by": run["teacher"]["distance_ratio"]})))
    guard = {name.replace("_", " "): count for name, count in run["guard"].items() if count and name != "clipped"}
    if guard:
        rows.add_row("left out", Packed([Text("not finite or far off:", style="yellow"), *pairs(guard)]))
    return [heading("learning"), rows]


def memories(run: dict[str, Any], width: int) -> list[RenderableType]:
    """Queues and banks: fill, age against what it settles at, norm."""
    if not run["memories"]:
        return []
    rows = table(22)
    for name, memory in run["memories"].items():
        rest = {what: memory.get(what) for what in ("age", "norm", "nonfinite")}
        rest["nonfinite"] = rest["nonfinite"] or None
        if rest["age"] is not None and memory.get("expected_age"):
            rest["age"] = f"{number(rest['age'])} of {number(memory['expected_age'])}"
        full = memory.get("fill")
        rows.add_row(Text(name), Packed([bar(full, 8 if width < 80 else 16), *pairs(rest)]))
    return [heading("memories"), rows]


def probes(run: dict[str, Any], width: int) -> list[RenderableType]:
    """Scores of the last probes: who over what."""
    if not run["probes"]:
        return []
    seen = {who for scores in run["probes"].values() for who in scores}
    who = [name for name in WHO if name in seen] + sorted(seen - set(WHO))
    if width < 70:
        who = who[:4]
    rows = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    rows.add_column("", style="cyan", no_wrap=True, max_width=24, overflow="ellipsis")
    for name in who:
        rows.add_column(Text(name), justify="right", no_wrap=True, max_width=10, overflow="ellipsis")
    for probe, scores in run["probes"].items():
        rows.add_row(Text(probe), *(number(scores.get(name)) for name in who))
    return [heading("probes"), rows]


def phases(run: dict[str, Any], width: int) -> list[RenderableType]:
    """Where the time of a step goes, largest first."""
    spent = sorted(run["phases"].items(), key=lambda item: -item[1])
    shown = {name: percent(share) for name, share in spent if share >= 0.005}
    return [heading("step"), Packed(pairs(shown))] if shown else []
