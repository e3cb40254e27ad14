"""Instance discrimination against the official numbers, step after step."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gristmill.objectives.instance import InstanceConfig, InstanceObjective
from gristmill.objectives.protocol import Objective, StepInfo
from pydantic import ValidationError

VECTORS = Path(__file__).parents[1] / "vectors"
EXACT: dict[str, Any] = {"rtol": 1e-12, "atol": 1e-12}


def official() -> tuple[dict, InstanceObjective, StepInfo]:
    vector = torch.load(VECTORS / "mugs_infonce.pt", weights_only=True)
    config = InstanceConfig(queue=vector["K"], temperature=vector["temperature"])
    objective = InstanceObjective(config, vector["D"], seed=0, dtype=torch.float64)
    objective.load({**objective.state(), "queue.rows": vector["queue0"].T.contiguous()})
    info = StepInfo(batch=vector["B"], student_crops=vector["ncrops"], student_globals=2, teacher_crops=2)
    return vector, objective, info


def test_official_steps() -> None:
    vector, objective, info = official()
    assert objective.queue.pointer == vector["ptr0"]
    for step in vector["steps"]:
        student = step["student"].clone().requires_grad_()
        outcome = objective.loss({"instance": student}, {"instance": step["teacher"]}, info)
        torch.testing.assert_close(outcome.loss, step["loss"], **EXACT)
        outcome.loss.backward()
        torch.testing.assert_close(student.grad, step["grad_student"], **EXACT)
        objective.commit(outcome)
        torch.testing.assert_close(objective.queue.rows.T, step["queue_after"], **EXACT)
        assert objective.queue.pointer == step["ptr_after"]


def test_ranks_gather_along_the_first_dimension() -> None:
    """Two ranks with half of the images each leave the queue that one rank with all of them leaves."""
    vector, whole, info = official()
    _, parts, _ = official()
    step, half = vector["steps"][0], info.batch // 2
    whole.commit(whole.loss({"instance": step["student"]}, {"instance": step["teacher"]}, info))
    outcomes = []
    for rank in range(2):
        mine = slice(rank * half, (rank + 1) * half)
        student = step["student"].view(info.student_crops, info.batch, -1)[:, mine].flatten(0, 1)
        teacher = step["teacher"].view(2, info.batch, -1)[:, mine].flatten(0, 1)
        part = StepInfo(batch=half, student_crops=info.student_crops, student_globals=2, teacher_crops=2)
        outcomes.append(parts.loss({"instance": student}, {"instance": teacher}, part))
    outcomes[0].commit = {k: torch.cat([o.commit[k] for o in outcomes]) for k in outcomes[0].commit}
    parts.commit(outcomes[0])
    assert torch.equal(whole.queue.rows, parts.queue.rows)
    assert whole.queue.pointer == parts.queue.pointer


def test_loss_has_no_side_effect_and_logs_no_graph() -> None:
    vector, objective, info = official()
    before = objective.state()
    student = vector["steps"][0]["student"].clone().requires_grad_()
    outcome = objective.loss({"instance": student}, {"instance": vector["steps"][0]["teacher"]}, info)
    assert isinstance(objective, Objective)
    assert all(torch.equal(before[key], tensor) for key, tensor in objective.state().items())
    assert not any(isinstance(v, torch.Tensor) and v.requires_grad for v in outcome.logs.values())
    assert not any(t.requires_grad for t in outcome.commit.values())
    assert {"loss/instance", "instance/positive_similarity", "memory/instance.queue/fill"} <= outcome.logs.keys()


def test_half_precision_outputs_are_taken_up_in_full() -> None:
    objective = InstanceObjective(InstanceConfig(queue=32), 8, seed=0)
    info = StepInfo(batch=4, student_crops=3, student_globals=2, teacher_crops=2)
    generator = torch.Generator().manual_seed(0)
    student, teacher = (F.normalize(torch.randn(n, 8, generator=generator), dim=1).bfloat16() for n in (12, 8))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outcome = objective.loss({"instance": student}, {"instance": teacher}, info)
    full = objective.loss({"instance": student.float()}, {"instance": teacher.float()}, info)
    assert outcome.loss.dtype == torch.float32
    assert torch.equal(outcome.loss, full.loss)
    assert outcome.commit["keys"].dtype == torch.float32


def test_a_queue_smaller_than_a_step_is_refused_before_backward() -> None:
    objective = InstanceObjective(InstanceConfig(queue=7), 8, seed=0)
    info = StepInfo(batch=4, student_crops=3, student_globals=2, teacher_crops=2)
    with pytest.raises(ValueError, match=r"instance\.queue: a step brings 8 rows"):
        objective.loss({"instance": torch.ones(12, 8)}, {"instance": torch.ones(8, 8)}, info)


def test_config_is_strict() -> None:
    with pytest.raises(ValidationError, match="queu"):
        InstanceConfig(queu=3)  # type: ignore[call-arg]
    with pytest.raises(ValidationError):
        InstanceConfig(temperature=0)
