"""What each ZeRO stage keeps on a rank, as ops/engine, ops/zero, ops/teacher and DeepSpeed 0.19 beneath them keep it.

It differs from the textbook where the code does: fp32 masters are a copy of their own under ZeRO 1 to 3 even where the
weights are fp32; buckets are allocated at their full size whatever the model's (`reduce_bucket_size`, 5e8 numbers unless
`engine.deepspeed` says less); stage 1 lets whole gradients pile up until the backward is over; BF16_Optimizer (stage 1,
bf16) keeps all gradients in fp32; the teacher's average is its weights where these are fp32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..recipe import Recipe
from .parameters import Weights, gathered

FALLBACK = 500_000_000  # numbers that DeepSpeed's all-reduce without ZeRO joins at once
DEFAULTS = {  # of DeepSpeed's zero_optimization
    "reduce_bucket_size": 500_000_000, "overlap_comm": None, "stage3_prefetch_bucket_size": 50_000_000,
    "stage3_param_persistence_threshold": 100_000, "stage3_max_reuse_distance": 1_000_000_000,
}  # fmt: skip


@dataclass(frozen=True)
class States:
    """Bytes of one rank, by what they are for."""

    held: dict[str, float]  # from the first step's end to the last
    backward: dict[str, float]  # besides, while there are activations
    step: dict[str, float]  # besides `held`, between the backward's end and the next forward
    start: float  # at most, while the run is put together
    pile: float  # bytes that pile up in the backward for each byte of gradients that autograd makes
    sent: dict[str, float]  # numbers of bytes a step and rank that an all-reduce, gather or scatter is about
    overlap: bool  # whether sending goes on beside the backward


def setting(recipe: Recipe, name: str) -> Any:
    """A field of DeepSpeed's zero_optimization, under its long or short name."""
    own = recipe.engine.deepspeed.get("zero_optimization", {})
    return own.get(name, own.get(name.removeprefix("stage3_"), DEFAULTS[name]))


def states(recipe: Recipe, weights: Weights, stage: int, world: int) -> States:
    """Of a rank of `world` under ZeRO `stage`."""
    low = recipe.precision == "bf16"
    p, t, frozen = weights.trained, weights.averaged, 2 * weights.frozen
    width = 2 if low else 4
    moments = 2 if recipe.optimizer.name == "adamw" else 1
    share = 1 if stage == 0 else 1 / world
    bucket = int(setting(recipe, "reduce_bucket_size"))
    overlap = stage == 3 if setting(recipe, "overlap_comm") is None else bool(setting(recipe, "overlap_comm"))
    accumulates = recipe.engine.accumulate > 1
    whole = 1 / world if stage == 3 else 1.0
    held = {
        "weights, student": width * (p * whole + weights.frozen),
        "weights, teacher": width * (t * whole + weights.frozen),
        "optimizer states": 4.0 * moments * p * share,
        "fp32 masters": 4.0 * p * share if stage or low else 0.0,
        "EMA shadow": 4.0 * t * share if low else 0.0,
    }
    backward: dict[str, float] = {}
    step: dict[str, float] = {}
    sent: dict[str, float] = {}
    pile = 1.0 if stage < 2 and not accumulates else 0.0
    if stage == 0:
        backward["gradients"] = width * p if accumulates else 0.0  # of earlier micro-batches
        step["gradients"] = width * p + (4.0 * p if low else 0.0)
        step["reduction"] = 4.0 * min(p, FALLBACK) if world > 1 else 0.0
        sent["all-reduce"] = 4.0 * p
    elif stage == 1 and low:
        pile = 0.0  # taken over into fp32 as they come
        held["gradients"] = 4.0 * p
        step["reduction"] = 4.0 * min(p, FALLBACK) if world > 1 else 0.0
        sent |= {"all-reduce": 4.0 * p, "all-gather": 2.0 * (p + t)}
    elif stage in (1, 2):
        backward["buckets"] = width * bucket * (2 if overlap else 1)
        step["reduction"] = 4.0 * min(p, bucket) if low else 0.0  # a full bucket, in fp32
        if accumulates:  # those of earlier micro-batches
            backward["gradients"] = 4.0 * p * share if stage == 2 else width * p
        elif stage == 2:
            pile = 4 / width * share
        step["gradients"] = 2.0 * 4 * p * share
        sent |= {"all-reduce": 4.0 * p, "all-gather": width * (p + t)}
    else:
        small = sum(
            count for count in _tensors(weights) if count <= setting(recipe, "stage3_param_persistence_threshold")
        )
        held["weights, student"] += width * small
        held["gradients"] = 4.0 * p * share
        held["buckets"] = 4.0 * bucket
        how = {"persistent": int(setting(recipe, "stage3_param_persistence_threshold"))}
        reuse, ahead = (
            int(setting(recipe, "stage3_max_reuse_distance")),
            int(setting(recipe, "stage3_prefetch_bucket_size")),
        )
        most, fetched = gathered(weights.modules, backward=True, reuse=reuse, **how)
        _, aims = gathered(weights.modules, backward=False, reuse=reuse, persistent=0)
        if world > 1:  # alone, a rank's part is the whole, and nothing is copied
            backward["gathered weights"] = width * float(min(most + ahead, p - small))
            backward["reduction"] = 4.0 * min(p, bucket) * (1 + 1 / world)
        sent |= {"reduce-scatter": 4.0 * p, "all-gather": width * (fetched + aims)}
    if recipe.optimizer.name == "lars":
        step["trust ratios"] = 2 * 4.0 * p * share
    if world == 1:
        sent = {}
    start = 4.0 * (p + t + frozen) + (4.0 * p if low else 0.0) + width * (p + t)
    return States(_some(held), _some(backward), _some(step), start, pile, sent, overlap)


def _tensors(weights: Weights) -> list[int]:
    return list(dict(entry for module in weights.modules for entry in module).values())


def _some(found: dict[str, float]) -> dict[str, float]:
    return {name: size for name, size in found.items() if size}
