"""A real run's memory on this CPU, as torch's own allocator counts it: what tests hold `gristmill plan` to.

    python -m tests.ops.measured_memory '[["recipe", "key=value", ...], ...]'

Networks, objectives and DeepSpeed's engine are built and take two steps inside torch's memory profiler, which hears of
every allocation and release; the second step is measured, since the first has no moments yet. Of each recipe a line:
`rest` and `peak` in bytes. Views are made before, and rows of memories that numpy made are no tensor's: those are `rows`.
"""

from __future__ import annotations

import gc
import json
import sys
import warnings
from dataclasses import replace
from typing import Any

import torch
from gristmill.models.teacher import make_teacher
from gristmill.objectives import Outcome
from gristmill.objectives.memory import RingMemory
from gristmill.ops.bench.steps import IMAGES
from gristmill.ops.engine import Engine
from gristmill.ops.guard import Guard
from gristmill.ops.heap import keep_heap
from gristmill.ops.inputs import Inputs, Origin
from gristmill.ops.launch import join, leave, quiet_deepspeed
from gristmill.ops.networks import build_mixture, build_student
from gristmill.ops.ranks import gather
from gristmill.ops.recipe import Recipe, load_recipe
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile, record_function

FIXED = ("data=none", "probes.at=[]", "optimizer.freeze_last_layer=0", "checkpoint.every=4096")


def recipe_of(name: str, *overrides: str) -> Recipe:
    return load_recipe(name, [*FIXED, *overrides], tiny=True)


class Step:
    """As ops/run.py and ops/train.py take it, on views that are given."""

    def __init__(self, recipe: Recipe, rank: int, world: int):
        self.recipe, self.world, self.inputs = recipe, world, Inputs(recipe, rank, world, "cpu")
        if recipe.engine.recompute:
            keep_heap(False)
        student = build_student(recipe)
        student.backbone.recompute = recipe.engine.recompute
        self.depth = len(student.backbone.blocks)
        self.mixture = build_mixture(recipe, student, images=IMAGES)
        self.engine = Engine(student, make_teacher(student), recipe, rank, world)
        self.guard = Guard(recipe.guard, rank, world)
        micro = self.inputs.micro
        cut = {v.name: torch.eye(3)[:2].expand(micro, v.count, 2, 3) for v in recipe.views}
        self.origin = Origin(torch.arange(micro), cut)
        self.position = 0

    def take(self, views: dict[str, torch.Tensor]) -> None:
        engine, mixture, inputs, recipe = self.engine, self.mixture, self.inputs, self.recipe
        info = replace(inputs.info(self.position, 0.5, 0, self.origin, IMAGES), gather=gather)
        masked, targets = inputs.masked(info), {}
        if mixture.needs_teacher:
            context = mixture.teacher_context() | masked | inputs.shuffled(self.position, 0)
            targets = engine.teacher(inputs.crops(views, inputs.teacher, 0), context)
        aims = mixture.aims(targets, info)
        context = mixture.context() | aims | masked | inputs.draws(self.position, 0, self.depth)
        outcome = mixture.loss(engine(inputs.crops(views, inputs.student, 0), context), targets | aims, info)
        engine.backward(outcome.loss)
        engine.set_rates(0.5, recipe.batch / recipe.images)
        verdict = self.guard.judge([outcome], engine.squares(), partial=not engine.segments.replicated)
        assert not verdict.bad
        assert engine.step(verdict.norms)
        engine.teacher.update(0.99)
        kept = {name: gather(rows) for name, rows in outcome.commit.items()}
        mixture.commit(Outcome(outcome.loss.detach(), {}, kept))
        self.position += recipe.batch


def measured(recipe: Recipe, rank: int, world: int) -> dict[str, Any]:
    gc.collect()
    views = {v.name: torch.randn(recipe.batch // world, v.count, 3, v.size, v.size) for v in recipe.views}
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step = Step(recipe, rank, world)
        step.take(views)
        with record_function("measured"):
            step.take(views)
    held: list[tuple[int, int]] = []  # (when, bytes held by then)
    before: list[tuple[int, int]] = []  # what the allocator still counts of an earlier recipe
    begin = end = 0
    assert recorded.profiler is not None
    assert recorded.profiler.kineto_results is not None
    waiting = list(recorded.profiler.kineto_results.experimental_event_tree())
    while waiting:
        event = waiting.pop()
        waiting.extend(event.children)
        if event.tag == _EventType.Allocation:
            told = event.extra_fields
            held.append((event.start_time_ns, told.total_allocated))
            before.append((event.start_time_ns, told.total_allocated - told.alloc_size))
        elif event.name == "measured":
            begin, end = event.start_time_ns, event.end_time_ns
    held.sort()
    already = min(before)[1]
    parts = [part for o in step.mixture.objectives.values() for part in vars(o).values()]
    rows = sum(part.rows.nbytes for part in parts if isinstance(part, RingMemory) and not part.unit)
    step.engine.close()
    return {
        "rest": [size for when, size in held if when <= begin][-1] - already,
        "peak": max(size for when, size in held if begin <= when <= end) - already,
        "rows": rows,
    }


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    quiet_deepspeed()
    rank, world, _ = join()
    for name, *overrides in json.loads(sys.argv[1]):
        sys.stdout.write("\n" + json.dumps(measured(recipe_of(name, *overrides), rank, world)) + "\n")
        sys.stdout.flush()
    leave()


if __name__ == "__main__":
    main()
