"""The teacher: the student's weights at first, no predictor, no gradient, nothing shared."""

import pytest
import torch
from gristmill.models.batch_norm import merge_statistics, statistics_of
from gristmill.models.ema import ema_update, pairs
from gristmill.models.student import Student, StudentConfig
from gristmill.models.teacher import make_teacher
from torch.nn.functional import normalize

CONFIG = StudentConfig(
    image_size=16, patch_size=8, embed_dim=32, depth=2, heads=2, drop_path=0.3, head_hidden=24, head_out=8,
    predictor_hidden=20, prototypes=40, neighbours=3,
)  # fmt: skip


@pytest.mark.parametrize("frozen", [False, True])
def test_teacher_is_the_student_without_predictors(frozen: bool):
    student = Student(CONFIG.model_copy(update={"norm_last_layer": frozen}))
    before = {key: value.clone() for key, value in student.state_dict().items()}
    teacher = make_teacher(student)
    weights = teacher.state_dict()
    assert set(before) - set(weights) == {key for key in before if ".predictor." in key}
    assert len(set(before) - set(weights)) == 4
    assert all(torch.equal(value, before[key]) for key, value in weights.items())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert all(parameter.requires_grad for parameter in student.parameters())
    for parameter in teacher.parameters():
        parameter.add_(1)
    assert all(torch.equal(value, before[key]) for key, value in student.state_dict().items())


def test_teacher_drops_no_paths_and_projects_without_predicting():
    student = Student(CONFIG)
    teacher = make_teacher(student).train()
    generator = torch.Generator().manual_seed(0)
    context = {"local_group.bank": torch.randn(9, 32, generator=generator)}
    out = teacher([torch.randn(4, 3, 16, 16, generator=generator)], context)
    assert not any(value.requires_grad for value in out.values())
    projected = student.heads["instance"].projector(out["class_token"])  # pyright: ignore[reportCallIssue]
    torch.testing.assert_close(out["instance"], normalize(projected, dim=-1), rtol=0, atol=1e-6)
    assert student.config.drop_path == 0.3


def test_batch_norm_takes_the_teachers_own_batch_and_remembers_it_apart_from_the_students():
    config = CONFIG.model_copy(update={"head_norm": "batch", "drop_path": 0.0})
    student = Student(config, seed=1)
    teacher = make_teacher(student)
    generator = torch.Generator().manual_seed(0)
    context = {"local_group.bank": torch.randn(9, 32, generator=generator)}
    x = torch.randn(8, 3, 16, 16, generator=generator)
    out = student([x], context)
    with torch.no_grad():
        targets = teacher([x], context)
    # Same weights and own statistics: the same projection, so statistics are the student's to the bit.
    found = statistics_of(targets)
    assert found.keys() == statistics_of(out).keys()
    assert len(found) == 6
    assert all(torch.equal(found[key], out[key]) for key in found)
    merge_statistics(student, statistics_of(student([x + 1], context)))
    ema_update(pairs(student, teacher), 0.5)
    key = "heads.group.projector.1.running_mean"
    assert not teacher.state_dict()[key].any()
    merge_statistics(teacher, found)
    torch.testing.assert_close(teacher.state_dict()[key], 0.1 * found["batch_norm.heads.group.projector.1"][0, 0])
    one = teacher.eval()([x[:1]], context)
    assert one["group"].isfinite().all()
    assert not statistics_of(one)
