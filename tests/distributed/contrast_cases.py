"""Run by zygote.py: the contrastive and predictive ancestors on two ranks against one process, through gloo.

A linear encoder shared by the ranks gives unit rows; each rank has half of the images. What is compared with one process
that has all of them: the mean loss, the mean gradient of the encoder, and what a step leaves in the memories, over three
steps. What was found goes to found.jsonl, the largest difference of each kind, of any rank.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from gristmill.objectives.bank import BankConfig, BankObjective
from gristmill.objectives.batch_contrast import BatchContrastConfig, BatchContrastObjective
from gristmill.objectives.bootstrap import BootstrapConfig, BootstrapObjective
from gristmill.objectives.instance import InstanceConfig, InstanceObjective
from gristmill.objectives.protocol import Objective, Outcome, StepInfo
from gristmill.ops.launch import join, leave
from gristmill.ops.ranks import gather
from torch import Tensor
from torch.nn.functional import normalize

BATCH, STEPS, IN, DIM, IMAGES = 8, 3, 7, 6, 24
PLACE: dict[str, Any] = {"dtype": torch.float64}


def objectives() -> dict[str, tuple[Objective, int]]:
    """Each case anew, with the crops that both networks see."""
    contrast, boot, bank = BatchContrastConfig, BootstrapConfig, BankConfig
    return {
        "moco": (InstanceObjective(InstanceConfig(queue=20, pairs="all"), DIM, seed=1, **PLACE), 1),
        "moco-v3": (BatchContrastObjective(contrast(temperature=0.2), DIM, **PLACE), 2),
        "moco-v3 virtual": (BatchContrastObjective(contrast(virtual_batch=2), DIM, **PLACE), 2),
        "simclr": (BatchContrastObjective(contrast(form="simclr"), DIM, **PLACE), 2),
        "simclr virtual": (BatchContrastObjective(contrast(form="simclr", virtual_batch=4), DIM, **PLACE), 2),
        "byol": (BootstrapObjective(boot(form="byol"), DIM, **PLACE), 2),
        "simsiam": (BootstrapObjective(boot(form="simsiam"), DIM, **PLACE), 2),
        "npid": (BankObjective(bank(negatives=5), DIM, images=IMAGES, seed=1, **PLACE), 1),
        "npid softmax": (BankObjective(bank(negatives=None), DIM, images=IMAGES, seed=1, **PLACE), 1),
    }


def run(objective: Objective, crops: int, rank: int, world: int) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Losses and gradients of all steps, means over the ranks, and the state at the end; world 1: of one process."""
    generator = torch.Generator().manual_seed(3)
    weights = torch.randn(IN, DIM, generator=generator, dtype=torch.float64)
    losses, gradients = [], []
    size = BATCH // world
    mine = slice(rank * size, (rank + 1) * size)
    for step in range(STEPS):
        student, teacher = torch.randn(2, crops, BATCH, IN, generator=generator, dtype=torch.float64)[:, :, mine]
        index = torch.randint(IMAGES, (BATCH,), generator=generator)[mine]
        encoder = weights.clone().requires_grad_()
        rows = normalize(student.flatten(0, 1) @ encoder, dim=1)
        info = StepInfo(
            batch=size, student_crops=crops, student_globals=crops, teacher_crops=crops, position=step * BATCH,
            same_views=crops > 1, rank=rank, world=world, gather=gather if world > 1 else None, index=index, images=IMAGES,
        )  # fmt: skip
        sides = {objective.name: rows, f"{objective.name}.projection": rows.detach().flip(1)}
        keys = {objective.name: normalize(teacher.flatten(0, 1) @ weights, dim=1)}
        outcome = objective.loss(sides, keys if getattr(objective, "needs_teacher", True) else {}, info)
        (gradient,) = torch.autograd.grad(outcome.loss, encoder)
        loss = outcome.loss.detach().view(1)
        if world > 1:
            loss, gradient = gather(loss).mean(0, keepdim=True), gather(gradient.unsqueeze(0)).mean(0)
            outcome = Outcome(outcome.loss, {}, {name: gather(kept) for name, kept in outcome.commit.items()})
        objective.commit(outcome)
        weights = weights - 0.3 * gradient
        losses.append(loss)
        gradients.append(gradient)
    return losses, gradients, list(objective.state().values())


def widest(found: list[Tensor], wanted: list[Tensor]) -> float:
    """Largest difference relative to the largest number, of pairs that may hold the same NaN."""
    gaps = [0.0]
    for a, b in zip(found, wanted, strict=True):
        if not torch.equal(a.isnan(), b.isnan()):
            return float("inf")
        a, b = a.double().nan_to_num(), b.double().nan_to_num()
        gaps.append(float((a - b).abs().max() / b.abs().max().clamp_min(1e-12)))
    return max(gaps)


def main() -> None:
    folder = Path(sys.argv[1])
    rank, world, _ = join()
    together, alone = objectives(), objectives()
    for case, (objective, crops) in together.items():
        parts = run(objective, crops, rank, world), run(alone[case][0], crops, 0, 1)
        gaps = [widest(*sides) for sides in zip(*parts, strict=True)]
        worst = gather(torch.tensor([gaps], dtype=torch.float64)).amax(0)
        if rank == 0:
            values = dict(zip(("loss", "gradient", "state"), worst.tolist(), strict=True))
            # A case whose loss stood still would be equal for nothing.
            moved = float((parts[0][0][0] - parts[0][0][-1]).abs())
            with (folder / "found.jsonl").open("a") as file:
                file.write(json.dumps({"case": case, **values, "moved": moved}) + "\n")
    leave()
