"""One measurement of `gristmill bench objectives` that wants a process of its own: a whole training step, or its parts.

    python -m gristmill.ops.bench.steps WHAT SETTINGS

WHAT: "plain" (plain_step.py), "plain autocast", "ours fp32", "ours autocast", "ours bf16", each of ours with ", recompute" or
", compiled", "backbones fp32", "backbones bf16" (timm's, one pass a crop size, student forward and backward, teacher
forward), "products". SETTINGS is JSON: overrides (of the recipe mugs-vits16-100), steps, threads, device ("cpu", "cuda").
The last line printed is JSON. Memory (meter.py) is that of weights, moments, memories, activations and scratch.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import DeviceType  # pyright: ignore[reportPrivateImportUsage]
from torch.nn.functional import linear
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from ...models import compile_blocks
from ...models.products import COUNTED, of_weight, product
from ...models.teacher import make_teacher
from ...objectives import Outcome
from ..engine import Engine
from ..guard import Guard
from ..heap import keep_heap
from ..inputs import Inputs, Origin
from ..launch import join, leave, quiet_deepspeed
from ..networks import build_mixture, build_student
from ..recipe import Recipe, load_recipe
from ..schedule import cosine
from .meter import held, lasted, peak, timed
from .plain_step import PlainStep, backbone_tokens, plain_backbone

RECIPE = "mugs-vits16-100"
# What a step is made of, by the names of torch's operators; the first that fits counts.
KINDS = {
    "matrix products": ("mm", "bmm", "addmm", "addbmm", "conv", "linear"),
    "attention": ("scaled_dot_product", "_softmax"),
    "GELU": ("gelu",),
    "norms": ("layer_norm", "vector_norm", "weight_norm"),
    "optimizer and EMA": ("adam", "lerp", "addcdiv", "sqrt"),
    "copies": ("copy_", "cat", "index", "clone", "fill_", "zero", "stack", "contiguous"),
}


def recipe_of(settings: dict[str, Any], *more: str) -> Recipe:
    fixed = [
        "data=none",
        "batch=4",
        "images=4096",
        "checkpoint.every=4096",
        "checkpoint.keep_every=4096",
        "probes.at=[]",
    ]
    return load_recipe(
        settings.get("recipe", RECIPE),
        [*fixed, "optimizer.freeze_last_layer=0", *settings["overrides"], *more],
        settings.get("tiny", False),
    )


IMAGES = 1 << 16  # of the data set that an objective may believe in


class OurStep:
    """The loop's step (ops/train.py) on random crops, without data, log and checkpoint."""

    def __init__(self, recipe: Recipe, device: str = "cpu"):
        self.recipe, self.inputs, self.position = recipe, Inputs(recipe, 0, 1, device), 0
        if device == "cpu":
            keep_heap(not recipe.engine.recompute)
        student = build_student(recipe).to(device)
        student.backbone.recompute = recipe.engine.recompute
        self.depth = len(student.backbone.blocks)
        teacher = make_teacher(student)
        if recipe.engine.compile:
            for network in (student, teacher):
                compile_blocks(network.backbone, recipe.engine.compile)  # pyright: ignore[reportArgumentType]
        self.mixture = build_mixture(recipe, student, device, images=IMAGES)
        self.engine = Engine(student, teacher, recipe)
        self.guard = Guard(recipe.guard)
        # Every crop the whole of a picture of its own size: what objectives ask for, and as good as any.
        whole = torch.eye(3)[:2]
        cut = {view.name: whole.expand(recipe.batch, view.count, 2, 3) for view in recipe.views}
        self.origin = Origin(torch.arange(recipe.batch), cut)

    def run(self, teacher_crops: list[Tensor], student_crops: list[Tensor]) -> dict[str, float]:
        """One step; losses by name."""
        engine, mixture, progress = self.engine, self.mixture, self.position / self.recipe.images
        info = self.inputs.info(self.position, progress, 0, self.origin, IMAGES)
        targets = engine.teacher(teacher_crops, mixture.teacher_context()) if mixture.needs_teacher else {}
        aims = mixture.aims(targets, info)
        context = mixture.context() | aims | self.inputs.draws(self.position, 0, self.depth)
        outcome = mixture.loss(engine(student_crops, context), targets | aims, info)
        engine.backward(outcome.loss)
        engine.set_rates(progress, self.recipe.batch / self.recipe.images)
        verdict = self.guard.judge([outcome], engine.squares(), partial=False)
        if verdict.bad or not engine.step(verdict.norms):
            raise RuntimeError(f"the step that is measured was not taken: {verdict.bad}")
        engine.teacher.update(cosine(*self.recipe.teacher.momentum, progress))
        mixture.commit(Outcome(outcome.loss.detach(), {}, outcome.commit))
        self.position += self.recipe.batch
        return {name: float(outcome.logs[f"loss/{name}"]) for name in mixture.objectives}


def crops_of(recipe: Recipe, device: str = "cpu") -> tuple[list[Tensor], list[Tensor]]:
    """Noise in the sizes of the recipe: the teacher's crops and the student's, a tensor a size."""
    inputs, generator = Inputs(recipe, 0, 1, device), torch.Generator().manual_seed(0)
    views = {
        view.name: torch.randn(recipe.batch, view.count, 3, view.size, view.size, generator=generator)
        for view in recipe.views
    }
    return inputs.crops(views, inputs.teacher, 0), inputs.crops(views, inputs.student, 0)


