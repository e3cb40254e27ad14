"""Several objectives on one student and one teacher pass, added with true weights.

The loss is the weighted mean, `sum w_o loss_o / sum w_o`. In the official Mugs code weights are mere switches and a
divisor; the two agree at 1, 1, 1 (section 1.5 of the notes on it). iBOT's is the plain sum, `add: sum`. Names are `<objective>.<what>` throughout.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from .group import GroupConfig, GroupObjective
from .instance import InstanceConfig, InstanceObjective, strip
from .local_group import LocalGroupConfig, LocalGroupObjective
from .patch import PatchConfig, PatchObjective
from .protocol import Objective, Outcome, StepInfo

ObjectiveConfig = InstanceConfig | LocalGroupConfig | GroupConfig | PatchConfig


class MixtureConfig(BaseModel):
    """Weights of the objectives by name; one that is not named weighs 1."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    weights: dict[str, Annotated[float, Field(gt=0, allow_inf_nan=False)]] = Field(
        default_factory=dict
    )  # Mugs: 1, 1, 1
    add: Literal["mean", "sum"] = "mean"  # of the weighted losses; Mugs: mean, iBOT: sum


class Mixture:
    """An objective made of objectives; `weights` by name, 1 where not given, all positive; `add` as in the config."""

    name = "mixture"

    def __init__(
        self,
        objectives: Sequence[Objective],
        weights: Mapping[str, float] | None = None,
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
            if not 0 < weight < float("inf"):
                raise ValueError(f"weight of {name!r} is {weight}: weigh it above 0, or leave the objective out")
        self.weights = {name: float(weights.get(name, 1.0)) for name in self.objectives}
        self._divisor = sum(self.weights.values()) if add == "mean" else 1.0

    def context(self) -> dict[str, Tensor]:
        return {key: tensor for o in self.objectives.values() for key, tensor in o.context().items()}

    def teacher_context(self) -> dict[str, Tensor]:
        return {key: tensor for o in self.objectives.values() for key, tensor in o.teacher_context().items()}

    def loss(self, student: dict[str, Tensor], teacher: dict[str, Tensor], info: StepInfo) -> Outcome:
        """Weighted mean (or sum) of the losses, with `loss/<objective>` (before its weight) and `weight/<objective>` in the logs."""
        terms: list[Tensor] = []
        logs: dict[str, Tensor | float] = {}
        commit: dict[str, Tensor] = {}
        for name, objective in self.objectives.items():
            outcome = objective.loss(student, teacher, info)
            terms.append(outcome.loss * self.weights[name])
            logs.update(outcome.logs)
            logs[f"weight/{name}"] = self.weights[name]
            commit.update({f"{name}.{key}": tensor for key, tensor in outcome.commit.items()})
        loss = torch.stack(terms).sum() / self._divisor
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


def build_objectives(
    configs: Mapping[str, ObjectiveConfig | None],
    *,
    dims: Dims,
    seed: int,
    mixture: MixtureConfig | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Mixture:
    """Objectives by name ("instance", "local_group", "group", "patch"; None: left out), memories drawn from `seed`.

    ValueError for another name, a configuration of the wrong kind, or a width in `dims` that is missing.
    """
    place = {"dtype": dtype, "device": device}
    objectives: list[Objective] = []
    for name, config in configs.items():
        match name, config:
            case _, None:
                continue
            case "instance", InstanceConfig():
                objectives.append(InstanceObjective(config, dims.instance, seed=seed, **place))
            case "local_group", LocalGroupConfig():
                objectives.append(LocalGroupObjective(config, dims.local_group, dims.features, seed=seed, **place))
            case "group", GroupConfig():
                if dims.prototypes < 1:
                    raise ValueError(f"group: dims.prototypes is {dims.prototypes}, give the width of the group head")
                objectives.append(GroupObjective(config, dims.prototypes, **place))
            case "patch", PatchConfig():
                if dims.patch_prototypes < 1:
                    raise ValueError(f"patch: dims.patch_prototypes is {dims.patch_prototypes}, give the head's width")
                objectives.append(PatchObjective(config, dims.patch_prototypes, **place))
            case _:
                raise ValueError(
                    f"objective {name!r} with a {type(config).__name__}: known are instance (InstanceConfig), "
                    "local_group (LocalGroupConfig), group (GroupConfig) and patch (PatchConfig)"
                )
    mixture = mixture or MixtureConfig()
    return Mixture(objectives, mixture.weights, mixture.add)
