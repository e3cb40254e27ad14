"""Local groups: which rows reach which memory, and that the contrast is instance discrimination's."""

import pytest
import torch
import torch.nn.functional as F
from gristmill.objectives.contrast import info_nce_reference
from gristmill.objectives.local_group import LocalGroupConfig, LocalGroupObjective
from gristmill.objectives.protocol import StepInfo
from pydantic import ValidationError

BATCH, CROPS, DIM, FEATURES = 5, 4, 6, 7
CONFIG = LocalGroupConfig(queue=40, memory=32, neighbours=3)


def outputs(seed: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)

    def draw(rows: int, dim: int) -> torch.Tensor:
        return torch.randn(rows, dim, generator=generator)

    student = {"local_group": F.normalize(draw(CROPS * BATCH, DIM), dim=1), "memory_row": draw(2 * BATCH, FEATURES)}
    teacher = {"local_group": F.normalize(draw(2 * BATCH, DIM), dim=1), "memory_row": draw(2 * BATCH, FEATURES)}
    return student, teacher


def info(weak: list[bool] | None = None) -> StepInfo:
    flags = None if weak is None else torch.tensor(weak)
    return StepInfo(batch=BATCH, student_crops=CROPS, student_globals=2, teacher_crops=2, weak=flags)


def test_loss_is_the_plain_formula_on_its_own_queue() -> None:
    objective = LocalGroupObjective(CONFIG, DIM, FEATURES, seed=0)
    student, teacher = outputs(0)
    expected = info_nce_reference(
        student["local_group"], teacher["local_group"], objective.queue.rows, student_crops=CROPS, student_globals=2,
        teacher_crops=2, temperature=0.2,
    )  # fmt: skip
    torch.testing.assert_close(objective.loss(student, teacher, info()).loss, expected)


@pytest.mark.parametrize("weak", [None, [True, False, True, True, False], [False] * BATCH])
def test_memories_take_crop_zero_and_the_student_only_weak_images(weak: list[bool] | None) -> None:
    objective = LocalGroupObjective(CONFIG, DIM, FEATURES, seed=0)
    start = objective.student.rows.clone()
    student, teacher = outputs(1)
    objective.commit(objective.loss(student, teacher, info(weak)))
    chosen = [i for i in range(BATCH) if weak is None or weak[i]]
    assert torch.equal(objective.student.rows[: len(chosen)], student["memory_row"][chosen])
    assert torch.equal(objective.student.rows[len(chosen) :], start[len(chosen) :])
    assert objective.student.pointer == len(chosen)
    assert torch.equal(objective.teacher.rows[:BATCH], teacher["memory_row"][:BATCH])
    assert torch.equal(objective.queue.rows[: 2 * BATCH], teacher["local_group"])


def test_each_network_searches_its_own_memory() -> None:
    objective = LocalGroupObjective(CONFIG, DIM, FEATURES, seed=0)
    names = {"local_group.bank", "local_group.norms"}
    assert objective.context().keys() == objective.teacher_context().keys() == names
    assert objective.context()["local_group.bank"] is objective.student.rows
    assert objective.teacher_context()["local_group.bank"] is objective.teacher.rows
    assert objective.context()["local_group.norms"] is objective.student.norms
    assert not torch.equal(objective.student.rows, objective.teacher.rows)


def test_compat_moves_the_memories_officially_and_the_queue_as_a_ring() -> None:
    objective = LocalGroupObjective(CONFIG.model_copy(update={"compat": True}), DIM, FEATURES, seed=0)
    objective.commit(objective.loss(*outputs(2), info([True, True, False, False, False])))
    assert (objective.student.pointer, objective.teacher.pointer, objective.queue.pointer) == (4, 10, 10)


def test_health_of_neighbours() -> None:
    objective = LocalGroupObjective(CONFIG, DIM, FEATURES, seed=0)
    student, teacher = outputs(3)
    logs = objective.loss(student, teacher, info()).logs
    rows = F.normalize(student["memory_row"][:BATCH], dim=1)
    nearest = (rows @ F.normalize(objective.student.rows, dim=1).T).topk(3, dim=1)
    assert float(logs["local_group/neighbour_similarity"]) == pytest.approx(float(nearest.values.mean()), rel=1e-5)
    unique = nearest.indices.unique().numel() / nearest.indices.numel()
    assert float(logs["local_group/neighbour_unique_ratio"]) == pytest.approx(unique)
    student["memory_row"] = student["memory_row"][:1].expand(2 * BATCH, -1)  # all images alike: the same three slots
    logs = objective.loss(student, teacher, info()).logs
    assert float(logs["local_group/neighbour_unique_ratio"]) == pytest.approx(1 / BATCH)


def test_loss_changes_nothing_and_state_comes_back() -> None:
    objective, twin = (LocalGroupObjective(CONFIG, DIM, FEATURES, seed=seed) for seed in (0, 1))
    before = objective.state()
    outcome = objective.loss(*outputs(4), info())
    assert all(torch.equal(before[key], tensor) for key, tensor in objective.state().items())
    objective.commit(outcome)
    twin.load(objective.state())
    for each in (objective, twin):
        each.commit(each.loss(*outputs(5), info([True, False, False, True, True])))
    assert all(t.is_contiguous() and torch.equal(t, twin.state()[k]) for k, t in objective.state().items())
    with pytest.raises(ValueError, match=r"'other\.rows'"):
        twin.load({"other.rows": torch.zeros(1)})


def test_a_memory_too_small_for_its_neighbours_is_refused() -> None:
    with pytest.raises(ValidationError, match="enlarge memory"):
        LocalGroupConfig(memory=4, neighbours=8)


def test_a_step_that_does_not_fit_is_refused_before_backward() -> None:
    objective = LocalGroupObjective(CONFIG, DIM, FEATURES + 1, seed=0)
    with pytest.raises(ValueError, match=r"local_group\.student: rows of 7 numbers"):
        objective.loss(*outputs(6), info())
    objective = LocalGroupObjective(LocalGroupConfig(queue=40, memory=4, neighbours=3), DIM, FEATURES, seed=0)
    with pytest.raises(ValueError, match="brings 5 rows"):
        objective.loss(*outputs(6), info())
    objective = LocalGroupObjective(CONFIG, DIM, FEATURES, seed=0)
    with pytest.raises(ValueError, match="weak flags"):
        objective.loss(*outputs(6), info([True]))
