"""One part of `gristmill bench objectives`: what each objective of a recipe costs, by leaving it out.

    python -m gristmill.ops.bench.parts without NAME|nothing SETTINGS

SETTINGS is that of steps.py, with "recipe". Whole steps of multigrain, and again without each of its objectives, every
one in a process of its own; the difference is what that objective costs in time and memory. Re-clustering is no part of a
step: it is timed alone, once. An objective that warms up is measured past its warm-up, with its memory full.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from ...objectives import HierarchyObjective
from ..launch import join, leave, quiet_deepspeed
from ..recipe import Recipe, load_recipe
from .meter import memory, timed
from .steps import OurStep, crops_of, recipe_of

RECIPE = "multigrain-vits16"
QUICKLY = ("objectives.hierarchy.attempts=1", "objectives.hierarchy.iterations=1")


def names_of(settings: dict[str, Any]) -> list[str]:
    return load_recipe(settings.get("recipe", RECIPE)).objectives.names()


def ripen(step: OurStep, again: bool) -> float | None:
    """Put a hierarchy past its warm-up, its memory full of noise and clustered (QUICKLY, since a step does not mind how well).

    again: cluster once more, as a run does every so often, from the prototypes that are there; its seconds.
    """
    hierarchy = step.mixture.objectives.get("hierarchy")
    if not isinstance(hierarchy, HierarchyObjective):
        return None
    assert hierarchy.memory is not None
    draws = torch.Generator().manual_seed(0)
    rows = torch.nn.functional.normalize(torch.randn(hierarchy.memory.rows.shape, generator=draws), dim=1)
    hierarchy.memory.enqueue(rows)
    hierarchy.refit(step.inputs.info(step.position, 0.5))
    begin = time.perf_counter()
    if again:
        hierarchy.refit(step.inputs.info(step.position + hierarchy.every, 0.5))
    seconds = time.perf_counter() - begin
    with suppress(OSError):  # its own peak is none of the step's
        Path("/proc/self/clear_refs").write_text("5")
    return seconds if again else None


def measure(without: str, settings: dict[str, Any]) -> dict[str, Any]:
    kept = {
        name: weight
        for name, weight in load_recipe(settings.get("recipe", RECIPE)).objectives.model_dump()["weights"].items()
        if name != without
    }
    own = [] if without == "nothing" else [f"objectives.{without}=null", f"objectives.weights={json.dumps(kept)}"]
    quick = () if without == "hierarchy" else QUICKLY
    recipe: Recipe = recipe_of({"recipe": RECIPE, **settings}, *quick, *own)
    quiet_deepspeed()
    join()
    before = memory("VmRSS")
    step = OurStep(recipe)
    step.position = recipe.images // 2 // recipe.batch * recipe.batch
    clustering = ripen(step, again=without == "nothing")
    crops = crops_of(recipe)
    found: dict[str, Any] = timed(lambda: step.run(*crops), settings["steps"])
    found |= {"memory_MB": memory("VmHWM") - before, "clustering_seconds": clustering}
    found["losses"] = step.run(*crops)
    leave()
    return found


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    given = json.loads(sys.argv[3])
    torch.set_num_threads(given["threads"])
    torch.set_flush_denormal(True)
    torch.manual_seed(0)
    sys.stdout.write(f"\n{json.dumps(measure(sys.argv[2], given))}\n")
