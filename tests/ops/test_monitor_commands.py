"""`gristmill monitor`: what it writes and prints is what the monitor's own parts make."""

import json
import subprocess
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from gristmill.ops.cli import main
from gristmill.ops.monitor.alerts import ALERTS, render, render_routes
from gristmill.ops.monitor.panels import dashboards as boards
from gristmill.ops.monitor.reference import render as reference


def said(*arguments: object) -> str:
    answer = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert answer.exit_code == 0, answer.output
    return answer.output


def test_rules(tmp_path: Path):
    out = said("monitor", "rules", "--out", tmp_path / "new" / "rules")
    folder = tmp_path / "new" / "rules"
    assert sorted(path.name for path in folder.iterdir()) == ["alertmanager.yml", "gristmill.yml"]
    assert (folder / "gristmill.yml").read_text() == render()
    assert (folder / "alertmanager.yml").read_text() == render_routes()
    assert out.count("written: ") == 2
    said("monitor", "rules", "--out", folder, "--scale", "0.01")
    assert (folder / "gristmill.yml").read_text() == render(0.01) != render()


@pytest.mark.program("promtool")
def test_rules_that_prometheus_takes(tmp_path: Path):
    said("monitor", "rules", "--out", tmp_path)
    subprocess.run(["promtool", "check", "rules", tmp_path / "gristmill.yml"], check=True, capture_output=True)


def test_dashboards(tmp_path: Path):
    out = said("monitor", "dashboards", "--out", tmp_path)
    titles = {f"{board.uid}.json": f"Gristmill: {board.title}" for board in boards()}
    assert len(titles) >= 6
    assert {file.name: json.loads(file.read_text())["title"] for file in tmp_path.iterdir()} == titles
    assert out.splitlines() == [f"written: {tmp_path / name}" for name in sorted(titles)]


def test_reference():
    assert said("monitor", "reference") == reference()
    assert "gristmill_buffer_starved_seconds_total" in reference()


def test_alerts():
    page = said("monitor", "alerts")
    words = " ".join(page.split())
    for alert in ALERTS:
        assert f"{alert.name} {alert.severity}" in words
        assert alert.summary in words
        assert alert.cause in words
    listed = json.loads(said("monitor", "alerts", "--json"))
    assert [alert["name"] for alert in listed] == [alert.name for alert in ALERTS]
    assert "\x1b" not in page
    rules = yaml.safe_load(render())
    written = {rule["alert"] for group in rules["groups"] for rule in group["rules"] if "alert" in rule}
    assert written == {alert["name"] for alert in listed}


def test_a_folder_that_cannot_be_written(tmp_path: Path):
    (tmp_path / "file").write_text("")
    answer = CliRunner().invoke(main, ["monitor", "rules", "--out", str(tmp_path / "file")])
    assert answer.exit_code == 2
    assert "file" in answer.output
    assert "Traceback" not in answer.output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["status", "--over", "-1"], "--over"),
        (["status", "--cert", "nowhere.pem"], "nowhere.pem"),
        (["status", "--key", __file__], "--cert"),
        (["monitor", "rule", "--out", "x"], "rule"),
    ],
)
def test_mistakes(arguments: list[str], words: str):
    answer = CliRunner().invoke(main, arguments)
    assert answer.exit_code == 2
    assert words in answer.output
