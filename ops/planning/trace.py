"""One micro-batch, forward and backward, on tensors without memory: what it keeps, what it needs at most, its FLOPs.

A step of the loop (ops/run.py, ops/train.py) as it is, up to its backward. Blocks of a ViT are alike, so that all that is
counted grows by the same amount with each: deep ones are traced with two and with three blocks, and carried on from there.
Images are alike, too: two micro-batches are traced (`ANCHORS`), others lie on the line through them. What does not
grow evenly is the scratch of streamed products, at most 2^25 numbers at a time. Tests tie both lines to whole traces.
"""

from __future__ import annotations

import functools
import warnings
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from ...models.host import off_host
from ...models.student import Student
from ..engine import zero_3_linear
from ..inputs import Inputs, Origin
from ..recipe import Recipe
from .hollow import IMAGES, fill, networks
from .ledger import Ledger

SHALLOW = (2, 3)  # blocks of what a deep ViT is judged by
ANCHORS = (8, 32)  # images of the micro-batches that others are judged by, in whole groups that share a forward


@dataclass(frozen=True)
class Trace:
    """Of one micro-batch on one rank. Bytes beyond what was there before it: weights, memories, the batch itself."""

    peak: float  # the most at once, without gradients of weights
    peak_with: float  # the same, with gradients that stay
    kept: float  # after the losses: what backward needs, and what is handed on to objectives
    gradients: float  # bytes of all gradients of weights, in the weights' type
    sizes: dict[int, float] = field(default_factory=dict)  # of `kept`, by pixels of the crops: inside the backbone
    flops: dict[str, float] = field(default_factory=dict)  # by phase: teacher, student, losses, backward
    traffic: float = 0.0  # bytes that operators without products read and write
    kernels: float = 0.0  # operators

    @property
    def all_flops(self) -> float:
        return sum(self.flops.values())

    def beyond(self, other: Trace, steps: float) -> Trace:
        """This, and `steps` times what it has more than `other`."""

        def on(a: float, b: float) -> float:
            return a + steps * (a - b)

        names = ("peak", "peak_with", "kept", "gradients", "traffic", "kernels")
        found = {name: on(getattr(self, name), getattr(other, name)) for name in names}
        sizes = {key: on(value, other.sizes[key]) for key, value in self.sizes.items()}
        flops = {key: on(value, other.flops[key]) for key, value in self.flops.items()}
        return Trace(**found, sizes=sizes, flops=flops)


def traced(recipe: Recipe, micro: int, *, unit: int = 1, images: int = IMAGES, cut: bool = False) -> Trace:
    """On a GPU, of a micro-batch of so many images, with the recipe's precision and `engine.recompute`.

    unit: images that must share a forward. images: of the data set. cut: ZeRO 3 cuts the weights.
    """
    low = -(-ANCHORS[0] // unit) * unit
    high = max(2 * low, ANCHORS[1] // unit * unit)
    plain = {name: type(getattr(recipe, name))() for name in ("optimizer", "teacher", "checkpoint", "metrics", "guard")}
    plain["engine"] = type(recipe.engine)(recompute=recipe.engine.recompute)  # what else it says changes no micro-batch
    text = recipe.model_copy(update={**plain, "batch": high, "images": high, "name": ""}).model_dump_json()
    if micro in (low, high):
        return _traced(text, micro, images, cut)
    first, second = _traced(text, low, images, cut), _traced(text, high, images, cut)
    return second.beyond(first, (micro - high) / (high - low))


@functools.lru_cache(maxsize=256)
def _traced(text: str, micro: int, images: int, cut: bool) -> Trace:
    recipe = Recipe.model_validate_json(text)
    depth = 0 if recipe.student.resnet else _depth(recipe)
    if depth <= SHALLOW[1] + 1:
        return run(recipe, micro, images=images, cut=cut)
    shallow = [recipe.student.model_copy(update={"depth": depth}) for depth in SHALLOW]
    first, second = (run(recipe.model_copy(update={"student": s}), micro, images=images, cut=cut) for s in shallow)
    return second.beyond(first, depth - SHALLOW[1])


def _depth(recipe: Recipe) -> int:
    if recipe.student.depth:
        return recipe.student.depth
    with torch.device("meta"):
        return len(Student(recipe.student).backbone.blocks)


def run(
    recipe: Recipe, micro: int, device: Literal["cuda", "cpu"] = "cuda", images: int = IMAGES, cut: bool = False
) -> Trace:
    """Trace one micro-batch with all blocks."""
    ledger, nets = Ledger(), networks(recipe, images)
    student, teacher, mixture = nets.student, nets.teacher, nets.mixture
    low = recipe.precision == "bf16"
    fill(nets, ledger, torch.bfloat16 if low else torch.float32)
    student.backbone.recompute = recipe.engine.recompute
    for parameter in student.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(ledger.gradient)
    inputs = Inputs(recipe.model_copy(update={"batch": micro}), 0, 1, "cpu")
    views = {v.name: ledger.hollow(micro, v.count, 3, v.size, v.size) for v in recipe.views}
    whole = torch.eye(3)[:2]
    boxes = {v.name: whole.expand(micro, v.count, 2, 3) for v in recipe.views}
    info = inputs.info(0, 0.5, 0, Origin(torch.arange(micro), boxes), images)
    info = replace(info, masks=inputs.masks(0, 1.0, 0))
    masked, shuffled = inputs.masked(info), inputs.shuffled(0)
    draws = inputs.draws(0, 0, len(student.backbone.blocks))
    sizes = _watched(student.backbone, ledger)
    with warnings.catch_warnings(), ExitStack() as inside:
        warnings.simplefilter("ignore")  # fake tensors have no address to tell
        if device == "cuda":
            inside.enter_context(off_host())
        if cut:
            inside.enter_context(zero_3_linear())
        cast = nullcontext if recipe.precision == "fp32" else lambda: torch.autocast("cpu", dtype=torch.bfloat16)

        def shown(groups: list[list], part: int = 0) -> list[Tensor]:
            return [x.bfloat16() if low else x for x in inputs.crops(views, groups, part)]

        inside.enter_context(ledger)
        targets: dict[str, Tensor] = {}
        ledger.phase = "teacher"
        if mixture.needs_teacher:
            with cast(), torch.no_grad():
                targets = teacher(inputs.crops(views, inputs.teacher, 0), mixture.teacher_context() | masked | shuffled)
        aims = mixture.aims(targets, info)
        ledger.phase = "student"
        with cast():
            outputs = student(shown(inputs.student), mixture.context() | aims | masked | draws)
        ledger.phase = "losses"
        outcome = mixture.loss(outputs, targets | aims, info)
        kept = ledger.live
        ledger.phase = "backward"
        outcome.loss.backward()
    crops = [group[0].size for group in inputs.student]
    flops = {phase: float(ledger.flops[phase]) for phase in ("teacher", "student", "losses", "backward")}
    by_size = dict(zip(crops, map(float, sizes), strict=True))
    rest = {"traffic": ledger.traffic, "kernels": ledger.kernels}
    return Trace(ledger.peak, ledger.peak_with, kept, ledger.gradients, by_size, flops, **rest)


def _watched(backbone: torch.nn.Module, ledger: Ledger) -> list[int]:
    """What each forward of the backbone left alive, filled as they happen."""
    found: list[int] = []
    before: list[int] = []
    backbone.register_forward_pre_hook(lambda *_: before.append(ledger.live))
    backbone.register_forward_hook(lambda *_: found.append(ledger.live - before[-1]))
    return found
