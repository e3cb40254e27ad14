"""Two ranks' rows meet as the official code's do; whole runs with hidden patches, balance over ranks and weak flags."""

from pathlib import Path
from typing import Any

import pytest

from .zygote import Zygote


@pytest.fixture(scope="module")
def found(zygote: Zygote, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    return zygote.cases("objective_cases", 2, tmp_path_factory.mktemp("objectives"), tiny)


def test_order_of_enqueue_centre_and_weak_rows_are_the_official_ones(found):
    """A rank holds neighbouring positions, so the official order, rank by rank, is the order of the positions."""
    gaps = found["official"]
    assert gaps.keys() == {"infonce", "queue", "pointer", "group", "centre", "memory", "memory_pointer"}
    assert gaps["queue"] == gaps["pointer"] == gaps["memory"] == gaps["memory_pointer"] == 0.0
    assert max(gaps.values()) < 1e-12


def test_sinkhorn_over_ranks_is_sinkhorn_over_their_images(found):
    assert found["sinkhorn"].keys() == {"over_ranks", "virtual"}
    assert max(found["sinkhorn"].values()) < 1e-12


def test_hidden_patches_and_balance_over_ranks_run_on_every_stage_alike(found):
    """Other prototypes for patches, a mask token that the teacher lacks, a collective inside the loss."""
    plain = found["ibot zero0"]
    assert len(plain["loss/patch"]) == 4
    assert any(0 < ratio < 0.5 for ratio in plain["patch/hidden_ratio"])
    for stage in (0, 2, 3):
        case = found[f"ibot zero{stage}"]
        assert case["bad"] == 0
        assert case["centre"] > 0
        for name in ("loss/group", "loss/patch", "patch/hidden_ratio"):
            assert case[name] == pytest.approx(plain[name], rel=1e-4), (stage, name)


def test_the_students_memory_takes_weak_images_only(found):
    """As the coins of all ranks' images fell, step by step; the teacher's takes every image."""
    case = found["mugs"]
    assert case["bad"] == 0
    assert case["written"] == {"student": sum(case["weak_by_step"]), "teacher": 32}
    assert case["written_by_step"] == case["weak_by_step"]
    assert 0 < sum(case["weak_by_step"]) < 32
