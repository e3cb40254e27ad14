"""The board: the same panels as Grafana's, from the exporter's own history or from Prometheus, as a browser shows them.

One run with every objective goes on while a real Prometheus scrapes it; beside it a real ingest's numbers, and a made-up
pair of ranks that has every metric of the catalogue, so that panels which need a GPU or a cache are asked for, too. That
history and Prometheus say the same is shown on numbers of every kind at the same times, loaded into Prometheus as blocks.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any
from urllib.error import HTTPError

import numpy as np
import pytest
from gristmill.ops.monitor.board import FRESH, board
from gristmill.ops.monitor.exporter import Exporter
from gristmill.ops.monitor.history import History
from gristmill.ops.monitor.history_terms import evaluate
from gristmill.ops.monitor.intake import IngestCollector
from gristmill.ops.monitor.metrics import Metrics
from gristmill.ops.monitor.panels import dashboards, wanted_samples
from gristmill.ops.monitor.panels_flow import FLOW
from gristmill.ops.monitor.panels_run import HEAD
from gristmill.ops.monitor.panels_terms import Term, samples_of
from gristmill.shards.ingest import IngestStats
from prometheus_client import CollectorRegistry

from ..workers import Workers
from .watched import Online, Watched, ask, eventually

pytestmark = [pytest.mark.system, pytest.mark.program("prometheus"), pytest.mark.program("promtool")]

WINDOW = "20s"  # of rates; scrapes are two seconds apart
# Panels that stay empty on that run, and why; asked of the made-up ranks or of the ingest instead.
ELSEWHERE = {
    "Model FLOPs utilisation": "no GPU whose peak is known",
    "Retries by reason": "no remote storage",
    "Throttled": "no remote storage",
    "Cache hits": "no cache",
    "Cache size and eviction": "no cache",
    "GPU memory": "no GPU",
    "Bytes exchanged": "one process",
    "Operations a step": "one process",
    "Spread of the features": "the probes have labels",
}
STEADY = ("Ranks of the run", "Attempts", "How full", "Weights of the objectives", "Interruptions")
TITLES = {place: panel.title for one in dashboards() for place, panel in one.panels()}
NO_REMOTE = {"Requests tried again": "an ingest of files makes no requests"}
ALL = [
    (board.name, panel.title, query.term, board.scope)
    for board in dashboards()
    for _, panel in board.panels()
    for query in panel.queries
]


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory, workers: Workers) -> Iterator[Watched]:
    watched = Watched(tmp_path_factory.mktemp("board"), workers)
    try:
        watched.begin()
        yield watched
    finally:
        watched.close()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Online]:
    browser = Online(tmp_path_factory.mktemp("chromium"))
    yield browser
    browser.close()


def finite(values: dict[Any, float]) -> bool:
    return any(math.isfinite(value) for value in values.values())


def test_no_panel_asks_for_an_unknown_metric(watched: Watched) -> None:
    """Names of the catalogue are in the blocks; what the run and the ingest have are scraped, the ingest's soon."""
    retried = IngestCollector(lambda: IngestStats(retries=Counter(timeout=1))).collect()
    unknown = {name for _, _, term, _ in ALL for name in samples_of(term)}
    unknown -= {sample.name for family in retried for sample in family.samples}

    def all_known() -> bool:
        left = unknown - set(ask(watched.prometheus, "/api/v1/label/__name__/values")["data"])
        if left:
            print(left)  # if it stays so
        return not left

    eventually(all_known)
    run = set(ask(watched.prometheus, "/api/v1/label/__name__/values", **{"match[]": '{run="run"}'})["data"])
    asked = {(title, name) for board, title, term, _ in ALL for name in samples_of(term) if board != "ingest"}
    assert {title for title, name in asked if name not in run} <= set(ELSEWHERE)


def test_every_query_of_every_panel_is_answered(watched: Watched) -> None:
    """Asked again where a scrape was lost; what is listed above stays empty."""
    for _, title, term, scope in ALL:
        found = finite(watched.values(term, scope, "run", WINDOW))
        if title in ELSEWHERE or title in NO_REMOTE:
            assert not found, title
        elif not found:
            print(title)  # if it stays so
            eventually(lambda term=term, scope=scope: finite(watched.values(term, scope, "run", WINDOW)))


