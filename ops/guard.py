"""The verdict: one vector, reduced over all ranks, decides whether a step is taken. DESIGN promise 4.

Non-finite losses and gradients, a request to stop, a request to save: all ranks read the same answer, so that no rank
steps, saves or leaves alone. Reading it is the step's only wait for the device. A bad step is named (objective, rank,
first sample keys) in the run's log; after `LIMIT` bad steps in a row the run stops, since skipping cures accidents,
not divergence.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ..objectives import Outcome
from ..shards.errors import GristmillError

LIMIT = 10  # bad steps in a row


class DivergedError(GristmillError):
    """Too many bad steps in a row."""


@dataclass
class Verdict:
    """What all ranks agreed on. `norms`: [tensors] gradient norms of this step, before clipping."""

    bad: list[str]  # what was not finite: objectives by name, "loss", "gradient", or "memory" (what would be kept)
    stop: bool
    norms: Tensor
    grad_norm: float  # of all tensors together


class Guard:
    """Counts bad steps in a row and builds verdicts."""

    def __init__(self) -> None:
        self.in_a_row = 0

    def judge(self, outcome: Outcome, gradients: list[Tensor], stop: bool) -> Verdict:
        """outcome: losses by objective in its logs; gradients: this rank's, averaged over ranks; stop: asked to end."""
        norms = torch.stack(torch._foreach_norm(gradients))  # pyright: ignore[reportPrivateImportUsage]
        checked = {name: value for name, value in outcome.logs.items() if name.startswith("loss/")}
        checked |= {"loss": outcome.loss.detach(), "gradient": torch.linalg.vector_norm(norms)}
        values = torch.stack([torch.as_tensor(value).double() for value in checked.values()])
        bad = torch.cat([~torch.isfinite(values), (~outcome.finite())[None]])
        flags = torch.cat([bad.double(), values.new_tensor([float(stop)])])
        if dist.get_world_size() > 1:
            dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        *answer, stopping, grad_norm = torch.cat([flags, values[-1:]]).tolist()
        names = [name.removeprefix("loss/") for name in checked] + ["memory"]
        return Verdict(
            [name for name, flag in zip(names, answer, strict=True) if flag], bool(stopping), norms, grad_norm
        )

    def count(self, verdict: Verdict, position: int, keys: list[str]) -> None:
        """Note the verdict; raises DivergedError after LIMIT bad ones in a row."""
        self.in_a_row = self.in_a_row + 1 if verdict.bad else 0
        if self.in_a_row >= LIMIT:
            raise DivergedError(
                f"{LIMIT} steps in a row were not finite, the last at image {position} in {', '.join(verdict.bad)} "
                f"(first keys of that batch: {', '.join(keys[:3])}). The last checkpoint is good: start again with a "
                f"lower optimizer.lr or a longer optimizer.warmup."
            )
