"""The one list of panels: what Grafana's dashboards (grafana.py) and the built-in page (board.py) both show.

A panel is a title, a unit, queries as terms (panels_terms.py), a kind and one sentence on what it tells. Dashboards are
rows of panels, in the order in which an operator asks: is it well, what holds it up, does it learn, which rank, what is
lost. Panels that stay empty on a healthy run on this machine say in `needs` what they wait for.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Literal

from .panels_terms import Term, samples_of

Kind = Literal["timeseries", "stacked", "stat", "bar", "table", "state"]
Unit = Literal["", "seconds", "bytes", "bytes/s", "ratio", "images/s", "images", "steps", "flops/s", "inputs/s"]


@dataclass(frozen=True)
class Query:
    """A term, and how its series are called: text with {{label}} in it."""

    term: Term
    legend: str


@dataclass(frozen=True)
class Panel:
    """kind: stacked is a timeseries whose parts add up; a bar and a table show the newest values.

    span: columns of 24; low, high: ends of the axis where they are known; log: an axis of powers of ten; levels:
    (value, "warn" or "bad") from which a value wants attention, and `below` where it does so underneath.
    """

    title: str
    help: str
    queries: tuple[Query, ...]
    unit: Unit = ""
    kind: Kind = "timeseries"
    span: int = 8
    low: float | None = None
    high: float | None = None
    log: bool = False
    levels: tuple[tuple[float, str], ...] = ()
    below: bool = False
    needs: str = ""


@dataclass(frozen=True)
class PanelRow:
    title: str
    panels: tuple[Panel, ...]


@dataclass(frozen=True)
class Dashboard:
    """scope: labels of the scrape target that its variables choose by."""

    name: str
    title: str
    about: str
    rows: tuple[PanelRow, ...]
    scope: tuple[str, ...] = ("run", "rank")

    @property
    def uid(self) -> str:
        """Grafana's own name of it: stays the same over releases, so that links and provisioning do."""
        return f"gristmill-{self.name}"

    def panels(self) -> Iterator[tuple[str, Panel]]:
        """(id, panel) in order; an id is unique in all dashboards."""
        for number, row in enumerate(self.rows):
            for place, panel in enumerate(row.panels):
                yield f"{self.name}-{number}-{place}", panel


@cache
def dashboards() -> tuple[Dashboard, ...]:
    from .panels_data import DATA_PATH
    from .panels_ingest import INGEST
    from .panels_learning import LEARNING
    from .panels_run import CHECKPOINTS, OVERVIEW, RANKS

    return (OVERVIEW, DATA_PATH, LEARNING, RANKS, CHECKPOINTS, INGEST)


def wanted_samples() -> frozenset[str]:
    """Names of all samples that some panel, or the picture of the flow, reads."""
    from .panels_flow import FLOW
    from .panels_run import HEAD

    terms = [query.term for board in dashboards() for _, panel in board.panels() for query in panel.queries]
    return frozenset(name for term in [*terms, *FLOW.values(), *HEAD.values()] for name in samples_of(term))