def test_panels_that_this_run_leaves_empty_are_answered_elsewhere(watched: Watched) -> None:
    for name, title, term, scope in ALL:
        if name != "ingest":
            assert finite(watched.values(term, scope, "every", "1m", time=str(watched.end))), title
    for title in [*ELSEWHERE, *NO_REMOTE]:
        assert panel_of(title).needs, title


def panel_of(title: str) -> Any:
    return next(panel for board in dashboards() for _, panel in board.panels() if panel.title == title)


def test_history_says_what_prometheus_says(watched: Watched) -> None:
    """Every query, with rates over a minute of counters that grow by fits and start anew; the same samples at the same times."""
    view = watched.history.view(watched.end - 600, watched.end)
    grid = np.array([watched.end - 20, watched.end])
    assert watched.history.dropped == 0
    terms = [(title, term) for board, title, term, _ in ALL if board != "ingest"]
    for title, term in [*terms, *FLOW.items(), *HEAD.items()]:
        for place, at in enumerate(grid):
            theirs = watched.values(term, ("run", "rank"), "every", "60s", time=str(at))
            ours = {k: float(v[place]) for k, v in evaluate(term, view, grid, 60.0).items() if np.isfinite(v[place])}
            assert ours.keys() == {k for k, v in theirs.items() if math.isfinite(v)}, title
            for labels, value in ours.items():
                assert value == pytest.approx(theirs[labels], rel=1e-9), (title, labels)


def test_an_ingest_s_history_agrees_too(watched: Watched) -> None:
    history = History(watched.intake.registry, wanted_samples())
    for ago in (10, 5, 0):
        history.sample(time.time() - ago)
    view, grid = history.view(time.time() - 60, time.time()), np.array([time.time()])
    for name, title, term, scope in ALL:
        if name == "ingest":
            ours = {k: float(v[0]) for k, v in evaluate(term, view, grid, 60.0).items() if np.isfinite(v[0])}

            def alike(term: Term = term, scope: tuple[str, ...] = scope, ours: dict[Any, float] = ours) -> bool:
                theirs = watched.values(term, scope, "", WINDOW)
                return ours == {k: v for k, v in theirs.items() if math.isfinite(v)}

            print(title, ours)  # if it stays unlike
            eventually(alike)  # a scrape over its time leaves a gap


@pytest.mark.parametrize("name", ["overview", "data-path", "objectives", "ranks", "checkpoints"])
def test_the_page_says_the_same_from_both(watched: Watched, name: str) -> None:
    """What the run's own exporter remembers, and a board that is fed by the Prometheus that scrapes the run."""
    pages, _ = board(CollectorRegistry(), run="run", prometheus=watched.prometheus)
    made: Any = pages["board.json"].__self__  # pyright: ignore[reportFunctionMemberAccess]
    own, theirs = eventually(lambda: settled(watched, name, made))
    assert own["source"] == "from this process's own history"
    assert theirs["source"].startswith("from Prometheus at 127.0.0.1")
    shown = filled(own)
    assert {TITLES[place] for place in own["panels"].keys() - shown} <= set(ELSEWHERE)
    assert own["head"]["images"] == 160000
    assert own["flow"]["limit"] in ("storage", "reader", "augment", "step")
    assert own["flow"]["words"][0]


def settled(watched: Watched, name: str, made: Any) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """Both answers, once the own history is long enough for rates, Prometheus answered in time, and both show the same
    panels and numbers: between the two looks the run may have made the first of one, or a scrape may have failed."""
    own = ask(watched.url, "/board.json", dashboard=name, span="300")
    if len(own["times"]) <= 4 or not own["flow"] or not own["head"]["speed"]:
        return None
    theirs = json.loads(made.answer(name, 300))
    if theirs["note"] or filled(own) != filled(theirs) or steady(own) != steady(theirs):
        print(theirs["note"] or filled(own) ^ filled(theirs) or (steady(own), steady(theirs)))  # if it stays so
        return None
    return own, theirs


