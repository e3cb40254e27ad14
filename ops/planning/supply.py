"""What a run asks of everything around the GPUs: storage, decoders, host memory, room for checkpoints."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import ceil

from ..recipe import Recipe
from .hardware import Hardware
from .memory import shares, view_bytes
from .parameters import Weights
from .speed import Assumptions, Speed

PROCESS = 3.5e9  # bytes of a rank's process before it holds anything: torch, CUDA and DALI, measured as VmRSS
ENCODED = 2 + 1  # encoded batches that the loader holds
SAMPLE = 24  # bytes an image that a node's view of the manifest takes: offsets, lengths, sizes of the rows at hand


@dataclass(frozen=True)
class Supply:
    """Of the whole run unless it says node."""

    read: float  # bytes a second from the storage
    read_node: float
    gpu_supply: float  # share of what DALI manages on a GPU: its decoder or its crops, whichever is slower
    cores_node: int  # CPU cores for decoding and augmenting on the host instead
    readers: int  # reader threads a rank, from a local disk
    host_node: float  # bytes of memory
    host: dict[str, float] = field(default_factory=dict)  # of it, a rank
    checkpoint: float = 0.0  # bytes


def supply(
    recipe: Recipe,
    hardware: Hardware,
    weights: Weights,
    speed: Speed,
    assumed: Assumptions,
    memories: float,
    images: int,
) -> Supply:
    """memories: bytes of the objectives' memories, on each rank; images: of the data set."""
    ranks = min(hardware.node, hardware.gpus)
    local = recipe.batch / hardware.gpus
    parts = shares(weights, recipe)
    state = sum(parts.values())
    tables = sum(
        images * (4 * len(getattr(config, "prototypes", ())) if name == "clusters" else 4)
        for name, config in recipe.objectives.chosen().items()
        if name in recipe.objectives.needs_table
    )
    crops = sum(view.count for view in recipe.views)
    host = {
        "process": PROCESS,
        "encoded batches": ENCODED * local * assumed.bytes,
        "index and quarantine": SAMPLE * images / hardware.nodes / ranks + 64e6,
        "checkpoint being written": state / hardware.gpus + memories,
        "tables of objectives": float(tables),
    }
    if recipe.stream.augment == "cpu":
        host["views"] = 2 * local * view_bytes(recipe)
    a_node = speed.images * ranks / hardware.gpus
    return Supply(
        read=speed.images * assumed.bytes,
        read_node=a_node * assumed.bytes,
        gpu_supply=speed.images / hardware.gpus * max(1 / hardware.gpu.decoders, crops / assumed.crops),
        cores_node=ceil(a_node * crops / 14 / assumed.core),
        readers=max(1, ceil(speed.images / hardware.gpus / assumed.readers)),
        host_node=ranks * sum(host.values()),
        host=host,
        checkpoint=state + memories,
    )
