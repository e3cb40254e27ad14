"""Run by zygote.py (see test_objectives.py): objectives on two ranks, whose rows meet through gloo.

`official`: what the official code printed on two ranks (mugs_dist2.pt), fed to our objectives rank by rank.
`sinkhorn`: assignments over both ranks' images against one process's over all of them. `ibot zeroN`: whole runs with
hidden patches, prototypes of their own and balance over the ranks. `mugs`: a run whose student's crops are strong by
coins. What was found goes to found.jsonl.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gristmill.objectives import (
    GroupConfig,
    GroupObjective,
    InstanceConfig,
    InstanceObjective,
    LocalGroupConfig,
    LocalGroupObjective,
    Outcome,
    StepInfo,
)
from gristmill.objectives.memory import RingMemory
from gristmill.ops import train as training
from gristmill.ops.checkpoint import newest
from gristmill.ops.launch import join, leave
from gristmill.ops.ranks import gather
from gristmill.ops.recipe import Recipe, load_recipe
from gristmill.ops.runlog import read_log
from gristmill.ops.stores import open_store
from gristmill.pipeline.plan import Plan
from gristmill.pipeline.strong import strong_crops
from torch import Tensor

VECTORS = Path(__file__).parents[1] / "vectors"
STEPS, BATCH = 4, 8
SMALL = [
    f"batch={BATCH}", f"images={BATCH * STEPS}", "threads=1", "seed=5", "stream.lanes=4", "stream.window=8",
    "metrics.port=off", "probes.at=[]", "watchdog=0", "probes.size=16", "student.image_size=16", "student.patch_size=4",
    "student.embed_dim=32", "student.depth=2", "student.heads=2", "student.head_hidden=32", "student.head_out=16",
    "student.predictor_hidden=32", "student.prototypes=64", "guard.captures=0", "checkpoint.every=1000",
]  # fmt: skip
IBOT = [
    "views.global.size=16", "views.local.size=8", "objectives.instance=null", "objectives.local_group=null",
    "objectives.group={form: dino, balance: sinkhorn}", "objectives.patch={}", "objectives.add=sum",
    "student.shared_head=false", "student.patch_prototypes=48",
]  # fmt: skip
MUGS = [
    "views=mugs", "views.teacher.size=16", "views.global.size=16", "views.local.size=8", "views.local.count=2",
    "objectives.instance.queue=64", "objectives.local_group.queue=64", "objectives.local_group.memory=64",
    "objectives.local_group.neighbours=4", "stream.seed=9",
]  # fmt: skip


def gathered(outcome: Outcome) -> Outcome:
    return Outcome(outcome.loss, {}, {name: gather(rows) for name, rows in outcome.commit.items()})


def gap(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().max())


def official(rank: int) -> dict[str, float]:
    """Losses of this rank, then queue, pointer, centre and the student's memory after each step."""
    vector = torch.load(VECTORS / "mugs_dist2.pt", weights_only=True)
    dim, capacity = vector["queue0"].shape
    instance = InstanceObjective(InstanceConfig(queue=capacity), dim, seed=0, dtype=torch.float64)
    instance.load({**instance.state(), "queue.rows": vector["queue0"].T.contiguous()})
    group = GroupObjective(GroupConfig(teacher_temperature=(0.04, 0.04)), dim, dtype=torch.float64)
    config = LocalGroupConfig(queue=capacity, memory=len(vector["mem0"]["block.queue_k"]), neighbours=2, compat=True)
    local = LocalGroupObjective(config, dim, 8, seed=0)
    local.load({**local.state(), "student.rows": vector["mem0"]["block.queue_k"]})
    assert isinstance(local.student, RingMemory)
    gaps: dict[str, float] = {}

    def note(name: str, value: float) -> None:
        gaps[name] = max(gaps.get(name, 0.0), value)

    for step in vector["ranks"][rank]:
        info = StepInfo(batch=3, student_crops=4, student_globals=2, teacher_crops=2, weak=step["weak"])
        outcome = instance.loss({"instance": step["pred"]}, {"instance": step["keys"]}, info)
        note("infonce", gap(outcome.loss, step["nce"]))
        instance.commit(gathered(outcome))
        note("queue", gap(instance.queue.rows.T, step["queue"]))
        note("pointer", abs(instance.queue.pointer - step["ptr"]))
        outcome = group.loss({"group": step["s"]}, {"group": step["t"]}, info)
        note("group", gap(outcome.loss, step["clu"]))
        group.commit(gathered(outcome))
        note("centre", gap(group.center, step["center"]))
        sides = {"local_group": step["keys"].float(), "memory_row": step["enqueue"].repeat(2, 1)}
        outcome = local.loss({**sides, "local_group": step["pred"].float()}, sides, info)
        local.commit(gathered(outcome))
        note("memory", gap(local.student.rows, step["mem"]))
        note("memory_pointer", abs(local.student.pointer - step["mem_ptr"]))
    return gaps


