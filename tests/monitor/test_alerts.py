"""Real faults, real Prometheus, real Alertmanager: who is woken by what, and by nothing else.

What arrived in the inbox by the end of the night (night.py) is all that an operator would have got. How long it took is
printed (`pytest -s`), and written with `--alert-table FILE`; it is not held to anything.
"""

from __future__ import annotations

import pytest

from .night import CASES, Night

pytestmark = [
    pytest.mark.system,
    pytest.mark.slow,
    pytest.mark.program("prometheus"),
    pytest.mark.program("prometheus-alertmanager"),
    pytest.mark.timeout(1200),
]


@pytest.mark.parametrize("name", CASES)
def test_the_right_alert_and_only_that_is_told(night: Night, name: str):
    if name == "full" and night.no_disk:
        pytest.skip(f"a small disk cannot be mounted here: {night.no_disk}")
    assert set(night.fired(name)) == CASES[name].told, night.story(name)


def test_nothing_is_told_before_the_fault(night: Night):
    assert [one for one in night.told if one.at < night.struck[one.labels["run"]]] == []


def test_runs_live_and_end_as_they_should(night: Night):
    """A fault that ends the run, or does not, is what was meant to be shown."""
    assert night.codes == {name: list(case.codes) for name, case in CASES.items()}


def test_all_rules_were_evaluated(night: Night):
    assert night.rules == []
