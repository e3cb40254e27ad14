"""What cannot work is refused with a name and a remedy, what can is defined: never a silent wrong loss."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gristmill.models.student import Student, StudentConfig
from gristmill.objectives import (
    Dims,
    GroupConfig,
    InstanceConfig,
    LocalGroupConfig,
    Mixture,
    StepInfo,
    build_objectives,
)
from gristmill.ops.inputs import Inputs
from gristmill.ops.networks import build_mixture, build_student
from gristmill.ops.recipe import RecipeError, load_recipe
from pydantic import ValidationError
from torch import Tensor

BATCH, CROPS, FEATURES, OUT, PROTOTYPES = 4, 5, 6, 8, 12
INFO = StepInfo(batch=BATCH, student_crops=CROPS, student_globals=2, teacher_crops=2, progress=0.5)
NAMES = ("instance", "local_group", "group")


def build(dtype: torch.dtype = torch.float32, **group: Any) -> Mixture:
    configs = {
        "instance": InstanceConfig(queue=24),
        "local_group": LocalGroupConfig(queue=24, memory=20, neighbours=2),
        "group": GroupConfig(**group),
    }
    return build_objectives(configs, dims=Dims(FEATURES, OUT, OUT, PROTOTYPES), seed=0, dtype=dtype)


def outputs(crops: int = CROPS, dtype: torch.dtype = torch.float32) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    sides = []
    for count in (crops, 2):
        side = {n: F.normalize(torch.randn(count * BATCH, OUT, generator=generator), dim=1) for n in NAMES[:2]}
        side["group"] = torch.randn(count * BATCH, PROTOTYPES, generator=generator)
        side["class_token"] = torch.randn(count * BATCH, FEATURES, generator=generator)
        side["memory_row"] = torch.randn(2 * BATCH, FEATURES, generator=generator)
        sides.append({name: value.to(dtype) for name, value in side.items()})
    return sides[0], sides[1]


# An objective without its head, its view, or its rows.


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("who", [0, 1])
def test_without_its_head_an_objective_says_so(name: str, who: int) -> None:
    sides = outputs()
    del sides[who][name]
    with pytest.raises(ValueError, match=rf"objective {name}: the {('student', 'teacher')[who]} gives no '{name}'"):
        build().loss(*sides, INFO)


def test_a_student_built_for_others_is_refused_by_name() -> None:
    student = Student(StudentConfig(
        image_size=16, patch_size=8, embed_dim=FEATURES, depth=1, heads=2, drop_path=0, head_hidden=8, head_out=OUT,
        predictor_hidden=8, prototypes=PROTOTYPES, objectives=("instance", "group"),
    ))  # fmt: skip
    with torch.no_grad():
        out = student([torch.zeros(2 * BATCH, 3, 16, 16), torch.zeros(3 * BATCH, 3, 8, 8)])
        targets = student([torch.zeros(2 * BATCH, 3, 16, 16)])
    with pytest.raises(
        ValueError, match=r"local_group\.student: no 'memory_row'.*local_group among student\.objectives"
    ):
        build().loss(out, targets, INFO)


def test_rows_of_another_batch_are_refused() -> None:
    student, teacher = outputs()
    for name in NAMES:
        cut = {**student, name: student[name][:-1]}
        with pytest.raises(ValueError, match=rf"objective {name}: 19 rows of the student for 5 crops of 4 images"):
            build().loss(cut, teacher, INFO)
    short = {**teacher, "memory_row": teacher["memory_row"][: BATCH - 1]}
    with pytest.raises(ValueError, match=r"local_group\.teacher: no 'memory_row' of 4 images"):
        build().loss(student, short, INFO)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("views.global.role=student", "the teacher sees none"),
        (
            "views.local.count=1 views.global.count=1 views.global.role=teacher",
            "views: instance: 1 teacher and 1 student crops leave",
        ),
        ("student.objectives=[instance,group]", "differ from objectives"),
        ("objectives.local_group.neighbours=2000", "cannot be found in a memory of 1024"),
        ("student.neighbours=5", "student.neighbours 5 differs from objectives.local_group.neighbours 8"),
    ],
)
def test_recipes_that_cannot_work_are_refused_before_anything_starts(override: str, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        load_recipe("demo", override.split(" "))


def test_a_queue_or_memory_smaller_than_a_step_is_refused() -> None:
    for override, said in [
        ("objectives.instance.queue=63", r"objectives\.instance\.queue: 63 is less than the 64 rows of one step"),
        ("objectives.local_group.queue=40", r"objectives\.local_group\.queue: 40 is less"),
        ("objectives.local_group.memory=31", r"objectives\.local_group\.memory: 31 is less than a batch of 32"),
    ]:
        with pytest.raises(RecipeError, match=said):
            load_recipe("demo", [override])
    small = build_objectives({"instance": InstanceConfig(queue=7)}, dims=Dims(instance=OUT), seed=0)
    with pytest.raises(ValueError, match=r"instance\.queue: a step brings 8 rows but the memory holds 7"):
        small.loss(*outputs(), INFO)
    with pytest.raises(ValidationError, match="enlarge memory"):
        LocalGroupConfig(memory=4, neighbours=8)


def test_rows_of_several_ranks_that_exceed_a_memory_change_nothing() -> None:
    """A step fits on each rank alone, but not all ranks' rows together: the commit refuses, and leaves no trace."""
    made = build_objectives({"instance": InstanceConfig(queue=12)}, dims=Dims(instance=OUT), seed=0)
    outcome, before = made.loss(*outputs(), INFO), made.state()
    outcome.commit = {name: rows.repeat(2, 1, 1) for name, rows in outcome.commit.items()}
    with pytest.raises(ValueError, match="brings 16 rows"):
        made.commit(outcome)
    assert all(torch.equal(tensor, before[name]) for name, tensor in made.state().items())


