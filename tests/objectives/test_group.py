"""The group objective against the official numbers, its temperature schedule and its centre."""

from pathlib import Path
from typing import Any

import pytest
import torch
from gristmill.objectives.group import GroupConfig, GroupObjective
from gristmill.objectives.protocol import StepInfo
from hypothesis import given
from hypothesis import strategies as st

VECTORS = Path(__file__).parents[1] / "vectors"
EXACT: dict[str, Any] = {"rtol": 1e-12, "atol": 1e-12}


def official() -> tuple[dict, GroupObjective, int]:
    vector = torch.load(VECTORS / "mugs_cluster.pt", weights_only=True)
    schedule = vector["temp_schedule"]
    epochs, warm = len(schedule), int((schedule < schedule[-1]).sum())  # the last warm epoch is at the end already
    config = GroupConfig(
        student_temperature=vector["student_temp"],
        teacher_temperature=(float(schedule[0]), float(schedule[-1])),
        warmup=warm / epochs,
        center_momentum=vector["center_momentum"],
    )
    objective = GroupObjective(config, vector["D"], dtype=torch.float64)
    objective.load({"center": vector["center0"]})
    return vector, objective, epochs


def test_official_steps() -> None:
    vector, objective, epochs = official()
    for step in vector["steps"]:
        info = StepInfo(
            batch=vector["B"], student_crops=vector["ncrops"], student_globals=2, teacher_crops=2,
            progress=step["epoch"] / epochs,
        )  # fmt: skip
        student = step["student"].clone().requires_grad_()
        outcome = objective.loss({"group": student}, {"group": step["teacher"]}, info)
        torch.testing.assert_close(outcome.loss, step["loss"], **EXACT)
        outcome.loss.backward()
        torch.testing.assert_close(student.grad, step["grad_student"], **EXACT)
        objective.commit(outcome)
        torch.testing.assert_close(objective.center, step["center_after"], **EXACT)


def test_official_temperatures() -> None:
    vector, objective, epochs = official()
    ours = [objective.config.teacher_temperature_at(epoch / epochs) for epoch in range(epochs)]
    assert ours == pytest.approx(vector["temp_schedule"].tolist(), rel=1e-14)


@given(progress=st.floats(0, 1), warmup=st.floats(0, 1))
def test_temperature_stays_between_its_ends(progress: float, warmup: float) -> None:
    config = GroupConfig(teacher_temperature=(0.04, 0.07), warmup=warmup)
    temperature = config.teacher_temperature_at(progress)
    assert 0.04 <= temperature <= 0.07 + 1e-12
    if progress >= warmup:
        assert temperature == pytest.approx(0.07)


def test_ranks_gather_along_the_first_dimension() -> None:
    _, whole, _ = official()
    _, parts, _ = official()
    teacher = torch.randn(12, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    student = torch.zeros(30, 32, dtype=torch.float64)
    info = StepInfo(batch=6, student_crops=5, student_globals=2, teacher_crops=2)
    whole.commit(whole.loss({"group": student}, {"group": teacher}, info))
    half = StepInfo(batch=3, student_crops=5, student_globals=2, teacher_crops=2)
    views = teacher.view(2, 6, 32)
    outcomes = [
        parts.loss({"group": student[:15]}, {"group": views[:, rows].flatten(0, 1)}, half)
        for rows in (slice(0, 3), slice(3, 6))
    ]
    outcomes[0].commit["mean"] = torch.cat([o.commit["mean"] for o in outcomes])
    parts.commit(outcomes[0])
    torch.testing.assert_close(parts.center, whole.center, **EXACT)


def test_loss_changes_nothing_and_health_is_logged() -> None:
    vector, objective, _ = official()
    before = objective.state()
    step = vector["steps"][0]
    student = step["student"].clone().requires_grad_()
    info = StepInfo(batch=vector["B"], student_crops=vector["ncrops"], student_globals=2, teacher_crops=2)
    outcome = objective.loss({"group": student}, {"group": step["teacher"]}, info)
    assert torch.equal(before["center"], objective.center)
    assert not any(isinstance(v, torch.Tensor) and v.requires_grad for v in outcome.logs.values())
    assert outcome.logs.keys() == {
        "loss/group", "group/teacher_entropy_ratio", "group/batch_entropy_ratio", "group/center_norm",
        "group/teacher_temperature",
    }  # fmt: skip
    objective.commit(outcome)
    assert not torch.equal(before["center"], objective.center)


def test_foreign_center_is_refused() -> None:
    with pytest.raises(ValueError, match=r"group\.center"):
        GroupObjective(GroupConfig(), 8).load({"center": torch.zeros(1, 9)})
