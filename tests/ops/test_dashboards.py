"""Grafana's dashboards: generated from the list of panels, whole, and as Grafana's own models read them.

The models are grafana-foundation-sdk's (10.1), from which every key that we write has to come back. By hand, npm's
@grafana/schema 13.2.3 was asked, too: `npm i @grafana/schema@13.2.3 typescript@5`, a file with `export const d:
Plain<Dashboard> = {...}` for each dashboard, and the same for the Options and FieldConfig of each panel's type
(dist/esm/raw/composable/*/panelcfg), where Plain turns enums into their values: `type Plain<T> = T extends string ? `${T}` :
T extends (infer U)[] ? Plain<U>[] : T extends object ? { [K in keyof T]: Plain<T[K]> } : T`; then `npx tsc --noEmit --strict
--skipLibCheck --module esnext --moduleResolution bundler`. It is clean without KNOWN, and names what is misspelt.
"""

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from gristmill.ops.monitor.grafana import FOLDER, dashboard, render, write
from gristmill.ops.monitor.panels import Panel, dashboards, wanted_samples
from gristmill.ops.monitor.panels_terms import Agg, Both, Only, Quantile, Rate, Take, Top, promql

BOARDS = {board.name: board for board in dashboards()}
PANELS = [(board, name, panel) for board in dashboards() for name, panel in board.panels()]
# What Grafana reads and the models of 10.1 do not know: its variable editor's own key, and Prometheus' of an annotation.
KNOWN = {"definition", "expr", "step", "titleFormat", "textFormat"}


def test_the_files_are_what_the_code_gives(tmp_path: Path) -> None:
    assert {path.name: path.read_text() for path in FOLDER.iterdir()} == {
        f"{board.uid}.json": render(board) for board in dashboards()
    }, "run: python -c 'from gristmill.ops.monitor.grafana import write; write()'"
    assert [path.read_text() for path in write(tmp_path)] == [render(board) for board in dashboards()]


def test_there_is_a_dashboard_for_each_question() -> None:
    assert list(BOARDS) == ["overview", "data-path", "objectives", "ranks", "checkpoints", "ingest"]
    rows = [row.title for row in BOARDS["data-path"].rows]
    assert rows == [
        "Storage and cache", "Reader", "Encoded buffer", "Augmentation", "Ready buffer", "The step, and what it waits",
    ]  # fmt: skip
    assert len({board.uid for board in dashboards()}) == 6
    for board in dashboards():
        assert re.fullmatch(r"[a-z-]{1,40}", board.uid)  # Grafana's limit


@pytest.mark.parametrize(("board", "name", "panel"), PANELS, ids=[name for _, name, _ in PANELS])
def test_every_panel_says_what_it_tells(board: Any, name: str, panel: Panel) -> None:
    assert panel.help.endswith(".")
    assert 15 < len(panel.help) < 140
    assert 0 < panel.span <= 24
    assert panel.queries
    assert len({query.legend for query in panel.queries}) == len(panel.queries)
    for query in panel.queries:  # what tells series apart is in their names
        by = query.term.by if isinstance(query.term, Agg) else ()
        fixed = {label for label in by if panel.title and f"{{{{{label}}}}}" not in query.legend}
        assert fixed <= {"objective", "name"} or panel.kind == "table", (panel.title, fixed)


