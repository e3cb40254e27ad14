"""Several objectives on one student and one teacher pass, added with true weights.

The loss is the weighted mean, `sum w_o loss_o / sum w_o`. In the official Mugs code weights are mere switches and a
divisor; the two agree at 1, 1, 1 (section 1.5 of the notes on it). iBOT's is the plain sum, `add: sum`. Names are `<objective>.<what>` throughout.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from .bank import BankConfig, BankObjective
from .batch_contrast import BatchContrastConfig, BatchContrastObjective
from .bootstrap import BootstrapConfig, BootstrapObjective
from .clusters import ClustersConfig, ClustersObjective
from .dense import DenseConfig, DenseObjective
from .group import GroupConfig, GroupObjective
from .hierarchy import HierarchyConfig, HierarchyObjective
from .instance import InstanceConfig, InstanceObjective, strip
from .local_group import LocalGroupConfig, LocalGroupObjective
from .patch import PatchConfig, PatchObjective
from .protocol import Objective, Outcome, StepInfo
from .swapped import SwappedConfig, SwappedObjective
from .weight import Ramp, Weight, weight_at

ObjectiveConfig = BaseModel  # of one of KINDS


class MixtureConfig(BaseModel):
    """Weights of the objectives by name; one that is not named weighs 1."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    weights: dict[str, Weight] = Field(default_factory=dict)  # Mugs: 1, 1, 1
    add: Literal["mean", "sum"] = "mean"  # of the weighted losses; Mugs: mean, iBOT: sum


class Mixture:
    """An objective made of objectives; `weights` by name, 1 where not given, positive or ramps; `add` as in the config."""

    name = "mixture"

    def __init__(
        self,
        objectives: Sequence[Objective],
        weights: Mapping[str, float | Ramp] | None = None,
        add: Literal["mean", "sum"] = "mean",
    ) -> None:
        weights = weights or {}
        self.objectives = {objective.name: objective for objective in objectives}
        names = ", ".join(self.objectives)
        if not objectives or len(self.objectives) != len(objectives):
            raise ValueError(f"a mixture needs objectives of different names, got {names or 'none'}")
        for name, weight in weights.items():
            if name not in self.objectives:
                raise ValueError(f"weight of {name!r}: there is no such objective, only {names}")
            if not isinstance(weight, Ramp) and not 0 < weight < float("inf"):
                raise ValueError(f"weight of {name!r} is {weight}: weigh it above 0, or leave the objective out")
        self.weights: dict[str, float | Ramp] = {name: weights.get(name, 1.0) for name in self.objectives}
        self.add = add
        for share in (
            0.0,
            1.0,
            *(share for each in self.weights.values() if isinstance(each, Ramp) for share in each.over),
        ):
            if not sum(self.weights_at(share).values()):
                raise ValueError(
                    f"all weights are 0 at {share:.0%} of the run, and nothing would be learned; raise one"
                )

    def weights_at(self, progress: float) -> dict[str, float]:
        """By name, at this share of the run."""
        return {name: weight_at(weight, progress) for name, weight in self.weights.items()}

    def context(self) -> dict[str, Tensor]:
        return {key: tensor for o in self.objectives.values() for key, tensor in o.context().items()}

    def teacher_context(self) -> dict[str, Tensor]:
        return {key: tensor for o in self.objectives.values() for key, tensor in o.teacher_context().items()}

    def aims(self, teacher: dict[str, Tensor], info: StepInfo) -> dict[str, Tensor]:
        """What the student's forward is told of the teacher's outputs, "<objective>.<what>"; show it to `loss`, too.

        It goes into the student's context and joins the teacher's outputs. Leaving it out gives the same losses, by the
        plain way.
        """
        found: dict[str, Tensor] = {}
        for objective in self.objectives.values():
            if isinstance(objective, GroupObjective):
                found |= objective.aims(teacher, info)
        return found

    @property
    def needs_teacher(self) -> bool:
        """Whether any objective reads the teacher's outputs; without, `teacher` may be empty everywhere."""
        return any(getattr(objective, "needs_teacher", True) for objective in self.objectives.values())

    def refit(self, info: StepInfo) -> dict[str, Tensor | float]:
        """Let each cluster anew what it remembers, if it is time; logs of those that did. Collective."""
        logs: dict[str, Tensor | float] = {}
        for objective in self.objectives.values():
            if (refit := getattr(objective, "refit", None)) is not None:
                logs.update(refit(info))
        return logs

    def stale(self, info: StepInfo) -> list[str]:
        """Names of the objectives that want a pass over the data before this step; the same on all ranks."""
        asked = {name: getattr(objective, "stale", None) for name, objective in self.objectives.items()}
        return [name for name, stale in asked.items() if stale is not None and stale(info)]

    def refresh(self, name: str, features: Tensor, info: StepInfo) -> None:
        """Give what a pass over the data found, unit rows [images, dim] in the order of their index, to one of `stale`."""
        objective: Any = self.objectives[name]
        objective.refresh(features, info)

    def loss(self, student: dict[str, Tensor], teacher: dict[str, Tensor], info: StepInfo) -> Outcome:
        """Weighted mean (or sum) of the losses, with `loss/<objective>` (before its weight) and `weight/<objective>` in the logs."""
        weights = self.weights_at(info.progress)
        terms: list[Tensor] = []
        logs: dict[str, Tensor | float] = {}
        commit: dict[str, Tensor] = {}
        for name, objective in self.objectives.items():
            outcome = objective.loss(student, teacher, info)
            terms.append(outcome.loss * weights[name])
            logs.update(outcome.logs)
            logs[f"weight/{name}"] = weights[name]
            commit.update({f"{name}.{key}": tensor for key, tensor in outcome.commit.items()})
        loss = torch.stack(terms).sum() / (sum(weights.values()) if self.add == "mean" else 1.0)
        logs["loss"] = loss.detach()
        return Outcome(loss, logs, commit)

    def commit(self, outcome: Outcome) -> None:
        split = strip(self.name, outcome.commit, *self.objectives)
        for name, objective in self.objectives.items():
            objective.commit(Outcome(outcome.loss, {}, split[name]))

    def state(self) -> dict[str, Tensor]:
        return {f"{name}.{key}": tensor for name, o in self.objectives.items() for key, tensor in o.state().items()}

    def load(self, state: dict[str, Tensor]) -> None:
        split = strip(self.name, state, *self.objectives)
        for name, objective in self.objectives.items():
            objective.load(split[name])


