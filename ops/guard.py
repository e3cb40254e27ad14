"""The verdict: one vector, summed over all ranks, decides what happens to a step. DESIGN promise 4, 3.6.

It carries everything that ranks must agree on: non-finite losses, gradients and memories by rank and objective, the
wish to stop, a rank without data, the state of a checkpoint under way, and the sums that make gradient norms and logs
whole. Reading it is the step's only wait for the device, and since all ranks read the same answer none steps, saves,
rolls back or leaves alone. Skipping cures accidents, not divergence: after `patience` bad steps in a row the run goes
back to its last good state and leaves the window out, and after `rollbacks` of these it stops.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from ..models.host import constant
from ..objectives import Outcome
from ..shards.errors import GristmillError


class GuardConfig(BaseModel):
    """When a step is bad, and what follows."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    patience: int = Field(default=10, ge=1)  # bad steps in a row before the run goes back to its last good state
    rollbacks: int = Field(default=3, ge=0)  # so often in one run; then it stops
    spike: float = Field(default=0.0, ge=0)  # a loss so many standard deviations above its mean is bad, too; 0: off
    spike_window: int = Field(default=100, ge=10)  # good steps over which mean and deviation are taken
    captures: int = Field(default=2, ge=0)  # bad steps kept for `gristmill replay`, the first ones of the run


class DivergedError(GristmillError):
    """Too many bad steps in a row."""


@dataclass
class Verdict:
    """What all ranks agreed on."""

    bad: list[str]  # what is wrong: objectives by name, "loss", "memory", "gradient", "spike", "optimizer"
    culprits: list[tuple[int, str]]  # (rank, what) where a rank's own part was not finite
    logs: dict[str, float]  # the outcome's, mean over ranks and micro-batches
    norms: Tensor  # [P] gradient norm of each parameter, over all ranks, before clipping
    grad_norm: float  # of all together
    flags: dict[str, float]  # what was handed in as `flags`, summed over ranks
    largest: float = 0.0  # of `norms`


@dataclass
class Spikes:
    """Exponential mean and variance of the loss over good steps; the same numbers on all ranks, kept in checkpoints."""

    mean: float = 0.0
    variance: float = 0.0
    steps: int = 0

    def high(self, loss: float, config: GuardConfig) -> bool:
        if not config.spike or self.steps < config.spike_window:
            return False
        # Of a loss that stands still, rounding is no spike.
        return loss > self.mean + config.spike * max(math.sqrt(self.variance), 1e-6 * abs(self.mean))

    def learn(self, loss: float, config: GuardConfig) -> None:
        self.steps += 1
        share = max(1.0 / self.steps, 2.0 / (config.spike_window + 1))
        gap = loss - self.mean
        self.mean += share * gap
        self.variance = (1.0 - share) * (self.variance + share * gap * gap)


@dataclass
class Guard:
    """Builds verdicts, counts bad steps in a row, and says when to go back."""

    config: GuardConfig
    rank: int = 0
    world: int = 1
    in_a_row: int = 0
    rolled_back: int = 0
    spikes: Spikes = field(default_factory=Spikes)

    def judge(
        self, outcomes: list[Outcome], squares: Tensor, *, partial: bool, flags: dict[str, float] | None = None
    ) -> Verdict:
        """outcomes: one a micro-batch; squares [P]: of each parameter's gradient, to be added over ranks if `partial`;
        flags: numbers of this rank that all ranks want the sum of. Collective."""
        flags = flags or {}
        finite: dict[str, Tensor] = {}
        for outcome in outcomes:
            for name, value in {**_losses(outcome), "loss": outcome.loss.detach()}.items():
                good = torch.isfinite(torch.as_tensor(value, device=squares.device)).all()
                finite[name] = good & finite.get(name, good)
            good = outcome.finite_rows().to(squares.device)  # the loss has its own flag
            finite["memory"] = good & finite.get("memory", good)
        bad = torch.zeros(self.world, len(finite), dtype=torch.float64, device=squares.device)
        bad[self.rank] = ~torch.stack(list(finite.values()))
        named = {name: [o.logs[name] for o in outcomes] for name in outcomes[0].logs}
        measured = [name for name, values in named.items() if isinstance(values[0], Tensor)]
        values = [torch.stack([v.detach().double().reshape(()) for v in named[name]]).mean() for name in measured]  # pyright: ignore[reportAttributeAccessIssue]
        head = torch.cat([
            constant(list(flags.values()), squares),
            bad.flatten(),
            *([torch.stack([v.to(squares.device) for v in values])] if values else []),
        ])  # fmt: skip
        if self.world > 1:
            vector = torch.cat([head, squares]) if partial else head
            dist.all_reduce(vector)
            head = vector[: len(head)]
            squares = vector[len(head) :] if partial else squares
        *answer, total, largest = torch.cat([head, squares.sum()[None], squares.amax()[None]]).tolist()
        summed = dict(zip(flags, answer, strict=False))
        rows = answer[len(flags) : len(flags) + bad.numel()]
        culprits = [
            (place // len(finite), list(finite)[place % len(finite)]) for place, flag in enumerate(rows) if flag
        ]
        logs = {
            name: float(sum(v) / len(v)) for name, v in named.items() if name not in measured
        } | dict(zip(measured, (v / self.world for v in answer[len(flags) + len(rows) :]), strict=True))  # fmt: skip
        wrong = [name for name in finite if any(what == name for _, what in culprits)]
        if not math.isfinite(total):
            wrong.append("gradient")
        if not wrong and self.spikes.high(logs.get("loss", 0.0), self.config):
            wrong.append("spike")
        length, largest = (math.sqrt(square) if square >= 0 else math.nan for square in (total, largest))
        return Verdict(wrong, culprits, logs, squares.sqrt(), length, summed, largest)

    def settle(self, verdict: Verdict) -> bool:
        """Note how the step ended; True when the run must go back to its last good state. Same on all ranks."""
        if not verdict.bad:
            self.in_a_row = 0
            self.spikes.learn(verdict.logs.get("loss", 0.0), self.config)
            return False
        self.in_a_row += 1
        return self.in_a_row >= self.config.patience

    def go_back(self, verdict: Verdict, position: int, keys: list[str]) -> None:
        """Count a return to the last good state; raises DivergedError when there were too many."""
        self.in_a_row = 0
        self.rolled_back += 1
        if self.rolled_back > self.config.rollbacks:
            raise DivergedError(
                f"{self.config.patience} steps in a row were bad, the last at image {position} in {', '.join(verdict.bad)} "
                f"(first keys of that batch: {', '.join(keys[:3])}), after {self.config.rollbacks} returns to the last good "
                f"state. The last checkpoint is good: start again with a lower optimizer.lr or a longer optimizer.warmup, "
                f"or look at captures/ with `gristmill replay`."
            )

    def state(self) -> dict[str, Any]:
        """Plain values for the checkpoint; a run that goes on judges as one that was never stopped."""
        return {"in_a_row": self.in_a_row, "rolled_back": self.rolled_back, "spikes": asdict(self.spikes)}

    def load(self, state: dict[str, Any]) -> None:
        self.in_a_row, self.rolled_back = state["in_a_row"], state["rolled_back"]
        self.spikes = Spikes(**state["spikes"])


def _losses(outcome: Outcome) -> dict[str, Any]:
    return {n.removeprefix("loss/"): v for n, v in outcome.logs.items() if n.startswith("loss/")}
