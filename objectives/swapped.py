"""Swapped prediction (SwAV, arXiv 2006.09882, eq. 1-5): each crop foretells to which prototypes the image's others go.

Codes are the student's own: scores of one global crop, of all images of the step, balanced by Sinkhorn-Knopp, each crop
on its own. In small batches rows of earlier steps take part in the balancing (the queue), not in the loss. The weighting
is that of facebookresearch/swav, main_swav.py: mean over the crops with a code of the mean over all other crops.
The prototypes are the last layer of the student's head, of length 1 by weight norm. There they are set back to length 1
before each step instead; the scores are the same, the steps are not quite: weight norm has no gradient along a prototype
and counts its length in, which SGD lets grow, so that directions turn more slowly. Under LARS, whose step is a share of
the length, that cancels, and what remains is that theirs counts the gradient along the prototype in its norm.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from .instance import strip
from .memory import RingMemory
from .protocol import Outcome, StepInfo
from .prototypes import group_cross_entropy
from .sinkhorn import sinkhorn_offsets


class SwappedConfig(BaseModel):
    """Online clustering with balanced codes. Values are SwAV's, those of the queue its recipe's for a batch of 256."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    needs_teacher: ClassVar[bool] = False

    temperature: float = Field(default=0.1, gt=0)  # of the predictions; SwAV: 0.1
    epsilon: float = Field(default=0.05, gt=0)  # of the codes, the temperature of Sinkhorn-Knopp; SwAV: 0.05
    iterations: int = Field(default=3, ge=1)  # of Sinkhorn-Knopp; SwAV: 3
    # Projections of each global crop that are kept to balance with; SwAV: 3840 for 256 images, 0 (none) for 4096.
    queue: int = Field(default=3840, ge=0)
    start: float = Field(
        default=0.075, ge=0, le=1
    )  # share of the run before the queue is filled; SwAV: 15 of 200 epochs
    # Images whose codes are balanced together (with the queue, if there is one), in the order of the positions; it divides
    # a forward's images, so that the number of ranks does not matter. None: those of all ranks' micro-batches, as SwAV.
    virtual_batch: int | None = Field(default=None, ge=2)

    @property
    def over_ranks_batch(self) -> bool:
        """Whether the loss of an image depends on who shares its micro-batch, on any rank."""
        return self.virtual_batch is None


