"""The runbooks' pages, docs/runbooks/<alert>.md: what an alert says of itself on top, written advice below.

The top is made from alerts.py (`python -m gristmill.ops.monitor.runbooks docs/runbooks` renews it and the index), so that
thresholds on a page are those that fire; the advice is written by hand and stays as it is.
"""

import sys
from pathlib import Path

from .alert import Alert, duration, scaled
from .alerts import ALERTS, SUBJECTS

ADVICE = ("## What to look at", "## What to do", "## No cause for worry")
_TITLES = {"run": "The run", "data": "Its data", "learning": "What it learns"}


def head(alert: Alert) -> str:
    """The generated top of an alert's page, up to where the advice begins."""
    wait = f", when it lasts for {duration(alert.hold)}" if alert.hold else ", at once"
    who = "wakes somebody" if alert.severity == "page" else "waits for the morning"
    lines = [f"# {alert.name}", "", alert.summary, "", f"- Severity: {alert.severity} ({who}){wait}."]
    lines.append(f"- Likely: {alert.cause[0].lower()}{alert.cause[1:]}")
    if alert.masks:
        lines.append(f"- While it fires, what follows from it is not told: {_linked(alert.masks)}.")
    if causes := tuple(other.name for other in ALERTS if alert.name in other.masks):
        lines.append(f"- Not told while a cause of it fires: {_linked(causes)}.")
    return "\n".join([*lines, "", "```promql", scaled(alert.expr), "```", "", ""])


def index() -> str:
    """README.md of the folder: all alerts by subject."""
    lines = ["# Runbooks", "", "A page for each alert of [gristmill.yml](../../ops/monitor/rules/gristmill.yml).", ""]
    for name, subject in SUBJECTS.items():
        lines += [f"## {_TITLES[name]}", "", "| Alert | | Means |", "| --- | --- | --- |"]
        lines += [f"| [{a.name}]({a.name}.md) | {a.severity} | {a.summary} |" for a in subject.ALERTS]
        lines.append("")
    return "\n".join(lines)


def renew(folder: Path) -> list[Path]:
    """Write the tops of all pages and the index anew; returns what changed. OSError, ValueError for a page without advice."""
    texts = {folder / "README.md": index()}
    for alert in ALERTS:
        page = folder / f"{alert.name}.md"
        _, mark, advice = page.read_text().partition(ADVICE[0])
        if not mark:
            raise ValueError(f"{page} has no advice: write it under {', '.join(ADVICE)}")
        texts[page] = head(alert) + mark + advice
    changed = [path for path, text in texts.items() if not path.exists() or path.read_text() != text]
    for path in changed:
        path.write_text(texts[path])
    return changed


def _linked(names: tuple[str, ...]) -> str:
    return ", ".join(f"[{name}]({name}.md)" for name in names)


if __name__ == "__main__":
    for path in renew(Path(sys.argv[1])):
        print(f"written: {path}")
