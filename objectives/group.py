"""Groups: agreement on soft assignments to learned prototypes, the coarsest granularity of Mugs (GDS).

A DINO loss: the teacher's logits are centred by their running mean, against one prototype for all, and sharpened by a
low temperature, against no preference at all. The prototypes are the last layer of the student's head; what is kept here
is the centre. Section 1.4 of the notes on the official code.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from .memory import check_state
from .protocol import Outcome, StepInfo
from .prototypes import group_cross_entropy, teacher_targets

Temperature = Annotated[float, Field(gt=0)]


class GroupConfig(BaseModel):
    """Clustering against a centred, sharpened teacher (as in DINO)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    student_temperature: Temperature = 0.1  # Mugs: 0.1
    teacher_temperature: tuple[Temperature, Temperature] = (0.04, 0.07)  # start, end; Mugs: .04, .07 (S-100: .04, .04)
    warmup: float = Field(
        default=0.1, ge=0, le=1
    )  # share of the run from start to end; Mugs: 30 of 300 epochs, 50 of 400 (B)
    center_momentum: float = Field(default=0.9, ge=0, lt=1)  # of the running mean of teacher logits; Mugs: 0.9

    def teacher_temperature_at(self, progress: float) -> float:
        """Linear from start to end over the warm-up, in the share of the run that is done (official: by whole epochs)."""
        start, end = self.teacher_temperature
        return start + (end - start) * (min(1.0, progress / self.warmup) if self.warmup else 1.0)


class GroupObjective:
    """Cross-entropy on the outputs "group": student logits [C*B, K], teacher logits [G*B, K], crop-major."""

    name = "group"

    def __init__(
        self,
        config: GroupConfig,
        prototypes: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.config = config
        self.center = torch.zeros(1, prototypes, dtype=dtype, device=device)

    def context(self) -> dict[str, Tensor]:
        return {}

    def teacher_context(self) -> dict[str, Tensor]:
        return {}

    def loss(self, student: dict[str, Tensor], teacher: dict[str, Tensor], info: StepInfo) -> Outcome:
        """Carries the mean of this rank's teacher logits [1, K] for the centre."""
        temperature = self.config.teacher_temperature_at(info.progress)
        logits = teacher[self.name].detach()
        with torch.autocast(logits.device.type, enabled=False):
            targets = teacher_targets(logits, self.center, temperature)
            loss = group_cross_entropy(
                student[self.name],
                targets.probabilities,
                student_crops=info.student_crops,
                student_globals=info.student_globals,
                teacher_crops=info.teacher_crops,
                temperature=self.config.student_temperature,
            )
            mean = logits.mean(0, keepdim=True, dtype=self.center.dtype)
        logs: dict[str, Tensor | float] = {
            f"loss/{self.name}": loss.detach(),
            f"{self.name}/teacher_entropy_ratio": targets.entropy_ratio,
            f"{self.name}/batch_entropy_ratio": targets.batch_entropy_ratio,
            f"{self.name}/center_norm": torch.linalg.vector_norm(self.center),
            f"{self.name}/teacher_temperature": temperature,
        }
        return Outcome(loss, logs, {"mean": mean})

    def commit(self, outcome: Outcome) -> None:
        """Move the centre towards the mean over the ranks, which bring equal numbers of rows."""
        mean = outcome.commit["mean"].mean(0, keepdim=True)
        momentum = self.config.center_momentum
        self.center = self.center * momentum + mean * (1 - momentum)

    def state(self) -> dict[str, Tensor]:
        return {"center": self.center.clone()}

    def load(self, state: dict[str, Tensor]) -> None:
        check_state(self.name, state, {"center": self.center})
        self.center = state["center"].to(self.center.device, copy=True, memory_format=torch.contiguous_format)
