"""The mixture: true weights, one namespace, and a bad step that can be refused."""

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from gristmill.objectives import (
    Dims,
    GroupConfig,
    InstanceConfig,
    LocalGroupConfig,
    Mixture,
    MixtureConfig,
    Objective,
    Ramp,
    StepInfo,
    build_objectives,
)
from pydantic import ValidationError
from safetensors.torch import load, save

BATCH, CROPS, FEATURES, OUT, PROTOTYPES = 4, 5, 6, 8, 12
DIMS = Dims(features=FEATURES, instance=OUT, local_group=OUT, prototypes=PROTOTYPES)
INFO = StepInfo(batch=BATCH, student_crops=CROPS, student_globals=2, teacher_crops=2, progress=0.5)
CONFIGS = {
    "instance": InstanceConfig(queue=24),
    "local_group": LocalGroupConfig(queue=24, memory=20, neighbours=2),
    "group": GroupConfig(),
}


def outputs(seed: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    sides = []
    for crops in (CROPS, 2):
        side = {
            name: F.normalize(torch.randn(crops * BATCH, OUT, generator=generator), dim=1)
            for name in ("instance", "local_group")
        }
        side["group"] = torch.randn(crops * BATCH, PROTOTYPES, generator=generator)
        side["memory_row"] = torch.randn(2 * BATCH, FEATURES, generator=generator)
        sides.append(side)
    for name in ("instance", "local_group", "group"):
        sides[0][name].requires_grad_()
    return sides[0], sides[1]


def build(seed: int = 0, weights: Mapping[str, float] | None = None) -> Mixture:
    return build_objectives(CONFIGS, dims=DIMS, seed=seed, mixture=MixtureConfig(weights=dict(weights or {})))


def test_equal_weights_give_the_plain_mean_and_others_a_weighted_one() -> None:
    for weights in ({}, {"instance": 2.0, "group": 0.5}):
        mixture = build(weights=weights)
        student, teacher = outputs(0)
        outcome = mixture.loss(student, teacher, INFO)
        losses = {name: o.loss(student, teacher, INFO).loss for name, o in mixture.objectives.items()}
        full = {"instance": 1.0, "local_group": 1.0, "group": 1.0, **weights}
        expected = sum(full[name] * loss for name, loss in losses.items()) / sum(full.values())
        torch.testing.assert_close(outcome.loss, expected)
        assert {name: outcome.logs[f"weight/{name}"] for name in full} == full
        for name, loss in losses.items():
            assert torch.equal(torch.as_tensor(outcome.logs[f"loss/{name}"]), loss.detach())


def test_gradient_reaches_every_output_and_commit_nothing_else() -> None:
    mixture = build()
    assert isinstance(mixture, Objective)
    student, teacher = outputs(1)
    outcome = mixture.loss(student, teacher, INFO)
    outcome.loss.backward()
    for name in ("instance", "local_group", "group"):
        gradient = student[name].grad
        assert gradient is not None
        assert bool(torch.isfinite(gradient).all())
        assert float(gradient.abs().sum()) > 0
    assert not any(t.requires_grad for t in outcome.commit.values())
    assert not any(isinstance(v, torch.Tensor) and v.requires_grad for v in outcome.logs.values())
    assert all(t.numel() == 1 for t in map(torch.as_tensor, outcome.logs.values()))


def test_a_bad_step_leaves_no_trace() -> None:
    """A run that met a non-finite step and refused it goes on as one that never saw it."""
    met, never = build(), build()
    before = met.state()
    for poisoned in ("instance", "local_group", "group", "memory_row"):
        student, teacher = outputs(2)
        teacher[poisoned][0] = float("nan")
        outcome = met.loss(student, teacher, INFO)
        assert not bool(outcome.finite()), poisoned
        assert all(torch.equal(before[key], tensor) for key, tensor in met.state().items())
    for mixture in (met, never):
        outcome = mixture.loss(*outputs(3), INFO)
        assert bool(outcome.finite())
        mixture.commit(outcome)
    assert all(torch.equal(tensor, never.state()[key]) for key, tensor in met.state().items())


def test_resumes_bit_for_bit_through_safetensors() -> None:
    mixture, resumed = build(seed=0), build(seed=1)
    for seed in range(4):
        mixture.commit(mixture.loss(*outputs(seed), INFO))
    resumed.load(load(save(mixture.state())))
    traces = []
    for each in (mixture, resumed):
        trace = []
        for seed in range(4, 9):
            outcome = each.loss(*outputs(seed), INFO)
            each.commit(outcome)
            trace.append({k: float(v) for k, v in outcome.logs.items()})
        traces.append(trace)
    assert traces[0] == traces[1]
    assert all(torch.equal(tensor, resumed.state()[key]) for key, tensor in mixture.state().items())


def test_names_are_stable() -> None:
    """Checkpoints depend on them."""
    assert sorted(build().state()) == sorted(
        ["group.center"]
        + [
            f"{memory}.{part}"
            for memory in ("instance.queue", "local_group.queue", "local_group.student", "local_group.teacher")
            for part in ("pointer", "rows", "step", "written")
        ]
    )
    assert build().context().keys() == {"local_group.bank", "local_group.norms"}


def test_memories_differ_from_each_other_and_agree_between_ranks() -> None:
    first, second = build(seed=7).state(), build(seed=7).state()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not torch.equal(first["instance.queue.rows"], first["local_group.queue.rows"])


def test_objectives_can_be_left_out() -> None:
    mixture = build_objectives({**CONFIGS, "local_group": None}, dims=DIMS, seed=0)
    assert list(mixture.objectives) == ["instance", "group"]
    assert mixture.context() == {}
    student, teacher = outputs(4)
    for side in (student, teacher):
        del side["local_group"], side["memory_row"]
    mixture.commit(mixture.loss(student, teacher, INFO))


def test_no_local_crops() -> None:
    student, teacher = outputs(5)
    student = {key: tensor[: 2 * BATCH] for key, tensor in student.items()}
    info = StepInfo(batch=BATCH, student_crops=2, student_globals=2, teacher_crops=2, same_views=True)
    assert bool(build().loss(student, teacher, info).finite())


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="'dense'"):
        build(weights={"dense": 1.0})
    with pytest.raises(ValidationError):
        MixtureConfig(weights={"group": 0.0})
    with pytest.raises(ValueError, match="leave the objective out"):
        Mixture(list(build().objectives.values()), {"group": -1.0})
    with pytest.raises(ValueError, match="GroupConfig"):
        build_objectives({"instance": GroupConfig()}, dims=DIMS, seed=0)
    with pytest.raises(ValueError, match=r"dims\.prototypes"):
        build_objectives({"group": GroupConfig()}, dims=Dims(), seed=0)
    with pytest.raises(ValueError, match="different names"):
        build_objectives({"group": None}, dims=DIMS, seed=0)
    with pytest.raises(ValueError, match="belongs to none"):
        build().load({"dense.queue": torch.zeros(1)})


