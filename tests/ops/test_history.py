"""The exporter's own history: what is kept of the registry, and what terms say over it. test_board.py asks Prometheus, too."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from gristmill.ops.monitor.history import EVERY, GAP, RINGS, SERIES, SLOTS, History
from gristmill.ops.monitor.history_terms import evaluate
from gristmill.ops.monitor.panels_terms import Agg, Both, Only, Rate, Scaled, Take, Term, Top
from prometheus_client import CollectorRegistry, Counter, Gauge
from prometheus_client.core import Metric
from prometheus_client.registry import Collector


def made_history(every: float = EVERY) -> tuple[Gauge, Counter, History]:
    registry = CollectorRegistry()
    gauge = Gauge("a", "a", ["x"], registry=registry)
    counter = Counter("b", "b", registry=registry)
    return gauge, counter, History(registry, {"a", "b_total"}, {"run": "r"}, every)


def test_history_is_bounded() -> None:
    gauge, _, history = made_history()
    for number in range(SERIES + 50):
        gauge.labels(str(number)).set(number)
    history.sample(0.0)
    history.sample(5.0)
    assert history.dropped == 51  # one is the counter, or it has found room and one gauge more has not
    assert sum(ring.values.nbytes for ring in history.rings) == SERIES * SLOTS * 8 < 9e6


def test_samples_are_kept_for_half_an_hour_and_for_half_a_day() -> None:
    _, _, history = made_history()
    for number in range(9000):
        history.sample(5.0 * number + number % 3)  # a clock that trembles
    assert [len(ring.order()) for ring in history.rings] == [slots for _, slots in RINGS]
    spans = [float(ring.times[ring.order()[-1]] - ring.times[ring.order()[0]]) for ring in history.rings]
    assert spans == pytest.approx([1800, 43200], rel=0.02)


def test_history_takes_the_finest_ring_that_reaches_back() -> None:
    _, _, history = made_history()
    for number in range(1000):
        history.sample(5.0 * number)
    now = 5.0 * 999
    assert history.view(now - 300, now).every == 5.0
    assert history.view(now - 1700, now).every == 5.0
    assert history.view(now - 4000, now).every == 60.0
    assert history.view(now - 1e6, now).every == 60.0
    assert history.since() == 0.0


def test_what_is_gone_is_not_shown_as_if_it_were_there() -> None:
    gauge, _, history = made_history()
    gauge.labels("1").set(7)
    history.sample(0.0)
    history.sample(5.0)
    view = history.view(0.0, 100.0)
    key = (("run", "r"), ("x", "1"))
    found = view.instant("a", (), np.array([-1.0, 0.0, 5.0, 5.0 + GAP * 5, 5.1 + GAP * 5]))[key]
    assert [math.isnan(value) for value in found] == [True, False, False, False, True]
    gauge.remove("1")
    history.sample(10.0)
    assert math.isnan(history.view(0.0, 100.0).instant("a", (), np.array([10.0]))[key][0])


def test_rates_of_counters_that_begin_late_or_anew() -> None:
    registry = CollectorRegistry()
    total = [0.0]

    class One(Collector):
        def collect(self) -> Iterator[Metric]:
            family = Metric("c", "c", "counter")
            if total[0] >= 0:
                family.add_sample("c_total", {}, total[0])
            yield family

    registry.register(One())
    history = History(registry, {"c_total"})
    for number, value in enumerate([-1, -1, 10, 20, 30, 5, 15, -1, 25]):
        total[0] = value
        history.sample(5.0 * number)
    found = history.view(0, 40).rate("c_total", (), np.array([5.0, 10.0, 20.0, 25.0, 40.0]), 20.0)[()]
    assert math.isnan(found[0])
    assert math.isnan(found[1])  # one sample is no growth
    assert found[2:].tolist() == [20 / 10, 25 / 15, (5 + 10 + 10) / 20]


def test_terms_over_history() -> None:
    gauge, counter, history = made_history()
    for number in range(5):
        gauge.labels("u").set(number)
        gauge.labels("v").set(2)
        counter.inc(10)
        history.sample(5.0 * number)
    view, grid = history.view(0, 20), np.array([10.0, 20.0])

    def at(term: Term) -> dict[Any, list[float]]:
        return {labels: values.tolist() for labels, values in evaluate(term, view, grid, 20.0).items()}

    a = Take("a")
    assert at(Agg("sum", a)) == {(): [4.0, 6.0]}
    assert at(Agg("count", Only(a, ">", 2), ("run",)))[(("run", "r"),)] == pytest.approx([math.nan, 1.0], nan_ok=True)
    assert at(Rate(Take("b_total"))) == {(("run", "r"),): [2.0, 2.0]}
    assert at(Top(1, Agg("max", a, ("x",)))) == {(("x", "u"),): [2.0, 4.0]}
    assert at(Scaled(Agg("max", Take("a", (("x", "u|w"),))), 3.0)) == {(): [6.0, 12.0]}
    assert at(Both(Agg("sum", a, ("x",)), "/", Agg("sum", a), spread=True)) == {
        (("x", "u"),): [0.5, 4 / 6], (("x", "v"),): [0.5, 2 / 6],
    }  # fmt: skip
    assert at(Both(Agg("sum", a, ("x",)), "/", Agg("sum", a))) == {}
    assert at(Agg("sum", Take("none"))) == {}
