"""The board: the panels as a page of the exporter, for whoever has no Grafana. `board(registry, ...)` gives page and clock.

The page asks for one dashboard and one span; nothing else of the query is used. Answers come from Prometheus where the
recipe names one, and else from the exporter's own history; they are computed in one thread of their own, so that neither
a slow Prometheus nor a flood of readers holds up scrapes or training, and are kept for a moment, so that many readers
cost as much as one.
"""

from __future__ import annotations

import asyncio
import json
import math
import re
import threading
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
from prometheus_client import CollectorRegistry

from .board_flow import TOP, WINDOW, top
from .board_page import SPANS, page
from .board_prometheus import PATIENCE, Prometheus, PrometheusError
from .history import EVERY, History, Series
from .history_terms import evaluate
from .panels import Dashboard, Query, dashboards, wanted_samples

POINTS = 150  # of a series
FRESH = 2.0  # seconds for which an answer is given again

Page = tuple[str, bytes]
Handler = Callable[[dict[str, str]], Page | Awaitable[Page]]
Tick = tuple[float, Callable[[], None]]


def board(
    registry: CollectorRegistry,
    *,
    run: str = "",
    rank: int = 0,
    world: int = 1,
    prometheus: str | None = None,
    names: Sequence[str] = ("overview", "data-path", "objectives", "ranks", "checkpoints"),
    every: float = EVERY,
) -> tuple[dict[str, Handler], list[Tick]]:
    """(pages, ticks) for an Exporter of `registry`: the page at "", its numbers at "board.json".

    run, rank: as this process's target is labelled; prometheus: URL of a server that scrapes it; names: of dashboards
    (an ingest shows "ingest" alone). Raises PrometheusError where the URL is none.
    """
    shown = [one for name in names for one in dashboards() if one.name == name]
    made = Board(registry, shown, run=run, rank=rank, world=world, prometheus=prometheus, every=every)
    return {"": made.page, "board.json": made.data}, [(every, made.history.sample)]


