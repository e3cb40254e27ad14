"""The alerts, fired and kept quiet by promtool, and held to the metrics that a run really serves."""

import re
import subprocess
from pathlib import Path

import pytest
import yaml
from gristmill.ops import monitor
from gristmill.ops.monitor.catalogue import CATALOGUE, HEALTH, PHASES, RESULTS

RULES = Path(monitor.__file__).parent / "rules" / "gristmill.yml"
ALERTS = {rule["alert"]: rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]}

GOOD = {
    'up{job="gristmill"}': "1x300",
    "gristmill_last_step_timestamp_seconds": "0+60x300",
    'gristmill_step_phase_seconds_total{phase="data_wait"}': "0+3x300",
    "gristmill_step_seconds_sum": "0+60x300",
    "gristmill_bad_steps_total": "0x100 1x200",
    'gristmill_objective_health{objective="group",name="teacher_entropy_ratio"}': "0.9x300",
    'gristmill_objective_health{objective="group",name="batch_entropy_ratio"}': "0.9x300",
    'gristmill_memory_norm_mean{memory="instance.queue"}': "1x300",
    'gristmill_memory_fill_ratio{memory="instance.queue"}': "1x300",
    'gristmill_memory_norm_mean{memory="local_group.teacher"}': "7x300",
    'gristmill_memory_fill_ratio{memory="local_group.teacher"}': "1x300",
    "gristmill_checkpoint_last_success_timestamp_seconds": "0+60x300",
    'gristmill_checkpoints_total{result="failed"}': "0x300",
    "gristmill_substituted_samples_total": "0x150 1x150",
    "gristmill_read_samples_total": "0+1000x300",
}
# What makes each alert fire by the 250th minute: one series that differs from the good run.
BAD = {
    "GristmillExporterDown": ('up{job="gristmill"}', "1x100 0x200"),
    "GristmillNoProgress": ("gristmill_last_step_timestamp_seconds", "0+60x230 13800x70"),
    "GristmillDataStarved": ('gristmill_step_phase_seconds_total{phase="data_wait"}', "0+15x300"),
    "GristmillBadSteps": ("gristmill_bad_steps_total", "0+1x300"),
    "GristmillTeacherCollapse": (
        'gristmill_objective_health{objective="group",name="batch_entropy_ratio"}',
        "0.9x100 0.01x200",
    ),
    "GristmillQueueNotUnit": ('gristmill_memory_norm_mean{memory="instance.queue"}', "1x100 1.2x200"),
    "GristmillCheckpointOverdue": ("gristmill_checkpoint_last_success_timestamp_seconds", "0+60x100 6000x200"),
    "GristmillCheckpointFailed": ('gristmill_checkpoints_total{result="failed"}', "0x220 1x80"),
    "GristmillDataDamaged": ("gristmill_substituted_samples_total", "0+2x300"),
}


def promtool(*arguments: str) -> str:
    answer = subprocess.run(["promtool", *arguments], capture_output=True, text=True, timeout=120)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    return answer.stdout


def case(series: dict[str, str], fires: str | None, labels: dict[str, str]) -> dict:
    """One promtool test: after 250 minutes the alert `fires` does so with these labels, and no other does."""
    expected = []
    for alert, rule in ALERTS.items():
        one = {"exp_labels": {**labels, **rule["labels"]}, "exp_annotations": rule["annotations"]}
        expected.append({"eval_time": "250m", "alertname": alert, "exp_alerts": [one] if alert == fires else []})
    inputs = [{"series": name, "values": values} for name, values in series.items()]
    return {"interval": "1m", "input_series": inputs, "alert_rule_test": expected}


def test_every_alert_says_what_to_do_and_has_a_case():
    assert set(BAD) == set(ALERTS)
    for rule in ALERTS.values():
        assert rule["labels"]["severity"] in ("page", "warn")
        assert rule["annotations"]["summary"].endswith(".")
        assert rule["annotations"]["remedy"].endswith(".")


def test_alerts_and_their_cases_name_only_what_a_run_serves():
    served = {row.metric for row in CATALOGUE} | {
        f"{row.metric}_sum" for row in CATALOGUE if isinstance(row.kind, tuple)
    }
    text = RULES.read_text() + "\n".join(["", *GOOD])
    assert set(re.findall(r"\bgristmill_\w+", text)) <= served
    members = {"phase": PHASES, "result": RESULTS, "name": HEALTH}
    for label, value in re.findall(r'(phase|result|name)="(\w+)"', text):
        assert value in members[label]


@pytest.mark.system
@pytest.mark.program("promtool")
def test_alerts_fire_when_they_should_and_only_then(tmp_path: Path):
    promtool("check", "rules", str(RULES))
    tests = [case(GOOD, None, {})]
    for alert, (name, values) in BAD.items():
        labels = dict(re.findall(r'(\w+)="([^"]*)"', name))
        labels.pop("phase", None)  # the division drops it
        tests.append(case({**GOOD, name: values}, alert, labels))
    labels = {"objective": "group", "name": "teacher_entropy_ratio"}
    uniform = 'gristmill_objective_health{objective="group",name="teacher_entropy_ratio"}'
    tests.append(case({**GOOD, uniform: "1x300"}, "GristmillTeacherCollapse", labels))
    file = tmp_path / "cases.yml"
    file.write_text(yaml.safe_dump({"rule_files": [str(RULES)], "evaluation_interval": "1m", "tests": tests}))
    assert "SUCCESS" in promtool("test", "rules", str(file))
