"""The board as one HTML page: markup, style and script of the folder `page`, and the list of panels as data inside it.

Nothing is fetched from elsewhere (a Content-Security-Policy in the page forbids it), and what the page cannot know in
advance it asks its own exporter for (board.py).
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import cache
from html import escape
from pathlib import Path
from typing import Any

from .panels import Dashboard, Panel

SPANS = ((300, "5 min"), (1800, "30 min"), (7200, "2 h"), (43200, "12 h"))
ASKED = 5  # seconds between two questions of the page
_SCRIPTS = ("chart.js", "flow.js", "board.js")


def page(title: str, boards: Sequence[Dashboard]) -> bytes:
    """The page for these dashboards."""
    spec = {"every": ASKED, "spans": SPANS, "dashboards": [_dashboard(board) for board in boards]}
    parts = {
        "title": escape(title),
        "style": _file("board.css"),
        "script": "\n".join(_file(name) for name in _SCRIPTS),
        # Inside <script> nothing is an entity; "<" alone could end it.
        "spec": json.dumps(spec, separators=(",", ":")).replace("<", "\\u003c"),
    }
    # In one pass: what a run is called may look like a place to fill.
    return re.sub(r"{{(\w+)}}", lambda found: parts[found[1]], _file("board.html")).encode()


def _dashboard(board: Dashboard) -> dict[str, Any]:
    names = iter(board.panels())
    rows = [
        {"title": row.title, "panels": [_panel(next(names)[0], panel) for panel in row.panels]} for row in board.rows
    ]
    return {"name": board.name, "title": board.title, "about": board.about, "rows": rows}


def _panel(name: str, panel: Panel) -> dict[str, Any]:
    kept = ("title", "help", "unit", "kind", "span", "low", "high", "log", "levels", "below", "needs")
    return {"id": name, **{key: getattr(panel, key) for key in kept}}


@cache
def _file(name: str) -> str:
    return (Path(__file__).parent / "page" / name).read_text()
