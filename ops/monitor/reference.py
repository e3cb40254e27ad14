"""The metric reference, docs/metrics.md, made from the catalogue and from what the collectors themselves say.

A test fails when the file is out of date; `gristmill monitor reference` writes it anew.
"""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families

from ...shards.ingest import IngestStats, Outcome
from .catalogue import ENUMS, GROUPS, HEALTH_OF
from .exporter import FAILURES, FAILURES_HELP
from .intake import IngestCollector
from .node import merged
from .row import Row

HEAD = """# Metric reference

<!-- Made by ops/monitor/reference.py from the catalogue; a test holds the two together. -->

Every process of a run serves its metrics on a port of its own (`metrics.port`, 9464 and those after it). Names follow
`gristmill_<subject>_<unit>[_total]`, in base units. Labels have the values listed here and no others, so that no file name, host or
message can become a series; `run`, `rank`, `node` and `job` come from whoever scrapes. Gauges are there from their first value
on; counters begin at zero with the process, but for those that only some processes have. Counters of seconds
and FLOPs are there to be divided: `rate(a[5m]) / rate(b[5m])` is right over any window, where a ready-made share is not.
"""
VALUES = "## Values of labels\n\n| label | values |\n|---|---|\n"
SIGNS = "## Signs of life by objective\n\nValues of `name`.\n\n| objective | names |\n|---|---|\n"
SHOWN = 9  # values of a label that a table's cell still shows
PROCESS = "Process"
INGEST = "Ingest (`gristmill ingest --metrics-port`)"


def render() -> str:
    """The whole file."""
    sections = [
        _section(group.title, f"Counted by {group.source}.", [_of(row) for row in _merged(group.rows)])
        for group in GROUPS
    ]
    parts = [HEAD, *sections]
    info = ("gristmill_run_info", "info", "run and what decides bit-for-bit resumption", "What runs: always 1.")
    process = [info, *(_told(metric, {}) for metric in _collected([ProcessCollector(registry=None)]))]
    parts.append(_section(PROCESS, "Read from /proc by the client library, and from the run's topology.", process))
    outcomes = [outcome.value for outcome in Outcome]
    labels = {"outcome": outcomes, "reason": outcomes, "direction": ["in", "out"]}
    intake = [_told(metric, labels) for metric in _collected([IngestCollector(_one_of_each)])]
    parts.append(
        _section(INGEST, "Counted by `shards/ingest/`, served by `ops/monitor/intake.py` while it runs.", intake)
    )
    parts.append(
        _section("Exporter", "Counted by `ops/monitor/exporter.py` and, for a whole node, `node.py`.", _serving())
    )
    many = {name: values for name, values in ENUMS.items() if len(values) > SHOWN and name != "name"}
    many["outcome, reason (of ingest)"] = tuple(outcomes)
    parts.append(VALUES + "".join(f"| {name} | {', '.join(values)} |\n" for name, values in many.items()))
    parts.append(SIGNS + "".join(f"| {name} | {', '.join(names)} |\n" for name, names in HEALTH_OF.items()))
    return "\n".join(part.strip("\n") + "\n" for part in parts)


Line = tuple[str, str, str, str]  # name, type, labels, meaning


def _section(title: str, source: str, lines: Iterable[Line]) -> str:
    rows = "".join(f"| `{name}` | {kind} | {labels} | {text} |\n" for name, kind, labels, text in lines)
    return f"## {title}\n\n{source}\n\n| metric | type | labels | meaning |\n|---|---|---|---|\n{rows}"


def _merged(rows: Iterable[Row]) -> list[list[Row]]:
    """Rows that feed one metric together."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row.metric, []).append(row)
    return list(found.values())


def _of(rows: list[Row]) -> Line:
    row = rows[0]
    kind = "histogram" if not isinstance(row.kind, str) else "gauge" if row.kind == "gauge" else "counter"
    values: dict[str, list[str]] = {label: [] for label in row.labels}
    for each in rows:
        for label, value in each.fixed:
            values[label].append(value)
    for name, label in zip(row.free, row.labels[len(row.fixed) :], strict=True):
        values[label] += ENUMS[name]
    return row.metric, kind, _labels(values), row.help


def _labels(values: dict[str, list[str]]) -> str:
    return "; ".join(
        f"{label}: {', '.join(known)}" if 0 < len(known) <= SHOWN else f"{label} (below)" if known else label
        for label, known in values.items()
    )


def _told(metric: Metric, known: dict[str, list[str]]) -> Line:
    total = "_total" if metric.type == "counter" else ""
    labels = sorted({label for sample in metric.samples for label in sample.labels})
    return (
        f"{metric.name}{total}",
        metric.type,
        _labels({label: known[label] for label in labels}),
        metric.documentation,
    )


def _serving() -> Iterable[Line]:
    yield FAILURES, "counter", "what: metrics, page, tick", FAILURES_HELP
    for metric in text_string_to_metric_families(merged({0: None}, 1).decode()):
        yield _told(metric, {"rank": []})


def _collected(collectors: Iterable[object]) -> Iterable[Metric]:
    registry = CollectorRegistry()
    for collector in collectors:
        registry.register(collector)  # pyright: ignore[reportArgumentType]
    return sorted(registry.collect(), key=lambda metric: metric.name)


def _one_of_each() -> IngestStats:
    stats = IngestStats()
    stats.outcomes.update([next(iter(Outcome)).value])
    stats.retries.update([next(iter(Outcome)).value])
    return stats
