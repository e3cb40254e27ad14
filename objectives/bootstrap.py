"""Prediction without negatives: BYOL (arXiv 2006.07733, eq. 2) and SimSiam (arXiv 2011.10566, eq. 1 to 4).

The student predicts, from one crop of an image, the projection of another: the teacher's (BYOL), or its own with the
gradient stopped (SimSiam). Nothing in the loss keeps all outputs from becoming one point, so their spread is logged.
Facts: google-deepmind/deepmind-research, byol/utils/helpers.py; facebookresearch/simsiam, main_simsiam.py.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from ..models.host import constant
from .memory import check_state
from .protocol import Outcome, StepInfo, pair_weights


class BootstrapConfig(BaseModel):
    """Which of the two. Predictor, target's momentum and optimizer are the student's, the teacher's and the run's."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    # byol: 2 - 2 cos to the teacher, both directions added up. simsiam: -cos to itself, both directions averaged.
    form: Literal["byol", "simsiam"] = "byol"

    @property
    def needs_teacher(self) -> bool:
        return self.form == "byol"


class BootstrapObjective:
    """On the outputs called `name`, unit rows, crop-major: predictions of the student [C*B, dim] and their targets.

    Those are the teacher's [G*B, dim] or, for SimSiam, the student's "<name>.projection" [C*B, dim] of its global crops.
    It remembers nothing, and draws nothing from `seed`.
    """

    def __init__(
        self,
        config: BootstrapConfig,
        dim: int,
        *,
        seed: int = 0,
        name: str = "bootstrap",
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.config, self.dim, self.name, self.dtype = config, dim, name, dtype
        self.needs_teacher = config.needs_teacher

    def context(self) -> dict[str, Tensor]:
        return {}

    def teacher_context(self) -> dict[str, Tensor]:
        return {}

    def loss(self, student: dict[str, Tensor], teacher: dict[str, Tensor], info: StepInfo) -> Outcome:
        """Weights of the pairs are `pair_weights`', so two crops give the published sums. ValueError for other rows."""
        rows = info.output(self.name, "student", student)
        targets, weights = self._targets(student, teacher, info)
        for who, given in (("predictions", rows), ("targets", targets)):
            if given.shape[1:] != (self.dim,):
                raise ValueError(
                    f"{self.name}: {who} are {list(given.shape)}, not [n, {self.dim}]; build head and objective from one "
                    f"recipe"
                )
        with torch.autocast(rows.device.type, enabled=False):
            rows, targets = rows.to(self.dtype), targets.detach().to(self.dtype)
            crops, aims = rows.view(-1, info.batch, self.dim), targets.view(-1, info.batch, self.dim)
            cosine = torch.einsum("gbd,cbd->gcb", aims, crops).mean(-1)
            cosine = (cosine * constant(weights, rows)).sum()
            loss = 2 * (2 - 2 * cosine) if self.config.form == "byol" else -cosine
        logs: dict[str, Tensor | float] = {
            f"loss/{self.name}": loss.detach(),
            f"{self.name}/similarity": cosine.detach(),
            f"{self.name}/prediction_std": spread(crops[0]),
            f"{self.name}/target_std": spread(aims[0]),
        }
        return Outcome(loss, logs)

    def _targets(
        self, student: dict[str, Tensor], teacher: dict[str, Tensor], info: StepInfo
    ) -> tuple[Tensor, list[list[float]]]:
        """Rows [T*B, dim] and the weights [T][C] of each with each crop."""
        if self.config.form == "byol":
            return info.output(self.name, "teacher", teacher), info.pair_weights(same=info.same_views)
        if info.student_crops < 2 or not info.student_globals:
            raise ValueError(
                f"{self.name}: SimSiam compares crops that the student sees, but it sees {info.student_crops}; give the "
                "recipe one view with count: 2"
            )
        key = f"{self.name}.projection"
        if key not in student or len(student[key]) != info.student_crops * info.batch:
            found = list(student[key].shape) if key in student else "missing"
            raise ValueError(
                f"{self.name}: SimSiam's targets, the student's {key!r}, are {found}; give its head a predictor, and "
                f"one row for each of {info.student_crops} crops of {info.batch} images"
            )
        targets = student[key][: info.student_globals * info.batch]
        return targets, pair_weights(info.student_globals, info.student_crops, info.student_globals)

    def commit(self, outcome: Outcome) -> None:
        """Nothing is remembered."""

    def state(self) -> dict[str, Tensor]:
        return {}

    def load(self, state: dict[str, Tensor]) -> None:
        check_state(self.name, state, {})


@torch.no_grad()
def spread(rows: Tensor) -> Tensor:
    """Standard deviation of unit rows [n, d], a channel, times sqrt(d): 1 spread over the sphere, 0 one point.

    SimSiam, section 4.1. `health.feature_std` without a wait for the device; 0 for a single row.
    """
    return rows.std(0, correction=min(1, len(rows) - 1)).mean() * math.sqrt(rows.shape[1])
