"""HCSC on two ranks: the clusterings, memories and tables of one process bit for bit, and whole runs on every ZeRO stage."""

from pathlib import Path
from typing import Any

import pytest

from .zygote import Zygote


@pytest.fixture(scope="module")
def found(zygote: Zygote, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    return zygote.cases("hierarchy_cases", 2, tmp_path_factory.mktemp("hierarchy"), tiny)


@pytest.mark.parametrize("form", ["stream", "table"])
def test_clusterings_over_ranks_are_one_processs(found, form: str):
    case = dict(found[form])
    assert case.pop("clusterings") >= 4
    assert case.pop("stable") > 0.6
    assert case.pop("loss") < 1e-4  # of about ten, in float32
    assert case.pop("gradient") < 1e-5
    assert {
        "means",
        "phi",
        "parents",
        "highest",
        "scores",
        "queue",
        "table" if form == "table" else "memory",
    } < case.keys()
    assert set(case.values()) == {0.0}


def test_a_run_without_epochs_goes_over_to_prototypes(found):
    case = found["run stream zero2"]
    assert case["bad"] == 0
    assert case["clustered"] == 128
    ramps = case["ramps"]
    assert ramps[0] == 0.0
    assert ramps[-1] == 1.0
    assert any(0 < ramp < 1 for ramp in ramps)


def test_a_pass_over_the_data_gives_the_same_on_every_stage(found):
    plain = found["run table zero0"]
    assert plain["unknown"] == 0
    for stage in (0, 2, 3):
        case = found[f"run table zero{stage}"]
        assert case["bad"] == 0
        assert case["clustered"] == 64  # before the first step, and again half way through
        assert set(case["ramps"]) == {1.0}
        assert case["losses"] == pytest.approx(plain["losses"], rel=1e-4)
