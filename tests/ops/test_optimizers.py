"""Groups partition the student; a held group is untouched; clip and LARS on shards equal whole tensors, one at a time."""

import copy
import itertools
import math
from typing import Any

import pytest
import torch
from gristmill.models.student import Student, StudentConfig
from gristmill.models.teacher import make_teacher
from gristmill.ops.optimizers import (
    LarsReference,
    OptimizerConfig,
    OptimizerError,
    Stepper,
    clip_reference,
    clip_scales,
    lars_scales,
    layer_of,
    make_optimizer,
    parameter_groups,
)
from gristmill.ops.recipe import load_recipe
from gristmill.ops.segments import Segment, Segments, Shard
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor, nn

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
    assert make_optimizer([{"params": [nn.Parameter(torch.ones(1))]}], settings_of(), "cuda").defaults["fused"]
    on_cpu = make_optimizer([{"params": [nn.Parameter(torch.ones(1))]}], settings_of(eps=1e-6, betas=(0.5, 0.6)), "cpu")
    assert on_cpu.defaults["foreach"]
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


lengths = st.lists(st.floats(0, 1e4), min_size=1, max_size=6)


@given(lengths, st.sampled_from(["tensor", "global"]), st.sampled_from([0.0, 0.3, 3.0]))
def test_clip_scales_equal_the_plain_clip(lengths: list[float], by: str, clip: float):
    config = settings_of(clip=clip, clip_by=by)
    gradients = [torch.full((2, 2), length, dtype=torch.float64) for length in lengths]
    norms = torch.stack([g.norm() for g in gradients])
    ours = [g * scale for g, scale in zip(gradients, clip_scales(norms, config), strict=True)]
    clip_reference(gradients, config)
    torch.testing.assert_close(ours, gradients, rtol=1e-12, atol=0)


def test_the_clip_of_mugs_vit_large_falls_to_a_tenth_after_101_epochs():
    config = load_recipe("mugs-vitl16-250").optimizer
    assert [config.clip_at(epoch / 250) for epoch in (0, 100, 101, 249)] == [3.0, 3.0, 0.3, 0.3]
    norms = torch.tensor([0.15, 1.5, 6.0])
    torch.testing.assert_close(clip_scales(norms, config, 0.4), torch.tensor([1.0, 1.0, 0.5]))
    torch.testing.assert_close(clip_scales(norms, config, 0.5), torch.tensor([1.0, 0.2, 0.05]))
    with pytest.raises(ValueError, match="clip_late"):
        settings_of(clip=0, clip_late=(0.4, 0.3))


def test_the_global_clip_is_torchs():
    parameters = [nn.Parameter(torch.zeros(n)) for n in (3, 4)]
    for p in parameters:
        p.grad = torch.arange(1.0, p.numel() + 1)
    gradients = [p.grad.clone() for p in parameters if p.grad is not None]
    scales = clip_scales(torch.stack([g.norm() for g in gradients]), settings_of(clip=1.0, clip_by="global"))
    nn.utils.clip_grad_norm_(parameters, 1.0)
    for p, g, scale in zip(parameters, gradients, scales, strict=True):
        torch.testing.assert_close(p.grad, g * scale)


def test_trust_ratio_by_hand():
    config = settings_of(name="lars", trust=0.1)
    weights, updates = torch.tensor([2.0, 0.0, 2.0, 2.0]), torch.tensor([4.0, 4.0, 0.0, 4.0])
    excluded = torch.tensor([False, False, False, True])
    assert torch.equal(lars_scales(weights, updates, config, excluded), torch.tensor([0.05, 1.0, 1.0, 1.0]))


@st.composite
def nets(draw: st.DrawFn) -> tuple[list[tuple[int, ...]], list[list[float]]]:
    """Shapes of one to five tensors, and for each of two groups where its flat tensor is cut (fractions)."""
    shapes = draw(st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple), min_size=1, max_size=5))
    cuts = st.lists(st.floats(0, 1), max_size=3).map(sorted)
    return shapes, [draw(cuts), draw(cuts)]


def cut(group: dict[str, Any], where: list[float]) -> list[tuple[Tensor, list[Segment]]]:
    """The group's parameters laid end to end and cut: on each rank a flat tensor and its segments (both may be empty)."""
    whole = torch.cat([p.detach().reshape(-1) for p in group["params"]])
    edges = [0, *(round(fraction * len(whole)) for fraction in where), len(whole)]
    ranks = []
    for low, high in itertools.pairwise(edges):
        segments, begin = [], 0
        for name, p in zip(group["names"], group["params"], strict=True):
            start, stop = max(low - begin, 0), min(high - begin, p.numel())
            if start < stop:
                segments.append(Segment(name, start, stop, begin + start - low))
            begin += p.numel()
        ranks.append((whole[low:high].clone(), segments))
    return ranks


