"""A straggler among two, three and eight ranks: told by Prometheus' rules and by `gristmill status`, or by neither.

Of an even number of ranks the median is the lower of the two in the middle; of two ranks the mean would hide a
rank that is not nearly twice as slow. A rank is told above 1.3 times the median, if that costs a tenth of a step.
"""

import json
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml
from gristmill.ops.monitor.alerts import render
from gristmill.ops.monitor.conditions import holding
from gristmill.ops.monitor.flow import straggler
from gristmill.ops.monitor.reading import Rank, Reading
from gristmill.ops.monitor.summary import summarize

from .processes import BACK, NOW, Process

NAME = "GristmillStraggler"
INTERVAL = 240


class Ranks(NamedTuple):
    """How long each computes for a step of half a second, in 0.2 s, and the one to be told."""

    times: tuple[float, ...]
    told: str | None


CASES = {
    "two, one slower": Ranks((1, 1.4), "1"),
    "two, the first slower": Ranks((1.4, 1), "0"),
    "two, one a little slower": Ranks((1, 1.2), None),
    "two, just below the ratio": Ranks((1, 1.29), None),
    "two, just above it": Ranks((1, 1.31), "1"),
    "two, a small part of the step": Ranks((0.2, 0.4), None),
    "three, one slower": Ranks((1, 1, 1.4), "2"),
    "three, one a little slower": Ranks((1, 1, 1.2), None),
    "three, one faster": Ranks((1, 0.6, 1), None),
    "eight, one slower": Ranks((1, 1, 1, 1.4, 1, 1, 1, 1), "3"),
    "eight, one a little slower": Ranks((1, 1, 1, 1.2, 1, 1, 1, 1), None),
    "eight, half of them slower": Ranks((1, 1, 1, 1, 1.35, 1.35, 1.35, 1.4), "7"),
    "eight, most of them slower": Ranks((1, 1, 1, 1.4, 1.4, 1.4, 1.4, 1.45), None),
}


def processes(case: str) -> list[Process]:
    times = CASES[case].times
    found = [Process(rank, world=len(times)) for rank in range(len(times))]
    for process, time in zip(found, times, strict=True):
        process.grow("gristmill_step_phase_seconds_total", 0.0, phase="data_wait")
        process.grow("gristmill_rank_own_seconds_total", 0.4 * time)  # of two steps a second
    return found


@pytest.mark.parametrize("case", CASES)
def test_the_view_tells_it(case: str):
    ranks = [
        Rank(f"http://{p.rank}/", p.labels, Reading(p.text(), NOW), Reading(p.text(NOW - BACK), NOW - BACK))
        for p in processes(case)
    ]
    run = summarize("first", ranks)
    told = [alert["where"] for alert in holding(run, ranks, True) if alert["name"] == NAME]
    wanted = CASES[case].told
    assert [text[0].split()[1] for text in told] == ([wanted] if wanted else [])
    shown = straggler(ranks)
    assert shown
    assert (shown["rank"] if shown["slow"] else None) == wanted


@pytest.mark.system
@pytest.mark.program("promtool")
def test_prometheus_tells_it(tmp_path: Path):
    """All at once, as runs of one Prometheus."""
    series = [one for case in CASES for each in processes(case) for one in each.series(INTERVAL, run=case)]
    expected = [
        {"labels": f'{{run="{case}",rank="{ranks.told}"}}', "value": 1} for case, ranks in CASES.items() if ranks.told
    ]
    expr = f'group by (run, rank) (ALERTS{{alertname="{NAME}",alertstate="firing"}})'
    question = {"expr": expr, "eval_time": f"{NOW:.0f}s", "exp_samples": expected}
    tests = [{"interval": f"{INTERVAL}s", "input_series": series, "promql_expr_test": [question]}]
    (tmp_path / "rules.yml").write_text(render())
    order = [group["name"] for group in yaml.safe_load(render())["groups"]]
    about = {
        "rule_files": ["rules.yml"],
        "evaluation_interval": f"{INTERVAL}s",
        "group_eval_order": order,
        "tests": tests,
    }
    (tmp_path / "test.yml").write_text(json.dumps(about))
    answer = subprocess.run(["promtool", "test", "rules", "test.yml"], cwd=tmp_path, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stdout + answer.stderr
