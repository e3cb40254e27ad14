"""Checkpoints of thousands of ranks, laid out by the code that writes them, and never written.

Student, teacher and parameter groups of a recipe are built without memory; a rank's shards are what ops/zero.py makes
of them (DeepSpeed's rule for where a partition begins is the one thing repeated here), its parts come from the engine,
its file from the writer's layout. So bytes are exact, header and all. Times are arithmetic over stated bandwidths, but
for what rank 0 does alone to publish, which is measured on a small number of ranks and counted by rows.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn

from ..checkpoint import Content, Part, compose, lay_out
from ..engine import Engine
from ..optimizers import parameter_groups
from ..planning.hollow import networks
from ..recipe import Recipe, load_recipe
from ..segments import Segments, Shard
from ..stores import LocalStore
from ..writer import NAMES, _named
from ..zero import Parameters, _partition, _whole

RECIPES = ("multigrain-vits16", "multigrain-vitb16", "multigrain-vitl16", "multigrain-vitg16")
MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW
LOOKED = 33  # ranks whose files are laid out, evenly spread, the first and the last among them


@dataclass(frozen=True)
class Assumed:
    """What times are reckoned with."""

    node: float = 2e9  # bytes a second that a node writes to the shared storage
    storage: float = 100e9  # bytes a second that the storage takes of all nodes together
    copy: float = 20e9  # bytes a second from a GPU to pinned memory, for which the step waits
    reading: float = 0.001  # seconds for rank 0 to read another rank's note
    images: float = 50.0  # a second and rank: what `gristmill plan` says of ViT-g on H100s


@dataclass(frozen=True)
class Hollow:
    """A recipe's trained parameters, of no memory, by group; and what is written whole beside them."""

    student: nn.Module
    groups: list[dict[str, Any]]
    names: dict[int, str]
    shapes: dict[str, torch.Size]
    whole: int  # bytes of objectives' memories

    @classmethod
    def of(cls, recipe: Recipe) -> Hollow:
        found = networks(recipe)
        named = {name: p for name, p in found.student.named_parameters() if p.requires_grad}
        groups = parameter_groups(found.student, recipe.optimizer)
        shapes = {name: p.shape for name, p in named.items()}
        return cls(found.student, groups, {id(p): name for name, p in named.items()}, shapes, sum(found.kept.values()))


