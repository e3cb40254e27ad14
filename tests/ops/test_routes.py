"""Alertmanager: one cause is told once. The committed routes, checked by amtool and tried on the real program."""

import json
import re
import subprocess
import time
import urllib.request
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import yaml
from gristmill.ops import monitor
from gristmill.ops.monitor.alerts import ALERTS

from ..servers import DIRECT, program

ROUTES = Path(monitor.__file__).parent / "rules" / "alertmanager.yml"
BY_NAME = {alert.name: alert for alert in ALERTS}
PATIENCE = 60.0  # seconds until all alerts have gone through the program


def test_only_alerts_are_masked_and_no_warning_hides_a_page():
    for alert in ALERTS:
        assert len(set(alert.masks)) == len(alert.masks)
        for name in alert.masks:
            assert name in BY_NAME.keys() - {alert.name}, f"{alert.name} masks {name}"
            assert (alert.severity, BY_NAME[name].severity) != ("warn", "page"), f"{alert.name} hides {name}"


def test_masks_run_one_way():
    """Of two that hide each other neither would be told; nor in a longer circle."""

    def effects(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, f"a circle: {' -> '.join((*above, name))}"
        for other in BY_NAME[name].masks:
            effects(other, (*above, name))

    for alert in ALERTS:
        effects(alert.name, ())


def test_the_routes_hold_no_secret_and_one_place_for_each_severity():
    config = yaml.safe_load(ROUTES.read_text())
    assert {receiver["name"] for receiver in config["receivers"]} == {"pager", "morning"}
    hosts = re.findall(r"https?://([^/:\s]+)", ROUTES.read_text())
    assert set(hosts) == {"127.0.0.1"}
    assert config["route"]["group_by"] == ["run"]


@pytest.mark.system
@pytest.mark.program("amtool")
@pytest.mark.parametrize(("severity", "receiver"), [("page", "pager"), ("warn", "morning")])
def test_amtool_finds_the_file_well_and_routes_by_severity(severity: str, receiver: str):
    asked = [
        ["check-config", str(ROUTES)],
        ["config", "routes", "test", f"--config.file={ROUTES}", f"severity={severity}"],
    ]
    checked, routed = (subprocess.run(["amtool", *each], capture_output=True, text=True, timeout=60) for each in asked)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert routed.stdout.strip() == receiver, routed.stdout + routed.stderr


@pytest.mark.system
@pytest.mark.program("prometheus-alertmanager")
def test_of_a_cause_and_what_follows_from_it_only_the_cause_is_active(tmp_path: Path):
    """Every mask, each in a run of its own; the same effects in a run without the cause are told."""
    posted = [
        _alert(name, f"{alert.name} masks {effect}")
        for alert in ALERTS
        for effect in alert.masks
        for name in (alert.name, effect)
    ]
    posted += [_alert(alert.name, f"{alert.name} alone") for alert in ALERTS]
    # A dead rank, as a run really tells it: everything stands still, and one thing is told.
    dead = ("GristmillRanksMissing", "GristmillNoProgress", "GristmillStraggler", "GristmillGoodputLow")
    posted += [_alert(name, "dead") for name in (*dead, "GristmillStarvedByStorage", "GristmillCheckpointOverdue")]
    wanted = {(f"{alert.name} masks {effect}", alert.name) for alert in ALERTS for effect in alert.masks}
    wanted |= {(f"{alert.name} alone", alert.name) for alert in ALERTS} | {("dead", "GristmillRanksMissing")}
    # Its first notification waits for longer than this test takes.
    with program(tmp_path, "prometheus-alertmanager", ROUTES, "--cluster.listen-address=") as url:
        _ask(url, posted)
        told = _settled(url, wanted)
    assert _active(told) == wanted
    assert len(told) == len(posted)
    assert all(status["inhibitedBy"] for status in told.values() if status["state"] != "active")


Told = dict[tuple[str, str], dict[str, Any]]  # (run, alert) -> its status


def _alert(name: str, run: str) -> dict[str, Any]:
    labels = {"alertname": name, "run": run, "severity": BY_NAME[name].severity}
    return {"labels": labels, "annotations": {}, "startsAt": datetime.now(UTC).isoformat()}


def _active(told: Told) -> set[tuple[str, str]]:
    return {about for about, status in told.items() if status["state"] == "active"}


def _settled(url: str, wanted: set[tuple[str, str]]) -> Told:
    """What became of all alerts, once it is as wanted, or when patience ends: they go through the program one by one."""
    until = time.monotonic() + PATIENCE
    while True:
        found = _ask(url)
        told = {(one["labels"]["run"], one["labels"]["alertname"]): one["status"] for one in found}
        if _active(told) == wanted or time.monotonic() > until:
            return told
        time.sleep(0.1)


def _ask(url: str, body: Any = None) -> Any:
    request = urllib.request.Request(
        f"{url}/api/v2/alerts",
        data=None if body is None else json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    with DIRECT.open(request, timeout=30) as answer:
        text = answer.read()
    return json.loads(text) if text and body is None else None
