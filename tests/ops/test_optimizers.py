"""Groups partition the student; a held group is untouched; the transform sees what steps; the fast forms are chosen."""

import copy
from typing import Any

import pytest
import torch
from gristmill.models.student import Student, StudentConfig
from gristmill.models.teacher import make_teacher
from gristmill.ops.optimizers import (
    OptimizerConfig,
    OptimizerError,
    Stepper,
    layer_of,
    make_optimizer,
    parameter_groups,
)
from pydantic import ValidationError
from torch import nn

DEPTH = 3


@pytest.fixture(scope="module")
def student() -> Student:
    sizes: dict[str, Any] = {"head_hidden": 16, "head_out": 8, "predictor_hidden": 16, "prototypes": 12}
    return Student(StudentConfig(image_size=32, patch_size=8, embed_dim=16, depth=DEPTH, heads=2, **sizes))


def settings_of(**changes: Any) -> OptimizerConfig:
    return OptimizerConfig.model_validate(changes)


@pytest.mark.parametrize("changes", [{}, {"layer_decay": 0.75}, {"decay_all": True, "name": "sgd"}])
def test_groups_hold_every_trained_parameter_once_with_its_treatment(student: Student, changes: dict[str, Any]):
    student = copy.deepcopy(student)
    student.backbone.pos_embed.requires_grad_(False)  # pyright: ignore[reportOptionalMemberAccess]
    config = settings_of(**changes)
    groups = parameter_groups(student, config)
    parameters = {name: p for name, p in student.named_parameters() if p.requires_grad}
    assert sorted(name for group in groups for name in group["names"]) == sorted(parameters)
    assert "backbone.pos_embed" not in parameters
    known_to_teacher = dict(make_teacher(student).named_parameters())
    treatments = set()
    for group in groups:
        assert group["params"]
        assert all(p is parameters[name] for p, name in zip(group["params"], group["names"], strict=True))
        treatments.add(tuple(value for key, value in group.items() if key not in ("params", "names")))
        for name in group["names"]:
            assert group["decays"] == (config.decay_all or (parameters[name].ndim > 1 and not name.endswith("bias")))
            assert group["last_layer"] == ("last_layer" in name)
            assert group["teacher"] == (name in known_to_teacher)
            patch = 0.2 if "patch_embed" in name else 1.0
            assert group["lr_scale"] == patch * config.layer_decay ** (DEPTH + 1 - layer_of(name, DEPTH))
    assert len(treatments) == len(groups)
    assert any(group["last_layer"] for group in groups)
    assert not all(group["teacher"] for group in groups)
    again = parameter_groups(student, config)
    assert [group["names"] for group in again] == [group["names"] for group in groups]


def test_mugs_four_groups(student: Student):
    groups = parameter_groups(student, settings_of())
    assert {(group["lr_scale"], group["decays"]) for group in groups} == {
        (scale, decays) for scale in (0.2, 1.0) for decays in (True, False)
    }


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("backbone.cls_token", 0),
        ("backbone.pos_embed", 0),
        ("backbone.patch_embed.proj.weight", 0),
        ("backbone.blocks.0.norm1.weight", 1),
        ("backbone.blocks.11.mlp.fc2.bias", 12),
        ("backbone.norm.weight", 13),
        ("relation.block.attn.qkv.weight", 13),
        ("heads.group.last_layer.weight_v", 13),
        ("heads.cls_tokens.weight", 13),
    ],
)
def test_layers_are_counted_as_by_beit(name: str, layer: int):
    assert layer_of(name, 12) == layer


def test_layer_decay_needs_blocks():
    with pytest.raises(OptimizerError, match="layer_decay: this backbone has no blocks"):
        parameter_groups(nn.ModuleDict({"backbone": nn.Linear(2, 2)}), settings_of(layer_decay=0.9))


@pytest.mark.parametrize(
    "wrong",
    [
        {"name": "adam"},
        {"layer_decay": 0},
        {"momentum": 1},
        {"clip_by": "norm"},
        {"learning_rate": 1},
        {"name": "lars", "decay_all": True},
    ],
)
def test_impossible_settings_are_refused(wrong: dict[str, Any]):
    with pytest.raises(ValidationError, match=list(wrong)[-1]):
        settings_of(**wrong)


def two_groups(config: OptimizerConfig, device: str = "cpu") -> tuple[Stepper, list[nn.Parameter]]:
    generator = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.randn(3, 4, generator=generator, device="cpu").to(device)) for _ in range(4)]
    groups = [{"params": parameters[:2], "lr_scale": 1.0}, {"params": parameters[2:], "lr_scale": 0.5}]
    optimizer = make_optimizer(groups, config, device)
    for group in optimizer.param_groups:
        group.update(lr=0.1 * group["lr_scale"], weight_decay=0.01, held=False)
    return optimizer, parameters


