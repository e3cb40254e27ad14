"""The alerts that `gristmill status` sees are those of Prometheus: same names, same thresholds, same verdict on the same run."""

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from gristmill.ops.monitor.alerts import ALERTS, render
from gristmill.ops.monitor.conditions import CONDITIONS, UNKNOWN, holding
from gristmill.ops.monitor.reading import Rank, Reading
from gristmill.ops.monitor.summary import summarize

from .processes import BACK, NOW, Process

Worsen = Callable[[Process, Process], object]


def still(age: float) -> Worsen:
    return lambda *ranks: [rank.say("gristmill_last_step_timestamp_seconds", NOW - age) for rank in ranks]


def says(name: str, value: float, /, **labels: str) -> Worsen:
    return lambda *ranks: [rank.say(name, value, **labels) for rank in ranks]


def grows(name: str, rate: float, /, **labels: str) -> Worsen:
    return lambda *ranks: [rank.grow(name, rate, **labels) for rank in ranks]


def starved(by: str) -> Worsen:
    def worsen(one: Process, other: Process) -> None:
        other.grow("gristmill_step_phase_seconds_total", 0.4, phase="data_wait")
        other.grow("gristmill_step_phase_seconds_total", 0.12, phase="backward")
        other.grow("gristmill_rank_own_seconds_total", 0.8)
        other.grow("gristmill_buffer_starved_seconds_total", 0.4, buffer="ready")
        other.grow("gristmill_buffer_blocked_seconds_total", 0.0, buffer="ready")
        other.grow("gristmill_buffer_starved_seconds_total", 0.0 if by == "augment" else 0.6, buffer="encoded")
        other.grow("gristmill_read_seconds_total", 0.9)
        other.grow("gristmill_storage_seconds_total", 0.8 if by == "storage" else 0.1)

    return worsen


def straggles(one: Process, other: Process) -> None:
    other.grow("gristmill_rank_own_seconds_total", 0.9)


def sign(objective: str, name: str, value: float) -> Worsen:
    return says("gristmill_objective_health", value, objective=objective, name=name)


def both(*worse: Worsen) -> Worsen:
    return lambda *ranks: [each(*ranks) for each in worse]


def on_the_other(worse: Worsen) -> Worsen:
    """Of rank 1 alone: the run's own numbers are taken from rank 0."""
    return lambda one, other: worse(other, other)


QUEUE = {"memory": "instance.queue"}
WORSE: dict[str, Worsen] = {  # by alert, and what tells one of its cases from another
    "GristmillNoProgress": still(1000),
    "GristmillStraggler": straggles,
    "GristmillCheckpointOverdue": both(
        says("gristmill_checkpoint_last_position_samples", 3e5),
        says("gristmill_checkpoint_last_success_timestamp_seconds", NOW - 2500),
    ),
    "GristmillCheckpointFailed": grows("gristmill_checkpoints_total", 0.01, result="failed"),
    "GristmillDiskFull": says("gristmill_disk_free_bytes", 1.2e9, place="checkpoints"),
    "GristmillDiskFull: a checkpoint failed": both(  # in the room that a first, small checkpoint leaves in doubt
        says("gristmill_disk_free_bytes", 4.5e9, place="checkpoints"),
        says("gristmill_disk_size_bytes", 4e11, place="checkpoints"),
        grows("gristmill_checkpoints_total", 0.01, result="failed"),
    ),
    "GristmillStarvedByStorage": starved("storage"),
    "GristmillStarvedByStorage: beside passes over the data": both(  # which are no part of a step
        starved("storage"),
        grows("gristmill_step_phase_seconds_total", 2.0, phase="refresh"),
        grows("gristmill_step_seconds_sum", 3.0),
    ),
    "GristmillStarvedByReader": starved("reader"),
    "GristmillStarvedByAugmentation": starved("augment"),
    "GristmillStorageThrottled": grows("gristmill_storage_throttled_seconds_total", 0.3),
    "GristmillStorageRetries": grows("gristmill_storage_retries_total", 0.2, reason="timeout"),
    "GristmillCacheThrash": grows("gristmill_cache_evicted_bytes_total", 3e6),
    "GristmillDataDamaged": grows("gristmill_substituted_samples_total", 1.2),
    "GristmillBadSteps": grows("gristmill_bad_steps_total", 0.5),
    "GristmillRollback": grows("gristmill_rollbacks_total", 0.1),
    "GristmillCollapseUniform": sign("group", "teacher_entropy_ratio", 0.995),
    "GristmillCollapseOneGroup": sign("group", "batch_entropy_ratio", 0.01),
    "GristmillCollapseContrast": both(sign("instance", "positive_similarity", 0.99), sign("instance", "accuracy", 0.0)),
    "GristmillCollapseBootstrap": sign("bootstrap", "target_std", 0.05),
    "GristmillPrototypesDead": both(sign("clusters", "used", 0.5), sign("hierarchy", "level0_reseeded", 200)),
    "GristmillFeaturesCollapsed": says("gristmill_probe_ratio", 1.5, probe="rank_me", who="teacher"),
    "GristmillQueueStale": says("gristmill_memory_age_steps", 30, **QUEUE),
    "GristmillQueueNotUnit": says("gristmill_memory_norm_mean", 1.1, **QUEUE),
    "GristmillQueueStale: of another rank": on_the_other(says("gristmill_memory_age_steps", 30, **QUEUE)),
    "GristmillQueueNotUnit: of another rank": on_the_other(says("gristmill_memory_norm_mean", 0.5, **QUEUE)),
    "GristmillMemoryNotFinite": says("gristmill_memory_nonfinite_rows", 3, **QUEUE),
    "GristmillMemoryNotFinite: of another rank": on_the_other(says("gristmill_memory_nonfinite_rows", 3, **QUEUE)),
}
# These are about ranks that are silent, and about how much they say: other tests have them.
ELSEWHERE = {"GristmillRanksMissing", "GristmillExporterDown", "GristmillTooManySeries"}
WELL = "a run that is well"