def filled(answer: dict[str, Any]) -> set[str]:
    """The panels that have something to show."""
    return {place for place, queries in answer["panels"].items() if any(query["series"] for query in queries)}


def steady(answer: dict[str, Any]) -> dict[str, Any]:
    """What does not move between two looks: last values of some panels, all images, and which numbers the flow has."""
    last = {
        place: [(series["name"], series["values"][-1]) for query in queries for series in query["series"]]
        for place, queries in answer["panels"].items()
        if TITLES[place] in STEADY
    }
    flow = answer["flow"]["values"].keys() if answer["flow"] else None
    return {"last": last, "images": answer["head"].get("images"), "flow": flow}


@pytest.mark.program("chromium")
@pytest.mark.parametrize("name", ["overview", "data-path", "objectives", "ranks", "checkpoints"])
def test_a_browser_shows_every_panel(watched: Watched, browser: Online, name: str) -> None:
    browser.look(watched.url, name)
    states = browser.ask(
        "[...document.querySelectorAll('.panel')].map(p => [p.querySelector('h3').firstChild.textContent, p.dataset.state])"
    )
    shown = next(one for one in dashboards() if one.name == name)
    assert [title for title, _ in states] == [panel.title for _, panel in shown.panels()]
    assert {title for title, state in states if state != "drawn"} <= set(ELSEWHERE)
    bare = "d => !d.closest('[hidden]') && !d.querySelector('svg, .bars, table')"
    blank = f"[...document.querySelectorAll('.drawing')].filter({bare}).map(d => d.closest('.panel').textContent)"
    assert browser.ask(blank) == []
    flow = browser.ask("[...document.querySelectorAll('.stage b, .tank b')].map(e => e.textContent)")
    assert flow == ["Storage", "Reader", "Encoded", "Augmentation", "Ready", "Step"]
    assert browser.ask("document.querySelectorAll('.limit').length") == 1
    assert len(browser.ask("document.getElementById('verdict').textContent")) > 20
    assert browser.ask("document.getElementById('state').textContent") in ("training", "checkpointing", "probing")
    assert browser.said() == []
    assert {url.partition("?")[0].partition("#")[0] for url in browser.asked() if not url.startswith("data:")} == {
        f"{watched.url}/", f"{watched.url}/board.json",
    }  # fmt: skip


@pytest.mark.program("chromium")
def test_light_and_dark_and_what_the_pointer_finds(watched: Watched, browser: Online) -> None:
    grounds = {}
    for scheme in ("light", "dark"):
        browser.look(watched.url, "overview", scheme=scheme)
        ground = (
            "getComputedStyle(document.body).backgroundColor + getComputedStyle(document.querySelector('.panel')).color"
        )
        grounds[scheme] = browser.ask(ground)
    assert grounds["light"] != grounds["dark"]
    place = "document.querySelector('.panel svg.chart:has(.cursor)')"
    tip = browser.ask(
        f"(() => {{ const s = {place}, r = s.getBoundingClientRect(); "
        "s.dispatchEvent(new PointerEvent('pointermove', {clientX: r.right - 30, clientY: r.top + 20, bubbles: true})); "
        "return document.querySelector('.tip')?.textContent })()"
    )
    assert re.match(r"\d\d:\d\d:\d\d", tip), tip
    browser.ask("document.querySelector('.why').click()")
    assert browser.ask("document.querySelector('.help').hidden") is False
    times = browser.ask(  # that the page asks for numbers, for one click
        "new Promise(done => { clearTimeout(timer); const before = round_; "
        "addEventListener('hashchange', () => done(round_ - before), {once: true}); "
        "[...document.querySelectorAll('nav button')].find(b => b.textContent === 'Ranks').click() })"
    )
    assert times == 1
    eventually(lambda: browser.ask("document.getElementById('panels').dataset.drawn === 'ranks'"))
    assert browser.ask("location.hash") == "#ranks"
    assert browser.said() == []