def sinkhorn(rank: int, world: int) -> dict[str, float]:
    """Six images on all ranks together, once as one batch over the ranks, once in virtual batches of a rank's."""
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(4, 6, 7, generator=generator, dtype=torch.float64)
    teacher = torch.randn(2, 6, 7, generator=generator, dtype=torch.float64)
    gaps, mine = {}, slice(rank * 6 // world, (rank + 1) * 6 // world)
    for name, virtual in (("over_ranks", None), ("virtual", 6 // world)):
        config = GroupConfig(balance="sinkhorn", virtual_batch=virtual)
        objective = GroupObjective(config, 7, dtype=torch.float64)
        losses = []
        for images, meet in ((slice(0, 6), None), (mine, gather)):
            s, t = student[:, images].flatten(0, 1), teacher[:, images].flatten(0, 1)
            batch = len(t) // 2
            info = StepInfo(batch=batch, student_crops=4, student_globals=2, teacher_crops=2, gather=meet)
            losses.append(objective.loss({"group": s}, {"group": t}, info).loss)
        gaps[name] = gap(gather(losses[1].view(1)).mean(), losses[0])
    return gaps


def recipe_of(data: str, *more: str) -> Recipe:
    return load_recipe("demo", [f"data={data}", *SMALL, *more])


def run(recipe: Recipe, folder: Path, rank: int) -> dict[str, Any]:
    """Train; on rank 0 the steps' losses and the memories of the checkpoint at the end."""
    training.train(recipe, folder, quiet=True)
    if rank:
        return {}
    steps = [line for line in read_log(folder / "metrics.jsonl") if line["kind"] == "step"]
    saved, _ = newest(open_store(folder / "checkpoints"))
    assert saved is not None
    memories = saved.whole("objectives")
    saved.close()
    return {"steps": steps, "memories": memories}


def runs(folder: Path, data: str, rank: int) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for stage in (0, 2, 3):
        name = f"ibot zero{stage}"
        ran = run(recipe_of(data, f"engine.zero={stage}", *IBOT), folder / name, rank)
        if rank == 0:
            logs = {
                key: [step[key] for step in ran["steps"]] for key in ("loss/group", "loss/patch", "patch/hidden_ratio")
            }
            centre = float(ran["memories"]["patch.center"].norm())
            found[name] = {"bad": sum(step["bad"] for step in ran["steps"]), "centre": centre, **logs}
    recipe = recipe_of(data, *MUGS)
    ran = run(recipe, folder / "mugs", rank)
    if rank == 0:
        plan = Plan(recipe.views)
        strong = strong_crops(plan, 9, np.arange(STEPS * BATCH))[:, plan.columns["global"].start]
        written = {
            who: int((ran["memories"][f"local_group.{who}.written"] >= 0).sum()) for who in ("student", "teacher")
        }
        by_step = [int(weak) for weak in (~strong).reshape(STEPS, BATCH).sum(1)]
        stamps = ran["memories"]["local_group.student.written"]
        found["mugs"] = {
            "written": written, "weak_by_step": by_step, "bad": sum(step["bad"] for step in ran["steps"]),
            "written_by_step": [int((stamps == step).sum()) for step in range(STEPS)],
        }  # fmt: skip
    return found


def main() -> None:
    folder, data = Path(sys.argv[1]), sys.argv[2]
    rank, world, device = join()
    training.join = lambda: (rank, world, device)
    training.leave = lambda: None
    found = {"official": official(rank), "sinkhorn": sinkhorn(rank, world)}
    for case, gaps in found.items():
        worst = gather(torch.tensor([list(gaps.values())], dtype=torch.float64)).amax(0)
        if rank == 0:
            with (folder / "found.jsonl").open("a") as file:
                file.write(json.dumps({"case": case, **dict(zip(gaps, worst.tolist(), strict=True))}) + "\n")
    for case, values in runs(folder, data, rank).items():
        with (folder / "found.jsonl").open("a") as file:
            file.write(json.dumps({"case": case, **values}) + "\n")
    leave()
