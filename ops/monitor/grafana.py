"""The panels as dashboards for Grafana: the files of the folder `dashboards` are what `render` gives; a test ties them.

Variables choose the data source, the run and any of its ranks; uids stay, so that provisioning renews a dashboard and links
to it live on. No Grafana server can be had here, so Grafana itself was not run. What was done instead: every query of every
panel is asked of a real Prometheus, the files go through the models of grafana-foundation-sdk 10.1 and come out the same
(tests/ops/test_dashboards.py), and tsc was run by hand over them as `const d: Dashboard` of npm's @grafana/schema 13.2.3.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ...shards.storage import published
from .grafana_panels import SOURCE, height_of, model
from .panels import Dashboard, dashboards

FOLDER = Path(__file__).parent / "dashboards"
SCHEMA = 39  # of Grafana 10.4; newer servers migrate it
ROW_HEIGHT = 1


def render(board: Dashboard) -> str:
    """The dashboard as a file's text."""
    return json.dumps(dashboard(board), indent=1) + "\n"


def write(folder: Path = FOLDER) -> list[Path]:
    """Write all dashboards into `folder`, one file each."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for board in dashboards():
        paths.append(folder / f"{board.uid}.json")
        with published(paths[-1]) as file:
            file.write(render(board).encode())
    return paths


def dashboard(board: Dashboard) -> dict[str, Any]:
    """Grafana's model of a dashboard."""
    firing = 'ALERTS{alertname=~"Gristmill.*",alertstate="firing"' + (',run="$run"}' if "run" in board.scope else "}")
    alerts = {
        "name": "Alerts",
        "datasource": SOURCE,
        "enable": True,
        "hide": False,
        "iconColor": "red",
        "expr": firing,
        "titleFormat": "{{alertname}}",
        "textFormat": "{{rank}}",
        "step": "30s",
    }
    link = {
        "title": "Gristmill",
        "type": "dashboards",
        "tags": ["gristmill"],
        "asDropdown": False,
        "icon": "external link",
        "includeVars": True,
        "keepTime": True,
        "targetBlank": False,
        "tooltip": "",
        "url": "",
    }
    return {
        "uid": board.uid,
        "title": f"Gristmill: {board.title}",
        "description": board.about,
        "tags": ["gristmill"],
        "schemaVersion": SCHEMA,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "timezone": "browser",
        "fiscalYearStartMonth": 0,
        "links": [link],
        "annotations": {"list": [alerts]},
        "templating": {"list": [_datasource(), *(_variable(label) for label in board.scope)]},
        "panels": _panels(board),
    }


def _datasource() -> dict[str, Any]:
    return {"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus", "regex": ""}


def _variable(label: str) -> dict[str, Any]:
    """Values of a label of the targets; ranks and ingests may be several, and all of them by default."""
    everyone = "gristmill_step_seconds_count"  # every rank has it from the start
    metric = {"instance": "gristmill_ingest_inputs", "run": everyone, "rank": everyone + '{run="$run"}'}[label]
    query = f"label_values({metric}, {label})"
    many = label != "run"
    found = {
        "name": label,
        "label": label.capitalize(),
        "type": "query",
        "datasource": SOURCE,
        "definition": query,
        "query": {"query": query, "refId": f"variable-{label}"},
        "refresh": 2,
        "sort": 3 if many else 1,
        "multi": many,
        "includeAll": many,
        "regex": "",
        "hide": 0,
        "skipUrlSync": False,
    }
    if many:
        found |= {"allValue": ".*", "current": {"selected": True, "text": ["All"], "value": ["$__all"]}}
    return found


def _panels(board: Dashboard) -> list[dict[str, Any]]:
    """Rows and their panels, from the top of the grid of 24 columns downwards."""
    found: list[dict[str, Any]] = []
    top = 0
    for row in board.rows:
        place = {"h": ROW_HEIGHT, "w": 24, "x": 0, "y": top}
        found.append(
            {
                "id": len(found) + 1,
                "type": "row",
                "title": row.title,
                "collapsed": False,
                "gridPos": place,
                "panels": [],
            }
        )
        top, left, tallest = top + ROW_HEIGHT, 0, 0
        for panel in row.panels:
            if left + panel.span > 24:
                top, left, tallest = top + tallest, 0, 0
            height = height_of(panel)
            place = {"h": height, "w": panel.span, "x": left, "y": top}
            found.append({"id": len(found) + 1, "gridPos": place, **model(panel, board.scope)})
            left, tallest = left + panel.span, max(tallest, height)
        top += tallest
    return found  # fmt: skip
