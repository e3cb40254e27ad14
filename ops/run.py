"""A run: the parts that a recipe asks for, put together, saved and restored as one. The loop is in train.py.

The run folder holds everything that a user may want afterwards: recipe.yaml (as resolved), metrics.jsonl,
checkpoints/, quarantine.jsonl, crops.npz (the first batch as it was fed), neighbours.npz, report.html.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..models.student import Student
from ..models.teacher import make_teacher
from ..objectives import Dims, MixtureConfig, StepInfo, build_objectives
from ..pipeline.cursor import Cursor
from ..pipeline.draws import Plan
from ..pipeline.loader import Batch, Loader
from ..pipeline.order import Order
from ..pipeline.philox import DROP_PATH, uniform
from ..shards.manifest import Manifest
from ..shards.quarantine import Quarantine
from .checkpoint import Checkpoint, CheckpointError, load_newest, save
from .engine import Engine
from .guard import Guard
from .recipe import Recipe, RecipeError, dump_recipe
from .runlog import RunLog

# What may differ between a checkpoint's recipe and the one that goes on with it: nothing that decides a number.
FREE = ("name", "data", "threads", "metrics", "checkpoint", "probes", "stream.prefetch", "stream.reader_threads")
VERSIONS = ("torch", "deepspeed", "nvidia-dali-cuda130", "timm", "webdataset", "numpy")


class Run:
    """All state of a run on this rank. `restore()` first, then the loop; `close()` at the end."""

    def __init__(self, recipe: Recipe, folder: Path, rank: int, world: int, device: torch.device):
        if recipe.data is None:
            raise RecipeError(
                "data: no data set is named; make one with `gristmill ingest DIR --out SHARDS` and add data=SHARDS/train"
            )
        if recipe.batch % world:
            raise RecipeError(f"batch: {recipe.batch} images cannot be shared equally by {world} processes")
        if world > 1:
            raise RecipeError(f"this version trains in one process, but the launcher started {world}")
        self.recipe, self.folder, self.rank, self.world, self.device = recipe, folder, rank, world, device
        self.threads = recipe.threads or len(os.sched_getaffinity(0))
        self.manifest = Manifest.open(recipe.data)
        if self.manifest.samples < recipe.batch:
            raise RecipeError(f"batch: {recipe.batch} is more than the {self.manifest.samples} images of {recipe.data}")
        self.steps = recipe.images // recipe.batch
        stream = recipe.stream
        self.order = Order(self.manifest.counts, stream.seed, stream.lanes, stream.window)
        self.cursor = Cursor(data=self.manifest.digest, seed=stream.seed, lanes=stream.lanes, window=stream.window)
        self.log = RunLog(folder)
        self.quarantine = Quarantine(folder / "quarantine.jsonl")
        self.plan = Plan(recipe.views)
        self.student_views = _by_size([v for v in recipe.views if v.role in ("student", "both")])
        self.teacher_views = _by_size([v for v in recipe.views if v.role in ("teacher", "both")])
        student = Student(recipe.student, seed=recipe.seed).to(device)
        self.teacher = make_teacher(student)
        self.engine = Engine(student, recipe, world)
        wanted, heads = recipe.objectives, recipe.student
        self.mixture = build_objectives(
            {name: getattr(wanted, name) for name in wanted.names()},
            dims=Dims(student.backbone.embed_dim, heads.head_out, heads.head_out, heads.prototypes),
            seed=recipe.seed,
            mixture=MixtureConfig(weights=wanted.weights),
            device=device,
        )
        self.guard = Guard()
        self._check_memories()

    @property
    def position(self) -> int:
        return self.cursor.position

    @property
    def progress(self) -> float:
        return self.position / (self.steps * self.recipe.batch)

    def loader(self) -> Loader:
        """Batches from the cursor's position on; the draws and the order depend on it alone."""
        return Loader(
            self.manifest,
            self.plan,
            self.recipe.stream,
            order=self.order,
            start=self.position,
            batch=self.recipe.batch,
            quarantine=self.quarantine,
            device="gpu" if self.device.type == "cuda" else "cpu",
            device_id=self.device.index,
            rank=self.rank,
            world=self.world,
        )

    def crops(self, batch: Batch, views: list[list[Any]]) -> list[Tensor]:
        """[crops * B, 3, H, W] for each size, crop-major as the official code has them."""
        return [
            torch.cat([batch.views[view.name].transpose(0, 1).flatten(0, 1) for view in group]).to(self.device)
            for group in views
        ]

    def info(self) -> StepInfo:
        student = [view for group in self.student_views for view in group]
        largest = max(view.size for view in student)
        return StepInfo(
            batch=self.recipe.batch // self.world,
            student_crops=sum(view.count for view in student),
            student_globals=sum(view.count for view in student if view.size == largest),
            teacher_crops=sum(view.count for group in self.teacher_views for view in group),
            position=self.position,
            progress=self.progress,
            same_views=any(view.role == "both" for view in student),
        )

    def context(self) -> dict[str, Tensor]:
        """What the student's forward reads: memories, and the draws of stochastic depth, keyed by the position."""
        context = self.mixture.context()
        if self.recipe.student.drop_path:
            blocks, crops = len(self.teacher.backbone.blocks), self.info().student_crops
            positions = self.position + np.arange(self.recipe.batch)
            draws = uniform(self.recipe.seed, positions, DROP_PATH, crops * 2 * blocks)
            by_crop = torch.from_numpy(draws).float().view(-1, crops, 2 * blocks).transpose(0, 1)
            context["drop_path.draws"] = by_crop.flatten(0, 1).to(self.device)
        return context

    def save(self) -> tuple[Path, float]:
        """Write a checkpoint of the position reached; returns (folder, seconds)."""
        start = time.perf_counter()
        self.cursor = self.cursor.noting(self.quarantine.count, self.quarantine.digest)
        path = save(
            self.folder / "checkpoints",
            self.position,
            Checkpoint(
                tensors={
                    "student": dict(self.engine.module.state_dict()),
                    "teacher": dict(self.teacher.state_dict()),
                    "optimizer": self.engine.optimizer_state(),
                    "objectives": self.mixture.state(),
                },
                state={
                    "cursor": self.cursor.to_json(),
                    "recipe": self.recipe.model_dump(mode="json"),
                    "topology": self.topology(),
                    "versions": {name: importlib.metadata.version(name) for name in VERSIONS},
                },
            ),
            self.recipe.checkpoint.keep,
        )
        return path, time.perf_counter() - start

    def topology(self) -> dict[str, Any]:
        """What bit-for-bit resumption hangs on, beyond the recipe."""
        return {
            "world": self.world,
            "threads": self.threads,
            "device": self.device.type,
            "executor": "dali",
            "processor": platform.processor() or platform.machine(),
        }

    def restore(self) -> list[str]:
        """Go on from the newest whole checkpoint, if there is one; returns what the user should be told."""
        checkpoint, told = load_newest(self.folder / "checkpoints")
        if checkpoint is None:
            (self.folder / "recipe.yaml").write_text(dump_recipe(self.recipe))
            self.log.rewind(0)
            torch.set_num_threads(self.threads)
            return told
        self._check_recipe(checkpoint)
        cursor = Cursor.from_json(checkpoint.state["cursor"])
        stream = self.recipe.stream
        cursor.check(self.manifest.digest, stream.seed, stream.lanes, stream.window)
        self.cursor = cursor
        self.engine.module.load_state_dict(checkpoint.tensors["student"])
        self.teacher.load_state_dict(checkpoint.tensors["teacher"])
        self.engine.load_optimizer_state(checkpoint.tensors["optimizer"])
        self.mixture.load(checkpoint.tensors["objectives"])
        before = checkpoint.state["topology"]
        if self.recipe.threads == 0:
            self.threads = before["threads"]  # another number of threads sums in another order
        changed = [f"{k} {v} -> {self.topology()[k]}" for k, v in before.items() if self.topology()[k] != v]
        if changed:
            told.append(f"not bit for bit as before: {', '.join(changed)}")
        torch.set_num_threads(self.threads)
        self.log.rewind(self.position)
        told.append(f"going on from image {self.position} ({checkpoint.path})")
        return told

    def _check_memories(self) -> None:
        """A step's rows must fit the memories that they go to."""
        rows = self.recipe.batch * self.info().teacher_crops
        for name in ("instance", "local_group"):
            config = getattr(self.recipe.objectives, name)
            if config and config.queue < rows:
                raise RecipeError(f"objectives.{name}.queue: {config.queue} is less than the {rows} rows of one step")
        local = self.recipe.objectives.local_group
        if local and local.memory < self.recipe.batch:
            raise RecipeError(
                f"objectives.local_group.memory: {local.memory} is less than a batch of {self.recipe.batch}"
            )

    def _check_recipe(self, checkpoint: Checkpoint) -> None:
        now, then = flatten(self.recipe.model_dump(mode="json")), flatten(checkpoint.state["recipe"])
        differing = [
            f"{key}: {then.get(key, 'absent')!r} there, {now.get(key, 'absent')!r} now"
            for key in sorted(now.keys() | then.keys())
            if now.get(key) != then.get(key) and not any(key == f or key.startswith(f + ".") for f in FREE)
        ]
        if differing:
            raise CheckpointError(
                f"{checkpoint.path} was written by another recipe ({'; '.join(differing[:3])}"
                + (f"; and {len(differing) - 3} more" if len(differing) > 3 else "")
                + "). Set these back, or name another folder with --out to start anew."
            )

    def close(self) -> None:
        self.engine.close()
        self.log.close()


def flatten(tree: Any, path: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}; list items by index."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else None
    if items is None:
        return {path: tree}
    return {k: v for key, value in items for k, v in flatten(value, f"{path}.{key}" if path else str(key)).items()}


def _by_size(views: list[Any]) -> list[list[Any]]:
    """Views in groups of equal size, largest first: one backbone call a group, globals before locals."""
    sizes = sorted({view.size for view in views}, reverse=True)
    return [[view for view in views if view.size == size] for size in sizes]
