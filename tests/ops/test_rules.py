"""The alerts: fired and kept quiet by promtool, and held to the metrics that a run really serves."""

import json
import re
import subprocess
from pathlib import Path

import pytest
import yaml
from gristmill.ops import monitor
from gristmill.ops.monitor import catalogue
from gristmill.ops.monitor.alert import duration, scaled
from gristmill.ops.monitor.alerts import ALERTS, RECORDS, render, render_routes
from gristmill.ops.monitor.row import CALLED

from . import alert_cases, alert_troubles
from .alert_cases import COUNT, EVERYWHERE, FIRST, INGEST, ONSET, STEP, TARGET, written

RULES = Path(monitor.__file__).parent / "rules"
NAMES = [alert.name for alert in ALERTS]
# Not of the catalogue: what Prometheus itself knows of a target, and an ingest's (ops/monitor/intake.py).
INTAKE = {f"gristmill_ingest_{name}" for name in ("items_total", "done_inputs", "inputs", "in_flight_units")}
INTAKE |= {"gristmill_ingest_retries_total"}
SERVED = {row.metric for row in catalogue.CATALOGUE} | INTAKE
FIRED = 'group by (run, alertname, severity) (count_over_time(ALERTS{alertstate="firing"}[1d]))'
EXPRESSIONS = [scaled(rule.expr) for rule in (*RECORDS, *ALERTS)]


def promtool(*arguments: str) -> str:
    answer = subprocess.run(["promtool", *arguments], capture_output=True, text=True, timeout=300)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    return answer.stdout


def metrics_in(text: str) -> set[str]:
    """Names of metrics, without those of recording rules."""
    return set(re.findall(r"(?<![:\w])(gristmill_\w+)(?!:)\b(?!:)", text))


def test_the_files_are_what_the_alerts_say():
    assert (RULES / "gristmill.yml").read_text() == render()
    assert (RULES / "alertmanager.yml").read_text() == render_routes()


def test_every_alert_is_told_in_full():
    assert len(set(NAMES)) == len(NAMES)
    for alert in ALERTS:
        assert re.fullmatch(r"Gristmill[A-Z][A-Za-z]+", alert.name)
        assert [alert.summary[-1], alert.cause[-1]] == [".", "."], alert.name
        assert min(alert.hold, alert.keep) >= 0
        assert "$value" not in alert.expr


def test_recording_rules_are_named_by_level_metric_and_operation_and_used():
    text = " ".join(EXPRESSIONS)
    for record in RECORDS:
        assert re.fullmatch(r"(run|rank):gristmill_\w+:[a-z]+", record.name)
        assert len(re.findall(rf"{record.name}\b", text)) >= 1, f"{record.name} is read by no rule"
    assert set(re.findall(r"\b(?:run|rank):\w+:\w+", text)) == {record.name for record in RECORDS}


def test_rules_name_only_what_is_served():
    found = metrics_in(" ".join(EXPRESSIONS))
    assert found <= SERVED, found - SERVED
    members = dict(catalogue.ENUMS)
    members["buffer"] = ("ready", "encoded")
    members["source"] = ("local", "cache", "remote")
    rows = {row.metric: row for row in catalogue.CATALOGUE}
    for text in EXPRESSIONS:
        for metric, inside in re.findall(r"(gristmill_\w+)(?::avg)?{([^}]*)}", text):
            for label, how, value in re.findall(r'(\w+)(=~|!~|!=|=)"([^"]*)"', inside):
                if metric in INTAKE:
                    continue
                row = rows[metric]
                assert label in row.labels, f"{metric} has no label {label}"
                spoken = next((name for name in row.free if label == CALLED.get(name, name)), label)
                named = value.split("|") if how in ("=~", "!~") else [value]
                for each in named:
                    assert any(re.fullmatch(each, member) for member in members[spoken]), f"{metric} {label}={each}"


def test_the_good_run_serves_all_that_any_rule_reads():
    told = {name.partition("{")[0] for series in (TARGET, EVERYWHERE, FIRST, INGEST) for name in series}
    wanted = metrics_in(" ".join(EXPRESSIONS))
    assert wanted <= told, wanted - told
    assert {name for name in told if name.startswith("gristmill_")} <= SERVED


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.25, "250ms"), (1.2, "1200ms"), (30, "30s"), (90, "90s"), (120, "2m"), (5400, "90m"), (86400, "24h"), (259200, "3d")],
)  # fmt: skip
def test_durations_are_written_as_prometheus_does(seconds: float, text: str):
    assert duration(seconds) == text


def test_durations_scale_and_windows_stay_as_long_as_is_asked():
    expr = 'rate(x{a="$b"}[$600s]) > $900 and y offset $60s'
    assert scaled(expr) == 'rate(x{a="$b"}[10m]) > 900 and y offset 60s'
    assert scaled(expr, 0.01) == 'rate(x{a="$b"}[6s]) > 9 and y offset 600ms'
    assert scaled(expr, 0.01, shortest=8) == 'rate(x{a="$b"}[8s]) > 9 and y offset 8s'
    fast, slow = (
        [rule for group in yaml.safe_load(render(scale))["groups"] for rule in group["rules"]] for scale in (0.001, 1)
    )
    assert [rule.get("alert", rule.get("record")) for rule in fast] == [r.get("alert", r.get("record")) for r in slow]
    assert (fast[-1]["for"], slow[-1]["for"]) == ("120ms", "2m")
    assert not re.search(r"\$\d", render(0.01))


