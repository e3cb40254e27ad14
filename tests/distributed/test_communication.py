"""What goes from rank to rank is counted as it is: two gloo ranks, every ZeRO stage, and each operation once."""

from pathlib import Path
from typing import Any

import pytest
from gristmill.ops.monitor.labels import OPERATIONS

from .zygote import Zygote

STAGES = [f"zero {stage}" for stage in range(4)]


@pytest.fixture(scope="module")
def found(zygote: Zygote, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    return zygote.cases("communication_cases", 2, tmp_path_factory.mktemp("communication"), tiny)


def moved(case: dict[str, Any]) -> dict[str, int]:
    """Bytes of one step by operation, where there are any."""
    return {name: case["counts"][f"bytes/{name}"] for name in OPERATIONS if case["counts"][f"bytes/{name}"]}


def test_bytes_of_a_step_are_what_the_parameters_let_expect(found):
    """Gradients over the ranks and the verdict; weights where each rank has updated its part; the teacher's, too."""
    plain = found["zero 0"]
    assert moved(plain) == {"all_reduce": plain["elements"] + plain["verdict"]}
    for stage in ("zero 1", "zero 2"):
        case = found[stage]
        assert moved(case) == {
            "all_reduce": case["elements"] + case["verdict"],
            "all_gather": case["student"] + case["teacher"],
        }, stage
        assert case["counts"]["calls/all_gather"] >= case["teacher_groups"] + 1
    scattered = found["zero 3"]
    assert moved(scattered)["all_gather"] == moved(scattered)["reduce_scatter"] == scattered["student"]
    asked = scattered["counts"]["calls/all_reduce"] - 1  # whether gradients are finite, of each group: one number
    assert 0 < moved(scattered)["all_reduce"] - scattered["verdict"] <= 8 * asked


def test_steps_that_are_counted_come_out_as_those_that_are_not(found):
    assert all(found[stage]["same"] for stage in STAGES)


def test_nothing_is_counted_afterwards(found):
    assert all(found[stage]["off"] for stage in STAGES)


def test_each_operation_is_called_by_its_name_and_counted_by_its_larger_side(found):
    counts = found["ours"]["counts"]
    calls = {name: counts[f"calls/{name}"] for name in OPERATIONS}
    assert calls == dict.fromkeys(OPERATIONS, 1) | {"all_reduce": 2}
    assert {name: counts[f"bytes/{name}"] for name in OPERATIONS} == {
        "all_reduce": 6 * 2 * 2 + 13 * 4,
        "all_gather": 2 * 6 * 2 * 2,
        "reduce_scatter": 2 * 3 * 4,
        "reduce": 7 * 4,
        "broadcast": 5 * 4,
        "all_to_all": 2 * 2 * 4,
        "barrier": 0,
        "other": 9 * 4,
    }


def test_a_group_that_is_made_later_is_counted_from_the_next_look_on(found):
    assert found["ours"]["unseen"]


def test_a_run_tells_its_metrics_from_its_first_step_to_its_last(found):
    """All operations from zero on, so that growth is seen from the first; and at the end what the last look missed."""
    run = found["run"]
    assert run["ended"] == 0
    assert run["first"] == dict.fromkeys([f"{what}/{name}" for what in ("calls", "bytes") for name in OPERATIONS], 0)
    for name in ("all_reduce", "all_gather"):  # gradients and verdict; weights, teacher's weights, and memories' rows
        assert run["last"][f"calls/{name}"] >= 3 * 2
        assert run["last"][f"bytes/{name}"] > 3 * 4 * 10_000
    assert run["last"]["calls/reduce_scatter"] == 0
