"""`gristmill bench train`: where the time of a step goes, what the safety costs, what the teacher costs.

Everything is compared inside one run, as ratios: the shares of a step; verdict and guard as a share of it; the EMA under
ZeRO 3 on local shards against the way that gathers every parameter first; the memory of the teacher on 1, 2 and 4 ranks;
the same images on one process and on two. The network is a ViT of a few million parameters on drawn pictures, so that
it runs in minutes on two cores; overrides make it any other.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from ...models.student import Student
from ...models.teacher import make_teacher
from ...shards.demo import make_demo_images
from ...shards.ingest import ingest_folder
from ..engine import Engine
from ..launch import join, leave, quiet_deepspeed
from ..recipe import Recipe, dump_recipe, load_recipe
from ..run import Run
from ..runlog import read_log

# A ViT of 11 million parameters at 64 pixels: large enough that shares mean something, small enough for two cores.
SIZES = (
    "student.embed_dim=256", "student.depth=8", "student.heads=4", "student.prototypes=4096", "student.head_hidden=512",
    "student.image_size=64", "views.global.size=64", "views.local.size=32", "probes.size=64", "probes.at=[]",
    "objectives.instance.queue=4096", "objectives.local_group.queue=4096", "objectives.local_group.memory=4096",
    "batch=32", "metrics.port=off", "threads=1",
)  # fmt: skip
PHASES = ("data_wait", "forward", "backward", "verdict", "optimizer", "ema", "commit")


def bench_train(steps: int, as_json: bool, only: tuple[str, ...] = (), overrides: tuple[str, ...] = ()) -> int:
    """Run the parts asked for (all by default) and print them; returns the exit code."""
    parts: dict[str, Callable[[Path, int, tuple[str, ...]], dict[str, Any]]] = {
        "step": step_shares,
        "guard": guard_cost,
        "ema": ema_cost,
        "teacher": teacher_memory,
        "ranks": one_and_two,
    }
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="gristmill-bench-") as folder:
        root = Path(folder)
        make_demo_images(root / "images", images=640)
        ingest_folder(root / "images", root / "data")
        for name, part in parts.items():
            if not only or name in only:
                found[name] = part(root, steps, overrides)
                if not as_json:
                    _show(name, found[name])
    if as_json:
        print(json.dumps(found))
    return 0


def recipe_of(root: Path, steps: int, *overrides: str) -> Recipe:
    """The bench's recipe for so many steps."""
    base = load_recipe("demo", [f"data={root / 'data' / 'train'}", *SIZES, *overrides])
    return load_recipe(
        "demo", [f"data={root / 'data' / 'train'}", *SIZES, f"images={steps * base.batch}",
                 f"checkpoint.every={max(1, steps // 4) * base.batch}", *overrides]
    )  # fmt: skip


def train_apart(root: Path, world: int, steps: int, name: str, *overrides: str) -> list[dict[str, Any]]:
    """The step lines of a run of its own process(es)."""
    recipe = recipe_of(root, steps, *overrides)
    path, out = root / f"{name}.yaml", root / name
    path.write_text(dump_recipe(recipe))
    command = ["-m", "gristmill.ops.cli", "train", str(path), "--out", str(out)]
    if world > 1:
        command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world), *command]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stdout[-2000:] + done.stderr[-4000:])
    return [line for line in read_log(out / "metrics.jsonl") if line["kind"] == "step"]


def step_shares(root: Path, steps: int, overrides: tuple[str, ...]) -> dict[str, float]:
    """Share of each phase in a step of one process, checkpoints written beside it."""
    lines = train_apart(root, 1, steps, "step", *overrides)[2:]  # the first ones warm up
    total = sum(sum(line["seconds"].values()) for line in lines)
    shares = {phase: sum(line["seconds"].get(phase, 0.0) for line in lines) / total for phase in PHASES}
    rest = {p: sum(line["seconds"].get(p, 0.0) for line in lines) / total for p in ("checkpoint", "metrics")}
    return {"seconds_a_step": total / len(lines), **shares, **rest}


