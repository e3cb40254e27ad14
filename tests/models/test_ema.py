"""The moving average: its plain form, its fixed points, and that a tensor's pieces get what the whole gets."""

import pytest
import torch
from gristmill.models.ema import ema_update, ema_update_reference, pairs
from gristmill.models.student import Student, StudentConfig
from gristmill.models.teacher import make_teacher
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

CONFIG = StudentConfig(
    image_size=16, patch_size=8, embed_dim=32, depth=1, heads=2, drop_path=0, head_hidden=24, head_out=8,
    predictor_hidden=20, prototypes=40,
)  # fmt: skip


def tensors(seed: int, *shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


@given(st.floats(0, 1), st.lists(st.tuples(st.integers(0, 9), st.integers(1, 9)), max_size=5), st.integers(0, 2**32))
@settings(deadline=None)
def test_equals_the_plain_form(momentum: float, shapes: list[tuple[int, int]], seed: int):
    student, teacher = tensors(seed, *shapes), tensors(seed + 1, *shapes)
    plain = [x.clone() for x in teacher]
    kept = [x.clone() for x in student]
    ema_update((student, teacher), momentum)
    ema_update_reference((student, plain), momentum)
    for found, wanted in zip(teacher, plain, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
    assert all(torch.equal(x, y) for x, y in zip(student, kept, strict=True))


@given(st.floats(0, 1), st.integers(0, 2**32))
@settings(deadline=None)
def test_fixed_points_are_exact(momentum: float, seed: int):
    (student,), (teacher,) = tensors(seed, (50,)), tensors(seed + 1, (50,))
    for m, start, wanted in ((1.0, teacher, teacher), (0.0, teacher, student), (momentum, student, student)):
        found = start.clone()
        ema_update(([student], [found]), m)
        assert torch.equal(found, wanted)


@given(st.lists(st.integers(0, 300), min_size=1, max_size=4), st.floats(0, 1))
@settings(deadline=None)
def test_shards_get_the_same_bits_as_the_whole(cuts: list[int], momentum: float):
    (student,), (teacher,) = tensors(1, (300,)), tensors(2, (300,))
    sizes = torch.tensor([0, *sorted(cuts), 300]).diff().tolist()
    pieces = [x.clone() for x in teacher.split(sizes)]
    ema_update(([x.clone() for x in student.split(sizes)], pieces), momentum)
    ema_update(([student], [teacher]), momentum)
    assert torch.equal(torch.cat(pieces), teacher)


def test_pairs_match_by_name_and_leave_the_predictors_out():
    student = Student(CONFIG)
    teacher = make_teacher(student)
    sources, targets = pairs(student, teacher)
    assert len(sources) == len(targets) == len(list(teacher.parameters())) == len(list(student.parameters())) - 4
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1)
    ema_update((sources, targets), 0.75)
    now = dict(student.named_parameters())
    for name, parameter in teacher.named_parameters():
        torch.testing.assert_close(parameter, now[name] - 0.75, rtol=0, atol=1e-6)


def test_pairs_of_different_recipes_are_refused():
    student = Student(CONFIG)
    with pytest.raises(ValueError, match=r"heads\.group\.last_layer\.weight_g \(41, 1\): the student's is \(40, 1\)"):
        pairs(student, make_teacher(Student(CONFIG.model_copy(update={"prototypes": 41}))))
    with pytest.raises(ValueError, match="the student's is none"):
        pairs(Student(CONFIG.model_copy(update={"objectives": ("instance",)})), make_teacher(student))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_types_than_float32_are_refused(dtype: torch.dtype):
    with pytest.raises(ValueError, match="float32"):
        ema_update(([torch.zeros(2)], [torch.zeros(2, dtype=dtype)]), 0.9)


def test_impossible_arguments_are_refused():
    with pytest.raises(ValueError, match="momentum"):
        ema_update(([torch.zeros(2)], [torch.zeros(2)]), 1.1)
    with pytest.raises(ValueError, match="momentum"):
        ema_update(([torch.zeros(2)], [torch.zeros(2)]), float("nan"))
    with pytest.raises(ValueError, match="1 student tensors for 0"):
        ema_update(([torch.zeros(2)], []), 0.9)