@pytest.mark.program("chromium")
@pytest.mark.parametrize("name", ["overview", "data-path", "ranks"])
def test_a_narrow_screen_does_not_scroll_sideways(watched: Watched, browser: Online, name: str) -> None:
    browser.look(watched.url, name, width=360)
    assert browser.ask("innerWidth") == 360
    assert browser.ask("document.documentElement.scrollWidth") == browser.ask("document.documentElement.clientWidth")
    outside = (
        "e => !e.closest('.scroll, svg') && e.getBoundingClientRect().right > document.documentElement.clientWidth + 1"
    )
    assert (
        browser.ask(f"[...document.querySelectorAll('main *')].filter({outside}).map(e => e.outerHTML.slice(0, 99))")
        == []
    )


@pytest.mark.program("chromium")
def test_the_flow_is_drawn_as_soon_as_there_are_numbers(browser: Online) -> None:
    """Rates want two samples: a page that is opened with the first has no flow yet, and gets it with the next."""
    metrics = Metrics("young", {})
    pages, _ = board(metrics.registry, run="young")
    made: Any = pages["board.json"].__self__  # pyright: ignore[reportFunctionMemberAccess]
    made.history.sample(time.time() - 20)
    hidden = "document.getElementById('flow').hidden"
    with Exporter(metrics.registry, 0, pages=pages) as exporter:
        browser.look(exporter.url.removesuffix("/metrics"), "overview")
        assert browser.ask(hidden) is True
        for ago in (15, 10, 5, 0):
            made.history.sample(time.time() - ago)
        eventually(lambda: browser.ask(f"refresh().then(() => !{hidden})"))
        assert browser.ask("document.querySelectorAll('#flow .stage').length") == 4
        assert browser.said() == []


@pytest.mark.program("chromium")
def test_hostile_names_do_nothing_in_a_browser(browser: Online) -> None:
    hostile = "</script><img src=x onerror=alert(1)>{{spec}}"
    metrics = Metrics(hostile, {})
    metrics.observe_step({"loss": 1.0, "phases": {"forward": 0.1}, "batch": 4})
    pages, ticks = board(metrics.registry, run=hostile, every=0.2)
    with Exporter(metrics.registry, 0, pages=pages, ticks=ticks) as exporter:
        browser.look(exporter.url.removesuffix("/metrics"), "overview")
        assert browser.ask("document.title") == hostile
        assert browser.ask("document.images.length") == 0
        assert browser.ask("document.scripts.length") == 2
        assert browser.said() == []
        exporter.close()
        # Two questions without an answer, and the page says so; the browser's own word on them is no error of the page.
        browser.ask("refresh().then(refresh)")
        assert "no longer answers" in browser.ask("document.getElementById('note').textContent")


def test_only_panels_can_be_asked_for(watched: Watched) -> None:
    """Whatever the query says, the answer is that of a dashboard over one of the four spans."""
    usual = ask(watched.url, "/board.json")
    for query in ({"query": "up"}, {"dashboard": "../metrics", "span": "1e9"}, {"prometheus": "http://127.0.0.1:1"}):
        answer = ask(watched.url, "/board.json", **query)
        assert answer["dashboard"] == "overview"
        assert answer["panels"].keys() == usual["panels"].keys()
        assert answer["times"][-1] - answer["times"][0] <= 300
    with pytest.raises(HTTPError, match="404"):
        ask(watched.url, "/api/v1/query", query="up")


def test_readers_share_an_answer() -> None:
    metrics = Metrics("many", {})
    pages, ticks = board(metrics.registry, run="many", every=0.1)
    made: Any = pages["board.json"].__self__  # pyright: ignore[reportFunctionMemberAccess]
    answers = []
    real = made.answer
    made.answer = lambda *key: answers.append(key) or real(*key)
    with Exporter(metrics.registry, 0, pages=pages, ticks=ticks) as exporter:
        url, begin = exporter.url.removesuffix("/metrics"), time.monotonic()
        for _ in range(40):
            ask(url, "/board.json", dashboard="ranks", span="1800")
        assert len(answers) <= (time.monotonic() - begin) / FRESH + 1