def test_every_alert_has_a_case_and_every_case_an_alert():
    troubles = {*alert_troubles.BAD, *alert_troubles.BAD_INGEST}
    assert troubles == set(NAMES)
    masks = {alert.name: alert.masks for alert in ALERTS}
    for (alert, _), beside in alert_troubles.BESIDE.items():
        assert all(other in masks[alert] for other in beside), "what fires beside its cause is masked by it"


def test_the_docs_count_the_cases():
    fired = [bool(alerts) for _, alerts in alert_troubles.cases().values()]
    told = f"{sum(fired)} runs with one fault each, and {len(fired) - sum(fired)} quiet ones"
    assert told in (Path(__file__).parents[2] / "docs" / "watch.md").read_text()


def test_series_are_written_as_they_are():
    values = (*alert_cases.line(1, 2, 4), "stale", None, None, 5.0, 5.0, "NaN")
    assert written(values) == "1+2x3 stale _x2 5+0x1 NaN"
    assert len(alert_cases.bent(3, 1)) == len(alert_cases.then(1)) == COUNT
    assert written(alert_cases.bent(3, 1, start=2)) == f"2+3x{ONSET - 1} {3 * ONSET}+1x{COUNT - ONSET - 1}"


@pytest.mark.system
@pytest.mark.program("promtool")
def test_alerts_fire_when_they_should_and_no_other_does(tmp_path: Path):
    """All runs in one database: what fires at some time, in nine hours, is exactly what each run's case says."""
    promtool("check", "rules", str(RULES / "gristmill.yml"))
    cases = alert_troubles.cases()
    severity = {alert.name: alert.severity for alert in ALERTS}
    expected = [
        {"labels": f'{{run="{run}",alertname="{name}",severity="{severity[name]}"}}', "value": 1}
        for run, (_, alerts) in cases.items()
        for name in alerts
    ]
    asked = [(ONSET * STEP - 600, []), (COUNT * STEP - 600, expected)]
    test = {
        "interval": f"{STEP}s",
        "input_series": [
            {"series": name, "values": written(values)} for told, _ in cases.values() for name, values in told.items()
        ],
        "promql_expr_test": [{"expr": FIRED, "eval_time": f"{at}s", "exp_samples": found} for at, found in asked],
    }
    suite = {
        "rule_files": [str(RULES / "gristmill.yml")],
        "evaluation_interval": "10m",
        "group_eval_order": [group["name"] for group in yaml.safe_load(render())["groups"]],
        "tests": [test],
    }
    file = tmp_path / "cases.yml"
    file.write_text(json.dumps(suite))  # JSON is YAML, and quick to read
    answer = subprocess.run(["promtool", "test", "rules", str(file)], capture_output=True, text=True, timeout=900)
    assert answer.returncode == 0, _difference(answer.stdout + answer.stderr)
    assert "SUCCESS" in answer.stdout


@pytest.mark.system
@pytest.mark.program("promtool")
def test_an_alert_tells_its_value_and_where_to_read_on(tmp_path: Path):
    rules = tmp_path / "rules.yml"
    rules.write_text(render(runbooks="https://wiki.example/runbooks/"))
    (alert,) = (alert for alert in ALERTS if alert.name == "GristmillDataDamaged")
    told = {"summary": alert.summary, "cause": alert.cause, "value": "1%"}
    told["runbook_url"] = "https://wiki.example/runbooks/GristmillDataDamaged.md"
    series = [
        {"series": 'gristmill_substituted_samples_total{run="a",rank="0"}', "values": "0+10x100"},
        {"series": 'gristmill_read_samples_total{run="a",rank="0"}', "values": "0+1000x100"},
    ]
    fired = {"exp_labels": {"run": "a", "severity": "warn"}, "exp_annotations": told}
    asked = [{"eval_time": "90m", "alertname": alert.name, "exp_alerts": [fired]}]
    test = {"interval": "1m", "input_series": series, "alert_rule_test": asked}
    file = tmp_path / "case.yml"
    file.write_text(json.dumps({"rule_files": [str(rules)], "evaluation_interval": "10m", "tests": [test]}))
    assert "SUCCESS" in promtool("test", "rules", str(file))


def _difference(said: str) -> str:
    """What is missing and what is too much, of promtool's long lists."""
    told = []
    for wanted, got in re.findall(r"exp: ?(.*)\n\s*got: ?(.*)", said):
        sides = [set(re.findall(r"{([^}]*)}", side)) for side in (wanted, got)]
        told.append(f"missing: {sorted(sides[0] - sides[1])}\nunwanted: {sorted(sides[1] - sides[0])}")
    return "\n".join(told) or said[:5000]
