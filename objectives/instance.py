"""Instance discrimination: the finest granularity of Mugs (IDS), and MoCo v1 and v2 themselves.

Every student crop must find its own image's teacher crop among the teacher projections of earlier steps (a MoCo
queue). Values and order of events follow the official code (section 1.2 of the notes on it): both teacher views see
the queue as it was before the step, afterwards view 0 of all images is enqueued, then view 1. MoCo (arXiv 1911.05722,
2003.04297; facebookresearch/moco, moco/builder.py) has one query crop and one key crop, so its one pair is j = i. It
moves the teacher before the pass over the keys, which is where a teacher moved after the last step stands.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from .contrast import contrast
from .memory import RingMemory
from .protocol import Outcome, StepInfo


class InstanceConfig(BaseModel):
    """Instance discrimination with a queue of negatives."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    queue: int = Field(default=65536, ge=1)  # teacher projections kept as negatives; Mugs, MoCo v1, v2: 65536
    temperature: float = Field(default=0.2, gt=0)  # of all logits; Mugs, MoCo v2: 0.2, MoCo v1: 0.07
    # mugs: teacher crop i with every student crop but j = i, whether or not they are the same crop. all: every pair of
    # different crops, so that j = i counts where student and teacher see crops of their own (MoCo v1, v2).
    pairs: Literal["mugs", "all"] = "mugs"

    def same(self, same_views: bool) -> bool:
        """Whether pairs j = i are left out; `same_views`: the student's global crop i is the teacher's crop i."""
        return self.pairs == "mugs" or same_views


class InstanceObjective:
    """InfoNCE on the outputs called `name`: student [C*B, dim] and teacher [G*B, dim], unit rows, crop-major."""

    def __init__(
        self,
        config: InstanceConfig,
        dim: int,
        *,
        seed: int,
        name: str = "instance",
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.config, self.name = config, name
        self.queue = RingMemory(
            config.queue, dim, seed=seed, unit=True, name=f"{name}.queue", dtype=dtype, device=device
        )

    def context(self) -> dict[str, Tensor]:
        return {}

    def teacher_context(self) -> dict[str, Tensor]:
        return {}

    def loss(self, student: dict[str, Tensor], teacher: dict[str, Tensor], info: StepInfo) -> Outcome:
        """Adds no more than logs and the teacher rows to enqueue, [B, G, dim]. ValueError if they cannot fit."""
        queries, keys = info.outputs(self.name, student, teacher)
        self.queue.check(*keys.shape)
        with torch.autocast(self.queue.rows.device.type, enabled=False):
            keys = keys.detach().to(self.queue.rows.dtype)
            result = contrast(
                queries.to(self.queue.rows.dtype),
                keys,
                self.queue.rows,
                student_crops=info.student_crops,
                student_globals=info.student_globals,
                teacher_crops=info.teacher_crops,
                temperature=self.config.temperature,
                same=self.config.same(info.same_views),
            )
        logs: dict[str, Tensor | float] = {
            f"loss/{self.name}": result.loss.detach(),
            f"{self.name}/positive_similarity": result.similarity,
            f"{self.name}/accuracy": result.accuracy,
            **self.queue.logs(),
        }
        keys = keys.view(info.teacher_crops, info.batch, -1).transpose(0, 1).contiguous()
        return Outcome(result.loss, logs, {"keys": keys})

    def commit(self, outcome: Outcome) -> None:
        """Enqueue view by view, images (of all ranks, in order) inside a view."""
        self.queue.enqueue(outcome.commit["keys"].transpose(0, 1).flatten(0, 1))

    def state(self) -> dict[str, Tensor]:
        return {f"queue.{key}": tensor for key, tensor in self.queue.state().items()}

    def load(self, state: dict[str, Tensor]) -> None:
        self.queue.load(strip(self.name, state, "queue")["queue"])


def strip(owner: str, state: dict[str, Tensor], *parts: str) -> dict[str, dict[str, Tensor]]:
    """Split names `<part>.<rest>` by part. ValueError naming what belongs to no part."""
    split: dict[str, dict[str, Tensor]] = {part: {} for part in parts}
    for key, tensor in state.items():
        part, _, rest = key.partition(".")
        if part not in split:
            raise ValueError(
                f"{owner}: the saved state has {key!r}, which belongs to none of {', '.join(parts)}; "
                "resume with the recipe that wrote it"
            )
        split[part][rest] = tensor
    return split