def ranks(case: str) -> tuple[Process, Process]:
    found = Process(0), Process(1)
    if case != WELL:
        WORSE[case](*found)
    return found


def seen(processes: tuple[Process, ...], silent: int = 0, complete: bool = True) -> dict[str, str | None]:
    """The alerts that hold, each with what masks it."""
    found = [
        Rank(f"http://{p.rank}/", p.labels, Reading(p.text(), NOW), Reading(p.text(NOW - BACK), NOW - BACK))
        for p in processes
    ]
    found += [
        Rank(f"http://{rank}/", {"rank": str(rank)}, why="gone") for rank in range(len(found), len(found) + silent)
    ]
    run = summarize("first", found)
    return {alert["name"]: alert["masked_by"] for alert in holding(run, found, complete) if alert["where"]}


def test_every_alert_is_known_to_the_view():
    names = {alert.name for alert in ALERTS}
    assert set(CONDITIONS) | set(UNKNOWN) == names
    assert not set(CONDITIONS) & set(UNKNOWN)
    assert {case.partition(":")[0] for case in WORSE} | ELSEWHERE == set(CONDITIONS)
    assert all(UNKNOWN.values())


@pytest.mark.parametrize("name", sorted(CONDITIONS))
def test_thresholds_are_those_of_the_alert(name: str):
    expression = next(alert.expr for alert in ALERTS if alert.name == name)
    records = {0.05, 0.1}  # of recording rules and of what they stand for
    written = {float(number) for number in re.findall(r"(?<![\w.])\$?(\d+(?:\.\d+)?)s?\b", expression)}
    assert set(CONDITIONS[name].limits) <= written | (records if "progress" in expression else set())


@pytest.mark.parametrize("case", [WELL, *WORSE])
def test_what_holds(case: str):
    unmasked = [name for name, masked in seen(ranks(case)).items() if masked is None]
    assert unmasked == ([] if case == WELL else [case.partition(":")[0]])


@pytest.mark.program("promtool")
def test_prometheus_sees_the_same(tmp_path: Path):
    """The rules, run by promtool over two hours of the same processes, fire exactly what the view says holds."""
    series, expected, interval = [], [], 240
    for number, case in enumerate([WELL, *WORSE]):  # all at once, as runs of one Prometheus
        processes = ranks(case)
        series += [one for process in processes for one in process.series(interval, run=f"{number:02}")]
        labels = [f'{{alertname="{name}",run="{number:02}"}}' for name in sorted(seen(processes))]
        expected += [{"labels": each, "value": 1} for each in labels]
    known = f'ALERTS{{alertstate="firing",alertname=~"{"|".join(CONDITIONS)}"}}'
    question = {"expr": f"group by (alertname, run) ({known})", "eval_time": f"{NOW:.0f}s", "exp_samples": expected}
    tests = [{"interval": f"{interval}s", "input_series": series, "promql_expr_test": [question]}]
    (tmp_path / "rules.yml").write_text(render())
    order = [group["name"] for group in yaml.safe_load(render())["groups"]]  # else it is another one each time
    about = {
        "rule_files": ["rules.yml"],
        "evaluation_interval": f"{interval}s",
        "group_eval_order": order,
        "tests": tests,
    }
    (tmp_path / "test.yml").write_text(json.dumps(about))
    answer = subprocess.run(["promtool", "test", "rules", "test.yml"], cwd=tmp_path, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stdout + answer.stderr


def test_ranks_that_are_silent():
    one = Process(0)
    assert seen((one,), silent=1) == {"GristmillExporterDown": None}  # training goes on
    still(400)(one, one)
    assert seen((one,), silent=1)["GristmillRanksMissing"] is None
    still(1000)(one, one)
    assert seen((one,), silent=1)["GristmillNoProgress"] == "GristmillRanksMissing"
    assert seen((), silent=2) == {"GristmillRanksMissing": None}
    still(0)(one, one)
    assert seen((one,), complete=False) == {}  # one URL of two ranks: nobody was asked for the other
    assert seen((one,), complete=True) == {"GristmillExporterDown": None}


def test_a_process_that_says_too_much():
    one = Process(0)
    for index in range(450):
        one.say("gristmill_extra", 1.0, index=str(index))
    assert seen((one, one)) == {"GristmillTooManySeries": None}
    assert seen((one, Process(1))) == {}  # it is the mean that counts


def test_a_young_run_is_not_called_collapsed():
    two = ranks("GristmillCollapseUniform")
    for rank in two:
        rank.say("gristmill_progress_ratio", 0.01)
    assert seen(two) == {}


def test_what_happened_before_the_view_counts_for_a_young_process():
    """A process of five minutes: a failed checkpoint in its second minute is within the alert's hour."""
    one = Process(0, world=1)
    one.say("process_start_time_seconds", NOW - 300)
    one.grow("gristmill_storage_retries_total", 0.0, reason="server")
    text = one.text().replace('checkpoints_total{result="failed"} 0.0', 'checkpoints_total{result="failed"} 1.0')
    now, before = Reading(text, NOW), Reading(text, NOW - BACK)
    rank = Rank("http://0/", one.labels, now, before)
    held = holding(summarize("first", [rank]), [rank], True)
    assert [alert["name"] for alert in held] == ["GristmillCheckpointFailed"]
