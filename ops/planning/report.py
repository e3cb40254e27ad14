"""A plan: what a recipe needs on a machine, put together from the recipe and the machine's description alone."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from ...models.flops import Asked, training_flops
from ..inputs import Inputs
from ..recipe import Recipe
from .fitting import Judged, Setting, architecture, built, judge, largest_micro
from .hollow import Networks
from .memory import Memory
from .parameters import Weights
from .proposals import Proposal, proposals
from .speed import Speed, speed
from .supply import Supply, supply

STAGES = (0, 1, 2, 3)


@dataclass(frozen=True)
class Plan:
    """All that `gristmill plan` says."""

    recipe: Recipe
    setting: Setting
    judged: Judged
    weights: Weights
    stages: dict[int, Memory]
    without: dict[str, float]  # bytes of one micro-batch's activations: kept and at most, with and without recompute
    largest: int  # images of a micro-batch
    speed: Speed
    supply: Supply
    days: float
    proposals: list[Proposal] = field(default_factory=list)

    @property
    def fits(self) -> bool:
        return self.judged.fits

    def dump(self) -> dict[str, Any]:
        """As JSON has it; bytes, seconds, numbers of weights."""
        hardware = self.setting.hardware
        return {
            "recipe": self.recipe.name,
            "backbone": architecture(self.recipe.student),
            "hardware": asdict(hardware) | {"nodes": hardware.nodes},
            "assumed": self.setting.assumed.dump(),
            "fits": self.fits,
            "batch": {
                "global": self.recipe.batch, "rank": self.recipe.batch // hardware.gpus, "micro": self.judged.micro,
                "accumulate": self.recipe.engine.accumulate, "largest_micro": self.largest,
            },
            "zero": {"asked": self.recipe.engine.zero, "stage": self.judged.stage},
            "parameters": {"student": self.weights.student, "teacher": self.weights.teacher, "trained": self.weights.trained},
            "memory": {
                "room": self.judged.room, "over": max(0.0, self.judged.over), **asdict(self.judged.memory),
                "stages": {str(stage): asdict(memory) for stage, memory in self.stages.items()},
                "activations_at_most": self.without,
            },
            "flops": dict(self.judged.trace.flops),
            "speed": asdict(self.speed),
            "supply": asdict(self.supply),
            "days": self.days,
            "gpu_hours": self.days * 24 * hardware.gpus,
            "proposals": [asdict(proposal) for proposal in self.proposals],
        }  # fmt: skip


def plan(recipe: Recipe, setting: Setting, *, brief: bool = False) -> Plan:
    """Plan a recipe. Raises PlanError where its batch cannot be cut over the GPUs.

    brief: without what other stages and the other setting of `engine.recompute` would give, and without proposals.
    """
    judged = judge(recipe, setting)
    nets, weights = built(recipe, setting.images)
    others = [stage for stage in STAGES if stage == 0 or setting.hardware.gpus > 1] if not brief else []
    stages = {stage: judge(recipe, setting, stage).memory for stage in others}
    without = {}
    for name, recompute in (("recompute off", False), ("recompute on", True)):
        if brief or (recompute and recipe.student.resnet):
            continue
        engine = recipe.engine.model_copy(update={"recompute": recompute})
        trace = judge(recipe.model_copy(update={"engine": engine}), setting, judged.stage).trace
        without |= {f"{name}, kept": trace.kept, f"{name}, at most": trace.peak}
    told = speed(
        recipe,
        setting.hardware,
        judged.trace,
        judged.states,
        weights,
        setting.assumed,
        judged.stage,
        model_flops(recipe, nets),
    )
    around = supply(recipe, setting.hardware, weights, told, setting.assumed, sum(nets.kept.values()), setting.images)
    days = recipe.images / told.images / 86400
    largest = largest_micro(judged, setting)
    offers = [] if judged.fits or brief else proposals(judged, setting)
    return Plan(recipe, setting, judged, weights, stages, without, largest, told, around, days, offers)


def model_flops(recipe: Recipe, nets: Networks) -> float:
    """Of one image in one step, as gristmill_model_flops_total counts them (models/flops.py)."""
    inputs = Inputs(recipe.model_copy(update={"engine": type(recipe.engine)()}), 0, 1, "cpu")
    seen, aims = (
        [(view.size, view.count) for group in side for view in group] for side in (inputs.student, inputs.teacher)
    )
    local = recipe.objectives.local_group
    patches = sum(count * (size // recipe.patch_size) ** 2 for size, count in seen[:1])
    shares = [share for share, _ in recipe.masks.shares]
    hidden = patches * sum(shares) / len(shares) if recipe.objectives.patch else 0.0
    asked = Asked(memory=local.memory if local else 0, hidden=hidden)
    teacher = nets.teacher if nets.mixture.needs_teacher else None
    return float(training_flops(nets.student, teacher, seen, aims, asked))
