"""Run by zygote.py (see test_communication.py): what one step of each ZeRO stage sends, as the monitor counts it.

Writes what it found to the folder given, one JSON object a case: counts of one step, what the parameters let expect, and
whether steps that were counted came out as those that were not; at last a whole run on the data given.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from engine_cases import BATCH, data, loss_of, networks, recipe_of
from gristmill.objectives import Outcome
from gristmill.ops import train as training
from gristmill.ops.engine import Engine
from gristmill.ops.guard import Guard
from gristmill.ops.launch import join, leave
from gristmill.ops.monitor.communication import Communication
from gristmill.ops.monitor.metrics import Metrics
from gristmill.ops.ranks import gather
from run_cases import recipe_of as recipe_of_run

STEPS = 3


def trained(stage: int, rank: int, world: int, counted: Communication | None) -> tuple[Engine, dict[str, Any]]:
    """An engine after STEPS steps; counts of the last one."""
    recipe = recipe_of(stage, "fp32")
    engine, size = Engine(*networks(), recipe, rank, world), BATCH // world
    guard, before = Guard(recipe.guard, rank, world), {}
    if counted:
        counted.follow()
    for step in range(STEPS):
        before = counted.counts() if counted else {}
        engine.set_rates((step + 1) / 10, 0.1)
        loss = loss_of(engine([data(step)[rank * size : (rank + 1) * size]], {}))
        engine.backward(loss)
        squares = engine.squares()
        verdict = guard.judge([Outcome(loss, {}, {})], squares, partial=not engine.segments.replicated)
        engine.step(verdict.norms)
        engine.teacher.update(0.9)
    after = counted.counts() if counted else {}
    return engine, {name: after[name] - before[name] for name in after}


def case(stage: int, rank: int, world: int) -> dict[str, Any]:
    plain, _ = trained(stage, rank, world, None)
    weights = {n: t.clone() for n, t in plain.layout.whole([s.flat for s in plain.segments.shards])}
    plain.close()
    counted = Communication()
    engine, counts = trained(stage, rank, world, counted)
    counted.end()
    last = counted.counts()
    shards = engine.segments.shards
    same = all(torch.equal(weights[n], t) for n, t in engine.layout.whole([s.flat for s in shards]))
    found = {
        "counts": counts,
        "same": same,
        "off": counted.counts() == last,
        "student": 4 * world * sum(shard.flat.numel() for shard in shards),
        "teacher": 4 * world * sum(shard.flat.numel() for shard in shards if shard.group["teacher"]),
        "teacher_groups": sum(bool(shard.group["teacher"]) for shard in shards),
        "elements": 4 * sum(p.numel() for p in networks()[0].parameters()),
        # Two flags of each rank, of its loss and its memories; squares of gradients where each has its own part.
        "verdict": 8 * (2 * world + (0 if engine.segments.replicated else len(engine.segments.shapes))),
    }
    engine.close()
    return found


def ours() -> dict[str, Any]:
    """Every operation once, also in a group that was made later."""
    counted = Communication()
    counted.follow()
    world = dist.get_world_size()
    rows = torch.zeros(6, 2, dtype=torch.float16)
    gather(rows)
    dist.all_reduce(rows)
    dist.reduce_scatter_single(torch.zeros(3), torch.zeros(3 * world))
    dist.all_to_all_single(torch.zeros(2 * world), torch.zeros(2 * world))
    dist.broadcast(torch.zeros(5), 0)
    dist.reduce(torch.zeros(7), 0)
    dist.barrier()
    dist.send(torch.zeros(9), 1) if dist.get_rank() == 0 else dist.recv(torch.zeros(9), 0)
    group = dist.new_group(list(range(world)))
    assert isinstance(group, dist.ProcessGroup)
    before = counted.counts()["calls/all_reduce"]
    dist.all_reduce(torch.zeros(11), group=group)
    unseen = counted.counts()["calls/all_reduce"] == before
    counted.follow()
    dist.all_reduce(torch.zeros(13), group=group)
    counted.end()
    dist.all_reduce(torch.zeros(17))
    counted.end()
    return {"counts": counted.counts(), "unseen": unseen}


def run(data: str, folder: Path) -> dict[str, Any]:
    """What the metrics of a run of three steps are told: at first, and until its end."""
    told: list[dict[str, float]] = []

    class Told(Metrics):
        def observe(self, values: Any, prefix: str = "") -> None:
            super().observe(values, prefix)
            if prefix == "communication/":
                told.append(dict(values))

    training.Metrics = Told
    recipe = recipe_of_run(data, 1, more=(f"images={3 * BATCH}", "checkpoint.every=1000"))
    ending = training.train(recipe, folder, quiet=True)
    return {"ended": ending.code, "first": told[0], "last": told[-1]}


def main() -> None:
    folder, data = sys.argv[1:]
    rank, world, _ = join()
    torch.set_num_threads(1)
    cases = {f"zero {stage}": case(stage, rank, world) for stage in range(4)} | {"ours": ours()}
    leave()
    cases["run"] = run(data, Path(folder) / "run")
    if rank == 0:
        with (Path(folder) / "found.jsonl").open("w") as file:
            for name, found in cases.items():
                file.write(json.dumps({"case": name, **found}) + "\n")
