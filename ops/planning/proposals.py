"""What would fit where a recipe does not: small changes first, each judged by the same calculation as the recipe."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from ..recipe import Recipe
from .fitting import Judged, PlanError, Setting, judge

ENOUGH = 3
SMALL_BUCKET = 50_000_000


@dataclass(frozen=True)
class Proposal:
    """A change, as it is typed, and what comes of it."""

    change: str
    costs: str
    peak: float  # bytes
    gpus: int


def proposals(judged: Judged, setting: Setting, enough: int = ENOUGH) -> list[Proposal]:
    """The first changes after which the recipe fits; [] where none of those tried does."""
    found: list[Proposal] = []
    for change, costs, recipe, gpus in _changes(judged, setting):
        there = replace(setting, hardware=replace(setting.hardware, gpus=gpus))
        try:
            then = judge(recipe, there)
        except PlanError:
            continue
        if then.fits:
            found.append(Proposal(change, costs, then.memory.peak, gpus))
        if len(found) == enough:
            break
    return found


def _changes(judged: Judged, setting: Setting) -> Iterator[tuple[str, str, Recipe, int]]:
    recipe, gpus = judged.recipe, setting.hardware.gpus
    own = recipe.engine.deepspeed.get("zero_optimization", {})
    bucket = {**recipe.engine.deepspeed, "zero_optimization": {**own, "reduce_bucket_size": SMALL_BUCKET}}
    singles: dict[str, tuple[str, dict]] = {}
    if judged.stage and "reduce_bucket_size" not in own:
        words = f"engine.deepspeed.zero_optimization.reduce_bucket_size={SMALL_BUCKET}"
        singles[words] = ("gradients are sent in smaller pieces", {"deepspeed": bucket})
    for stage in range(judged.stage + 1, 4):
        if gpus > 1:
            sends = "weights are gathered anew in each pass" if stage == 3 else "no more is sent"
            singles[f"engine.zero={stage}"] = (sends, {"zero": stage})
    if not recipe.engine.recompute and not recipe.student.resnet:
        singles["engine.recompute=true"] = ("a third more arithmetic", {"recompute": True})
    parts = [n for n in (2, 4, 8, 16, 32) if recipe.engine.accumulate * n <= recipe.batch // gpus]
    for n in parts:
        count = recipe.engine.accumulate * n
        singles[f"engine.accumulate={count}"] = (f"{n} smaller micro-batches in place of one", {"accumulate": count})
    for words, (costs, update) in singles.items():
        yield words, costs, _with(recipe, update), gpus
    if recipe.precision != "bf16":
        yield (
            "precision=bf16",
            "weights in bf16, masters in fp32",
            recipe.model_copy(update={"precision": "bf16"}),
            gpus,
        )
    for n in (2, 4, 8):
        yield f"--gpus {gpus * n}", f"{n} times the GPUs, 1/{n} of the images on each", recipe, gpus * n
    if judged.stage < 3 and gpus > 1:
        strong = {"zero": 3, "deepspeed": bucket} | ({} if recipe.student.resnet else {"recompute": True})
        told = " ".join(["engine.zero=3", *(["engine.recompute=true"] if "recompute" in strong else [])])
        told += f" engine.deepspeed.zero_optimization.reduce_bucket_size={SMALL_BUCKET}"
        yield told, "all of these together", _with(recipe, strong), gpus
        for n in parts:
            count = recipe.engine.accumulate * n
            both = _with(recipe, {**strong, "accumulate": count})
            yield f"{told} engine.accumulate={count}", "all of these together", both, gpus


def _with(recipe: Recipe, update: dict) -> Recipe:
    return recipe.model_copy(update={"engine": recipe.engine.model_copy(update=update)})
