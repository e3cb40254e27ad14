"""A running ingest as metrics: counters by outcome, which sum to the inputs decided, bytes, retries, what is in flight."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ...shards.ingest import IngestStats


class IngestCollector(Collector):
    """Reads `IngestStats` whenever somebody scrapes."""

    def __init__(self, stats: Callable[[], IngestStats | None]) -> None:
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        if stats is None:
            return
        items = CounterMetricFamily(
            "gristmill_ingest_items", "Inputs decided in this start, by outcome.", labels=["outcome"]
        )
        for outcome, count in sorted(stats.outcomes.copy().items()):
            items.add_metric([outcome], count)
        yield items
        flow = CounterMetricFamily("gristmill_ingest_bytes", "Bytes of images in this start.", labels=["direction"])
        flow.add_metric(["in"], stats.received)
        flow.add_metric(["out"], stats.stored)
        yield flow
        retries = CounterMetricFamily(
            "gristmill_ingest_retries", "Requests that were tried again, by reason.", labels=["reason"]
        )
        for reason, count in sorted(stats.retries.copy().items()):
            retries.add_metric([reason], count)
        yield retries
        yield CounterMetricFamily("gristmill_ingest_shards", "Shards written in this start.", stats.shards)
        yield GaugeMetricFamily("gristmill_ingest_inputs", "Inputs of the whole ingest.", stats.inputs)
        yield GaugeMetricFamily("gristmill_ingest_done_inputs", "Inputs that workers are through with.", stats.done)
        yield GaugeMetricFamily(
            "gristmill_ingest_in_flight_units", "Units that workers have in hand.", stats.units_in_flight
        )
