"""The data path, the ranks and the machine of a run, as sections of the terminal view.

A rank's row is shown where there is something to see: the slowest, and those that do not answer. Of a thousand ranks
the others are one line.
"""

from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from .glyphs import Packed, bar, duration, heading, number, pairs, percent, size, table

STALL = 0.2  # share of the time spent waiting that is worth red
LIMITS = {"consumer": "the step", "none": "-"}
RANKS = 8  # rows, of many ranks
BUSY = 1 / 3  # of the data path's width goes into bars


def data_path(run: dict[str, Any], width: int) -> list[RenderableType]:
    """storage -> reader -> [encoded] -> augment -> [ready] -> step, and what limits it."""
    waits = run["bottleneck"]
    several = run["ranks"]["expected"] > 1
    longest = ", which waits longest" if (waits["data_wait_ratio"] or 0.0) >= 0.01 else ""
    whose = f" of rank {waits['rank']}{longest}" if several and waits["rank"] is not None else ""
    rows = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    rows.add_column("", style="cyan", no_wrap=True)
    rows.add_column("busy or filled", no_wrap=True)
    for title in ("waits for data", "waits for room") if width >= 70 else ("starved", "blocked"):
        rows.add_column(title, no_wrap=True, justify="right")
    long = max(8, min(24, int(width * BUSY) - 8))
    for part in run["flow"]:
        if part["kind"] == "stage":
            rows.add_row(f"▸ {part['stage']}", bar(part["busy_ratio"], long), "", "")
            continue
        starved, blocked = part["starved_ratio"], part["blocked_ratio"]
        held = f" {number(part['depth'])}/{number(part['capacity'])}" if part["capacity"] else ""
        filled = Text(bar(part["fill_ratio"], long, label=False), style="dim").append(held or " -", style="not dim")
        red = "bold red" if part["stage"] == "ready" and (starved or 0.0) > STALL else ""
        rows.add_row(f"  {part['stage']} │", filled, Text(percent(starved), style=red), percent(blocked))
    said = (
        Text("limited by ").append(waits["words"], style="bold") if waits["stage"] != "none" else Text(waits["words"])
    )
    if waits["remedy"]:
        said.append(f" ({waits['remedy']})")
    since = "" if run["window_seconds"] else ", since its process began"
    return [heading(f"data path{whose}{since}"), rows, said]


def ranks(run: dict[str, Any], width: int) -> list[RenderableType]:
    """The ranks, if there are several: the slowest by number, those that do not answer, and what sets the slowest apart."""
    all_of = run["ranks"]["list"]
    missing = run["ranks"]["expected"] - len(all_of)
    if run["ranks"]["expected"] < 2 and len(all_of) < 2:
        return []
    silent = [rank for rank in all_of if not rank["answers"]]
    answering = sorted((rank for rank in all_of if rank["answers"]), key=lambda rank: -(rank["own_seconds"] or 0.0))
    slowest = answering[:RANKS]
    shown = [rank for rank in all_of if rank in slowest]
    rows = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for title in ("rank", "node")[: 2 if any(rank["node"] for rank in shown) and width >= 70 else 1]:
        rows.add_column(title, style="cyan", no_wrap=True, max_width=24, overflow="ellipsis")
    for title in ("own s/step", "data wait", "last step"):
        rows.add_column(title, justify="right", no_wrap=True)
    if width >= 80:
        rows.add_column("limited by", no_wrap=True)
    slow = run["straggler"]
    for rank in shown:
        named = [Text(rank["rank"]), Text(rank["node"] or "-")][: len(rows.columns) - 3 - (width >= 80)]
        red = "bold red" if slow and slow["slow"] and slow["rank"] == rank["rank"] else ""
        age = duration(rank["last_step_age_seconds"])
        values = [Text(number(rank["own_seconds"]), style=red), percent(rank["data_wait_ratio"]), f"{age} ago"]
        rows.add_row(*named, *values, *([LIMITS.get(rank["limited_by"], rank["limited_by"])] if width >= 80 else []))
    parts: list[RenderableType] = [heading("ranks"), rows]
    if len(answering) > len(shown):
        parts.append(Text(f"{len(answering) - len(shown)} more ranks answer and are faster", style="dim"))
    parts += [
        Text(f"rank {rank['rank']} does not answer at {rank['url']}: {rank['why']}", style="bold red")
        for rank in silent[:RANKS]
    ]
    if len(silent) > RANKS:
        parts.append(Text(f"nor do {len(silent) - RANKS} more", style="bold red"))
    if missing > 0:
        known = f"{missing} of {run['ranks']['expected']} ranks are not known here: name the run's folder, their URLs or /node"
        parts.append(Text(known, style="yellow"))
    if slow:
        where = f" on {slow['node']}" if slow["node"] else ""
        line = f"slowest: rank {slow['rank']}{where}, {slow['ratio']:.2f} × the median"
        line += f", by {slow['because']}" if slow["slow"] else ""
        parts.append(Text(line, style="bold red" if slow["slow"] else ""))
    return parts


