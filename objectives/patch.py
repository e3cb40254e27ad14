"""Patches: tell what is hidden, the densest granularity (iBOT, arXiv 2111.07832, eq. 3; section 5 of the notes on it).

The student sees its global crops with patches hidden; the teacher sees the same crops whole, and its centred, sharpened
assignments of the hidden patches are what the student must find. Each crop's mean over its hidden patches counts the
same, and a crop without any counts as 0. The class token's part of iBOT is the group objective in DINO's form. Masks
come from the step, logits of the hidden patches alone from the networks; what is kept here is a centre of the patches'.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from .centre import Centred
from .protocol import Outcome, StepInfo
from .prototypes import teacher_targets
from .temperature import warm_temperature

Temperature = Annotated[float, Field(gt=0)]


class PatchConfig(BaseModel):
    """Masked image modelling with an online tokenizer. Defaults are those of iBOT's recipe for ViT-S/16."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    student_temperature: Temperature = 0.1  # iBOT: 0.1
    teacher_temperature: tuple[Temperature, Temperature] = (0.04, 0.07)  # of patches, start and end; iBOT: .04, .07
    warmup: float = Field(default=0.0375, ge=0, le=1)  # share of the run from start to end; iBOT: 30 of 800 epochs
    # Epochs of the run, for a temperature that steps once an epoch as the official code's; None: it moves every step.
    epochs: int | None = Field(default=None, ge=1)
    start: float = Field(default=0.0, ge=0, lt=1)  # share of the run before the first mask; iBOT: 0 (pred_start_epoch)
    center_momentum: float = Field(default=0.9, ge=0, lt=1)  # of the running mean of all teacher patches; iBOT: 0.9

    def teacher_temperature_at(self, progress: float) -> float:
        """In the share of the run that is done; the warm-up begins with the first masks. See `warm_temperature`."""
        return warm_temperature(self.teacher_temperature, self.warmup, max(0.0, progress - self.start), self.epochs)


class PatchObjective(Centred):
    """Cross-entropy on the outputs "patch": logits of the M hidden patches [M, K] of both networks, in one order.

    The teacher's "patch_mean" [1, K] moves the centre. `StepInfo.masks` says which patch belongs to which crop.
    """

    name = "patch"

    def __init__(
        self,
        config: PatchConfig,
        prototypes: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(prototypes, config.center_momentum, dtype=dtype, device=device)
        self.config = config

    def loss(self, student: dict[str, Tensor], teacher: dict[str, Tensor], info: StepInfo) -> Outcome:
        """Carries the mean of the teacher's patch logits [1, K]. ValueError when masks, views or outputs do not fit."""
        counts = self._hidden(info)
        hidden = int(counts.sum())
        for who, side in (("student", student), ("teacher", teacher)):
            wanted = {"patch": hidden} | ({"patch_mean": 1} if who == "teacher" else {})
            for name, rows in wanted.items():
                if name not in side:
                    raise ValueError(
                        f"objective {self.name}: the {who} gives no {name!r}; build it with patch among student.objectives"
                    )
                if side[name].shape != (rows, self.center.shape[1]):
                    raise ValueError(
                        f"objective {self.name}: the {who}'s {name!r} is {tuple(side[name].shape)}, and {hidden} hidden "
                        f"patches and {self.center.shape[1]} prototypes want {(rows, self.center.shape[1])}"
                    )
        temperature = self.config.teacher_temperature_at(info.progress)
        share = 1.0 / (counts.clamp(min=1).double() * len(counts))
        weights = torch.repeat_interleave(share, counts).to(
            self.center.device, self.center.dtype, non_blocking=True
        )  # [M]
        with torch.autocast(self.center.device.type, enabled=False):
            x = student["patch"].to(self.center.dtype) / self.config.student_temperature
            targets = teacher_targets(teacher["patch"].detach(), self.center, temperature)
            terms = torch.logsumexp(x, 1) - torch.linalg.vecdot(targets.probabilities, x)
            loss = torch.dot(terms, weights)
        nothing = self.center.new_zeros(())
        logs: dict[str, Tensor | float] = {
            f"loss/{self.name}": loss.detach(),
            f"{self.name}/hidden_ratio": hidden / max(1, info.masks.numel() if info.masks is not None else 0),
            f"{self.name}/teacher_entropy_ratio": targets.entropy_ratio if hidden else nothing,
            f"{self.name}/batch_entropy_ratio": targets.batch_entropy_ratio if hidden else nothing,
            f"{self.name}/center_norm": torch.linalg.vector_norm(self.center),
            f"{self.name}/teacher_temperature": temperature,
        }
        return Outcome(loss, logs, {"mean": teacher["patch_mean"].detach().to(self.center.dtype)})

    def _hidden(self, info: StepInfo) -> Tensor:
        """Hidden patches of each crop, int64 [G*B], on the host."""
        if not info.same_views or info.student_globals != info.teacher_crops:
            raise ValueError(
                f"objective {self.name}: the student's {info.student_globals} global crops must be the teacher's "
                f"{info.teacher_crops}; give the views of the largest size the role both"
            )
        if info.masks is None or info.masks.ndim != 3 or len(info.masks) != info.teacher_crops * info.batch:
            found = "none" if info.masks is None else str(tuple(info.masks.shape))
            raise ValueError(
                f"objective {self.name}: masks [{info.teacher_crops * info.batch}, h, w] are wanted, there are {found}"
            )
        return info.masks.cpu().flatten(1).sum(1)


def patch_cross_entropy_reference(student: Tensor, teacher: Tensor, masks: Tensor, *, temperature: float) -> Tensor:
    """The loss from its formula: logits [n, P, K] of all patches of n crops, assignments [n, P, K], masks [n, P]."""
    terms = -(teacher * torch.log_softmax(student / temperature, -1)).sum(-1)  # [n, P]
    per_crop = [t[m].sum() / max(1, int(m.sum())) for t, m in zip(terms, masks, strict=True)]
    return torch.stack(per_crop).mean()
