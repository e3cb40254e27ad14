"""Sinkhorn-Knopp and KoLeo against their published iterations, cut into virtual batches, and inside the group objective."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gristmill.objectives.group import GroupConfig, GroupObjective
from gristmill.objectives.koleo import koleo
from gristmill.objectives.protocol import StepInfo
from gristmill.objectives.prototypes import group_cross_entropy_reference
from gristmill.objectives.sinkhorn import sinkhorn_offsets, sinkhorn_reference
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

EXACT: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-12}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assignments(logits: Tensor, temperature: float, iterations: int = 3, **how: Any) -> Tensor:
    """[G, B, K] to rows [G*B, K] that sum to one."""
    offsets = sinkhorn_offsets(logits, temperature, iterations, **how)
    return torch.softmax(logits / temperature + offsets, -1).flatten(0, 1)


@given(
    crops=st.integers(1, 3), images=st.integers(1, 6), prototypes=st.integers(1, 9), turns=st.integers(1, 5),
    temperature=st.sampled_from([0.05, 0.3, 2.0]), seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=60)
def test_it_is_the_published_iteration(
    crops: int, images: int, prototypes: int, turns: int, temperature: float, seed: int
) -> None:
    logits = draw(crops, images, prototypes, seed=seed)
    wanted = sinkhorn_reference(logits.flatten(0, 1), temperature, turns)
    torch.testing.assert_close(assignments(logits, temperature, turns), wanted, **EXACT)


def test_prototypes_share_the_batch_evenly() -> None:
    even = assignments(draw(2, 32, 8), 0.3, 100)
    torch.testing.assert_close(even.sum(0), torch.full((8,), 8.0, dtype=torch.float64))
    torch.testing.assert_close(even.sum(1), torch.ones(64, dtype=torch.float64))


def test_sharp_temperatures_leave_no_row_without_mass() -> None:
    """In float32 exp(100 / .01) is infinite, and a row far below the largest logit is 0 / 0 in the published form."""
    logits = torch.tensor([[[100.0, 0.0], [-100.0, -50.0], [3.0, 3.5]]])
    assert not torch.isfinite(sinkhorn_reference(logits[0], 0.01)).all()
    found = assignments(logits, 0.01)
    assert torch.isfinite(found).all()
    torch.testing.assert_close(found.sum(1), torch.ones(3))


def test_virtual_batches_do_not_feel_each_other_nor_the_ranks() -> None:
    logits = draw(2, 8, 5)
    whole = assignments(logits, 0.1, virtual=4).view(2, 8, 5)
    for images in (slice(0, 4), slice(4, 8)):  # a virtual batch each, on a rank of its own
        torch.testing.assert_close(whole[:, images].flatten(0, 1), assignments(logits[:, images], 0.1), **EXACT)
        alone = assignments(logits[:, images], 0.1, virtual=4, gather=_forbidden)
        torch.testing.assert_close(whole[:, images].flatten(0, 1), alone, **EXACT)
    assert not torch.allclose(whole, assignments(logits, 0.1).view(2, 8, 5))


def _forbidden(rows: Tensor) -> Tensor:
    raise AssertionError("virtual batches lie within a rank")


def test_koleo_is_its_formula() -> None:
    x = draw(12, 5)
    wanted = []
    for part in F.normalize(x, dim=1).split(4):
        for i in range(4):
            distances = [float((part[i] - part[j]).norm()) for j in range(4) if j != i]
            wanted.append(-torch.log(torch.tensor(min(distances), dtype=torch.float64)))
    assert float(koleo(x, 4)) == pytest.approx(float(torch.stack(wanted).mean()), abs=1e-7)
    assert torch.autograd.gradcheck(lambda y: koleo(y, 4), (x.clone().requires_grad_(),))


def test_koleo_of_duplicates_is_finite() -> None:
    x = torch.ones(4, 3, requires_grad=True)
    loss = koleo(x, 4)
    loss.backward()
    assert torch.isfinite(loss)
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()
    with pytest.raises(ValueError, match="two or more"):
        koleo(torch.ones(4, 3), 1)
    with pytest.raises(ValueError, match="4 rows in batches of 3"):
        koleo(torch.ones(4, 3), 3)


INFO = StepInfo(batch=4, student_crops=3, student_globals=2, teacher_crops=2)


def test_the_group_objective_takes_balanced_targets_and_keeps_its_centre_for_the_log() -> None:
    objective = GroupObjective(GroupConfig(balance="sinkhorn", warmup=0.0), 6, dtype=torch.float64)
    objective.center += draw(1, 6, seed=3)  # which plays no part
    student, teacher = draw(12, 6, seed=1).requires_grad_(), draw(8, 6, seed=2)
    outcome = objective.loss({"group": student}, {"group": teacher}, INFO)
    targets = sinkhorn_reference(teacher, 0.07)
    wanted = group_cross_entropy_reference(
        student, targets, student_crops=3, student_globals=2, teacher_crops=2, temperature=0.1
    )
    torch.testing.assert_close(outcome.loss, wanted, **EXACT)
    assert float(outcome.logs["group/batch_entropy_ratio"]) > 0.95


def test_koleo_adds_to_the_loss_what_its_weight_says_and_is_off_by_default() -> None:
    student = {"group": draw(12, 6, seed=1), "class_token": draw(12, 5, seed=4).requires_grad_()}
    teacher = {"group": draw(8, 6, seed=2)}
    off = GroupObjective(GroupConfig(), 6, dtype=torch.float64).loss(student, teacher, INFO)
    on = GroupObjective(GroupConfig(koleo=0.1), 6, dtype=torch.float64).loss(student, teacher, INFO)
    assert "group/koleo" not in off.logs
    spread = koleo(student["class_token"][:8], 4)
    torch.testing.assert_close(on.loss, off.loss + 0.1 * spread, **EXACT)
    on.loss.backward()
    gradient = student["class_token"].grad
    assert gradient is not None
    assert not gradient[8:].any()  # local crops are left out
    assert gradient[:8].abs().sum() > 0


def test_mistakes_are_named() -> None:
    with pytest.raises(ValidationError, match="virtual_batch 4 is for balance: sinkhorn and koleo"):
        GroupConfig(virtual_batch=4)
    objective = GroupObjective(GroupConfig(koleo=0.1, virtual_batch=3), 6)
    with pytest.raises(ValueError, match="virtual_batch 3 does not divide the 4 images"):
        objective.loss({"group": torch.ones(12, 6)}, {"group": torch.ones(8, 6)}, INFO)
    with pytest.raises(ValueError, match="7 teacher logits for 6 prototypes"):
        GroupObjective(GroupConfig(), 6).loss({"group": torch.ones(12, 7)}, {"group": torch.ones(8, 7)}, INFO)