# Zero local crops: a defined result.


@pytest.mark.parametrize("form", ["mugs", "dino"])
def test_without_local_crops_the_global_pairs_are_all(form: str) -> None:
    student, teacher = outputs(crops=2)
    info = StepInfo(batch=BATCH, student_crops=2, student_globals=2, teacher_crops=2, progress=0.5)
    made = build(form=form, teacher_temperature=(0.04, 0.07), warmup=0.1)
    outcome = made.loss(student, teacher, info)
    assert bool(outcome.finite())
    p = torch.softmax(teacher["group"] / 0.07, 1).split(BATCH)
    z = torch.log_softmax(student["group"] / 0.1, 1).split(BATCH)
    wanted = -((p[0] * z[1]).sum(1).mean() + (p[1] * z[0]).sum(1).mean()) / 2
    assert float(outcome.logs["loss/group"]) == pytest.approx(float(wanted), rel=1e-5)


def test_a_recipe_without_local_crops_runs_its_forward() -> None:
    recipe = load_recipe("demo", ["views=byol", "views.global.size=32", "batch=4", "student.depth=1"])
    student, inputs = build_student(recipe), Inputs(recipe, 0, 1, "cpu")
    made, views = build_mixture(recipe, student), {"global": torch.randn(4, 2, 3, 32, 32)}
    with torch.no_grad():
        out = student(inputs.crops(views, inputs.student, 0), made.context())
        outcome = made.loss(
            out, student(inputs.crops(views, inputs.teacher, 0), made.teacher_context()), inputs.info(0, 0.0)
        )
    assert bool(outcome.finite())


# NaN, infinity, and other types.


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("balance", ["centre", "sinkhorn"])
@pytest.mark.parametrize("who", ["student", "teacher"])
@pytest.mark.parametrize("name", [*NAMES, "memory_row"])
def test_what_is_not_finite_shows_and_is_not_remembered(name: str, who: str, balance: str, bad: float) -> None:
    made, (student, teacher) = build(balance=balance), outputs()
    before = made.state()
    side = {"student": student, "teacher": teacher}[who]
    side[name] = side[name].clone()
    side[name][0, 0] = bad
    assert not bool(made.loss(student, teacher, INFO).finite())
    assert all(torch.equal(tensor, before[key]) for key, tensor in made.state().items())


@pytest.mark.parametrize("types", [("bfloat16", "float32"), ("float32", "bfloat16"), ("float64", "float16")])
def test_mixed_types_are_computed_in_the_memories_own(types: tuple[str, str]) -> None:
    one, other = (getattr(torch, name) for name in types)
    student, teacher = outputs(dtype=one)[0], outputs(dtype=other)[1]
    full = [{name: value.float() for name, value in side.items()} for side in (student, teacher)]
    made = build()
    found, wanted = made.loss(student, teacher, INFO), made.loss(full[0], full[1], INFO)
    assert found.loss.dtype == torch.float32
    torch.testing.assert_close(found.loss, wanted.loss, rtol=1e-6, atol=0)
    assert {rows.dtype for rows in found.commit.values()} == {torch.float32}
    made.commit(found)
    assert {t.dtype for t in made.state().values()} == {torch.float32, torch.int64}


def test_memories_of_another_type_are_refused_at_resume() -> None:
    with pytest.raises(ValueError, match="float64"):
        build().load(build(torch.float64).state())