def with_gradients(parameters: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for parameter in parameters:
        parameter.grad = torch.randn(3, 4, generator=generator).to(parameter.device)


def plain(name: str, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    groups = [{"params": parameters[:2], "lr": 0.1}, {"params": parameters[2:], "lr": 0.05}]
    if name == "adamw":
        return torch.optim.AdamW(groups, weight_decay=0.01, foreach=False)
    return torch.optim.SGD(groups, momentum=0.9, weight_decay=0.01, foreach=False)


HELD = ({0, 1, 4}, {3})  # steps at which each of two groups is held back


@pytest.mark.parametrize("name", ["adamw", "sgd"])
@pytest.mark.parametrize("how", ["all at once", "one group in the list", "one group with params"])
def test_held_groups_are_as_without_gradient(name: str, how: str):
    """And so under the ways in which DeepSpeed calls: everything (0), one group (1, 2), others emptied (3)."""
    optimizer, ours = two_groups(settings_of(name=name))
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    reference = plain(name, theirs)
    groups = optimizer.param_groups
    for step in range(6):
        with_gradients(ours, step)
        with_gradients(theirs, step)
        for index, group in enumerate(groups):
            group["held"] = step in HELD[index]
            if group["held"]:
                for p in theirs[2 * index : 2 * index + 2]:
                    p.grad = None
        reference.step()
        if how == "all at once":
            optimizer.step()
        elif how == "one group in the list":
            for group in groups:
                optimizer.param_groups = [group]
                optimizer.step()
                assert optimizer.param_groups == [group]
            optimizer.param_groups = groups
        else:
            kept = [group["params"] for group in groups]
            for group in groups:
                group["params"] = []
            for group, params in zip(groups, kept, strict=True):
                group["params"] = params
                optimizer.step()
                group["params"] = []
            for group, params in zip(groups, kept, strict=True):
                group["params"] = params
        assert optimizer.param_groups is groups
        for mine, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-7)
            a, b = optimizer.state.get(mine, {}), reference.state.get(other, {})
            assert {key for key in a if a[key] is not None} == {key for key in b if b[key] is not None}
            for key in a:
                torch.testing.assert_close(a[key], b[key], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["adamw", "sgd", "lars"])
def test_nothing_moves_until_the_engine_releases_the_groups(name: str):
    """DeepSpeed steps on zero gradients while it builds its bf16 optimizer; that must not age the moments."""
    parameter = nn.Parameter(torch.ones(2, 2))
    optimizer = make_optimizer([{"params": [parameter], "decays": True}], settings_of(name=name), "cpu")
    parameter.grad = torch.zeros(2, 2)
    optimizer.step()
    assert not optimizer.state
    assert isinstance(optimizer, torch.optim.Optimizer)
    optimizer.param_groups[0].update(held=False, lr=0.1)
    parameter.grad = torch.ones(2, 2)
    optimizer.step()
    assert optimizer.state[parameter]
    assert not torch.equal(parameter, torch.ones(2, 2))


def test_the_transform_sees_stepped_groups_only_and_a_failing_one_leaves_the_groups_whole():
    optimizer, parameters = two_groups(settings_of(name="sgd", momentum=0))
    groups, seen = optimizer.param_groups, []

    def transform(group: dict[str, Any]) -> None:
        assert not torch.is_grad_enabled()
        seen.append(group["lr_scale"])
        for p in group["params"]:
            p.grad.mul_(0.5)

    optimizer.transform = transform
    groups[1]["held"] = True
    before = [p.detach().clone() for p in parameters]
    with_gradients(parameters, 0)
    gradients = [p.grad.clone() for p in parameters if p.grad is not None]
    optimizer.step()
    assert seen == [1.0]
    torch.testing.assert_close(parameters[0].detach(), before[0] - 0.1 * (0.5 * gradients[0] + 0.01 * before[0]))
    assert torch.equal(parameters[2], before[2])
    groups[0]["lr"] = "fast"  # which torch's own step refuses
    with pytest.raises(TypeError):
        optimizer.step()
    assert optimizer.param_groups is groups


def test_the_fast_form_is_chosen_by_device():
    for device in ("cuda", "cpu"):
        assert make_optimizer([{"params": [nn.Parameter(torch.ones(1))]}], settings_of(), device).defaults["fused"]
    elsewhere = make_optimizer([{"params": [nn.Parameter(torch.ones(1))]}], settings_of(), "xpu")
    assert elsewhere.defaults["foreach"]
    on_cpu = make_optimizer([{"params": [nn.Parameter(torch.ones(1))]}], settings_of(eps=1e-6, betas=(0.5, 0.6)), "cpu")
    assert (on_cpu.defaults["eps"], on_cpu.defaults["betas"]) == (1e-6, (0.5, 0.6))


@pytest.mark.gpu
def test_the_fused_form_equals_the_plain_one_on_the_device():
    optimizer, ours = two_groups(settings_of(), "cuda")
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    reference = plain("adamw", theirs)
    for step in range(5):
        with_gradients(ours, step)
        with_gradients(theirs, step)
        optimizer.step()
        reference.step()
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)