def shards(hollow: Hollow, stage: int, rank: int, world: int) -> list[Shard]:
    """One rank's shards under a ZeRO stage, fp32 masters on no device."""
    if stage == 0:
        return [
            _whole(hollow.names[id(p)], _flat(p.numel()), group) for group in hollow.groups for p in group["params"]
        ]
    if stage in (1, 2):
        found = []
        for group in hollow.groups:
            total = sum(p.numel() for p in group["params"])
            length = -(-total // (2 * world)) * 2  # DeepSpeed: aligned to two numbers a rank
            found.append(
                _partition(hollow.names, _flat(length), group, group["params"], [0] * len(group["params"]), rank)
            )
        return found
    names, members = {}, []
    for group in hollow.groups:
        members.append([SimpleNamespace(ds_numel=p.numel(), partition_numel=_part(p, world)) for p in group["params"]])
        names |= {id(one): hollow.names[id(p)] for one, p in zip(members[-1], group["params"], strict=True)}
    optimizer = SimpleNamespace(
        optimizer=SimpleNamespace(param_groups=hollow.groups),
        fp32_partitioned_groups_flat=[_flat(sum(p.partition_numel() for p in cut)) for cut in members],
        fp16_groups=members,
        sub_group_to_group_id=list(range(len(members))),
        _get_param_partition_rank=lambda _: rank,
    )
    return Parameters.shards(SimpleNamespace(optimizer=optimizer, names=names))  # pyright: ignore[reportArgumentType]


def parts(hollow: Hollow, stage: int, rank: int, world: int) -> Iterator[Part]:
    """What a rank writes, as its engine says."""
    own = shards(hollow, stage, rank, world)
    segments = Segments(own, hollow.shapes, replicated=stage == 0)
    moments = {id(shard.key): {name: torch.empty_like(shard.flat) for name in MOMENTS} for shard in own}
    engine = SimpleNamespace(
        segments=segments,
        teacher=SimpleNamespace(shadows=[torch.empty_like(s.flat) if s.group["teacher"] else None for s in own]),
        rank=rank,
        world=world,
        _moments=lambda key: moments[id(key)],
    )
    return Engine.parts(engine)  # pyright: ignore[reportArgumentType]


def note(content: list[Part], rank: int) -> dict[str, Any]:
    """A rank's note of its file, as the writer makes it."""
    name = f"rank-{rank:05d}.safetensors"
    index = [[p.group, p.name, p.start, p.start + p.tensor.numel(), name] for p in content if p.tensor.numel()]
    kinds = {(p.group, p.name): [p.group, p.name, NAMES[p.tensor.dtype], list(p.shape)] for p in content}
    return {"digests": {name: "0" * 32}, "bytes": 0, "whole": {}, "tensors": list(kinds.values()), "index": index}


def measure(hollow: Hollow, stage: int, world: int) -> dict[str, Any]:
    """Bytes of the ranks' files and of state.json, from some ranks; exact where all were looked at."""
    some = np.unique(np.linspace(0, world - 1, min(world, LOOKED)).astype(int)).tolist()
    files, rows, text = [], [], []
    for rank in some:
        content = list(parts(hollow, stage, rank, world))
        image = lay_out(_named(Content(content)))
        files.append(len(image.header) + image.body)
        index = note(content, rank)["index"]
        rows.append(len(index))
        text.append(len(json.dumps(index)))
    return {
        "stage": stage,
        "ranks": world,
        "files": world + 3 + 2,  # with objectives, steps and buffers, state.json and its digest
        "rank_bytes": {"least": min(files), "mean": float(np.mean(files)), "most": max(files)},
        "bytes": float(np.mean(files)) * world,
        "whole_bytes": hollow.whole,
        "index_rows": float(np.mean(rows)) * world,
        "state_bytes": float(np.mean(text)) * world,
    }


def composing(hollow: Hollow, world: int) -> dict[str, float]:
    """What rank 0 takes to compose state.json under ZeRO 3, and every rank to read it: seconds a million rows."""
    notes = [note(list(parts(hollow, 3, rank, world)), rank) for rank in range(world)]
    rows = sum(len(one["index"]) for one in notes)
    begin = time.process_time()
    text = compose(0, notes, "{}")
    composed = time.process_time() - begin
    begin = time.process_time()
    json.loads(text)
    return {"rows": rows, "compose_s": composed / rows * 1e6, "parse_s": (time.process_time() - begin) / rows * 1e6}


def gathering(world: int) -> float:
    """CPU seconds in which rank 0 reads the notes of all ranks beside their files, on a local disk."""
    with tempfile.TemporaryDirectory() as folder:
        store = LocalStore(Path(folder))
        draft = store._draft(0)
        draft.mkdir()
        for rank in range(world):
            (draft / f"rank-{rank:05d}.json").write_text("{}")
            (draft / f"rank-{rank:05d}.safetensors").touch()
        begin = time.process_time()
        for rank in range(world):
            store.read_unpublished(0, f"rank-{rank:05d}.json")
        return time.process_time() - begin


def times(
    found: dict[str, Any], recipe: Recipe, assumed: Assumed, per_node: int, cost: dict[str, float], gathered: float
) -> dict[str, float]:
    """Seconds of a checkpoint: what a step waits, what goes on beside it, and the interval between two.

    cost: as `composing` found it; gathered: CPU seconds in which rank 0 reads the notes.
    """
    ranks = found["ranks"]
    nodes = -(-ranks // per_node)
    whole = found["bytes"] + found["whole_bytes"]
    first = found["rank_bytes"]["most"] + found["whole_bytes"]  # rank 0 writes the memories, too
    writing = max(whole / assumed.storage, first / assumed.node, found["bytes"] / nodes / assumed.node)
    noted = ranks * assumed.reading + gathered
    publishing = noted + found["index_rows"] / 1e6 * cost["compose_s"]
    interval = recipe.checkpoint.every / (assumed.images * ranks)
    stall = first / assumed.copy
    return {
        "stall_s": stall,
        "writing_s": writing,
        "publishing_s": publishing,
        "interval_s": interval,
        "stall_share": stall / interval,
        "busy_share": (writing + publishing) / interval,
        "restore_parse_s": found["index_rows"] / 1e6 * cost["parse_s"],
    }


def table(worlds: tuple[int, ...], per_node: int, assumed: Assumed, names: tuple[str, ...] = RECIPES) -> dict[str, Any]:
    """Every recipe under every stage on so many ranks."""
    rows, cost = [], composing(Hollow.of(load_recipe(names[-1])), 64)
    gathered = {world: gathering(world) for world in worlds}
    for name in names:
        recipe = load_recipe(name)
        hollow = Hollow.of(recipe)
        for world in worlds:
            for stage in (1, 2, 3):
                found = measure(hollow, 1 if stage == 2 else stage, world) | {"stage": stage}
                rows.append({"recipe": name, **found, **times(found, recipe, assumed, per_node, cost, gathered[world])})
    return {
        "assumed": asdict(assumed),
        "composing": cost,
        "gathering_cpu_s": {str(world): seconds for world, seconds in gathered.items()},
        "rows": rows,
    }


def _part(parameter: nn.Parameter, world: int) -> Callable[[], int]:
    """How many numbers of a parameter each rank holds, as DeepSpeed's `partition_numel` says."""
    return lambda: -(-parameter.numel() // world)


def _flat(numbers: int) -> torch.Tensor:
    return torch.empty(numbers, dtype=torch.float32, device="meta")
