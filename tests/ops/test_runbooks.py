"""Every alert has its page, every page its alert, and what a page asks can be asked."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from gristmill.ops.monitor import runbooks
from gristmill.ops.monitor.alerts import ALERTS, RECORDS

from .test_rules import SERVED, metrics_in

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docs" / "runbooks"
PAGES = {page.stem: page.read_text() for page in sorted(FOLDER.glob("*.md")) if page.stem != "README"}


def queries(text: str) -> list[str]:
    return [query.strip() for query in re.findall(r"```promql\n(.*?)```", text, re.DOTALL)]


def test_every_alert_has_its_page_and_every_page_an_alert():
    assert set(PAGES) == {alert.name for alert in ALERTS}
    assert (FOLDER / "README.md").read_text() == runbooks.index()


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert.name)
def test_a_page_says_what_the_alert_says_and_gives_advice(alert: runbooks.Alert):
    page = PAGES[alert.name]
    assert page.startswith(runbooks.head(alert)), "renew it: python -m gristmill.ops.monitor.runbooks docs/runbooks"
    rest = page.removeprefix(runbooks.head(alert))
    parts = [part.strip() for part in re.split(r"^## .*$", rest, flags=re.MULTILINE)]
    assert re.findall(r"^## .*$", rest, re.MULTILINE) == list(runbooks.ADVICE)
    before, look, do, calm = parts
    assert before == ""
    assert queries(look)
    assert do.startswith("1. ")
    assert len(calm) > 20


@pytest.mark.parametrize("name", PAGES)
def test_a_page_names_only_what_there_is(name: str):
    page = PAGES[name]
    series = SERVED | {f"{metric}_{part}" for metric in SERVED for part in ("sum", "count", "bucket")}
    assert metrics_in(page) <= series | {"gristmill_run_info"}
    assert set(re.findall(r"\b(?:run|rank):\w+:\w+", page)) <= {record.name for record in RECORDS}
    for link in re.findall(r"\]\((\w+)\.md\)", page):
        assert link in PAGES


@pytest.mark.system
@pytest.mark.program("promtool")
def test_what_the_pages_ask_is_promql(tmp_path: Path):
    rules = [
        {"record": f"page:{name}:q{number}", "expr": query}
        for name, page in PAGES.items()
        for number, query in enumerate(queries(page))
    ]
    assert len(rules) > 2 * len(PAGES)
    file = tmp_path / "asked.yml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "pages", "rules": rules}]}))
    answer = subprocess.run(["promtool", "check", "rules", str(file)], capture_output=True, text=True, timeout=120)
    assert answer.returncode == 0, answer.stdout + answer.stderr


def test_renewing_keeps_the_advice_and_asks_for_what_is_missing(tmp_path: Path):
    folder = tmp_path / "runbooks"
    shutil.copytree(FOLDER, folder)
    assert runbooks.renew(folder) == []
    page = folder / f"{ALERTS[0].name}.md"
    page.write_text("# Old\n\n## What to look at\n\nThe sky.\n")
    assert runbooks.renew(folder) == [page]
    assert page.read_text() == runbooks.head(ALERTS[0]) + "## What to look at\n\nThe sky.\n"
    page.write_text("# Empty\n")
    with pytest.raises(ValueError, match="has no advice"):
        runbooks.renew(folder)