class Board:
    """Page and answers; `history` wants its `sample` called every few seconds."""

    def __init__(
        self,
        registry: CollectorRegistry,
        shown: Sequence[Dashboard],
        *,
        run: str,
        rank: int,
        world: int,
        prometheus: str | None,
        every: float,
    ):
        self.shown = {one.name: one for one in shown}
        self.world = world
        labels = {"run": run, "rank": str(rank)} if "ingest" not in self.shown else {}
        self.history = History(registry, wanted_samples(), labels, every)
        self.scope = shown[0].scope
        self.prometheus = Prometheus(prometheus, run, self.scope) if prometheus else None
        self._page = page(f"{run or 'Gristmill'}", shown)
        self._kept: dict[tuple[str, int], tuple[float, bytes]] = {}
        self._waiting: dict[tuple[str, int], asyncio.Future[bytes]] = {}
        self._working = threading.Lock()

    def page(self, query: dict[str, str]) -> Page:
        return "text/html; charset=utf-8", self._page

    async def data(self, query: dict[str, str]) -> Page:
        """`dashboard` and `span` choose among those that there are; anything else is the first of them."""
        name = query.get("dashboard", "")
        name = name if name in self.shown else next(iter(self.shown))
        spans = {str(seconds): seconds for seconds, _ in SPANS}
        key = name, spans.get(query.get("span", ""), SPANS[0][0])
        made, body = self._kept.get(key, (-math.inf, b""))
        if time.monotonic() - made > FRESH:
            body = await asyncio.shield(self._waiting.get(key) or self._begin(key))
        return "application/json", body

    def _begin(self, key: tuple[str, int]) -> asyncio.Future[bytes]:
        """Compute an answer in a thread that does not hold up the exit of the process."""
        loop = asyncio.get_running_loop()
        future = self._waiting[key] = loop.create_future()

        def settle(body: bytes | None, error: Exception | None) -> None:
            self._waiting.pop(key, None)
            if body is not None:
                self._kept[key] = (time.monotonic(), body)
            if not future.done():
                future.set_result(body) if body is not None else future.set_exception(error or RuntimeError())

        def work() -> None:
            body, error = None, None
            try:
                with self._working:  # one at a time: readers must not add up
                    body = self.answer(*key)
            except Exception as caught:
                error = caught
            with suppress(RuntimeError):  # the exporter was closed meanwhile
                loop.call_soon_threadsafe(settle, body, error)

        threading.Thread(target=work, name="gristmill-board", daemon=True).start()
        return future

    def answer(self, name: str, span: int, now: float | None = None) -> bytes:
        """Numbers of a dashboard over the last `span` seconds, as JSON."""
        now = time.time() if now is None else now
        note = ""
        if self.prometheus is not None:
            try:
                return _dumped(self._from_prometheus(self.prometheus, name, span, now))
            except PrometheusError as error:
                note = f"Prometheus at {self.prometheus.place} does not answer ({error}): this is what rank 0 remembers itself."
        found = self._from_history(name, span, now)
        if not note and self.world > 1:
            note = f"Rank 0 of {self.world} sees itself alone; name a Prometheus (metrics.prometheus=URL) to see all ranks."
        return _dumped({**found, "note": note})

    def _from_history(self, name: str, span: int, now: float) -> dict[str, Any]:
        since = self.history.since()
        begin = max(now - span, since) if since is not None else now - span
        every = self.history.every
        grid = _grid(max(begin, now - span), now, every)
        view = self.history.view(float(grid[0]), now)
        window = max(4 * view.every, float(grid[1] - grid[0]) + view.every)
        fine = self.history.view(now - WINDOW, now)
        source = "from this process's own history"
        return self._filled(
            name,
            grid,
            source,
            now,
            lambda query: evaluate(query.term, view, grid, window),
            lambda query: evaluate(query.term, fine, grid[-1:], WINDOW * every / EVERY),
            "the run" if self.world == 1 else "this rank",
        )

    def _from_prometheus(self, server: Prometheus, name: str, span: int, now: float) -> dict[str, Any]:
        deadline = time.monotonic() + PATIENCE
        grid = _grid(now - span, now, 1.0)
        window = server.rate_window(float(grid[1] - grid[0]), deadline)
        pair = np.array([now - 1.0, now])
        found = self._filled(
            name,
            grid,
            f"from Prometheus at {server.place}",
            now,
            lambda query: server.evaluate(query.term, grid, window, deadline),
            lambda query: server.evaluate(query.term, pair, max(WINDOW, window), deadline),
        )
        return {**found, "note": ""}

    def _filled(
        self,
        name: str,
        grid: np.ndarray,
        source: str,
        now: float,
        ask: Callable[[Query], Series],
        ask_now: Callable[[Query], Series],
        whose: str = "the run",
    ) -> dict[str, Any]:
        panels = {
            place: [{"legend": query.legend, "series": _series(query, ask(query))} for query in panel.queries]
            for place, panel in self.shown[name].panels()
        }
        above = (
            {key: _series(query, ask_now(query)) for key, query in TOP.items()} if self.scope != ("instance",) else {}
        )
        return {
            "dashboard": name,
            "at": now,
            "source": source,
            "times": [round(float(at), 3) for at in grid],
            "panels": panels,
            **(top(above, whose) if above else {"head": {}, "flow": None}),
        }


def _grid(start: float, end: float, every: float) -> np.ndarray:
    """Times up to `end`, evenly spaced, no closer than the samples; two at least."""
    count = int(min(POINTS, max(2.0, (end - start) / every + 1)))
    return np.linspace(start if end > start else end - every, end, count)


def _series(query: Query, found: Series) -> list[dict[str, Any]]:
    rows = []
    for labels, values in found.items():
        if np.isfinite(values).any():
            numbers = [float(f"{value:.6g}") if math.isfinite(value) else None for value in values.tolist()]
            rows.append({"name": _named(query.legend, dict(labels)), "labels": dict(labels), "values": numbers})
    rows.sort(key=lambda row: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", row["name"])])
    return rows


def _named(legend: str, labels: Mapping[str, str]) -> str:
    return re.sub(r"{{(\w+)}}", lambda found: labels.get(found[1], ""), legend)


def _dumped(answer: dict[str, Any]) -> bytes:
    return json.dumps(answer, separators=(",", ":"), allow_nan=False).encode()