def test_a_ramp_moves_its_weight_over_its_part_of_the_run() -> None:
    ramp = Ramp(start=0.0, end=2.0, over=(0.25, 0.75))
    assert [ramp.at(share) for share in (0.0, 0.25, 0.375, 0.5, 0.75, 1.0)] == [0.0, 0.0, 0.5, 1.0, 2.0, 2.0]
    step = Ramp(start=1.0, end=0.5, over=(0.5, 0.5))
    assert [step.at(share) for share in (0.0, 0.49, 0.5, 1.0)] == [1.0, 1.0, 0.5, 0.5]
    mixture = build_objectives(CONFIGS, dims=DIMS, seed=0, mixture=MixtureConfig(weights={"group": ramp}))
    for progress, weight in ((0.0, 0.0), (0.5, 1.0), (1.0, 2.0)):
        student, teacher = outputs(0)
        info = replace(INFO, progress=progress)
        losses = {name: o.loss(student, teacher, info).loss for name, o in mixture.objectives.items()}
        found = mixture.loss(student, teacher, info)
        weights = {name: weight if name == "group" else 1.0 for name in CONFIGS}
        wanted = sum(weights[name] * loss for name, loss in losses.items()) / sum(weights.values())
        torch.testing.assert_close(found.loss, wanted)
        assert found.logs["weight/group"] == weight
        (gradient,) = torch.autograd.grad(found.loss, student["group"])
        assert bool(gradient.any()) == (weight > 0)  # there is one all the same, for every rank's step


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"start": 0, "end": 0}, "leave the objective out"),
        ({"start": 0, "end": 1, "over": [0.5, 0.2]}, "beginning first"),
        ({"start": -1, "end": 1}, "greater than or equal to 0"),
    ],
)
def test_ramps_that_cannot_be_are_refused(given: dict, said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        Ramp.model_validate(given)


def test_a_time_without_any_weight_is_refused() -> None:
    late: dict[str, float | Ramp] = {name: Ramp(start=0.0, end=1.0) for name in CONFIGS}
    with pytest.raises(ValueError, match="all weights are 0 at 0% of the run"):
        build_objectives(CONFIGS, dims=DIMS, seed=0, mixture=MixtureConfig(weights=late))
