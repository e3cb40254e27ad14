"""Whether a recipe fits a machine: one judgement, which the plan and each of its proposals go through alike."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

from ...models.student import StudentConfig
from ...shards.errors import GristmillError
from ..engine import resolve_stage
from ..fitting import together
from ..recipe import Recipe
from .hardware import GIB, Hardware
from .hollow import IMAGES, Networks, networks
from .memory import Memory, memory
from .parameters import Weights, weights
from .speed import Assumptions
from .states import States, states
from .trace import Trace, traced


class PlanError(GristmillError):
    """A recipe that cannot be cut over so many GPUs, whatever their memory."""


@dataclass(frozen=True)
class Judged:
    """A recipe on a machine. `over`: bytes by which the peak exceeds what there is; below 0 it fits."""

    recipe: Recipe
    stage: int
    micro: int
    trace: Trace
    states: States
    memory: Memory
    room: float  # bytes that a rank may use

    @property
    def over(self) -> float:
        return self.memory.peak - self.room

    @property
    def fits(self) -> bool:
        return self.over <= 0


@dataclass(frozen=True)
class Setting:
    """What all judgements of one plan share."""

    hardware: Hardware
    assumed: Assumptions
    images: int = IMAGES  # of the data set

    @property
    def room(self) -> float:
        return self.hardware.gpu.memory * (1 - self.assumed.fragments) - self.assumed.reserve * GIB


@functools.lru_cache(maxsize=64)
def _built(text: str, images: int, passes: int) -> tuple[Networks, Weights]:
    built = networks(Recipe.model_validate_json(text), images)
    return built, weights(built.student, built.teacher, passes)


def built(recipe: Recipe, images: int = IMAGES) -> tuple[Networks, Weights]:
    """Networks without memory and their weights; of one architecture only once."""
    sizes = {view.size for view in recipe.views if view.role != "teacher"}
    batch = unit_of(recipe)  # any will do, and one is what makes it the same recipe for all
    same = {"engine": type(recipe.engine)(), "name": "", "batch": batch, "images": batch}
    return _built(recipe.model_copy(update=same).model_dump_json(), images, len(sizes))


def unit_of(recipe: Recipe) -> int:
    """Images that must share a forward: a micro-batch is a multiple of it."""
    return math.lcm(*together(recipe).values())


def micro_of(recipe: Recipe, world: int) -> int:
    """Images of one micro-batch on one rank. Raises PlanError, with batches that would do, where they do not divide."""
    parts, unit = world * recipe.engine.accumulate, unit_of(recipe)
    micro, rest = divmod(recipe.batch, parts)
    if micro and not rest and not micro % unit:
        return micro
    step = parts * unit
    near = sorted({max(step, recipe.batch // step * step), -(-recipe.batch // step) * step})
    why = f"in whole groups of {unit} images (batch norm, shuffling or exclusion ask for them) " if unit > 1 else ""
    cut = f"{world} GPUs" + (
        f" in {recipe.engine.accumulate} micro-batches each" if recipe.engine.accumulate > 1 else ""
    )
    raise PlanError(
        f"batch: {recipe.batch} images cannot be shared {why}by {cut}; try batch={' or batch='.join(map(str, near))}"
        + (f", or at most {recipe.batch // unit} GPUs" if unit > 1 and recipe.batch < step else "")
    )


def judge(recipe: Recipe, setting: Setting, stage: int | None = None) -> Judged:
    """Everything about the memory of a rank; `stage`: another one than the recipe asks for."""
    world = setting.hardware.gpus
    micro = micro_of(recipe, world)
    nets, counted = built(recipe, setting.images)
    stage = resolve_stage(recipe, nets.student, world) if stage is None else stage
    trace = traced(recipe, micro, unit=unit_of(recipe), images=setting.images, cut=stage == 3)
    kept = states(recipe, counted, stage, world)
    how: dict[str, Any] = {"decoded": 3 * setting.assumed.pixels, "dali": recipe.stream.augment != "cpu"}
    found = memory(recipe, kept, trace, nets, world=world, **how)
    return Judged(recipe, stage, micro, trace, kept, found, setting.room)


def largest_micro(judged: Judged, setting: Setting) -> int:
    """The most images of a micro-batch that fit a rank, accumulating none; 0 where not even the smallest does."""
    unit, world = unit_of(judged.recipe), setting.hardware.gpus
    engine = judged.recipe.engine.model_copy(update={"accumulate": 1})

    def fits(groups: int) -> bool:
        recipe = judged.recipe.model_copy(update={"batch": groups * unit * world, "engine": engine})
        return judge(recipe, setting, judged.stage).fits

    low, high = 0, 1
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low * unit


def architecture(config: StudentConfig) -> str:
    """A backbone in a word or two."""
    sizes = [
        f"{k} {v}" for k, v in (("width", config.embed_dim), ("depth", config.depth), ("patch", config.patch_size)) if v
    ]
    return config.backbone + (f" ({', '.join(sizes)})" if sizes else "")
