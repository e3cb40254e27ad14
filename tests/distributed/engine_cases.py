"""Run by zygote.py (see test_engine.py): every ZeRO stage against a plain loop, one engine after another.

Writes what it found to the folder given, one JSON object a case: how far weights, teacher and its forward are from the
reference. The reference is one process's worth of plain torch on the whole batch, computed on every rank.
"""

import copy
import itertools
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from gristmill.models import products
from gristmill.models.products import by_onednn
from gristmill.objectives import Outcome
from gristmill.ops.engine import Engine
from gristmill.ops.guard import Guard
from gristmill.ops.launch import join, leave
from gristmill.ops.optimizers import LarsReference, clip_reference, parameter_groups
from gristmill.ops.recipe import Recipe, load_recipe
from gristmill.ops.schedule import cosine, warmup_cosine
from torch import nn

STEPS, BATCH, MOMENTUM = 6, 12, 0.9
BAD = {2: 0, 4: -1}  # step -> rank whose loss is NaN there; -1 the last
STATISTICS = [1.0 + 2.0**-12, 3.0]  # a float buffer that bf16 would round


class Toy(nn.Module):
    """Odd sizes, so that shards end inside parameters; names that decide on groups; a predictor that no teacher has."""

    seen: torch.Tensor
    heads: Any
    backbone: Any

    def __init__(self):
        super().__init__()
        self.backbone = nn.ModuleDict({"patch_embed": nn.Linear(7, 13), "blocks": nn.ModuleList([nn.Linear(13, 13)])})
        self.norm = nn.LayerNorm(13)
        self.heads = nn.ModuleDict({"instance": Head(), "group": Prototypes()})
        self.register_buffer("seen", torch.tensor(STATISTICS))

    def forward(self, views, context):
        x = self.backbone["patch_embed"](views[0])
        x = self.norm(x + torch.tanh(self.backbone["blocks"][0](x)))
        return {"instance": self.heads["instance"](x).float(), "group": self.heads["group"](x).float()}


class Head(nn.Module):
    predictor: nn.Module | None

    def __init__(self):
        super().__init__()
        self.projector = nn.Linear(13, 11)
        self.predictor = nn.Linear(11, 11)

    def forward(self, x):
        x = self.projector(x)
        return x if self.predictor is None else self.predictor(x)


class Prototypes(nn.Module):
    def __init__(self):
        super().__init__()
        self.last_layer = nn.Linear(13, 301, bias=False)

    def forward(self, x):
        return self.last_layer(x)


def networks() -> tuple[Toy, Toy]:
    torch.manual_seed(0)
    student = Toy()
    teacher = copy.deepcopy(student).requires_grad_(False).eval()
    teacher.heads["instance"].predictor = None
    return student, teacher


def data(step: int) -> torch.Tensor:
    return torch.randn(BATCH, 7, generator=torch.Generator().manual_seed(step))


def loss_of(out: dict[str, torch.Tensor]) -> torch.Tensor:
    return out["instance"].pow(2).mean() + torch.logsumexp(out["group"], 1).mean()


def recipe_of(stage: int, precision: str, *more: str) -> Recipe:
    return load_recipe("demo", [
        f"batch={BATCH}", f"images={BATCH * STEPS}", f"precision={precision}", f"engine.zero={stage}", "optimizer.lr=0.5",
        "optimizer.clip=0.3", "optimizer.freeze_last_layer=0.34", "optimizer.patch_embed_scale=0.5", *more,
    ])  # fmt: skip


def ours(recipe: Recipe, rank: int, world: int) -> dict[str, float]:
    """Train, and compare the teacher with a plain EMA of the masters as they really were."""
    student, teacher = networks()
    for network in student, teacher:
        by_onednn(network)
    engine = Engine(student, teacher, recipe, rank, world)
    guard = Guard(recipe.guard, rank, world)
    masters = lambda: {n: t.clone() for n, t in engine.layout.whole([s.flat for s in engine.segments.shards])}  # noqa: E731
    shadows = lambda: {n: t.clone() for n, t in engine.layout.whole(engine.teacher.shadows)}  # noqa: E731
    average = {
        n: t.clone() for n, t in masters().items() if n in dict(teacher.named_parameters()) or ".predictor" not in n
    }
    size, parts = BATCH // world, recipe.engine.accumulate
    micro, probe = size // parts, data(99)
    found = {"frozen": 0.0, "ema": 0.0, "forward": 0.0, "culprit": 0.0, "moved_frozen": 0.0}
    first = masters()["heads.group.last_layer.weight"]
    before = engine.teacher([probe], {})["instance"].clone()
    plain = copy.deepcopy(networks()[1])
    for step in range(STEPS):
        outcomes = []
        for part in range(parts):
            x = data(step)[rank * size + part * micro :][:micro]
            loss = loss_of(engine([x], {}, part == parts - 1))
            if step in BAD and rank == BAD[step] % world:
                loss = loss * float("nan")
            engine.backward(loss)
            outcomes.append(Outcome(loss, {"loss/instance": loss.detach(), "loss": loss.detach()}, {}))
        engine.set_rates(step / STEPS, 1 / STEPS)
        verdict = guard.judge(outcomes, engine.squares(), partial=not engine.segments.replicated)
        if step in BAD:
            found["culprit"] += float(
                (BAD[step] % world, "instance") not in verdict.culprits or "gradient" not in verdict.bad
            )
            engine.skip()
            continue
        assert not verdict.bad, (step, verdict)
        assert engine.step(verdict.norms)
        now = masters()
        if step / STEPS < recipe.optimizer.freeze_last_layer:
            found["moved_frozen"] = max(found["moved_frozen"], gap(now["heads.group.last_layer.weight"], first))
        engine.teacher.update(MOMENTUM)
        for name, value in average.items():
            value.lerp_(now[name], 1 - MOMENTUM)
        # No gather between update and forward: a teacher whose small parameters stayed as they were shows here.
        after = engine.teacher([probe], {})["instance"].clone()
        found["frozen"] += float(torch.equal(after, before))
        before = after
        found["ema"] = max(found["ema"], *(gap(value, average[name]) for name, value in shadows().items()))
        plain.load_state_dict(average, strict=False)
        with torch.no_grad():
            low = copy.deepcopy(plain).to(torch.bfloat16 if recipe.precision == "bf16" else torch.float32)
            with engine.autocast():
                found["forward"] = max(found["forward"], gap(after, low([probe], {})["instance"]))
    found["shadow_dtype"] = float(any(s is not None and s.dtype != torch.float32 for s in engine.teacher.shadows))
    found["buffer"] = gap(engine.module.get_buffer("seen").float(), torch.tensor(STATISTICS)) + float(
        engine.module.get_buffer("seen").dtype != torch.float32
    )
    found["held"] = (
        float("heads.group.last_layer.weight" not in engine.steps()) if recipe.optimizer.name == "adamw" else 0.0
    )
    reference = reference_of(recipe, world * parts)
    found["weights"] = max(gap(value, reference[name]) for name, value in masters().items())
    found["moved"] = max(gap(value, dict(networks()[0].named_parameters())[name]) for name, value in masters().items())
    total = lambda gaps: sum(float(g.detach().abs().sum()) for g in gaps)  # noqa: E731
    start = dict(networks()[0].named_parameters())
    found["drift"] = total(v - reference[n] for n, v in masters().items()) / total(
        v - start[n] for n, v in masters().items()
    )
    owned = torch.zeros(sum(s.numel() for s in engine.segments.shapes.values()))
    places, begin = {}, 0
    for name, shape in engine.segments.shapes.items():
        places[name], begin = begin, begin + shape.numel()
    for part in engine.parts():
        if part.group == "student":
            owned[places[part.name] + part.start :][: part.tensor.numel()] += 1
    dist.all_reduce(owned)
    found["covered"] = float((owned != 1).sum())
    engine.close()
    return found


