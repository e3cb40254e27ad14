"""MoCo v1 and v2 through the instance objective: the one pair, the order of events, and what Mugs keeps of it."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gristmill.models.ema import ema_update_reference
from gristmill.objectives.instance import InstanceConfig, InstanceObjective
from gristmill.objectives.protocol import StepInfo
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from . import plain_ancestors as plain

EXACT: dict[str, Any] = {"rtol": 1e-12, "atol": 1e-12}
PAIR: dict[str, Any] = {"student_crops": 1, "student_globals": 1, "teacher_crops": 1}


def rows(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1)


def moco(queue: int, dim: int, temperature: float = 0.2, **config: Any) -> InstanceObjective:
    config = {"pairs": "all", **config}
    return InstanceObjective(
        InstanceConfig(queue=queue, temperature=temperature, **config), dim, seed=3, dtype=torch.float64
    )


@settings(deadline=None, max_examples=25)
@given(
    batch=st.integers(1, 5), queue=st.integers(5, 12), temperature=st.sampled_from([0.07, 0.2, 1.0]), seed=st.integers(0, 99)
)  # fmt: skip
def test_the_one_pair_is_the_papers_loss(batch: int, queue: int, temperature: float, seed: int) -> None:
    objective = moco(queue, 6, temperature)
    queries = rows(batch, 6, seed=seed).requires_grad_()
    keys = rows(batch, 6, seed=seed + 1)
    outcome = objective.loss({"instance": queries}, {"instance": keys}, StepInfo(batch=batch, **PAIR))
    wanted = plain.moco(queries, keys, objective.queue.rows, temperature)
    torch.testing.assert_close(outcome.loss, wanted, **EXACT)
    torch.testing.assert_close(*(torch.autograd.grad(loss, queries)[0] for loss in (outcome.loss, wanted)), **EXACT)


def test_published_runs_step_for_step() -> None:
    """Teacher moved after a step, here, or before the next one's keys, there: one sequence of losses, keys and weights."""
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(5, 4, generator=generator, dtype=torch.float64)
    objective = moco(7, 4)
    reference = plain.PlainMoCo(weights, objective.queue.rows, temperature=0.2, momentum=0.9, lr=0.5)
    student, teacher = weights.clone(), weights.clone()
    for _ in range(6):
        query_crops, key_crops = torch.randn(2, 3, 5, generator=generator, dtype=torch.float64)
        student.requires_grad_()
        sides = {"instance": plain.unit(query_crops @ student)}, {"instance": plain.unit(key_crops @ teacher)}
        outcome = objective.loss(*sides, StepInfo(batch=3, **PAIR))
        (gradient,) = torch.autograd.grad(outcome.loss, student)
        student = student.detach() - 0.5 * gradient
        teacher = 0.9 * teacher + (1 - 0.9) * student
        objective.commit(outcome)
        torch.testing.assert_close(outcome.loss, reference.step(query_crops, key_crops), **EXACT)
        torch.testing.assert_close(objective.queue.rows, reference.queue, **EXACT)
        torch.testing.assert_close(student, reference.query, **EXACT)
        assert objective.queue.pointer == reference.pointer
    torch.testing.assert_close(teacher, 0.9 * reference.key + (1 - 0.9) * reference.query, **EXACT)


def test_a_teacher_like_its_student_stays_so() -> None:
    """Why the first of MoCo's updates, before any step, may be left out: it moves the teacher nowhere."""
    student = torch.randn(100, generator=torch.Generator().manual_seed(0))
    teacher = student.clone()
    ema_update_reference(([student], [teacher]), 0.999)
    torch.testing.assert_close(teacher, student, rtol=3e-7, atol=0)


def test_rows_are_enqueued_in_the_order_of_the_positions() -> None:
    objective, keys = moco(8, 4), rows(3, 4)
    for start in (0, 3):
        outcome = objective.loss({"instance": rows(3, 4, seed=5)}, {"instance": keys}, StepInfo(batch=3, **PAIR))
        objective.commit(outcome)
        assert torch.equal(objective.queue.rows[start : start + 3], keys)


def test_equal_indices_count_unless_they_are_the_same_crop() -> None:
    """Two crops each: all four pairs if the networks see crops of their own, the two of different crops otherwise."""
    student, teacher = rows(4, 6), rows(4, 6, seed=1)
    s, t = student.split(2), teacher.split(2)
    objective = moco(5, 6)
    queue = objective.queue.rows
    pairs = {(i, j): plain.moco(s[j], t[i], queue, 0.2) for i in range(2) for j in range(2)}
    cross = (pairs[0, 1] + pairs[1, 0]) / 2
    for config, same_views, wanted in [
        ("all", False, sum(pairs.values()) / 4),
        ("all", True, cross),
        ("mugs", False, cross),
        ("mugs", True, cross),
    ]:
        info = StepInfo(batch=2, student_crops=2, student_globals=2, teacher_crops=2, same_views=same_views)
        found = moco(5, 6, pairs=config).loss({"instance": student}, {"instance": teacher}, info).loss
        torch.testing.assert_close(found, wanted, **EXACT)


def test_mugs_leaves_one_pair_none_and_says_so() -> None:
    with pytest.raises(ValueError, match="leave no pair to compare"):
        moco(8, 4, pairs="mugs").loss({"instance": rows(3, 4)}, {"instance": rows(3, 4)}, StepInfo(batch=3, **PAIR))


def test_config() -> None:
    assert InstanceConfig().pairs == "mugs"
    with pytest.raises(ValidationError, match="mugs"):
        InstanceConfig(pairs="some")  # type: ignore[arg-type]