def guard_cost(root: Path, steps: int, overrides: tuple[str, ...]) -> dict[str, float]:
    """Time of squares, verdict and clip factors over that of the whole step, measured around the same calls."""
    run = _started(root, steps, "guard", overrides)
    loader = run.loader()
    spent, whole = 0.0, 0.0
    for step in range(steps):
        begin = time.perf_counter()
        batch = next(loader)
        outcome = run.forward(batch, 0)
        run.engine.backward(outcome.loss)
        run.engine.set_rates(run.progress, 1 / steps)
        before = time.perf_counter()
        flags: dict[str, float] = dict.fromkeys(("stop", "fault", "written", "failed"), 0.0)
        verdict = run.guard.judge([outcome], run.engine.squares(), partial=False, flags=flags)
        run.guard.settle(verdict)
        after = time.perf_counter()
        run.engine.step(verdict.norms)
        run.engine.teacher.update(0.99)
        run.commit([outcome])
        run.cursor = run.cursor.advance(run.recipe.batch, committed=True)
        if step >= 2:
            spent += after - before
            whole += time.perf_counter() - begin
    loader.close()
    run.close()
    leave()
    return {"verdict_and_guard_of_step": spent / whole}


def _started(root: Path, steps: int, name: str, overrides: tuple[str, ...]) -> Run:
    torch.set_flush_denormal(True)
    rank, world, device = join()
    run = Run(recipe_of(root, steps, *overrides), root / name, rank, world, device)
    run.restore()
    return run


def ema_cost(root: Path, steps: int, overrides: tuple[str, ...]) -> dict[str, float]:
    """ZeRO 3 on two ranks: EMA on local shards against gathering every parameter first, as most others do."""
    return _ranks(2, "ema", root, overrides)


def teacher_memory(root: Path, steps: int, overrides: tuple[str, ...]) -> dict[str, float]:
    """Bytes a rank keeps for the teacher at ZeRO 3, over those of one rank, on 1, 2 and 4 ranks."""
    found = {world: _ranks(world, "memory", root, overrides) for world in (1, 2, 4)}
    return {
        f"{name}_on_{world}_ranks": value[name] / found[1][name] for name in found[1] for world, value in found.items()
    }


def one_and_two(root: Path, steps: int, overrides: tuple[str, ...]) -> dict[str, float]:
    """Images a second of two processes over those of one, the same images, ZeRO 0 and 1."""

    def rate(lines: list[dict[str, Any]]) -> float:
        times = sorted(sum(line["seconds"].values()) for line in lines[2:])
        return 1.0 / times[len(times) // 2]

    one = rate(train_apart(root, 1, steps, "one", *overrides))
    return {
        f"two_over_one_zero{stage}": rate(train_apart(root, 2, steps, f"two{stage}", f"engine.zero={stage}", *overrides)) / one
        for stage in (0, 1)
    }  # fmt: skip


def _ranks(world: int, what: str, root: Path, overrides: tuple[str, ...]) -> dict[str, float]:
    out = root / f"{what}{world}.json"
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(world),
        "-m",
        __name__,
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, what, str(root), str(out), *overrides], env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(done.stdout[-2000:] + done.stderr[-4000:])
    return json.loads(out.read_text())


def _on_rank(what: str, root: Path, out: Path, overrides: list[str]) -> None:
    """What each process of `_ranks` does."""
    deepspeed = quiet_deepspeed()
    rank, world, _ = join()
    recipe = recipe_of(root, 8, "engine.zero=3", "batch=32", *overrides)
    student = Student(recipe.student, seed=0)
    engine = Engine(student, make_teacher(student), recipe, rank, world)
    teacher = engine.teacher
    if what == "memory":
        shards = sum(s.numel() * s.element_size() for s in teacher.shadows if s is not None)
        found: dict[str, float] = {"teacher_bytes": float(shards)}
    else:
        times: dict[str, list[float]] = {"local": [], "gathered": []}
        own = dict(teacher.module.named_parameters())
        pairs = [(p, own[name]) for name, p in engine.module.named_parameters() if name in own]
        for _ in range(6):
            begin = time.perf_counter()
            teacher.update(0.99)
            times["local"].append(time.perf_counter() - begin)
            begin = time.perf_counter()
            for source, target in pairs:
                with deepspeed.zero.GatheredParameters([source, target], modifier_rank=0):
                    if rank == 0:
                        target.data.lerp_(source.data, 0.01)
            times["gathered"].append(time.perf_counter() - begin)
        found = {name: sorted(values)[len(values) // 2] for name, values in times.items()}
        found = {"gathered_over_local": found["gathered"] / found["local"], "local_seconds": found["local"]}
    if rank == 0:
        out.write_text(json.dumps(found))
    engine.close()
    leave()


def _show(name: str, values: dict[str, float]) -> None:
    table = Table(title=name, title_justify="left")
    table.add_column("")
    table.add_column("", justify="right")
    for key, value in values.items():
        share = not key.endswith(("seconds_a_step", "_seconds")) and "over" not in key
        table.add_row(key.replace("_", " "), f"{100 * value:.2f} %" if share else f"{value:.4g}")
    Console().print(table)


if __name__ == "__main__":
    _on_rank(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
