"""Run by zygote.py: HCSC on two ranks, clusterings included.

`stream` and `table`: steps with real re-clusterings, each rank with its half of the images, beside one process that sees
all of them; the gaps between the losses, and between everything that is remembered. `run stream`, `run table zeroN`: whole runs,
with a pass over the data whose weights are scattered at stage 3. What was found goes to found.jsonl.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from gristmill.objectives import Outcome, StepInfo
from gristmill.objectives.hierarchy import HierarchyConfig, HierarchyObjective
from gristmill.ops import train as training
from gristmill.ops.checkpoint import newest
from gristmill.ops.launch import join, leave
from gristmill.ops.ranks import gather
from gristmill.ops.recipe import load_recipe
from gristmill.ops.runlog import read_log
from gristmill.ops.stores import open_store
from torch import Tensor

IMAGES, BATCH, STEPS, DIM = 480, 16, 24, 8
CONFIG: dict[str, Any] = {
    "queue": 64, "levels": (24, 12, 6), "exclusion_batch": 4, "warmup": 0.2, "iterations": 6, "attempts": 2, "again": 4,
}  # fmt: skip
FORMS: dict[str, dict[str, Any]] = {
    "stream": {"assign": "stream", "memory": 96, "every": 4 * BATCH, "ramp": 0.3},
    "table": {"assign": "table", "every": 6 * BATCH},
}
SMALL = [
    "batch=8", "images=128", "threads=1", "seed=5", "stream.lanes=4", "stream.window=8", "stream.take_up=never", "metrics.port=off",
    "probes.at=[]", "watchdog=0", "probes.size=16", "student.image_size=16", "student.patch_size=8", "student.embed_dim=32",
    "student.depth=1", "student.heads=2", "views.global.size=16", "views.local.size=8", "guard.captures=0", "checkpoint.every=1000",
    "student.projections={hierarchy: {layers: 2, hidden: 32, out: 16}}",
]  # fmt: skip


def rows(count: int, seed: int) -> Tensor:
    """Unit rows around 20 places that wander as the seed grows."""
    still, moving = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)
    places = torch.randn(20, DIM, generator=still)
    places = places + 0.02 * seed * torch.randn(20, DIM, generator=still)
    chosen = torch.randint(20, (count,), generator=moving)
    return F.normalize(places[chosen] + 0.3 * torch.randn(count, DIM, generator=moving), dim=1)


def steps(form: str, rank: int, world: int) -> dict[str, float]:
    """The largest gap of each thing to one process's, over all steps; how often was clustered, how stable prototypes were."""
    config = HierarchyConfig(**CONFIG, **FORMS[form])
    ours, whole = (HierarchyObjective(config, DIM, seed=1, images=IMAGES) for _ in range(2))
    half, found, stable, fits = BATCH // world, {"loss": 0.0, "gradient": 0.0}, 1.0, 0
    mine = slice(rank * half, (rank + 1) * half)
    for step in range(STEPS):
        queries, keys = rows(3 * BATCH, 100 + step).view(3, BATCH, DIM), rows(BATCH, step)
        index = torch.randperm(IMAGES, generator=torch.Generator().manual_seed(step))[:BATCH]
        shape: dict[str, Any] = {
            "student_crops": 3,
            "student_globals": 1,
            "teacher_crops": 1,
            "images": IMAGES,
            "position": step * BATCH,
        }
        all_of = StepInfo(batch=BATCH, index=index, progress=step / STEPS, **shape)
        part = StepInfo(
            batch=half, index=index[mine], progress=step / STEPS, rank=rank, world=world, gather=gather, **shape
        )
        for objective, info in ((ours, part), (whole, all_of)):
            if objective.stale(info):
                objective.refresh(rows(IMAGES, 1000 + step), info)
                fits += objective is ours
        a = queries[:, mine].flatten(0, 1).clone().requires_grad_()
        b = queries.flatten(0, 1).clone().requires_grad_()
        one = ours.loss({"hierarchy": a}, {"hierarchy": keys[mine]}, part)
        other = whole.loss({"hierarchy": b}, {"hierarchy": keys}, all_of)
        one.loss.backward()
        other.loss.backward()
        assert a.grad is not None
        assert b.grad is not None
        found["loss"] = max(found["loss"], gap(gather(one.loss.detach().view(1)).mean(), other.loss.detach()))
        wanted = b.grad.view(3, BATCH, DIM)[:, mine].flatten(0, 1) * world
        found["gradient"] = max(found["gradient"], gap(a.grad, wanted))
        ours.commit(Outcome(one.loss, {}, {name: gather(value) for name, value in one.commit.items()}))
        whole.commit(other)
        after: dict[str, Any] = {"position": (step + 1) * BATCH, "progress": (step + 1) / STEPS}
        logs = ours.refit(replace(part, **after))
        whole.refit(replace(all_of, **after))
        fits += bool(logs)
        stable = min(stable, float(logs.get("hierarchy/level0_stable", 1.0)))
        state = whole.state()
        for name, tensor in ours.state().items():
            kind = name.split(".")[0]
            found[kind] = max(found.get(kind, 0.0), gap(tensor.double(), state[name].double()))
    return {**found, "clusterings": float(fits), "stable": stable}


def gap(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().max())


def whole_runs(folder: Path, data: str, rank: int) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for form, stage in (("stream", 2), ("table", 0), ("table", 2), ("table", 3)):
        more = {"stream": "assign: stream, memory: 32, every: 32, ramp: 0.2", "table": "every: 64"}[form]
        settings = "levels: [12, 6, 3], queue: 64, iterations: 3, attempts: 1, exclusion_batch: 4, warmup: 0.0"
        objective = f"objectives={{hierarchy: {{{settings}, {more}}}}}"
        name = f"run {form} zero{stage}"
        training.train(
            load_recipe("demo", [f"data={data}", *SMALL, objective, f"engine.zero={stage}"]), folder / name, quiet=True
        )
        if rank:
            continue
        logged = [line for line in read_log(folder / name / "metrics.jsonl") if line["kind"] == "step"]
        saved, _ = newest(open_store(folder / name / "checkpoints"))
        assert saved is not None
        memories = saved.whole("objectives")
        saved.close()
        table = memories.get("hierarchy.table")
        found[name] = {
            "losses": [line["loss"] for line in logged],
            "ramps": [line["hierarchy/ramp"] for line in logged],
            "bad": sum(line["bad"] for line in logged),
            "clustered": int(memories["hierarchy.last"]),
            "unknown": None if table is None else int((table < 0).sum()),
        }
    return found


def main() -> None:
    folder, data = Path(sys.argv[1]), sys.argv[2]
    rank, world, device = join()
    training.join = lambda: (rank, world, device)
    training.leave = lambda: None
    with (folder / "found.jsonl").open("a") as file:
        for form in FORMS:
            gaps = steps(form, rank, world)
            worst = gather(torch.tensor([list(gaps.values())], dtype=torch.float64)).amax(0).tolist()
            if rank == 0:
                file.write(json.dumps({"case": form, **dict(zip(gaps, worst, strict=True))}) + "\n")
        for case, values in whole_runs(folder, data, rank).items():
            file.write(json.dumps({"case": case, **values}) + "\n")
    leave()
