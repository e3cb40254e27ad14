"""How many series a rank serves at most, and that nothing from outside the enumerations becomes one."""

import string
import subprocess
from typing import Any

import pytest
from gristmill.ops.monitor.catalogue import CATALOGUE, ENUMS
from gristmill.ops.monitor.metrics import UNKNOWN_KEPT, Metrics
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import generate_latest

from .test_metrics import everything, series

BUDGET = 400  # series of one rank with everything on: a thousand ranks are then less than half a million


def test_cardinality_stays_within_the_budget():
    metrics = Metrics("first", {"world": 1, "threads": 2, "device": "cpu"})
    everything(metrics)
    assert metrics.unknown == set()
    assert len(series(metrics)) <= BUDGET
    for name, labels in series(metrics):
        known = {value for row in CATALOGUE for label, value in row.fixed} | {
            v for values in ENUMS.values() for v in values
        }
        strange = {label: value for label, value in labels if value not in known and label != "le"}
        assert not strange or name == "gristmill_run_info", (name, strange)
    fed = {name for name, _ in metrics.registry._names_to_collectors.items()}
    assert all(row.metric in fed or row.metric.removesuffix("_total") in fed for row in CATALOGUE)


HOSTILE = st.text(alphabet=string.printable + "é\x1b\0\U0001f600", max_size=60) | st.sampled_from(
    ["loss/", "loss/../../etc", 'loss/x"} 1\nevil 1', "{objective}/{name}", "phase/{phase}", "probe/teacher/x.tar"]
)
ANYTHING = st.none() | st.text(max_size=5) | st.integers() | st.floats() | st.just([1, 2]) | st.just({})


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(HOSTILE, ANYTHING, max_size=20), HOSTILE)
def test_hostile_names_and_values_make_no_series_and_do_not_raise(values: dict[str, Any], name: str):
    metrics = Metrics("first", {})
    everything(metrics)
    known = set(series(metrics))
    metrics.observe_step(values)
    metrics.observe_step({"phases": values, "bad": values})
    metrics.observe_step({"seconds": values})
    metrics.observe_probe({**values, "who": name})
    metrics.observe(values, f"memory/{name}/")
    metrics.observe(values)
    for prefix in ("storage/retries/", "disk/", "spent/", "interruptions/", "state/", name):
        metrics.observe({name: 1.0} | values, prefix)
    metrics.observe_state(name)
    assert set(series(metrics)) == known
    assert len(metrics.unknown) <= UNKNOWN_KEPT


@pytest.mark.system
@pytest.mark.program("promtool")
def test_promtool_finds_nothing_to_mend():
    metrics = Metrics("first", {"world": 1})
    everything(metrics)
    answer = subprocess.run(
        ["promtool", "check", "metrics"], input=generate_latest(metrics.registry), capture_output=True, timeout=60
    )
    assert answer.returncode == 0, (answer.stdout + answer.stderr).decode()
    assert not answer.stdout + answer.stderr
