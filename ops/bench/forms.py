"""One part of `gristmill bench objectives`: fast forms of what a step does besides its backbone, or their plain forms, alone.

    python -m gristmill.ops.bench.forms fast|plain forms|growth SETTINGS

Each way has a process of its own. SETTINGS is JSON: batch, crops, globals, dim, features, queue, prototypes, neighbours,
seconds (spent on each), threads, and for growth the lists queues, prototype_counts, crop_counts. Every form is forward and
backward on noise of the step's sizes. Memory is what one call adds at its peak to what the process held before it
(VmHWM, set back by the kernel's clear_refs, less VmRSS; freed pages are given back before). Otherwise both ways keep them, as a
training does (../heap.py).
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from ...models.heads import WeightNormLinear
from ...models.neighbours import search
from ...models.vit import build_backbone
from ...objectives.contrast import info_nce, info_nce_reference
from ...objectives.prototypes import group_cross_entropy_reference, streamed_cross_entropy
from ..heap import keep_heap
from .meter import memory

Form = Callable[[], object]
TEMPERATURE = 0.1


def unit_rows(rows: int, dim: int) -> Tensor:
    return F.normalize(torch.randn(rows, dim), dim=1)


def views_of(settings: dict[str, Any]) -> dict[str, Any]:
    return {"student_crops": settings["crops"], "student_globals": settings["globals"], "teacher_crops": 2}


def instance(fast: bool, s: dict[str, Any]) -> Form:
    """InfoNCE of all crops against the queue: one streamed product, or a copy of the queue and logits for each pair of crops."""
    student = unit_rows(s["crops"] * s["batch"], s["dim"]).requires_grad_()
    teacher, queue = unit_rows(2 * s["batch"], s["dim"]), unit_rows(s["queue"], s["dim"])

    def run() -> None:
        form = info_nce if fast else info_nce_reference
        form(student, teacher, queue if fast else queue.clone(), temperature=0.2, **views_of(s)).backward()
        student.grad = None

    return run


def group(fast: bool, s: dict[str, Any]) -> Form:
    """Weight-normed prototypes and their cross-entropy: streamed, or by logits of all crops and a softmax for each pair."""
    layer = WeightNormLinear(s["dim"], s["prototypes"], train_norms=True)
    x = unit_rows(s["crops"] * s["batch"], s["dim"]).requires_grad_()
    targets = torch.softmax(torch.randn(2, s["batch"], s["prototypes"]) * 3, -1)

    def run() -> None:
        if fast:
            loss = streamed_cross_entropy(*layer(x, targets, TEMPERATURE), **views_of(s))
        else:
            loss = group_cross_entropy_reference(
                layer(x), targets.flatten(0, 1), temperature=TEMPERATURE, **views_of(s)
            )
        loss.backward()
        x.grad = None
        layer.zero_grad()

    return run


def neighbours(fast: bool, s: dict[str, Any]) -> Form:
    """The nearest rows of a memory: by lengths that are kept, or with the whole memory normalised anew."""
    query, bank = torch.randn(s["crops"] * s["batch"], s["features"]), torch.randn(s["queue"], s["features"])
    norms = bank.norm(dim=1)

    def run() -> object:
        if fast:
            return search(query, bank, s["neighbours"], norms=norms)
        cosine = F.normalize(query, dim=-1) @ F.normalize(bank, dim=-1).T
        return bank[cosine.topk(s["neighbours"], dim=-1).indices]

    return run


def block(fast: bool, s: dict[str, Any]) -> Form:
    """Four ViT blocks over the global crops: ours, which forgets what is cheap to make again, or timm's with plain attention
    and torch's layers."""
    vit = build_backbone("vit_small_patch16_224", embed_dim=s["features"], num_heads=s["features"] // 64, depth=4)
    if not fast:
        ours: Any
        for ours in vit.blocks:
            ours.forward = Block.forward.__get__(ours)
            ours.attn.fused_attn = False
            for part in ours.modules():
                if isinstance(part, nn.Linear):
                    part.__class__ = nn.Linear
    x = torch.randn(s["globals"] * s["batch"], 197, s["features"]).requires_grad_()

    def run() -> None:
        vit.blocks(x).square().mean().backward()
        x.grad = None
        vit.zero_grad()

    return run


def update(fast: bool, s: dict[str, Any]) -> Form:
    """Clipping by tensor, AdamW and EMA of the head's and a few blocks' weights: in one pass each, or a loop over tensors."""
    wide = [(s["prototypes"], s["dim"]), *[(4 * s["features"], s["features"])] * 40, *[(s["features"],)] * 100]
    weights = [torch.nn.Parameter(torch.randn(shape)) for shape in wide]
    averages = [p.detach().clone() for p in weights]
    for p in weights:
        p.grad = torch.randn_like(p)
    adamw = torch.optim.AdamW(weights, lr=1e-6, foreach=False, fused=fast)

    @torch.no_grad()
    def run() -> None:
        gradients = [p.grad for p in weights if p.grad is not None]
        if fast:
            norms = torch._foreach_norm(gradients)  # pyright: ignore[reportPrivateImportUsage]
            factors = [(3.0 / (norm + 1e-6)).clamp(max=1.0) for norm in norms]
            torch._foreach_mul_(gradients, factors)  # pyright: ignore[reportPrivateImportUsage]
        else:
            for gradient in gradients:
                gradient.mul_(min(1.0, 3.0 / (float(gradient.norm(2)) + 1e-6)))
        adamw.step()
        if fast:
            torch._foreach_lerp_(averages, [p.detach() for p in weights], 0.01)  # pyright: ignore[reportPrivateImportUsage]
        else:
            for average, p in zip(averages, weights, strict=True):
                average.mul_(0.99).add_(0.01 * p)

    return run


FORMS = {"instance": instance, "group": group, "neighbours": neighbours, "block": block, "update": update}


def measured(run: Form, seconds: float) -> dict[str, float]:
    """Wall and CPU seconds, the least, and the MB that a call adds."""
    run()
    gc.collect()
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
        before, again = memory("VmRSS"), True
    except OSError:
        before, again = float("nan"), False
    run()
    added = memory("VmHWM") - before if again else float("nan")
    walls, cpus, begin = [], [], time.perf_counter()
    while not walls or time.perf_counter() - begin < seconds:
        wall, cpu = time.perf_counter(), time.process_time()
        run()
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
    return {"seconds": min(walls), "cpu_seconds": min(cpus), "memory_MB": max(0.0, added)}


def forms(fast: bool, settings: dict[str, Any]) -> dict[str, Any]:
    return {name: measured(form(fast, settings), settings["seconds"]) for name, form in FORMS.items()}


def growth(fast: bool, settings: dict[str, Any]) -> dict[str, Any]:
    """By what grows, then by its size: the instance objective over queues and crops, the group objective over prototypes and crops."""
    axes = {
        "queue": (instance, "queue", settings["queues"]),
        "prototypes": (group, "prototypes", settings["prototype_counts"]),
        "crops, instance": (instance, "crops", settings["crop_counts"]),
        "crops, group": (group, "crops", settings["crop_counts"]),
    }
    return {
        axis: {str(size): measured(form(fast, settings | {key: size}), settings["seconds"]) for size in sizes}
        for axis, (form, key, sizes) in axes.items()
    }


if __name__ == "__main__":
    way, what, given = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    torch.set_num_threads(given["threads"])
    torch.set_flush_denormal(True)
    torch.manual_seed(0)
    keep_heap(True)
    answer = (forms if what == "forms" else growth)(way == "fast", given)
    sys.stdout.write(f"\n{json.dumps(answer)}\n")
