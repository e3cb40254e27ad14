"""Memory of one rank: what is held, what a micro-batch adds, the most at once, and how many images fit.

Three moments decide: while the run is put together, at the height of a backward, and in the optimizer's step. The rest
is bookkeeping: the batches that lie ready on the device, DALI's buffers, and what stays free for the driver.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ...pipeline.draws import Plan
from ..recipe import Recipe
from .hollow import Networks
from .parameters import Weights
from .states import States
from .trace import Trace

MADE = 1  # batches under way in the loader, beside those that lie ready
TAKEN = 2  # by the loop: the one in use, and the next


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank. `parts`: at the moment of the peak, largest first; they add up to it."""

    peak: float
    moment: str  # "backward", "step" or "start"
    parts: dict[str, float]
    training: dict[str, float]  # the same without the start
    held: float  # between steps, without batches
    activations: dict[str, float] = field(default_factory=dict)  # by crop size, of one micro-batch

    @property
    def largest(self) -> str:
        return next(iter(self.parts))


def memory(
    recipe: Recipe, states: States, trace: Trace, networks: Networks, *, world: int, decoded: float, dali: bool
) -> Memory:
    """Of a rank of `world`. decoded: bytes of one decoded image, on average; dali: views are made on the device."""
    images = recipe.batch // world
    ready = supply_memory(recipe, images, decoded, dali=dali)
    memories = {f"memory of {name}": float(size) for name, size in networks.kept.items() if size}
    around = {**states.held, **memories, **ready}
    grown = states.pile * (trace.peak_with - trace.peak)
    backward = {**around, **states.backward, "activations": trace.peak}
    if grown:
        backward["gradients"] = backward.get("gradients", 0.0) + grown
    moments = {
        "backward": backward,
        "step": {**around, **_joined(states.step, states.held)},
        "start": {"networks, as they are built": states.start, **memories},
    }
    height = {name: sum(parts.values()) for name, parts in moments.items()}
    moment = max(height, key=lambda name: height[name])
    parts = dict(sorted(moments[moment].items(), key=lambda item: -item[1]))
    training = moments[max(("backward", "step"), key=lambda name: height[name])]
    held = sum(states.held.values()) + sum(memories.values())
    by_size = {f"{size} px": kept for size, kept in trace.sizes.items()}
    by_size["heads and losses"] = trace.kept - sum(trace.sizes.values())
    return Memory(sum(parts.values()), moment, parts, training, held, by_size)


def _joined(step: dict[str, float], held: dict[str, float]) -> dict[str, float]:
    return {name: size + held.get(name, 0.0) for name, size in step.items()}


def view_bytes(recipe: Recipe) -> float:
    """Of one image's crops, fp32."""
    return float(sum(4 * 3 * view.count * view.size**2 for view in recipe.views))


def supply_memory(recipe: Recipe, images: int, decoded: float, *, dali: bool) -> dict[str, float]:
    """Batches on the device, and what DALI keeps beside them: decoded images, and each crop once an operator, times POOLS.

    Without DALI views are made on the host, and sent at once.
    """
    batch = images * view_bytes(recipe)
    found = {"batches ready": batch * (recipe.stream.prefetch + MADE + TAKEN)}
    return found | ({"DALI": images * decoded + batch * operators(recipe)} if dali else {})


# What DALI's pools came to on an H100 over the operators' own outputs, with Mugs' crops and 8 to 256 images.
POOLS = 1.8


def operators(recipe: Recipe) -> float:
    """How many times DALI holds each crop, by the operators of pipeline/augment/graph.py, weighted by their pixels."""
    plan = Plan(recipe.views)
    total = held = 0.0
    for v, owner in enumerate(plan.owner):
        view, pixels = plan.views[owner], float(plan.views[owner].size ** 2)
        forms = [form for form in (plan.weak, plan.strong_form if plan.strong[v] else None) if form is not None]
        count = 2.0  # resized, normalised
        count += view.filter == "bicubic"
        count += any(form.blur[v] > 0 for form in forms)
        count += 2 * any(form.jitter[v] > 0 or form.grey[v] > 0 for form in forms)
        count += 2 * any(form.solarize[v] > 0 for form in forms)
        count += 3 * bool(plan.strong[v])  # prepared source, warp, erased
        total, held = total + pixels, held + pixels * count
    return POOLS * held / total


def shares(weights: Weights, recipe: Recipe) -> dict[str, float]:
    """Bytes of a checkpoint's parts: masters, moments, average."""
    moments = 2 if recipe.optimizer.name == "adamw" else 1
    return {
        "student": 4.0 * weights.trained,
        "moments": 4.0 * moments * weights.trained,
        "teacher": 4.0 * weights.averaged,
    }
