"""The running mean that keeps a teacher's assignments from collapsing into one (DINO, arXiv 2104.14294, section 3.1)."""

from __future__ import annotations

import torch
from torch import Tensor

from .memory import check_state
from .protocol import Outcome


class Centred:
    """An objective with a centre [1, K] of teacher logits, moved at each commit, and nothing else that lasts."""

    name = "centred"

    def __init__(self, prototypes: int, momentum: float, *, dtype: torch.dtype, device: torch.device | str) -> None:
        self.center = torch.zeros(1, prototypes, dtype=dtype, device=device)
        self._momentum = momentum

    def context(self) -> dict[str, Tensor]:
        return {}

    def teacher_context(self) -> dict[str, Tensor]:
        return {}

    def commit(self, outcome: Outcome) -> None:
        """Move the centre towards the mean over the ranks, which bring equal numbers of rows: "mean" [ranks, K]."""
        mean = outcome.commit["mean"].mean(0, keepdim=True)
        self.center = self.center * self._momentum + mean * (1 - self._momentum)

    def state(self) -> dict[str, Tensor]:
        return {"center": self.center.clone()}

    def load(self, state: dict[str, Tensor]) -> None:
        check_state(self.name, state, {"center": self.center})
        self.center = state["center"].to(self.center.device, copy=True, memory_format=torch.contiguous_format)
