"""The findings as a person reads them: one line each where all is well, and what to do where it is not."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from .finding import Finding, State

LOOKS: dict[State, tuple[str, str]] = {
    "ok": ("ok", "green"), "warn": ("warn", "yellow"), "bad": ("BAD", "bold red"), "skipped": ("-", "dim"),
}  # fmt: skip


def show(findings: Sequence[Finding], console: Console, world: int = 1) -> None:
    """Print a table, and how many are not in order."""
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True, width=4)
    table.add_column(no_wrap=True, width=max([13, *(len(finding.name) for finding in findings)]))
    table.add_column(overflow="fold")
    for finding in findings:
        word, style = LOOKS[finding.state]
        lines = Text(ranks_of(finding, world) + finding.found)
        if finding.state in ("warn", "bad"):
            lines.append(f"\n{finding.why}", style="dim")
            lines.append("\ndo: ", style="bold")
            lines.append(finding.remedy)
        elif finding.state == "skipped":
            lines.append(f"; {finding.remedy}", style="dim")
        table.add_row(Text(word, style=style), finding.name, lines)
    console.print(table)
    console.print(summary(findings), highlight=False)


def summary(findings: Sequence[Finding]) -> str:
    """One line; it says what the exit code says."""
    count = {state: sum(finding.state == state for finding in findings) for state in LOOKS}
    if count["bad"]:
        more = f", and {count['warn']} that could be better" if count["warn"] else ""
        return f"{count['bad']} of {len(findings)} must be mended before a training{more}"
    if count["warn"]:
        return f"a training can start; {count['warn']} of {len(findings)} could be better"
    return "a training can start: all is well"


def ranks_of(finding: Finding, world: int) -> str:
    """ "rank 3: ", or nothing where all ranks say so."""
    ranks = finding.ranks
    if not ranks or len(ranks) == world:
        return ""
    shown = ", ".join(map(str, ranks[:6])) + (f" and {len(ranks) - 6} more" if len(ranks) > 6 else "")
    return f"rank {shown}: "
