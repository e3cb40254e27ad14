"""Clip and LARS: on shards equal to whole tensors, one at a time; late and global clips; trust ratios by hand."""

import itertools
import math
from typing import Any

import pytest
import torch
from gristmill.ops.optimizers import (
    LarsReference,
    clip_reference,
    clip_scales,
    lars_scales,
    make_optimizer,
    parameter_groups,
)
from gristmill.ops.recipe import load_recipe
from gristmill.ops.segments import Segment, Segments, Shard
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from .test_optimizers import settings_of

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
            parts, scales = self.table.spread(values, [key])
            if parts:  # a rank may hold none of a small group, and foreach refuses an empty list
                torch._foreach_mul_(parts, scales)  # pyright: ignore[reportPrivateImportUsage]


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


def test_what_is_not_clipped_is_not_touched():
    """A CPU reads no gradient to multiply it by 1; numbers of the step before are not taken for this one's."""
    shard = Shard(nn.Parameter(torch.ones(10)), {}, [Segment("w0", 0, 4, 0), Segment("w1", 0, 6, 4)])
    shard.key.grad = torch.ones(10)
    table = Segments([shard], {"w0": torch.Size((2, 2)), "w1": torch.Size((3, 2))}, replicated=False)
    for factors, wanted in (([1.0, 0.5], {6: 0.5}), ([1.0, 1.0], {}), ([0.25, 1.0], {4: 0.25})):
        parts, scales = table.spread(torch.tensor(factors, dtype=torch.float64), [shard.key])
        assert dict(zip(map(len, parts), scales, strict=True)) == wanted


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