def reference_of(recipe: Recipe, chunks: int) -> dict[str, torch.Tensor]:
    """The official order of events, written out; bad steps never happened. In bf16 a batch and its chunks round apart,
    so it sees the chunks that the ranks see."""
    model, config = networks()[0], recipe.optimizer
    low = copy.deepcopy(model).bfloat16() if recipe.precision == "bf16" else model
    groups = parameter_groups(model, config)
    for group in groups:
        group["lars"] = group["decays"]
    if config.name == "adamw":
        optimizer = torch.optim.AdamW(groups, lr=0.0, betas=config.betas, foreach=False)
    elif config.name == "sgd":
        optimizer = torch.optim.SGD(groups, lr=0.0, momentum=config.momentum)
    else:
        optimizer = LarsReference(groups, lr=0.0, weight_decay=0.0, momentum=config.momentum, trust=config.trust)
    for step in range(STEPS):
        if step in BAD:
            continue
        sums = [torch.zeros_like(p) for p in model.parameters()]
        for chunk in data(step).chunk(chunks):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=recipe.precision != "fp32"):
                out = low([chunk], {})
            (loss_of(out) / recipe.engine.accumulate).backward()
            for total, p in zip(sums, low.parameters(), strict=True):
                assert p.grad is not None
                total += p.grad.float() / (chunks // recipe.engine.accumulate)
                p.grad = None
        gradients = sums
        for p, total in zip(model.parameters(), sums, strict=True):
            p.grad = total
        clip_reference(gradients, config)
        if step / STEPS < config.freeze_last_layer:
            model.heads["group"].last_layer.weight.grad = None
        for group in optimizer.param_groups:
            peak = config.lr * recipe.batch / 256
            group["lr"] = group["lr_scale"] * warmup_cosine(peak, config.min_lr, config.warmup, step / STEPS, 1 / STEPS)
            group["weight_decay"] = cosine(*config.weight_decay, step / STEPS) if group["decays"] else 0.0
        optimizer.step()
        optimizer.zero_grad()
        if low is not model:
            low.load_state_dict(model.state_dict())
    return {name: p.detach() for name, p in model.named_parameters()}


def gap(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).detach().abs().max())


BASIC = [case for case in itertools.product(range(4), ["fp32", "autocast", "bf16"], [()]) if case[:2] != (0, "bf16")]
MORE = [
    # Without ZeRO, DeepSpeed rounds averaged gradients to bf16; AdamW would blow that up where they are next to nothing.
    (0, "bf16", ("optimizer.name=sgd",)),
    *((stage, "fp32", ("optimizer.name=lars", "optimizer.trust=0.02", "optimizer.clip=0")) for stage in range(4)),
    *((stage, "fp32", ("optimizer.name=sgd", "optimizer.clip_by=global")) for stage in range(4)),
    *((stage, "fp32", ("engine.accumulate=2", "optimizer.layer_decay=0.7")) for stage in range(4)),
    *((stage, "bf16", ("engine.accumulate=2",)) for stage in range(1, 4)),
]


def main() -> None:
    rank, world, _ = join()
    products.LEAST, products.better_here = 0, lambda: True  # products as small as these, and whoever made the processor
    for stage, precision, more in BASIC + MORE if world == 2 else BASIC:
        start = time.perf_counter()
        found = ours(recipe_of(stage, precision, *more), rank, world)
        if rank == 0:
            line = {
                "case": f"zero{stage} {precision} {' '.join(more)}".strip(),
                **found,
                "seconds": time.perf_counter() - start,
            }
            with (Path(sys.argv[1]) / "found.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")
    leave()


if __name__ == "__main__":
    main()