class SwappedObjective:
    """On scores [C*B, K] called `name` and unit projections [C*B, dim] called "<name>.projection", of the student alone.

    crops: global crops whose codes are worked out, the first of each image; prototypes: K.
    """

    needs_teacher = False

    def __init__(
        self,
        config: SwappedConfig,
        dim: int,
        *,
        prototypes: int,
        crops: int = 2,
        seed: int,
        name: str = "swapped",
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        if crops < 1 or prototypes < 2:
            raise ValueError(f"{name}: codes need a global crop and two prototypes, got {crops} and {prototypes}")
        self.config, self.name, self.crops, self.prototypes = config, name, crops, prototypes
        self.dtype, self.dim = dtype, dim
        self.queues = [
            RingMemory(config.queue, dim, seed=seed, unit=True, name=f"{name}.queue{crop}", dtype=dtype, device=device)
            for crop in range(crops if config.queue else 0)
        ]

    @property
    def in_use(self) -> bool:
        """Whether the queue takes part: from the step on that finds it full."""
        return bool(self.queues) and all(queue.filled == queue.capacity for queue in self.queues)

    def context(self) -> dict[str, Tensor]:
        """ "<name>.queue" [crops * queue, dim] once it is in use: the student is to score it, too."""
        return {f"{self.name}.queue": torch.cat([queue.rows for queue in self.queues])} if self.in_use else {}

    def teacher_context(self) -> dict[str, Tensor]:
        return {}

    def loss(self, student: dict[str, Tensor], teacher: dict[str, Tensor], info: StepInfo) -> Outcome:
        """Carries the global crops' projections [B, crops, dim] once the queue is being filled.

        Collective without a virtual batch. ValueError when outputs, crops or the queue do not fit.
        """
        scores = info.output(self.name, "student", student)
        self._check(scores, info)
        with torch.autocast(scores.device.type, enabled=False):
            own = scores.detach()[: self.crops * info.batch].to(self.dtype).view(self.crops, info.batch, -1)
            codes = self.codes(own, self._queue_scores(student), info)
            # Each pair of a code and another crop weighs the same, which is SwAV's mean of means.
            loss = group_cross_entropy(
                scores,
                codes.flatten(0, 1),
                student_crops=info.student_crops,
                student_globals=info.student_globals,
                teacher_crops=self.crops,
                temperature=self.config.temperature,
                equal=True,
            )
        logs = {f"loss/{self.name}": loss.detach(), **self._signs(own, codes)}
        commit: dict[str, Tensor] = {}
        if self.queues and info.progress >= self.config.start:
            rows = info.output(f"{self.name}.projection", "student", student)[: self.crops * info.batch]
            self.queues[0].check(info.batch, rows.shape[1])
            rows = rows.detach().to(self.dtype).view(self.crops, info.batch, -1)
            commit["projections"] = rows.transpose(0, 1).contiguous()
        return Outcome(loss, logs, commit)

    @torch.no_grad()
    def codes(self, scores: Tensor, queue: Tensor | None, info: StepInfo) -> Tensor:
        """Balanced assignments [crops, B, K], rows that sum to one, of scores [crops, B, K] and those of the queue.

        queue [crops, Q, K], equal on all ranks, or None. Over several ranks each counts its share of the queue.
        """
        config, (crops, batch, _) = self.config, scores.shape
        gather = None if config.virtual_batch else info.gather
        if queue is not None and gather is not None:
            ends = [queue.shape[1] * each // info.world for each in (info.rank, info.rank + 1)]
            queue = queue[:, ends[0] : ends[1]]
        size = config.virtual_batch or batch
        codes = torch.empty_like(scores)
        for crop in range(crops):
            for first in range(0, batch, size):
                own = scores[crop, first : first + size]
                rows = own if queue is None else torch.cat([queue[crop], own])
                offsets = sinkhorn_offsets(rows.unsqueeze(0), config.epsilon, config.iterations, gather=gather)
                codes[crop, first : first + size] = torch.softmax(own / config.epsilon + offsets[0, 0], dim=1)
        return codes

    def _signs(self, scores: Tensor, codes: Tensor) -> dict[str, Tensor | float]:
        """Signs of life: how sharp codes are, how evenly they are spread, whether global crops foretell each other."""
        unit = math.log(self.prototypes)
        with torch.no_grad():
            chosen, foretold = codes.argmax(2), scores.argmax(2)
            logs: dict[str, Tensor | float] = {
                f"{self.name}/code_entropy_ratio": torch.special.entr(codes).sum(2).mean() / unit,
                f"{self.name}/batch_entropy_ratio": torch.special.entr(codes.mean((0, 1))).sum() / unit,
                f"{self.name}/queue_in_use": float(self.in_use),
            }
            if self.crops > 1:
                logs[f"{self.name}/accuracy"] = (chosen == foretold.roll(1, 0)).to(self.dtype).mean()
        for queue in self.queues:
            logs |= queue.logs()
        return logs

    def _check(self, scores: Tensor, info: StepInfo) -> None:
        if scores.shape[1] != self.prototypes:
            raise ValueError(
                f"{self.name}: {scores.shape[1]} scores for {self.prototypes} prototypes; build head and objective from "
                "one recipe"
            )
        if info.student_globals != self.crops:
            raise ValueError(
                f"{self.name}: the student has {info.student_globals} global crops and the objective codes for "
                f"{self.crops}; build both from one recipe"
            )
        virtual = self.config.virtual_batch
        if virtual and info.batch % virtual:
            raise ValueError(
                f"{self.name}: virtual_batch {virtual} does not divide the {info.batch} images of one forward"
            )

    def _queue_scores(self, student: dict[str, Tensor]) -> Tensor | None:
        """Of the queue by the prototypes of this step, [crops, queue, K]; None while it is not in use."""
        if not self.in_use:
            return None
        key, wanted = f"{self.name}.queue_scores", (self.crops * self.config.queue, self.prototypes)
        found = student.get(key)
        if found is None or found.shape != wanted:
            given = "nothing" if found is None else str(tuple(found.shape))
            raise ValueError(
                f'{self.name}: the queue is in use, and "{key}" is {given} where {wanted} is expected; hand this '
                "objective's context() to the student's forward"
            )
        return found.detach().to(self.dtype).view(self.crops, self.config.queue, self.prototypes)

    def commit(self, outcome: Outcome) -> None:
        """Enqueue the rows of all ranks, in the order of the positions, each crop's in its own queue."""
        if "projections" not in outcome.commit:
            return
        for crop, queue in enumerate(self.queues):
            queue.enqueue(outcome.commit["projections"][:, crop])

    def state(self) -> dict[str, Tensor]:
        return {f"queue{crop}.{key}": tensor for crop, q in enumerate(self.queues) for key, tensor in q.state().items()}

    def load(self, state: dict[str, Tensor]) -> None:
        split = strip(self.name, state, *(f"queue{crop}" for crop in range(len(self.queues))))
        for crop, queue in enumerate(self.queues):
            queue.load(split[f"queue{crop}"])
