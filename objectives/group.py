"""Groups: agreement on soft assignments to learned prototypes, the coarsest granularity of Mugs (GDS), and DINO's own.

The teacher's logits are centred by their running mean, against one prototype for all, and sharpened by a low
temperature, against no preference at all; balancing them over the batch (sinkhorn.py) does the former's work, too. The
prototypes are the last layer of the student's head; what is kept here is the centre. `form` says whose weighting of
crops and whose published values are the defaults: Mugs' (section 1.4 of the notes on the official code) or DINO's
(arXiv 2104.14294; facebookresearch/dino, main_dino.py; section 5 there).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from .centre import Centred
from .koleo import koleo
from .protocol import Outcome, StepInfo
from .prototypes import Targets, group_cross_entropy, streamed_cross_entropy, teacher_targets
from .sinkhorn import sinkhorn_offsets
from .temperature import warm_temperature

Temperature = Annotated[float, Field(gt=0)]
# DINO's defaults where they differ: no warm-up of the temperature (its longer recipes: .04 to .07 over 30 of 300 epochs).
DINO = {"teacher_temperature": (0.04, 0.04), "warmup": 0.0}


class GroupConfig(BaseModel):
    """Clustering against a centred, sharpened teacher (as in DINO)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    # mugs: pairs with a global student crop weigh half, those with a local one the other half; dino: all pairs the same.
    form: Literal["mugs", "dino"] = "mugs"
    student_temperature: Temperature = 0.1  # Mugs, DINO: 0.1
    teacher_temperature: tuple[Temperature, Temperature] = (0.04, 0.07)  # start, end; Mugs: .04, .07 (S-100: .04, .04)
    warmup: float = Field(
        default=0.1, ge=0, le=1
    )  # share of the run from start to end; Mugs: 30 of 300 epochs, 50 of 400 (B)
    # Epochs of the run, for a temperature that steps once an epoch as the official code's; None: it moves every step.
    epochs: int | None = Field(default=None, ge=1)
    center_momentum: float = Field(default=0.9, ge=0, lt=1)  # of the running mean of teacher logits; Mugs, DINO: 0.9
    # What keeps the assignments apart: the running centre, or Sinkhorn-Knopp over the batch (SwAV, DINOv2).
    balance: Literal["centre", "sinkhorn"] = "centre"
    iterations: int = Field(default=3, ge=1)  # of Sinkhorn-Knopp; SwAV, DINOv2: 3
    # Weight of the KoLeo term on the student's global class tokens; Mugs, DINO: none, DINOv2: 0.1.
    koleo: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    # Images over which Sinkhorn-Knopp and KoLeo look, in the order of the positions; it divides a forward's images, so
    # that the number of ranks does not matter. None: Sinkhorn-Knopp over all ranks' images of a micro-batch, KoLeo over
    # this rank's.
    virtual_batch: int | None = Field(default=None, ge=2)

    @model_validator(mode="before")
    @classmethod
    def _published(cls, given: Any) -> Any:
        return {**DINO, **given} if isinstance(given, dict) and given.get("form") == "dino" else given

    @model_validator(mode="after")
    def _used(self) -> GroupConfig:
        if self.virtual_batch and not self.over_batch:
            raise ValueError(
                f"virtual_batch {self.virtual_batch} is for balance: sinkhorn and koleo; set one of them or leave it out"
            )
        return self

    @property
    def over_batch(self) -> bool:
        """Whether an image's loss depends on which others share its batch."""
        return self.balance == "sinkhorn" or self.koleo > 0

    @property
    def over_ranks_batch(self) -> bool:
        """Whether it depends on which images share a forward, and so on the number of processes."""
        return self.over_batch and not self.virtual_batch

    def teacher_temperature_at(self, progress: float) -> float:
        """In the share of the run that is done. See `warm_temperature`."""
        return warm_temperature(self.teacher_temperature, self.warmup, progress, self.epochs)


