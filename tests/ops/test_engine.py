"""The engine's step equals a plain loop's; a bad step leaves no trace; frozen prototypes get neither step nor moments."""

import copy

import pytest
import torch
from gristmill.objectives import Outcome
from gristmill.ops.engine import Engine, parameter_groups
from gristmill.ops.guard import LIMIT, DivergedError, Guard
from gristmill.ops.launch import join
from gristmill.ops.recipe import Recipe, load_recipe
from gristmill.ops.schedule import cosine, warmup_cosine
from torch import nn


class Toy(nn.Module):
    """A module with the names that decide on parameter groups."""

    def __init__(self):
        super().__init__()
        self.patch_embed = nn.Linear(6, 5)
        self.norm = nn.LayerNorm(5)
        self.last_layer = nn.Linear(5, 4, bias=False)

    def forward(self, views, context):
        return {"y": self.last_layer(self.norm(self.patch_embed(views[0])) * context["scale"])}


@pytest.fixture(scope="module", autouse=True)
def _group():
    join()  # left at exit: other tests of this process use the group, too


@pytest.fixture
def recipe() -> Recipe:
    return load_recipe("demo", ["batch=8", "images=160", "optimizer.clip=0.05", "optimizer.freeze_last_layer=0.15"])


def toy() -> Toy:
    torch.manual_seed(0)
    return Toy()


def loss_of(out: dict[str, torch.Tensor], bad: bool = False) -> torch.Tensor:
    return out["y"].pow(2).mean() * (float("nan") if bad else 1.0)


def run(recipe: Recipe, bad_steps: set[int]) -> tuple[Toy, Engine]:
    model = toy()
    engine, guard = Engine(model, recipe, 1), Guard()
    for step in range(20):
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
        loss = loss_of(engine([x], {"scale": torch.tensor(2.0)}), step in bad_steps)
        engine.backward(loss)
        engine.set_rates(step / 20, 1 / 20)
        verdict = guard.judge(Outcome(loss), [g for _, g in engine.gradients()], False)
        assert bool(verdict.bad) == (step in bad_steps)
        if verdict.bad:
            assert verdict.bad == ["loss", "gradient", "memory"]
            engine.skip()
        else:
            engine.clip(verdict.norms)
            engine.freeze_last_layer(step / 20)
            assert engine.step()
    return model, engine


def plain(recipe: Recipe, bad_steps: set[int]) -> Toy:
    """The official order of events, written out."""
    model, config = toy(), recipe.optimizer
    groups = parameter_groups(model, config)
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=config.betas, foreach=False)
    for step in range(20):
        if step in bad_steps:
            continue
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
        loss_of(model([x], {"scale": torch.tensor(2.0)})).backward()
        for parameter in model.parameters():
            assert parameter.grad is not None
            norm = parameter.grad.norm(2)
            if (coefficient := config.clip / (norm + 1e-6)) < 1:
                parameter.grad.mul_(coefficient)
        if step / 20 < config.freeze_last_layer:
            model.last_layer.weight.grad = None
        for group in optimizer.param_groups:
            peak = config.lr * recipe.batch / 256
            group["lr"] = group["lr_scale"] * warmup_cosine(peak, config.min_lr, config.warmup, step / 20, 1 / 20)
            group["weight_decay"] = cosine(*config.weight_decay, step / 20) if group["decays"] else 0.0
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.mark.parametrize("bad_steps", [set(), {0}, {7}, {3, 4, 19}])
def test_equals_the_plain_loop_that_never_saw_the_bad_steps(recipe: Recipe, bad_steps: set[int]):
    model, _ = run(recipe, bad_steps)
    for (name, ours), theirs in zip(model.named_parameters(), plain(recipe, bad_steps).parameters(), strict=True):
        assert torch.isfinite(ours).all(), name
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)


def test_groups():
    groups = parameter_groups(Toy(), load_recipe("demo", ["optimizer.patch_embed_scale=0.2"]).optimizer)
    named = {(group["lr_scale"], group["decays"]): len(group["params"]) for group in groups}
    assert named == {(0.2, True): 1, (0.2, False): 1, (1.0, False): 2, (1.0, True): 1}


def test_frozen_prototypes_have_no_moments(recipe: Recipe):
    model = toy()
    before = copy.deepcopy(model.last_layer.weight)
    engine = Engine(model, recipe, 1)
    engine.backward(loss_of(engine([torch.ones(8, 6)], {"scale": torch.tensor(1.0)})))
    engine.set_rates(0.1, 0.05)
    engine.freeze_last_layer(0.1)
    engine.step()
    assert torch.equal(model.last_layer.weight, before)
    assert not any(name.startswith("last_layer") for name in engine.optimizer_state())
    assert any(name.startswith("norm.weight") for name in engine.optimizer_state())


def test_optimizer_state_round_trip(recipe: Recipe):
    _, engine = run(recipe, set())
    fresh = Engine(toy(), recipe, 1)
    fresh.load_optimizer_state(engine.optimizer_state())
    ours, theirs = fresh.optimizer_state(), engine.optimizer_state()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_too_many_bad_steps_in_a_row_stop_the_run():
    guard = Guard()
    verdict = guard.judge(Outcome(torch.tensor(float("inf"))), [torch.ones(3)], False)
    for _ in range(LIMIT - 1):
        guard.count(verdict, 640, ["a", "b"])
    with pytest.raises(DivergedError, match=r"10 steps in a row.*image 640.*a, b"):
        guard.count(verdict, 640, ["a", "b"])
