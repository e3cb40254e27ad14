"""What HCSC's selected contrast costs, streamed and plain: python -m gristmill.ops.bench.selective_forms

Loss and backward of one step after the warm-up (N images, one global crop and `locals` that share its masks), against the queue
and all levels of prototypes. "fast" is the objective's: blocks, and log-sum-exps of queue entries that are kept from step to step.
"plain" is how the official code goes about it: memberships of the whole queue in all prototypes, whole masks, whole logits for
each level. Each has a process of its own; time and memory are taken as forms.py takes them.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ...objectives.hierarchy import HierarchyConfig, HierarchyObjective
from ...objectives.protocol import StepInfo
from ...objectives.selection import Recorded, selective_cross_entropy_reference
from ...objectives.tree import Tree
from . import objectives
from .forms import Form, measured, unit_rows


@dataclass(frozen=True)
class Sizes:
    """Of one step. The published ones; HCSC's multi-crop form has four local crops."""

    images: int = 32
    queue: int = 16384
    levels: tuple[int, ...] = (3000, 2000, 1000)
    dim: int = 128
    locals: int = 0
    seconds: float = 2.0
    threads: int = 1


def form(fast: bool, sizes: Sizes) -> Form:
    """One step, forward and backward, on noise."""
    config = HierarchyConfig(
        queue=sizes.queue, levels=sizes.levels, assign="stream", memory=max(sizes.levels[0], sizes.images), ramp=0.0, warmup=0.0
    )  # fmt: skip
    objective = HierarchyObjective(config, sizes.dim, seed=0)
    info = StepInfo(
        batch=sizes.images, student_crops=1 + sizes.locals, student_globals=1, teacher_crops=1, progress=0.5
    )
    means = [unit_rows(k, sizes.dim) for k in sizes.levels]
    above = [torch.randint(k, (below,)) for below, k in zip(sizes.levels, sizes.levels[1:], strict=False)]
    phi = [torch.full((k,), config.temperature) for k in sizes.levels]
    objective.plant(Tree(means, phi, above, [k - 1 for k in sizes.levels]), info)
    queries, keys = (
        unit_rows(info.student_crops * sizes.images, sizes.dim).requires_grad_(),
        unit_rows(sizes.images, sizes.dim),
    )

    def run() -> None:
        if fast:
            loss = objective.loss({"hierarchy": queries}, {"hierarchy": keys}, info).loss
        else:
            loss = _plain(objective, queries.view(info.student_crops, sizes.images, -1), keys)
        loss.backward()
        queries.grad = None

    return run


def _plain(objective: HierarchyObjective, queries: Tensor, keys: Tensor) -> Tensor:
    config, tree, rows = objective.config, objective.tree, objective.queue.rows
    lineage = tree.lineage(tree.assign(keys))
    total = queries.new_zeros(())
    queue = rows.clone()  # as the official code takes it
    belongs = [torch.softmax(queue @ c.t() / phi, 1) for c, phi in zip(tree.prototypes, tree.phi, strict=True)]
    stay = torch.stack([1 - s[:, own].t() for s, own in zip(belongs, lineage, strict=True)]).clamp(
        *config.instance_keep
    )
    keep = Recorded(torch.bernoulli(stay).bool().unsqueeze(1))
    how: dict[str, Any] = {"levels": len(lineage), "keep": keep}
    total = (
        total + selective_cross_entropy_reference(queries, keys, queue, 1 / config.temperature, **how).mean(-1).sum()
    )
    for level, own in enumerate(lineage):
        sharp = tree.prototypes[level] / tree.phi[level].unsqueeze(1)
        chosen = None
        if level + 1 < len(lineage):
            upper = torch.softmax(tree.logits(level) / tree.phi[level + 1], 1)[:, lineage[level + 1]].t()
            stays = (1 - upper).clamp(*config.prototype_keep).expand(1, len(queries), -1, -1)
            chosen = Recorded(torch.bernoulli(stays).bool())
        removed = objective.levels.no_negatives(own, level)
        found = selective_cross_entropy_reference(queries, sharp[own], sharp, 1.0, keep=chosen, removed=removed)
        total = total + found.mean(-1).sum() / len(lineage)
    return total


def bench_selective(sizes: Sizes) -> dict[str, Any]:
    """Both ways in processes of their own: {"fast", "plain", "fast_over_plain"}, each seconds, cpu_seconds, memory_MB."""
    given = json.dumps(asdict(sizes))
    fast, plain = (objectives._apart("selective_forms", way, given, threads=sizes.threads) for way in ("fast", "plain"))
    return objectives._paired(fast, plain)


def main(arguments: list[str]) -> None:
    """One way (`fast|plain SIZES`), for a process of its own; or, without arguments or with `key=value`, both, as a table."""
    if arguments[:1] in (["fast"], ["plain"]):
        given = json.loads(arguments[1])
        sizes = Sizes(**{**given, "levels": tuple(given["levels"])})
        torch.set_num_threads(sizes.threads)
        torch.manual_seed(0)
        sys.stdout.write(f"\n{json.dumps(measured(form(arguments[0] == 'fast', sizes), sizes.seconds))}\n")
        return
    sizes = Sizes(**{key: json.loads(value) for key, _, value in (argument.partition("=") for argument in arguments)})
    print(f"{asdict(sizes)}")
    for way, row in bench_selective(sizes).items():
        print(f"{way:<16}" + "  ".join(f"{name} {value:.4g}" for name, value in row.items()))


if __name__ == "__main__":
    main(sys.argv[1:])
