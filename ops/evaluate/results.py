"""The table of an evaluation for people, and as a file for machines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from ...shards.storage import published

# What is no share: shown as it is.
PLAIN = (
    "_k", "_temperature", "_c", "_rows", "_lr", "_wd", "_rate", "_epoch", "_images", "rank_me", "feature_std", "uniformity",
    "alignment", "alignment_strangers",
)  # fmt: skip
SHARES = ("top1_best_epoch", "top5_best_epoch")


def shown(name: str, value: float) -> str:
    """Shares in percent; settings that were chosen, effective ranks and distances as they are."""
    return f"{value:.4g}" if name.endswith(PLAIN) and not name.endswith(SHARES) else f"{100 * value:.1f} %"


def print_results(results: dict[str, Any], console: Console | None = None) -> None:
    """The table, who by who, and what was left out, to standard output."""
    console = console or Console(highlight=False)
    if not console.is_terminal:
        console = Console(file=console.file, width=max(100, console.width), highlight=False)
    probes: dict[str, dict[str, float]] = results["probes"]
    subject, data = results["subject"], results["data"]
    console.print(f"{subject['name']}, images of {subject['size']} pixels", markup=False, soft_wrap=True)
    for what, part in (("learned from", data["reference"]), ("asked about", data["query"])):
        labels = f", {part['classes']} classes ({part['level']})" if part["level"] else ", no labels"
        console.print(f"{what}: {part['pictures']} pictures of {part['where']}{labels}", markup=False, soft_wrap=True)
        if part["damaged"]:
            first = next(iter(part["damaged"].items()))
            console.print(
                f"  {len(part['damaged'])} do not decode and were left out: {first[0]} ({first[1]}) ...", markup=False
            )
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("probe")
    for who in probes:
        table.add_column(who, justify="right")
    names = list(dict.fromkeys(name for scores in reversed(probes.values()) for name in scores))
    for name in names:
        cells = [shown(name, scores[name]) if name in scores else "" for scores in probes.values()]
        table.add_row(name.replace("_", " "), *cells)
    if names:
        console.print(table)
    if any(name.endswith("chosen_on_query") for name in names):
        console.print('"chosen on query": the best of the grid, chosen by the queries themselves, as papers report it')
    for name, why in results["skipped"].items():
        console.print(f"left out: {name}: {why}", markup=False, soft_wrap=True)


def write_results(results: dict[str, Any], path: Path) -> None:
    """As JSON, complete or absent. OSError as the file system gives it."""
    with published(path) as file:
        file.write((json.dumps(results, indent=1) + "\n").encode())
