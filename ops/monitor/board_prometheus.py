"""Asks a Prometheus for what the board shows, on behalf of whoever looks at it.

The browser is never told where Prometheus is, and cannot make it answer anything but the panels' own queries over one of
four spans: no proxy for arbitrary queries, no cross-origin requests. Answers are bounded in time and size; what does not
come in time is replaced by the exporter's own history, and said. One that is silent is left alone for a while, so that
not every look costs its patience.
"""

from __future__ import annotations

import json
import math
import re
import time
from http.client import HTTPException
from typing import Any
from urllib.parse import urlencode, urlsplit

import numpy as np

from ...shards.errors import GristmillError
from .client import get
from .history import Labels, Series
from .panels_terms import RATE_WINDOW, Term, promql

PATIENCE = 3.5  # seconds for all queries of a page
REST = 30.0  # seconds after a silence for which it is not asked again
ANSWER_BYTES = 4 << 20
SCRAPES = "count_over_time(gristmill_step{%s}[5m])"


class PrometheusError(GristmillError):
    """The Prometheus that was named cannot be asked, or does not answer."""


class Prometheus:
    """`url`: of the server, http or https; run: the value of the label `run` there ("" where targets have none).

    Raises PrometheusError for what is no such URL, or one with a user's name in it (put a proxy before it, or none).
    """

    def __init__(self, url: str, run: str, scope: tuple[str, ...]):
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise PrometheusError(f"metrics.prometheus={url!r} is no URL of a Prometheus; write http://host:9090")
        if "@" in parts.netloc:
            raise PrometheusError(
                "metrics.prometheus holds a user name: recipes are no place for secrets; leave it out"
            )
        self.base, self.place = url.rstrip("/"), parts.netloc
        # Without a label of that name the empty string is what matches, so that a plain scrape of one run works, too.
        self.values = {"run": f"{re.escape(run)}|", "rank": ".*", "instance": ".*"}
        self.scope = scope
        self._heard = -math.inf  # when it last answered
        self._silent: tuple[float, str] | None = None  # (since when, why)
        self._scrapes: tuple[float, float] | None = None  # (when asked, seconds between two)

    def rate_window(self, step: float, deadline: float) -> float:
        """As Grafana does: four scrapes at least, so that a lost one does not tear a hole."""
        now = time.monotonic()
        if self._scrapes is None or now - self._scrapes[0] > 60.0:
            query = SCRAPES % ",".join(f'{label}=~"{_quoted(self.values[label])}"' for label in self.scope)
            found = self._ask("query", {"query": query}, deadline)
            counts = [float(one["value"][1]) for one in found]
            self._scrapes = (now, float(np.clip(300.0 / max([*counts, 1.0]), 1.0, 60.0)))
        every = self._scrapes[1]
        return max(step + every, 4 * every)

    def evaluate(self, term: Term, grid: np.ndarray, window: float, deadline: float) -> Series:
        """The term's series on the grid (evenly spaced, seconds). Raises PrometheusError."""
        text = promql(term, self.scope).replace(RATE_WINDOW, f"{round(window * 1000)}ms")
        for label, value in self.values.items():
            text = re.sub(rf'{label}=~?"\${label}"', lambda _, v=value, n=label: f'{n}=~"{_quoted(v)}"', text)
        step = float(grid[1] - grid[0])
        asked = {"query": text, "start": f"{grid[0]:.3f}", "end": f"{grid[-1] + step / 2:.3f}", "step": f"{step:.3f}"}
        series: Series = {}
        for one in self._ask("query_range", asked, deadline):
            labels: Labels = tuple(sorted((str(k), str(v)) for k, v in one["metric"].items() if k != "__name__"))
            row = np.full(len(grid), np.nan)
            for at, value in one["values"]:
                place = round((at - grid[0]) / step)
                if 0 <= place < len(grid):
                    row[place] = float(value)
            series[labels] = row
        return series

    def _ask(self, what: str, query: dict[str, str], deadline: float) -> list[dict[str, Any]]:
        """The result of one query. What has said nothing in all the time for a page is taken for dead, for a while."""
        if self._silent and time.monotonic() - self._silent[0] < REST:
            raise PrometheusError(self._silent[1])
        left = deadline - time.monotonic()
        if left <= 0:
            raise PrometheusError("it takes too long")
        try:
            body = get(f"{self.base}/api/v1/{what}?{urlencode(query)}", timeout=left, most=ANSWER_BYTES)
        except (OSError, ValueError, HTTPException) as error:
            why = str(error)[:100]
            if self._heard < deadline - PATIENCE:
                self._silent = time.monotonic(), why
            raise PrometheusError(why) from error
        self._heard, self._silent = time.monotonic(), None
        try:
            found = json.loads(body)["data"]["result"]
            if not isinstance(found, list):
                raise TypeError
            return found
        except (ValueError, KeyError, TypeError) as error:
            raise PrometheusError("what it answers is not of Prometheus") from error


def _quoted(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"')