@pytest.mark.parametrize("board", dashboards(), ids=list(BOARDS))
def test_grafana_finds_its_way(board: Any) -> None:
    model = dashboard(board)
    assert model["title"].startswith("Gristmill: ")
    variables = {one["name"]: one for one in model["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    if board.name == "ingest":
        assert variables["instance"]["multi"]
    else:
        assert not variables["run"]["multi"]
        assert variables["rank"]["multi"]
        assert variables["rank"]["includeAll"]
        assert variables["rank"]["allValue"] == ".*"
    names = {f"${name}" for name in variables} | {"${datasource}", "$__rate_interval", "$__all"}
    assert set(re.findall(r"\$\{?\w+\}?", json.dumps(model))) <= names
    panels = model["panels"]
    assert [panel["id"] for panel in panels] == list(range(1, len(panels) + 1))
    for number, panel in enumerate(panels):  # inside the grid, and on top of nothing
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        for other in panels[:number]:
            there = other["gridPos"]
            apart = (
                place["x"] >= there["x"] + there["w"] or there["x"] >= place["x"] + place["w"],
                place["y"] >= there["y"] + there["h"] or there["y"] >= place["y"] + place["h"],
            )
            assert any(apart), (panel["title"], other["title"])


@pytest.mark.parametrize("board", dashboards(), ids=list(BOARDS))
def test_the_models_of_grafana_keep_all_of_it(board: Any) -> None:
    from grafana_foundation_sdk.cog.encoder import JSONEncoder
    from grafana_foundation_sdk.cog.plugins import register_default_plugins
    from grafana_foundation_sdk.models.dashboard import Dashboard

    register_default_plugins()
    ours = json.loads(render(board))
    theirs = json.loads(JSONEncoder(sort_keys=True).encode(Dashboard.from_json(ours)))
    assert list(lost(ours, theirs)) == []
    ours["panels"][1]["options"]["misspelt"] = 1
    theirs = json.loads(JSONEncoder(sort_keys=True).encode(Dashboard.from_json(ours)))
    assert list(lost(ours, theirs)) == ["/panels/1/options/misspelt"]


def lost(ours: Any, theirs: Any, path: str = "") -> Any:
    """Places where the models have nothing or something else; what they add by default is theirs."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for key in ours.keys() - KNOWN:
            yield from lost(ours[key], theirs[key], f"{path}/{key}") if key in theirs else [f"{path}/{key}"]
    elif isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        for number, pair in enumerate(zip(ours, theirs, strict=True)):
            yield from lost(*pair, f"{path}/{number}")
    elif ours != theirs:
        yield path


@pytest.mark.program("promtool")
@pytest.mark.system
def test_promtool_reads_every_query(tmp_path: Path) -> None:
    """As the expression of a recording rule, with a window in place of Grafana's variable."""
    queries = [promql(query.term, board.scope) for board, _, panel in PANELS for query in panel.queries]
    rules = [
        {"record": f"panel:{number}", "expr": query.replace("$__rate_interval", "1m")}
        for number, query in enumerate(queries)
    ]
    file = tmp_path / "rules.yml"
    file.write_text(json.dumps({"groups": [{"name": "panels", "rules": rules}]}))
    told = subprocess.run(["promtool", "check", "rules", file], capture_output=True, text=True)
    assert told.returncode == 0, told.stderr
    assert f"{len(queries)} rules found" in told.stdout


def test_terms_are_written_as_promql() -> None:
    wait = Take("a_total", (("phase", "data_wait"), ("memory", r".+\.queue")))
    scope = 'run="$run",rank=~"$rank"'
    assert promql(wait) == rf'a_total{{phase="data_wait",memory=~".+\\.queue",{scope}}}'
    assert promql(Take("a", ranked=False)) == 'a{run="$run"}'
    assert promql(Take("a"), ("instance",)) == 'a{instance=~"$instance"}'
    assert promql(Agg("sum", Rate(Take("a")), ("rank",))) == f"sum by (rank) (rate(a{{{scope}}}[$__rate_interval]))"
    ratio = Both(Agg("sum", Take("a"), ("x",)), "/", Agg("sum", Take("b")), spread=True)
    assert promql(ratio) == f"(sum by (x) (a{{{scope}}}) / on () group_left () sum(b{{{scope}}}))"
    assert promql(Top(3, Only(Take("a"), ">", 0))) == f"topk(3, a{{{scope}}} > 0)"
    le = f"sum by (le) (rate(h_bucket{{{scope}}}[$__rate_interval]))"
    assert promql(Quantile(0.99, "h")) == f"histogram_quantile(0.99, {le})"
    assert "h_bucket" not in wanted_samples()