class GroupObjective(Centred):
    """Cross-entropy on the outputs "group": student logits [C*B, K], teacher logits [G*B, K], crop-major.

    Or, without the student's logits, on its "group.lse" and "group.agreement" with the teacher's `aims`.
    With KoLeo also on the student's "class_token" [C*B, d].
    """

    name = "group"

    def __init__(
        self,
        config: GroupConfig,
        prototypes: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(prototypes, config.center_momentum, dtype=dtype, device=device)
        self.config = config

    @torch.no_grad()
    def aims(self, teacher: dict[str, Tensor], info: StepInfo) -> dict[str, Tensor]:
        """The teacher's assignments and their temperature, for a student that streams its prototypes, and their health.

        "group.targets" [G, B, K], "group.temperature" [] of the student, on the host. Collective where `loss` is.
        """
        config, virtual = self.config, self.config.virtual_batch
        if virtual and info.batch % virtual:
            raise ValueError(
                f"{self.name}: virtual_batch {virtual} does not divide the {info.batch} images of one forward"
            )
        logits = info.output(self.name, "teacher", teacher)
        if logits.shape[1] != self.center.shape[1]:
            raise ValueError(
                f"{self.name}: {logits.shape[1]} teacher logits for {self.center.shape[1]} prototypes; build head and "
                f"objective from one recipe"
            )
        with torch.autocast(logits.device.type, enabled=False):
            targets = self._targets(logits, config.teacher_temperature_at(info.progress), info)
        return {
            f"{self.name}.targets": targets.probabilities.view(info.teacher_crops, info.batch, -1),
            f"{self.name}.temperature": torch.tensor(config.student_temperature, dtype=torch.float64),
            f"{self.name}.entropy_ratio": targets.entropy_ratio,
            f"{self.name}.batch_entropy_ratio": targets.batch_entropy_ratio,
        }

    def loss(self, student: dict[str, Tensor], teacher: dict[str, Tensor], info: StepInfo) -> Outcome:
        """Carries the mean of this rank's teacher logits [1, K] for the centre. ValueError when shapes disagree.

        With `balance: sinkhorn` and no virtual batch this is collective, unless `teacher` has the `aims`.
        """
        config, crops = self.config, {"student_crops": info.student_crops, "teacher_crops": info.teacher_crops}
        how = {**crops, "student_globals": info.student_globals, "equal": config.form == "dino"}
        streamed = f"{self.name}.lse" in student
        given = None if streamed else info.output(self.name, "student", student)
        logits = info.output(self.name, "teacher", teacher).detach()
        if streamed and f"{self.name}.targets" not in teacher:
            raise ValueError(
                f"{self.name}: the student was shown assignments that are missing here; add what `aims` gave"
            )
        aims = teacher if f"{self.name}.targets" in teacher else self.aims(teacher, info)
        with torch.autocast(logits.device.type, enabled=False):
            if given is None:
                loss = streamed_cross_entropy(student[f"{self.name}.lse"], student[f"{self.name}.agreement"], **how)
            else:
                targets = aims[f"{self.name}.targets"].flatten(0, 1)
                loss = group_cross_entropy(given, targets, temperature=config.student_temperature, **how)
            mean = logits.mean(0, keepdim=True, dtype=self.center.dtype)
            logs: dict[str, Tensor | float] = {}
            if config.koleo:
                globals_ = student["class_token"][: info.student_globals * info.batch].to(self.center.dtype)
                spread = koleo(globals_, config.virtual_batch or info.batch)
                logs[f"{self.name}/koleo"] = spread.detach()
                loss = loss + config.koleo * spread
        logs |= {
            f"loss/{self.name}": loss.detach(),
            f"{self.name}/teacher_entropy_ratio": aims[f"{self.name}.entropy_ratio"],
            f"{self.name}/batch_entropy_ratio": aims[f"{self.name}.batch_entropy_ratio"],
            f"{self.name}/center_norm": torch.linalg.vector_norm(self.center),
            f"{self.name}/teacher_temperature": config.teacher_temperature_at(info.progress),
        }
        return Outcome(loss, logs, {"mean": mean})

    def _targets(self, logits: Tensor, temperature: float, info: StepInfo) -> Targets:
        if self.config.balance == "centre":
            return teacher_targets(logits, self.center, temperature)
        rows = logits.to(self.center.dtype)
        offsets = sinkhorn_offsets(
            rows.view(info.teacher_crops, info.batch, -1),
            temperature,
            self.config.iterations,
            virtual=self.config.virtual_batch,
            gather=info.gather,
        )
        return teacher_targets(rows + offsets.view_as(rows) * temperature, torch.zeros_like(self.center), temperature)