@dataclass(frozen=True)
class Dims:
    """Widths of what the student gives out; only those of the objectives in use matter."""

    features: int = 0  # backbone's width d: "memory_row"
    instance: int = 256  # instance head's output
    local_group: int = 256  # local-group head's output
    prototypes: int = 0  # group head's output
    patch_prototypes: int = 0  # what hidden patches are assigned to
    dense: int = 128  # the other heads' outputs
    hierarchy: int = 128
    batch_contrast: int = 256
    bootstrap: int = 256
    bank: int = 128
    swapped: int = 128
    clusters: int = 128
    images: int = 0  # of the data set, for objectives that keep something for each
    globals: int = 2  # global crops of an image that the student sees, for objectives that remember each apart


def build_objectives(
    configs: Mapping[str, ObjectiveConfig | None],
    *,
    dims: Dims,
    seed: int,
    mixture: MixtureConfig | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Mixture:
    """Objectives by name (a name of `KINDS`; None: left out), memories drawn from `seed`.

    ValueError for another name, a configuration of the wrong kind, or a width in `dims` that is missing.
    """
    objectives: list[Objective] = []
    for name, config in configs.items():
        if config is None:
            continue
        if name not in KINDS or not isinstance(config, KINDS[name][0]):
            known = ", ".join(f"{each} ({kind.__name__})" for each, (kind, _) in KINDS.items())
            raise ValueError(f"objective {name!r} with a {type(config).__name__}: known are {known}")
        objectives.append(KINDS[name][1](config, dims, seed=seed, dtype=dtype, device=device))
    mixture = mixture or MixtureConfig()
    return Mixture(objectives, mixture.weights, mixture.add)


def _group(config: GroupConfig, dims: Dims, seed: int, **place: Any) -> Objective:
    if dims.prototypes < 1:
        raise ValueError(f"group: dims.prototypes is {dims.prototypes}, give the width of the group head")
    return GroupObjective(config, dims.prototypes, **place)


def _patch(config: PatchConfig, dims: Dims, seed: int, **place: Any) -> Objective:
    if dims.patch_prototypes < 1:
        raise ValueError(f"patch: dims.patch_prototypes is {dims.patch_prototypes}, give the head's width")
    return PatchObjective(config, dims.patch_prototypes, **place)


# What each name is configured by, and how it is built of (config, dims, seed=, dtype=, device=).
KINDS: dict[str, tuple[type[BaseModel], Callable[..., Objective]]] = {
    "instance": (InstanceConfig, lambda c, d, **how: InstanceObjective(c, d.instance, **how)),
    "dense": (DenseConfig, lambda c, d, **how: DenseObjective(c, d.dense, **how)),
    "local_group": (LocalGroupConfig, lambda c, d, **how: LocalGroupObjective(c, d.local_group, d.features, **how)),
    "hierarchy": (HierarchyConfig, lambda c, d, **how: HierarchyObjective(c, d.hierarchy, images=d.images, **how)),
    "group": (GroupConfig, _group),
    "patch": (PatchConfig, _patch),
    "batch_contrast": (BatchContrastConfig, lambda c, d, **how: BatchContrastObjective(c, d.batch_contrast, **how)),
    "bootstrap": (BootstrapConfig, lambda c, d, **how: BootstrapObjective(c, d.bootstrap, **how)),
    "bank": (BankConfig, lambda c, d, **how: BankObjective(c, d.bank, images=d.images, **how)),
    "swapped": (
        SwappedConfig,
        lambda c, d, **how: SwappedObjective(c, d.swapped, prototypes=d.prototypes, crops=d.globals, **how),
    ),
    "clusters": (
        ClustersConfig,
        lambda c, d, **how: ClustersObjective(c, d.clusters, images=d.images, crops=d.globals, **how),
    ),
}
