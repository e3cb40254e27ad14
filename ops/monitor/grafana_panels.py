"""One panel in Grafana's own words: its type, targets, options, field settings.

Bars and tables ask for the newest values only; a table's columns are one query each, joined by their labels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .panels import Panel
from .panels_terms import promql

SOURCE = {"type": "prometheus", "uid": "${datasource}"}
_HEIGHTS = {"stat": 4, "table": 8}
_UNITS = {
    "seconds": "s",
    "bytes": "bytes",
    "bytes/s": "binBps",
    "ratio": "percentunit",
    "flops/s": "flops",
    "images/s": "suffix: images/s",
    "inputs/s": "suffix: inputs/s",
}
_TYPES = {
    "timeseries": "timeseries",
    "stacked": "timeseries",
    "stat": "stat",
    "bar": "bargauge",
    "table": "table",
    "state": "state-timeline",
}
_COLOURS = {"good": "green", "warn": "orange", "bad": "red"}


def height_of(panel: Panel) -> int:
    """Rows of Grafana's grid."""
    return _HEIGHTS.get(panel.kind, 7)


def model(panel: Panel, scope: tuple[str, ...]) -> dict[str, Any]:
    """A panel as Grafana holds it, without its place."""
    now = panel.kind in ("bar", "table")
    targets = []
    for number, query in enumerate(panel.queries):
        target = {
            "refId": chr(ord("A") + number),
            "datasource": SOURCE,
            "expr": promql(query.term, scope),
            "legendFormat": query.legend or panel.title,
            "instant": now,
            "range": not now,
            "editorMode": "code",
            "format": "table" if panel.kind == "table" else "time_series",
        }
        targets.append(target)
    needs = f" Empty without {panel.needs}." if panel.needs else ""
    defaults: dict[str, Any] = {
        "unit": _UNITS.get(panel.unit, "short"),
        "thresholds": {"mode": "absolute", "steps": _steps(panel)},
        "color": {"mode": "thresholds" if panel.kind == "stat" else "palette-classic"},
        "custom": _custom(panel),
    }
    if not panel.log:
        ends = {"min": panel.low, "max": panel.high}
        defaults |= {side: value for side, value in ends.items() if value is not None}
    return {
        "type": _TYPES[panel.kind],
        "title": panel.title,
        "description": panel.help + needs,
        "datasource": SOURCE,
        "targets": targets,
        "options": _options(panel),
        "fieldConfig": {"defaults": defaults, "overrides": _overrides(panel)},
        "transformations": _transformations(panel),
    }


def _steps(panel: Panel) -> list[dict[str, Any]]:
    """Colours from the lowest value upwards."""
    if not panel.levels:
        return [{"color": "text" if panel.kind == "stat" else "green", "value": None}]
    levels = sorted(panel.levels)
    if panel.below:  # underneath each level it is as bad as the level says
        colours = [_COLOURS[name] for _, name in levels] + [_COLOURS["good"]]
    else:
        colours = [_COLOURS["good"]] + [_COLOURS[name] for _, name in levels]
    values = [None, *(value for value, _ in levels)]
    return [{"color": colour, "value": value} for colour, value in zip(colours, values, strict=True)]


def _custom(panel: Panel) -> dict[str, Any]:
    if panel.kind not in ("timeseries", "stacked"):
        return {}
    stacked = panel.kind == "stacked"
    custom: dict[str, Any] = {
        "drawStyle": "line",
        "lineWidth": 1,
        "fillOpacity": 60 if stacked else 8,
        "showPoints": "never",
        "spanNulls": False,
        "stacking": {"mode": "normal" if stacked else "none", "group": "A"},
        "thresholdsStyle": {"mode": "line" if panel.levels else "off"},
    }
    if panel.log:
        custom["scaleDistribution"] = {"type": "log", "log": 10}
    return custom


def _options(panel: Panel) -> dict[str, Any]:
    last = {"calcs": ["lastNotNull"], "fields": "", "values": False}
    legend = {"displayMode": "list", "placement": "bottom", "showLegend": True, "calcs": []}
    options: Mapping[str, dict[str, Any]] = {
        "timeseries": {"legend": legend, "tooltip": {"mode": "multi", "sort": "desc"}},
        "stat": {
            "reduceOptions": last,
            "colorMode": "value",
            "graphMode": "area",
            "justifyMode": "auto",
            "textMode": "value",
            "orientation": "auto",
        },
        "bargauge": {
            "reduceOptions": last,
            "displayMode": "basic",
            "orientation": "horizontal",
            "showUnfilled": True,
            "valueMode": "color",
        },
        "table": {"showHeader": True, "cellHeight": "sm"},
        "state-timeline": {
            "legend": legend,
            "tooltip": {"mode": "single", "sort": "none"},
            "mergeValues": True,
            "showValue": "never",
            "rowHeight": 0.9,
            "alignValue": "left",
        },
    }
    return options[_TYPES[panel.kind]]


def _overrides(panel: Panel) -> list[dict[str, Any]]:
    """Columns of a table have units of their own, which their names tell."""
    if panel.kind != "table":
        return []
    units = [
        (query.legend, "s" if "seconds" in query.legend else "percentunit" if "share" in query.legend else "none")
        for query in panel.queries
    ]
    return [
        {"matcher": {"id": "byName", "options": name}, "properties": [{"id": "unit", "value": unit}]}
        for name, unit in units
    ]  # fmt: skip


def _transformations(panel: Panel) -> list[dict[str, Any]]:
    if panel.kind != "table":
        return []
    names = {f"Value #{chr(ord('A') + number)}": query.legend for number, query in enumerate(panel.queries)}
    return [
        {"id": "merge", "options": {}},
        {"id": "organize", "options": {"excludeByName": {"Time": True}, "indexByName": {}, "renameByName": names}},
    ]
