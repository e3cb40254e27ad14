"""The engine in one process: its step equals a plain loop's, held groups thaw, moments travel, its numbers are its own.

Several ranks and all stages: tests/distributed/test_engine.py.
"""

import copy
import os

import pytest
import torch
from gristmill.objectives import Outcome
from gristmill.ops.deepspeed_config import deepspeed_config
from gristmill.ops.engine import Engine, _initialize, resolve_stage
from gristmill.ops.guard import Guard
from gristmill.ops.launch import join
from gristmill.ops.optimizers import clip_reference, parameter_groups
from gristmill.ops.recipe import Recipe, RecipeError, load_recipe
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


SCALE = {"scale": torch.tensor(2.0)}


@pytest.fixture(autouse=True)
def _group():
    join()  # left at exit: other tests of this process use the group, too


@pytest.fixture
def recipe() -> Recipe:
    return load_recipe("demo", ["batch=8", "images=160", "optimizer.clip=0.05", "optimizer.freeze_last_layer=0.15"])


def toy() -> Toy:
    torch.manual_seed(0)
    return Toy()


def start(recipe: Recipe) -> Engine:
    model = toy()
    return Engine(model, copy.deepcopy(model).requires_grad_(False), recipe)


def loss_of(out: dict[str, torch.Tensor], size: float = 1.0) -> torch.Tensor:
    return out["y"].pow(2).mean() * size


def data(step: int) -> torch.Tensor:
    return torch.randn(8, 6, generator=torch.Generator().manual_seed(step))


def run(
    recipe: Recipe, bad: set[int], size: float = 1.0, until: int = 20, engine: Engine | None = None, begin: int = 0
):
    engine, guard = engine or start(recipe), Guard(recipe.guard)
    for step in range(begin, until):
        loss = loss_of(engine([data(step)], SCALE), float("nan") if step in bad else size)
        engine.backward(loss)
        engine.set_rates(step / 20, 1 / 20)
        verdict = guard.judge([Outcome(loss)], engine.squares(), partial=not engine.segments.replicated)
        assert bool(verdict.bad) == (step in bad)
        if verdict.bad:
            assert verdict.bad == ["loss", "gradient"]
            engine.skip()
        else:
            assert engine.step(verdict.norms)
            engine.teacher.update(0.9)
    return engine


def plain(recipe: Recipe, bad: set[int], size: float = 1.0) -> Toy:
    """The official order of events, written out."""
    model, config = toy(), recipe.optimizer
    optimizer = torch.optim.AdamW(parameter_groups(model, config), lr=0.0, betas=config.betas, foreach=False)
    for step in range(20):
        if step in bad:
            continue
        loss_of(model([data(step)], SCALE), size).backward()
        clip_reference([p.grad for p in model.parameters() if p.grad is not None], config, step / 20)
        if step / 20 < config.freeze_last_layer:
            model.last_layer.weight.grad = None
        for group in optimizer.param_groups:
            peak = config.lr * recipe.batch / 256
            group["lr"] = group["lr_scale"] * warmup_cosine(peak, config.min_lr, config.warmup, step / 20, 1 / 20)
            group["weight_decay"] = cosine(*config.weight_decay, step / 20) if group["decays"] else 0.0
        optimizer.step()
        optimizer.zero_grad()
    return model


def same(engine: Engine, model: nn.Module) -> None:
    for (name, ours), theirs in zip(engine.module.named_parameters(), model.parameters(), strict=True):
        assert torch.isfinite(ours).all(), name
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("bad", [set(), {0}, {7}, {3, 4, 19}])
def test_equals_the_plain_loop_that_never_saw_the_bad_steps(recipe: Recipe, bad: set[int]):
    same(run(recipe, bad), plain(recipe, bad))


@pytest.mark.parametrize("clip", [{"clip": 0}, {"clip": 0.05}, {"clip": 0.05, "clip_late": (0.4, 0.005)}])
def test_nothing_else_clips(recipe: Recipe, clip: dict):
    """DeepSpeed clips the norm of all gradients to 1 unless it is told not to; SGD would show it, AdamW hides scales."""
    recipe = recipe.model_copy(update={"optimizer": recipe.optimizer.model_copy(update={**clip, "eps": 1.0})})
    engine = start(recipe)
    engine.optimizer.defaults["eps"] = 1.0
    same(run(recipe, set(), 1e3, engine=engine), _with_eps(recipe, 1e3))