class Rank:
    """One process' optimizer on its shards of both groups, with clip and LARS in the transform as the engine has them."""

    def __init__(self, groups: list[dict[str, Any]], shards: list[tuple[Tensor, list[Segment]]], config, shapes):
        own = [{**g, "params": [nn.Parameter(flat)]} for g, (flat, _) in zip(groups, shards, strict=True)]
        self.optimizer = make_optimizer(own, config, "cpu")
        table = [
            Shard(group["params"][0], group, segments)
            for group, (_, segments) in zip(self.optimizer.param_groups, shards, strict=True)
        ]
        self.table, self.config = Segments(table, shapes, replicated=False), config
        for group in self.optimizer.param_groups:
            group.update(lr=0.1 * group["lr_scale"], held=False)
        self.optimizer.transform = self.transform

    def receive(self, gradients: dict[str, Tensor]) -> Tensor:
        for shard in self.table.shards:
            shard.key.grad = torch.zeros_like(shard.key)
            for segment in shard.segments:
                segment.of(shard.key.grad).copy_(gradients[segment.name].view(-1)[segment.start : segment.stop])
        return self.table.squares(self.gradients())

    def gradients(self) -> list[Tensor]:
        return self.table.views(lambda shard: shard.key.grad.view(-1))  # pyright: ignore[reportOptionalMemberAccess]

    def norms(self, clip: Tensor, decay: float) -> Tensor:
        """[2, P] squares of this rank's part of the weights and of the updates."""
        self.clip, self.decay = clip, decay
        weights = self.table.views()
        scales = clip[self.table.index]
        updates = [g * s + decay * w for g, s, w in zip(self.gradients(), scales, weights, strict=True)]
        return torch.stack([self.table.squares(weights), self.table.squares(updates)])

    def transform(self, group: dict[str, Any]) -> None:
        (key,) = group["params"]
        for values in (self.clip, self.trust):
            if values is self.trust and group["decays"]:
                key.grad.add_(key, alpha=self.decay)
            segments, scales = self.table.spread(values, key)
            if segments:  # a rank may hold none of a small group, and foreach refuses an empty list
                torch._foreach_mul_([s.of(key.grad) for s in segments], scales)  # pyright: ignore[reportPrivateImportUsage]


@settings(max_examples=60, deadline=None)
@given(nets(), st.integers(0, 2**31), st.sampled_from([0.0, 0.5]), st.booleans())
def test_lars_on_shards_equals_lars_on_tensors(net, seed: int, clip: float, zero_first: bool):
    shapes, cuts = net
    generator = torch.Generator().manual_seed(seed)
    model = nn.ParameterDict({f"w{i}": torch.randn(s, generator=generator) for i, s in enumerate(shapes)})
    if zero_first:  # ||p|| = 0 has its own branch
        nn.init.zeros_(model["w0"])
    config = settings_of(name="lars", trust=0.02, momentum=0.8, clip=clip)
    groups = parameter_groups(model, config)
    sizes = {name: p.shape for name, p in model.named_parameters()}
    decays = {name: group["decays"] for group in groups for name in group["names"]}
    excluded = torch.tensor([not decays[name] for name in sizes])
    # Both groups are cut into the same number of ranks.
    count = max(len(where) for where in cuts)
    parts = [cut(g, where + [1.0] * (count - len(where))) for g, where in zip(groups, cuts, strict=False)]
    ranks = [Rank(groups, [part[i] for part in parts], config, sizes) for i in range(count + 1)]
    reference = LarsReference([{**g, "lr": 0.1 * g["lr_scale"]} for g in groups], 0.1, 0.05, config.momentum, 0.02)
    for _ in range(4):
        gradients = {name: torch.randn(shape, generator=generator) for name, shape in sizes.items()}
        norms = torch.stack([rank.receive(gradients) for rank in ranks]).sum(0).sqrt()
        scales = clip_scales(norms, config)
        sums = torch.stack([rank.norms(scales, 0.05) for rank in ranks]).sum(0).sqrt()
        trust = lars_scales(sums[0], sums[1], config, excluded)
        for rank in ranks:
            rank.trust = trust
            rank.optimizer.step()
        clip_reference(list(gradients.values()), config)
        for name, p in model.named_parameters():
            p.grad = gradients[name]
        reference.step()
    for rank in ranks:
        for shard, segment in rank.table:
            whole = model[segment.name].detach().view(-1)[segment.start : segment.stop]
            torch.testing.assert_close(segment.of(shard.flat), whole, rtol=2e-5, atol=2e-6)


def test_lars_reference_on_one_number():
    """Two steps by hand: |p| = 2, g = 1, wd = .5, trust .1, momentum .5, rate 1."""
    p = nn.Parameter(torch.tensor([[2.0]]))
    optimizer = LarsReference([p], lr=1.0, weight_decay=0.5, momentum=0.5, trust=0.1)
    p.grad = torch.tensor([[1.0]])
    optimizer.step()
    assert p.item() == pytest.approx(2.0 - 0.2)  # u = 2, q = .1 * 2 / 2, mu = q u = .2
    optimizer.step()
    assert p.item() == pytest.approx(1.8 - (0.5 * 0.2 + 0.1 * 1.8))
    assert math.isfinite(p.item())