def machine(run: dict[str, Any], width: int) -> list[RenderableType]:
    """Checkpoints, disks, goodput, and what was read."""
    rows, saved, data, good = table(20), run["checkpoint"], run["data"], run["goodput"]
    age = "none yet" if saved["age_seconds"] is None else f"{duration(saved['age_seconds'])} old"
    if saved["age_images"] is not None and saved["every_images"]:
        age += f", {number(saved['age_images'])} images ago (one every {number(saved['every_images'])})"
    failed = Text(f"{number(saved['failed'])} failed", style="bold red") if saved["failed"] else None
    held = size(saved["bytes"]) if saved["bytes"] else None
    rows.add_row("checkpoint", Packed([age, held, f"{number(saved['ok'])} written", failed]))
    for place, disk in run["disks"].items():
        full = 1 - disk["free_bytes"] / disk["size_bytes"] if disk["size_bytes"] else None
        text = f"{size(disk['free_bytes'])} free"
        rows.add_row(Text(f"disk of {place}"), Packed([bar(full, 12) + " full", text]) if full is not None else text)
    if good["ratio"] is not None:
        lost = {k: percent(v / sum(good["seconds"].values())) for k, v in good["seconds"].items() if v}
        lost.pop("productive", None)
        rows.add_row("goodput", Packed([percent(good["ratio"]), *pairs(lost)]))
    if (good["attempts"] or 1) > 1 or any(good["interruptions"].values()):
        causes = {cause: count for cause, count in good["interruptions"].items() if count}
        rows.add_row("attempts", Packed([number(good["attempts"]), *pairs(causes)]))
    cache = data["cache"]
    if cache["bytes"] is not None or cache["hit_ratio"] is not None:
        held = f"{size(cache['bytes'])} of {size(cache['limit_bytes'])}"
        rows.add_row("cache", Packed([f"{percent(cache['hit_ratio'])} hits", held]))
    again = {**{k: v for k, v in data["retries"].items() if v}}
    if again or data["throttled_seconds"]:
        again |= {"throttled": duration(data["throttled_seconds"])} if data["throttled_seconds"] else {}
        rows.add_row("storage again", Packed(pairs(again)))
    read = {"samples": data["samples"], "": size(data["bytes"])} if data["samples"] is not None else {}
    odd = {what: data[what] for what in ("substituted", "removed", "quarantined") if data[what]}
    rows.add_row("read", Packed(pairs({**read, **odd})))
    memory = {k: size(v) for k, v in run["machine"]["cuda_bytes"].items()}
    if run["machine"]["resident_bytes"]:
        memory = {"process": size(run["machine"]["resident_bytes"]), **{f"GPU {k}": v for k, v in memory.items()}}
        rows.add_row("memory", Packed(pairs(memory)))
    return [heading("machine"), rows]