def _with_eps(recipe: Recipe, size: float) -> Toy:
    before = torch.optim.AdamW.__init__
    try:
        torch.optim.AdamW.__init__ = lambda self, *a, **k: before(self, *a, **k, eps=1.0)  # type: ignore[method-assign]
        return plain(recipe, set(), size)
    finally:
        torch.optim.AdamW.__init__ = before  # type: ignore[method-assign]


def test_frozen_prototypes_have_no_moments_and_then_thaw(recipe: Recipe):
    engine = run(recipe, set(), until=3)
    assert torch.equal(engine.module.get_parameter("last_layer.weight"), toy().last_layer.weight)
    assert {part.name for part in engine.parts() if part.group == "exp_avg"} == {
        "patch_embed.weight", "patch_embed.bias", "norm.weight", "norm.bias",
    }  # fmt: skip
    run(recipe, set(), until=5, engine=engine, begin=3)
    assert not torch.equal(engine.module.get_parameter("last_layer.weight"), toy().last_layer.weight)
    assert int(engine.steps()["last_layer.weight"]) == 2
    assert int(engine.steps()["norm.weight"]) == 5


def test_stage_is_a_static_rule(recipe: Recipe):
    assert resolve_stage(recipe, toy(), 1) == 0
    assert resolve_stage(recipe, toy(), 4) == 1
    huge = nn.Module()
    huge.weight = nn.Parameter(torch.empty(40_000, 30_000, device="meta"))
    assert resolve_stage(recipe, huge, 4) == 3
    fixed = recipe.model_copy(update={"engine": recipe.engine.model_copy(update={"zero": 2})})
    assert resolve_stage(fixed, huge, 1) == 2


def test_deepspeeds_own_configuration_is_passed_through_and_checked(recipe: Recipe):
    def given(own: dict) -> Recipe:
        return recipe.model_copy(update={"engine": recipe.engine.model_copy(update={"deepspeed": own})})

    engine = start(given({"zero_optimization": {"reduce_bucket_size": 12345}}))
    assert engine._engine.zero_reduce_bucket_size() == 12345
    with pytest.raises(Exception, match=r"gradient_clipping.*optimizer\.clip"):
        start(given({"gradient_clipping": 1.0}))


def test_zero_3_gives_torchs_linear_back(recipe: Recipe):
    linear = nn.functional.linear
    engine = start(recipe.model_copy(update={"engine": recipe.engine.model_copy(update={"zero": 3})}))
    assert nn.functional.linear is not linear
    engine.close()
    assert nn.functional.linear is linear


class Asking(nn.Module):
    """What LOCAL_RANK is where DeepSpeed's hooks would ask."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.seen: list[tuple[str, ...]] = []

    def forward(self, x):
        self.seen.append((os.environ["LOCAL_RANK"], os.environ["OMPI_COMM_WORLD_LOCAL_RANK"]))
        return x * self.weight


def test_deepspeed_sees_the_gpu_of_a_process_that_has_but_one(monkeypatch: pytest.MonkeyPatch):
    """As the fourth of a host, to whom its scheduler shows GPU 0 alone; on a CPU DeepSpeed asks, and does nothing by it."""
    for name in ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"):
        monkeypatch.setenv(name, "3")
    config = deepspeed_config({}, stage=0, precision="fp32", micro_batch=1, accumulate=1, world=1)
    model = Asking()
    engine = _initialize(torch.device("cuda", 0), model=model, config=config)
    assert engine.local_rank == 0
    assert engine(torch.ones(1)) == 1
    assert model.seen == [("0", "0")]
    assert os.environ["LOCAL_RANK"] == os.environ["OMPI_COMM_WORLD_LOCAL_RANK"] == "3"
    engine.destroy()


def test_bf16_without_zero_does_not_accumulate():
    with pytest.raises(RecipeError, match=r"engine\.zero"):
        load_recipe("demo", ["precision=bf16", "engine.zero=0", "engine.accumulate=2"])
