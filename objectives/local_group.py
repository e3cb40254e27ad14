"""Local groups: an image with its nearest neighbours, Mugs' middle granularity (LGDS).

Inside the networks each crop fetches its neighbours from a memory and is mixed with them; here the mixed features
are contrasted as in instance discrimination, with a queue of their own, and the memories are kept: the student searches
features of the student (global crop 0, weakly augmented images only), the teacher those of the teacher. Section 1.3
of the notes on the official code.
"""

from __future__ import annotations

from typing import Self

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from ..models.products import product
from .instance import InstanceConfig, InstanceObjective, strip
from .memory import RingMemory
from .protocol import Outcome, StepInfo

HEALTH_IMAGES = (
    64  # images whose neighbours are looked at for the logs: enough for a mean, cheap beside the student's search
)


class LocalGroupConfig(BaseModel):
    """Local-group discrimination: InfoNCE on features that were mixed with those of the nearest neighbours."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    queue: int = Field(default=65536, ge=1)  # teacher projections kept as negatives; Mugs: 65536
    memory: int = Field(
        default=65536, ge=1
    )  # features to find neighbours in, for student and teacher each; Mugs: 65536
    neighbours: int = Field(default=8, ge=1)  # neighbours mixed with each crop (the student's top-k); Mugs: 8
    temperature: float = Field(default=0.2, gt=0)  # of all logits; Mugs: 0.2
    compat: bool = False  # True: the memories skip slots as the official code's do; paper: a plain ring

    @model_validator(mode="after")
    def _enough(self) -> Self:
        if self.neighbours > self.memory:
            raise ValueError(
                f"neighbours {self.neighbours} cannot be found in a memory of {self.memory}; enlarge memory"
            )
        return self


class LocalGroupObjective:
    """InfoNCE on the outputs "local_group", and the memories that the networks search (fed from "memory_row")."""

    name = "local_group"

    def __init__(
        self,
        config: LocalGroupConfig,
        dim: int,
        features: int,
        *,
        seed: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.config = config
        self._contrast = InstanceObjective(
            InstanceConfig(queue=config.queue, temperature=config.temperature),
            dim,
            seed=seed,
            name=self.name,
            dtype=dtype,
            device=device,
        )
        self.student, self.teacher = (
            RingMemory(
                config.memory,
                features,
                seed=seed,
                unit=False,
                compat=config.compat,
                name=f"{self.name}.{who}",
                dtype=dtype,
                device=device,
            )
            for who in ("student", "teacher")
        )

    @property
    def queue(self) -> RingMemory:
        return self._contrast.queue

    def context(self) -> dict[str, Tensor]:
        """The student's memory: `local_group.bank` [memory, features], and the lengths of its rows, `local_group.norms`."""
        return {"local_group.bank": self.student.rows, "local_group.norms": self.student.norms}

    def teacher_context(self) -> dict[str, Tensor]:
        """The teacher's memory under the same names."""
        return {"local_group.bank": self.teacher.rows, "local_group.norms": self.teacher.norms}

    def loss(self, student: dict[str, Tensor], teacher: dict[str, Tensor], info: StepInfo) -> Outcome:
        """The contrast's outcome, with rows of global crop 0 [B, features] for both memories and the weak flags [B]."""
        for memory, side in ((self.student, student), (self.teacher, teacher)):
            if "memory_row" not in side or len(side["memory_row"]) < info.batch:
                raise ValueError(
                    f"{memory.name}: no 'memory_row' of {info.batch} images to remember; build the networks with "
                    f"local_group among student.objectives, and give both a global view"
                )
            memory.check(info.batch, side["memory_row"].shape[1])
        if info.weak is not None and info.weak.shape != (info.batch,):
            raise ValueError(f"weak flags of shape {tuple(info.weak.shape)} for a batch of {info.batch} images")
        outcome = self._contrast.loss(student, teacher, info)
        for key, rows in (("student", student["memory_row"]), ("teacher", teacher["memory_row"])):
            outcome.commit[key] = rows[: info.batch].detach().to(self.student.rows.dtype)
        if info.weak is not None:
            outcome.commit["weak"] = info.weak.to(torch.uint8)  # not every collective takes bool
        outcome.logs.update(self._neighbours(outcome.commit["student"]))
        outcome.logs.update({**self.student.logs(), **self.teacher.logs()})
        return outcome

    def commit(self, outcome: Outcome) -> None:
        """Enqueue the keys, the teacher's rows, and those of the student's rows whose image was weakly augmented."""
        self._contrast.commit(outcome)
        rows = outcome.commit["student"]
        weak = outcome.commit.get("weak")
        self.student.enqueue(rows if weak is None else rows[weak.bool()])
        self.teacher.enqueue(outcome.commit["teacher"])

    def state(self) -> dict[str, Tensor]:
        state = self._contrast.state()
        for part, memory in (("student", self.student), ("teacher", self.teacher)):
            state.update({f"{part}.{key}": tensor for key, tensor in memory.state().items()})
        return state

    def load(self, state: dict[str, Tensor]) -> None:
        split = strip(self.name, state, "queue", "student", "teacher")
        for part, memory in (("queue", self.queue), ("student", self.student), ("teacher", self.teacher)):
            memory.load(split[part])

    @torch.no_grad()
    def _neighbours(self, rows: Tensor) -> dict[str, Tensor | float]:
        """Signs of a healthy memory: cosine to the nearest rows, and the share of distinct slots among them."""
        with torch.autocast(rows.device.type, enabled=False):
            cosine = product(F.normalize(rows[:HEALTH_IMAGES], dim=1), self.student.rows)
            nearest = cosine.div_(self.student.norms.clamp_min(1e-12)).topk(self.config.neighbours, dim=1)
        seen = rows.new_zeros(self.student.capacity)
        seen.index_fill_(0, nearest.indices.flatten(), 1)  # to assign a number would make a GPU's host wait
        return {
            f"{self.name}/neighbour_similarity": nearest.values.mean(),
            f"{self.name}/neighbour_unique_ratio": seen.sum() / nearest.indices.numel(),
        }
