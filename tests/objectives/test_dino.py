"""DINO's form of the group objective: its loss, centre, temperatures and head against what the official code printed."""

from pathlib import Path
from typing import Any

import pytest
import torch
from gristmill.models.heads import PrototypeHead
from gristmill.objectives.group import GroupConfig, GroupObjective
from gristmill.objectives.protocol import StepInfo, pair_weights
from gristmill.objectives.prototypes import group_cross_entropy, group_cross_entropy_reference
from gristmill.objectives.temperature import warm_temperature
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

VECTORS = Path(__file__).parents[1] / "vectors"
EXACT: dict[str, Any] = {"rtol": 1e-12, "atol": 1e-12}


def test_official_steps() -> None:
    vector = torch.load(VECTORS / "dino_loss.pt", weights_only=True)
    epochs = len(vector["temp_schedule"])
    config = GroupConfig(form="dino", teacher_temperature=(0.04, 0.07), warmup=3 / epochs, epochs=epochs)
    objective = GroupObjective(config, vector["out_dim"], dtype=torch.float64)
    for step in vector["steps"]:
        info = StepInfo(
            batch=vector["B"], student_crops=vector["ncrops"], student_globals=2, teacher_crops=2,
            progress=step["epoch"] / epochs, same_views=True,
        )  # fmt: skip
        student = step["student"].clone().requires_grad_()
        outcome = objective.loss({"group": student}, {"group": step["teacher"]}, info)
        torch.testing.assert_close(outcome.loss, step["loss"], **EXACT)
        outcome.loss.backward()
        torch.testing.assert_close(student.grad, step["grad_student"], **EXACT)
        objective.commit(outcome)
        torch.testing.assert_close(objective.center, step["center_after"], **EXACT)


@pytest.mark.parametrize("vector", ["dino_loss", "mugs_cluster"])
def test_official_temperatures_step_once_an_epoch(vector: str) -> None:
    schedule = torch.load(VECTORS / f"{vector}.pt", weights_only=True)
    schedule = schedule["temp_schedule"].tolist()
    epochs = len(schedule)
    warm = 1 + sum(t < schedule[-1] for t in schedule)  # the last warm epoch is at the end already
    for epoch, wanted in enumerate(schedule):
        for step in range(7):  # of seven steps an epoch, all alike
            found = warm_temperature((0.04, schedule[-1]), warm / epochs, (7 * epoch + step) / (7 * epochs), epochs)
            assert found == pytest.approx(wanted, rel=1e-13)


@given(
    epochs=st.integers(1, 900),
    steps=st.integers(1, 3000),
    batch=st.sampled_from([1, 640, 1008]),
    warm=st.integers(0, 60),
)
def test_an_epoch_begins_with_its_first_step(epochs: int, steps: int, batch: int, warm: int) -> None:
    """Rounding of position / images must not put a step into the epoch before."""
    warm = min(warm, epochs)
    for epoch in {0, warm // 2, max(0, warm - 1), min(warm, epochs - 1), epochs - 1}:
        wanted = 0.07 if epoch >= warm else 0.04 + 0.03 * epoch / max(1, warm - 1)
        for step in (epoch * steps, epoch * steps + steps - 1):
            found = warm_temperature((0.04, 0.07), warm / epochs, step * batch / (epochs * steps * batch), epochs)
            assert found == pytest.approx(wanted)


@pytest.mark.parametrize("frozen", [True, False])
def test_head_is_the_official_one(frozen: bool) -> None:
    case = torch.load(VECTORS / "dino_head.pt", weights_only=True)[f"norm_last_layer_{frozen}"]
    head = PrototypeHead(24, 40, 16, 48, norm_last_layer=frozen).double()
    head.load_state_dict(
        {key.replace("mlp.", "projector."): value for key, value in case["state"].items()}, strict=True
    )
    x = case["x"].clone().requires_grad_()
    y = head(x)
    y.backward(case["cotangent"])
    torch.testing.assert_close(y, case["y"], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(x.grad, case["grad_x"], rtol=1e-10, atol=1e-10)
    for key, parameter in head.named_parameters():
        wanted = case["grad_params"][key.replace("projector.", "mlp.")]
        torch.testing.assert_close(parameter.grad, wanted, rtol=1e-9, atol=1e-9)


def test_all_pairs_weigh_the_same() -> None:
    weights = torch.tensor(pair_weights(2, 10, 2, equal=True), dtype=torch.float64)
    assert torch.equal(weights > 0, torch.ones(2, 10).bool() & ~torch.eye(2, 10).bool())
    assert weights[weights > 0].tolist() == pytest.approx([1 / 18] * 18)
    without = torch.tensor(pair_weights(2, 2, 2, equal=True))
    assert without.tolist() == [[0, 0.5], [0.5, 0]]  # without local crops the two forms are one
    assert without.tolist() == pair_weights(2, 2, 2)


def test_fused_equals_plain() -> None:
    generator = torch.Generator().manual_seed(0)
    targets = torch.softmax(torch.randn(6, 9, generator=generator, dtype=torch.float64), 1)
    how: dict[str, Any] = {
        "student_crops": 5,
        "student_globals": 2,
        "teacher_crops": 2,
        "temperature": 0.1,
        "equal": True,
    }
    found = []
    for form in (group_cross_entropy, group_cross_entropy_reference):
        logits = torch.randn(15, 9, generator=generator.manual_seed(1), dtype=torch.float64).requires_grad_()
        loss = form(logits, targets, **how)
        found.append((loss.detach(), *torch.autograd.grad(loss, logits)))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, **EXACT)


def test_its_defaults_are_dinos() -> None:
    """main_dino.py: teacher .04 without warm-up, student .1, centre .9; Mugs' where nothing is said."""
    dino, mugs = GroupConfig(form="dino"), GroupConfig()
    assert (dino.teacher_temperature, dino.warmup, dino.student_temperature) == ((0.04, 0.04), 0.0, 0.1)
    assert dino.teacher_temperature_at(0.0) == dino.teacher_temperature_at(1.0) == 0.04
    assert (mugs.form, mugs.teacher_temperature, mugs.warmup, mugs.center_momentum) == ("mugs", (0.04, 0.07), 0.1, 0.9)
    longer = GroupConfig(form="dino", teacher_temperature=(0.04, 0.07), warmup=0.1)
    assert longer.teacher_temperature_at(1.0) == 0.07
    with pytest.raises(ValidationError, match="form"):
        GroupConfig.model_validate({"form": "ibot"})


@given(
    epochs=st.integers(1, 900), frozen=st.integers(0, 5), steps=st.integers(1, 3000), batch=st.sampled_from([1, 1008])
)
def test_a_layer_frozen_for_a_share_is_frozen_for_those_epochs(
    epochs: int, frozen: int, steps: int, batch: int
) -> None:
    """`freeze_last_layer: n / epochs`, compared with the position, ends with the last step of epoch n - 1."""
    frozen, end = min(frozen, epochs), epochs * steps * batch
    for step in {0, frozen * steps - 1, frozen * steps, epochs * steps - 1} - {-1, epochs * steps}:
        assert (step * batch / end < frozen / epochs) == (step // steps < frozen)