def plain_of(recipe: Recipe) -> PlainStep:
    wanted = recipe.objectives
    assert wanted.instance is not None
    assert wanted.local_group is not None
    return PlainStep(recipe.student, batch=recipe.batch, queue=wanted.instance.queue, memory=wanted.local_group.memory)


def mixed(device: str, bf16: bool) -> AbstractContextManager:
    return torch.autocast(device, dtype=torch.bfloat16, enabled=bf16)


def plainly(recipe: Recipe, device: str, bf16: bool) -> Callable[[list[Tensor], list[Tensor]], object]:
    """The plain step with all its parts on the device; bf16: under autocast, as the official code runs on GPUs (there in fp16)."""
    with torch.device(device):
        step = plain_of(recipe)
    step.mixed = lambda: mixed(device, bf16)
    return step.run


def backbones_of(recipe: Recipe, device: str, bf16: bool) -> Callable[[list[Tensor], list[Tensor]], object]:
    """timm's backbone alone with its fused attention: the passes that every such step consists of."""
    student, teacher = (plain_backbone(recipe.student, 0.0, fused=True).to(device) for _ in range(2))

    def run(teacher_crops: list[Tensor], student_crops: list[Tensor]) -> None:
        student.zero_grad()
        with mixed(device, bf16):
            with torch.no_grad():
                for x in teacher_crops:
                    backbone_tokens(teacher, x)
            out = [backbone_tokens(student, x) for x in student_crops]
        torch.stack([x.float().square().mean() for x in out]).sum().backward()

    return run


def shares_of(run: Callable[[], object], device: str) -> dict[str, float]:
    """Of the time inside operators (on a GPU, of the kernels that they start), by kind."""
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]) as recorded:
        lasted(run, device)
    spent = dict.fromkeys([*KINDS, "the rest"], 0.0)
    for event in recorded.key_averages():
        name = event.key.removeprefix("aten::")
        kind = next((kind for kind, marks in KINDS.items() if any(mark in name for mark in marks)), "the rest")
        if device != "cuda":
            spent[kind] += event.self_cpu_time_total
        elif event.device_type == DeviceType.CPU:  # kernels have events of their own beside those that started them
            spent[kind] += event.self_device_time_total
    total = sum(spent.values())
    return {kind: value / total for kind, value in spent.items()}


def product_rates(recipe: Recipe, seconds: float = 1.0, device: str = "cpu") -> dict[str, float]:
    """GFLOP/s (a multiply-add counts as two) at the sizes of a ViT block's layers over one size of crops, forward and backward.

    "fp32" and "bf16" by torch's own products, "ours fp32" by those of models/products.py.
    """
    dim, rows = build_student(recipe).backbone.embed_dim, recipe.batch * 2 * 197
    found = {}
    for name, dtype in (("fp32", torch.float32), ("ours fp32", torch.float32), ("bf16", torch.bfloat16)):
        own, spent, work = name.startswith("ours"), 0.0, 0.0
        for inner, outer in ((dim, 4 * dim), (4 * dim, dim), (dim, 3 * dim)):
            x, y, w = (torch.randn(*s, device=device).to(dtype) for s in ((rows, inner), (rows, outer), (outer, inner)))
            forms = (lambda x=x, w=w: linear(x, w), lambda y=y, w=w: y @ w, lambda x=x, y=y: y.t() @ x)
            ours = (
                lambda x=x, w=w: product(x, w),
                lambda y=y, w=w: product(y, w.t()),
                lambda x=x, y=y: of_weight(y, x),
            )
            for form in ours if own else forms:
                least, begin = float("inf"), time.perf_counter()
                form()
                while least == float("inf") or time.perf_counter() - begin < seconds / 9:
                    least = min(least, lasted(form, device)[0])
                spent, work = spent + least, work + 2.0 * rows * inner * outer
        found[name] = work / spent / 1e9
    return found


def measure(what: str, settings: dict[str, Any]) -> dict[str, Any]:
    device = settings.get("device", "cpu")
    bf16 = "bf16" in what or "autocast" in what
    precision = {"ours autocast": "autocast", "ours bf16": "bf16"}.get(what.split(",")[0], "fp32")
    more = ["engine.compile=inductor"] if "compiled" in what else []
    recompute = str("recompute" in what).lower()
    recipe = recipe_of(settings, f"precision={precision}", f"engine.recompute={recompute}", *more)
    if what == "products":
        return product_rates(recipe, settings.get("seconds", 1.0), device)
    if what.startswith("ours"):
        quiet_deepspeed()
        join()
    before = held(device)
    if what.startswith("plain"):
        step = plainly(recipe, device, bf16)
    else:
        step = OurStep(recipe, device).run if what.startswith("ours") else backbones_of(recipe, device, bf16)
    crops = crops_of(recipe, device)
    found: dict[str, Any] = timed(lambda: step(*crops), settings["steps"], device)
    found |= {"memory_MB": peak(device) - before, "process_MB": peak("cpu")}
    if settings.get("profile", True):
        found["shares"] = shares_of(lambda: step(*crops), device)
        with FlopCounterMode(display=False, custom_mapping=COUNTED) as counter:
            step(*crops)
        found["GFLOP"] = counter.get_total_flops() / 1e9
    if what.startswith("ours"):
        del step
        leave()
    return found


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    given = json.loads(sys.argv[2])
    torch.set_num_threads(given["threads"])
    torch.set_flush_denormal(True)
    torch.manual_seed(0)
    sys.stdout.write(f"\n{json.dumps(measure(sys.argv[1], given))}\n")
