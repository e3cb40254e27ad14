"""The report page: sections in the order in which a reader asks. What came out, how it got there, what went in.

Every string that comes from the run folder is escaped, and the page forbids itself scripts and network by a content
security policy, so that a file name or a recipe cannot do anything in the reader's browser.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from html import escape
from pathlib import Path

from . import attention, crops, curves, data, events, groups, matching, neighbours, probes, speed, summary, tree
from .drawings import draw as draw_all
from .drawings import drawings_of
from .folder import ReportError, RunFolder, read_run
from .style import STYLE

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
LOSSES = "Each objective's own loss, before its weight. The band is the range within a stretch of steps."

# Heading, text, what it holds; of a drawing, its name.
Section = tuple[str, str, Callable[[RunFolder], str], str]
SECTIONS: tuple[Section, ...] = (
    ("What was learned", "", probes.table, ""),
    ("On the way", "", probes.curves, ""),
    ("Nearest neighbours", "", neighbours.section, ""),
    ("Attention and patch features", "", attention.section, "attention"),
    ("Matches between two crops", "", matching.section, "matches"),
    ("Local groups", "", groups.section, "groups"),
    ("The hierarchy", "", tree.section, "tree"),
    ("Losses", LOSSES, curves.losses, ""),
    ("Schedules and gradients", "", curves.schedules, ""),
    ("What the network saw", "", crops.section, ""),
    ("Data", "", data.section, ""),
    ("Speed", "", speed.section, ""),
    ("Events", "", events.section, ""),
    ("Everything else that was recorded", "", curves.others, ""),
    ("Recipe", "", events.recipe, ""),
)


def write_report(run_dir: Path, *, draw: bool = True) -> Path:
    """Write `run_dir/report.html` from what the folder holds and return its path. An older report is replaced at once.

    Works at any time of a run: what is missing is said on the page. draw: first bring the drawings that need a network up
    to date with the newest checkpoint (seconds); what cannot be drawn is said on the page as well. Raises ReportError if the
    folder does not exist or cannot be written.
    """
    run_dir = Path(run_dir)
    run = read_run(run_dir)
    if draw:
        run.undrawn = draw_all(run)
    page = render(run)
    target, partial = run_dir / "report.html", run_dir / ".report.html.partial"
    try:
        partial.write_text(page, encoding="utf-8")
        os.replace(partial, target)
    except OSError as error:
        raise ReportError(
            f"{target} cannot be written ({error}). Free some space, or make the folder writable."
        ) from error
    return target


def render(run: RunFolder) -> str:
    """The whole page as text."""
    title = escape(str(run.recipe.get("name") or run.path.resolve().name))
    apply = drawings_of(run.recipe)
    links, sections = [], []
    for heading, text, section, drawing in SECTIONS:
        if drawing and drawing not in apply:
            continue
        if content := section(run):
            mark = heading.lower().replace(" ", "-")
            links.append(f'<a href="#{mark}">{heading}</a>')
            told = f"<p>{text}</p>" if text else ""
            sections.append(f'<section id="{mark}"><h2>{heading}</h2>{told}{content}</section>')
    problems = "".join(f'<p class="missing">{escape(problem)}</p>' for problem in run.problems)
    head = f"<h1>{title}</h1>{summary.lead(run)}{problems}{summary.facts(run)}{probes.tiles(run)}"
    contents = f'<nav aria-label="Contents">{"".join(links)}</nav>'
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{title} · Gristmill</title><style>{STYLE}</style></head><body><main><header>{head}{contents}</header>"
        f"{''.join(sections)}</main></body></html>\n"
    )
