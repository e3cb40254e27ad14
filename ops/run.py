"""A run: the parts that a recipe asks for, put together, saved and restored as one. The loop is in train.py.

The run folder holds everything that a user may want afterwards (about.py says what is what), and no secret. All ranks
read it; only rank 0 writes it, but for each rank's part of a checkpoint and its own finds of damage.
"""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..models import Backbone, compile_blocks, merge_statistics, statistics_of
from ..models.batch_norm import PREFIX
from ..models.products import library
from ..models.student import Student
from ..models.teacher import make_teacher
from ..objectives import Outcome, StepInfo
from ..pipeline.augment import chosen
from ..pipeline.cursor import Cursor
from ..pipeline.draws import Plan
from ..pipeline.loader import Batch, Loader
from ..shards.quarantine import Quarantine
from .about import resolved
from .checkpoint import CheckpointError, Content, Saved, newest
from .engine import Engine
from .feed import Feed
from .fitting import together
from .guard import Guard, Verdict
from .heap import keep_heap
from .importing import Initial, read_initial
from .inputs import Inputs, Origin
from .networks import build_mixture, build_student
from .ranks import drifted, gather, gather_texts, summed
from .recipe import Recipe, RecipeError
from .redacted import without_secrets
from .refresh import embed_all
from .runlog import NoLog, RunLog
from .stores import open_store
from .writer import Writer

# What may differ between a checkpoint's recipe and the one that goes on with it: nothing that decides more than rounding,
# and the data, which the cursor answers for.
FREE = (
    "name", "data", "threads", "metrics", "log", "checkpoint", "probes", "stream.prefetch", "stream.reader_threads",
    "stream.stall", "stream.deadline", "stream.cache", "stream.take_up", "stream.mixture_from", "stream.augment",
    "engine", "guard", "watchdog",
)  # fmt: skip
VERSIONS = ("torch", "deepspeed", "nvidia-dali-cuda130", "timm", "webdataset", "numpy", "numba", "simplejpeg")


class Run:
    """All state of a run on this rank. `restore()` first, then the loop; `close()` at the end."""

    def __init__(self, recipe: Recipe, folder: Path, rank: int, world: int, device: torch.device):
        if recipe.data is None:
            raise RecipeError(
                "data: no data set is named; make one with `gristmill ingest DIR --out SHARDS` and add data=SHARDS/train"
            )
        self.inputs = Inputs(recipe, rank, world, device)
        for field, images in together(recipe).items():
            if self.inputs.micro % images:
                raise RecipeError(
                    f"{field}: {images} does not divide the {self.inputs.micro} images of one forward on {world} processes"
                )
        self.recipe, self.folder, self.rank, self.world, self.device = recipe, folder, rank, world, device
        self.threads = recipe.threads or max(
            1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        )
        self.feed = Feed(recipe, rank, world)
        self.steps = recipe.images // recipe.batch
        self.cursor = self.feed.begin(None, self.everyones)
        self.log: RunLog | NoLog = RunLog(folder) if rank == 0 else NoLog(folder)
        self.quarantine = Quarantine(folder / "quarantine.jsonl")
        self.plan = Plan(recipe.views)
        if device.type == "cpu":
            keep_heap(not recipe.engine.recompute)
        student = self.build()
        student.backbone.recompute = recipe.engine.recompute
        self.depth = len(student.backbone.blocks)
        teacher = make_teacher(student)
        initial = self._initial(student)
        if initial:
            initial.fill(student, teacher)
        if recipe.engine.compile:
            if not (isinstance(student.backbone, Backbone) and isinstance(teacher.backbone, Backbone)):
                raise RecipeError("engine.compile: blocks of a ViT are compiled one by one; of a ResNet leave it out")
            try:
                compile_blocks(student.backbone, recipe.engine.compile)
                compile_blocks(teacher.backbone, recipe.engine.compile)
            except (ValueError, RuntimeError) as error:
                raise RecipeError(f"engine.compile: {error}", everywhere=False) from error  # perhaps no compiler here
        self.mixture = build_mixture(recipe, student, device, images=self.feed.images)
        if initial:
            initial.check(self.mixture)
        self.engine = Engine(student, teacher, recipe, rank, world)
        if initial:
            initial.finish(self.engine, self.mixture)
        self.begun = initial.report if initial else None
        self.guard = Guard(recipe.guard, rank, world)
        self.store = open_store(recipe.checkpoint.store or folder / "checkpoints")
        keep = recipe.checkpoint
        self.writer = Writer(
            self.store, rank, world, keep.keep, keep_every=keep.keep_every, asynchronous=keep.asynchronous
        )

    def build(self) -> Student:
        """The student as it is before its first step; its teacher's architecture, too."""
        return build_student(self.recipe).to(self.device)

    def _initial(self, student: Student) -> Initial | None:
        """Weights to begin with, as `student.init` says; none where a checkpoint has them. Collective."""
        if self.recipe.student.init is None:
            return None
        store = open_store(self.recipe.checkpoint.store or self.folder / "checkpoints")
        if self.total([float(len(store.positions())) if self.rank == 0 else 0.0])[0]:
            return None
        return read_initial(self.recipe, student, self.everyones)

    @property
    def position(self) -> int:
        return self.cursor.position

    @property
    def end(self) -> int:
        return self.steps * self.recipe.batch

    @property
    def progress(self) -> float:
        return self.position / self.end

    def loader(self) -> Loader:
        """This rank's share of batches from the cursor's position on; the draws and the order depend on it alone."""
        return self.feed.loader(self.position, self.quarantine, self.plan, self.device.type, self.device.index)

    def total(self, values: list[float]) -> list[float]:
        """Sums over the ranks. Collective."""
        if self.world == 1:
            return values
        return summed(values, self.device)

    def info(self, part: int = 0, batch: Batch | None = None) -> StepInfo:
        """Of a micro-batch, or without a batch of the position alone: nothing is drawn for it."""
        origin = None if batch is None else Origin(self.feed.index(batch.ids), batch.geometry)
        info = self.inputs.info(self.position, self.progress, part, origin, self.feed.images, batch is not None)
        return replace(info, gather=gather)

    def forward(self, batch: Batch, part: int) -> Outcome:
        """Teacher, student and losses of one micro-batch; nothing is remembered."""
        inputs, views, info = self.inputs, batch.views, self.info(part, batch)
        masked = inputs.masked(info)
        targets: dict[str, Tensor] = {}
        if self.mixture.needs_teacher:
            context = self.mixture.teacher_context() | masked | inputs.shuffled(self.position, part)
            targets = self.engine.teacher(inputs.crops(views, inputs.teacher, part), context)
        aims = self.mixture.aims(targets, info)
        context = self.mixture.context() | aims | masked | inputs.draws(self.position, part, self.depth)
        outputs = self.engine(inputs.crops(views, inputs.student, part), context, part == inputs.parts - 1)
        outcome = self.mixture.loss(outputs, targets | aims, info)
        for who, out in (("student", outputs), ("teacher", targets)):
            outcome.commit |= {f"{who}/{name}": value for name, value in statistics_of(out).items()}
        return outcome

    def commit(self, outcomes: list[Outcome]) -> None:
        """Remember a step that was applied: memories, centres, statistics, in the order of the positions on all ranks."""
        kept: dict[str, Tensor] = {}
        for name in outcomes[0].commit:
            rows = torch.cat([outcome.commit[name] for outcome in outcomes])
            kept[name] = gather(rows)
        found: dict[str, dict[str, Tensor]] = {}
        for who in self._networks():
            mark = f"{who}/"  # what batch norms would remember, among what the objectives would
            found[who] = {n.removeprefix(mark): kept.pop(n) for n in list(kept) if n.startswith(mark)}
        if not self.mixture.needs_teacher:  # one that was not asked has seen what the student saw
            there = {f"{PREFIX}{name}" for name, _ in self.engine.teacher.module.named_modules()}
            found["teacher"] = {name: value for name, value in found["student"].items() if name in there}
        for who, module in self._networks().items():
            merge_statistics(module, found[who])
        self.mixture.commit(Outcome(outcomes[0].loss.detach(), {}, kept))

    def refit(self) -> dict[str, float]:
        """Let objectives cluster anew what they remember, at the position reached; their logs. Collective."""
        return {name: float(value) for name, value in self.mixture.refit(self.info()).items()}

    def refresh(self) -> dict[str, int]:
        """Give objectives the pass over the data that they want before the next step. Collective.

        Their names, and how many images each did not see: left out, taken down or damaged.
        """
        missing: dict[str, int] = {}
        for name in self.mixture.stale(self.info()):
            rows = embed_all(self, name)
            missing[name] = int((~rows.any(1)).sum())
            self.mixture.refresh(name, rows, self.info())
        return missing

    def everyones(self, texts: list[str]) -> list[str]:
        """Equally many texts of every rank, in the order of the ranks. Collective.

        A global batch's keys, for example: only the rank that was fed a substitute knows which one it was.
        """
        return gather_texts(texts, self.total, self.device)

    def suspects(self, batch: Batch, verdict: Verdict) -> list[int]:
        """Offsets in the global batch of samples with pixels that are not finite, else the culprits' whole share."""
        size = self.recipe.batch // self.world
        mine = torch.zeros(self.recipe.batch, dtype=torch.float64)
        for crops in batch.views.values():
            finite = torch.isfinite(crops.flatten(1)).all(1).cpu()
            mine[self.rank * size : (self.rank + 1) * size] += (~finite).double()
        found = [place for place, count in enumerate(self.total(mine.tolist())) if count]
        ranks = sorted({rank for rank, _ in verdict.culprits})
        return found or [rank * size + i for rank in ranks for i in range(size)]

    def content(self) -> Content:
        """Everything that this rank contributes to a checkpoint."""
        self.cursor = self.cursor.noting(self.quarantine.count, self.quarantine.digest)
        self._same_memories()
        return Content(
            parts=list(self.engine.parts()),
            whole={
                "objectives": self.mixture.state(),
                "steps": self.engine.steps(),
                "buffers": {f"{who}/{n}": b for who, net in self._networks().items() for n, b in net.named_buffers()},
            },
            state={
                "cursor": self.cursor.to_json(),
                "guard": self.guard.state(),
                "recipe": without_secrets(self.recipe.model_dump(mode="json")),
                "topology": self.topology(),
                "images": self.feed.images,
                "versions": versions(),
            },
        )

    def topology(self) -> dict[str, Any]:
        """What bit-for-bit resumption hangs on, beyond the recipe."""
        host = {"products": library()} if self.device.type == "cpu" else {}
        return {
            "world": self.world,
            "zero": self.engine.stage,
            "precision": self.recipe.precision,
            "accumulate": self.inputs.parts,
            "threads": self.threads,
            "device": self.device.type,
            "executor": chosen(self.recipe.stream.augment, "gpu" if self.device.type == "cuda" else "cpu"),
            "processor": platform.processor() or platform.machine(),
            **host,
        }

    def restore(self) -> list[str]:
        """Go on from the newest whole checkpoint, if there is one; returns what the user should be told."""
        saved, told = newest(self.store, self.rank, self.world, self.total)
        if saved is None:
            if self.rank == 0:
                (self.folder / "recipe.yaml").write_text(resolved(self.recipe))
            self.log.rewind(0)
            torch.set_num_threads(self.threads)
            if self.begun:
                self.log.write("event", event="initial", **self.begun.as_dict())
                told += self.begun.lines()
            return told
        self._check_recipe(saved)
        self._check_topology(saved)
        self._load(saved)
        self.cursor = self.feed.begin(Cursor.from_json(saved.state["cursor"]), self.everyones)
        before = saved.state["topology"]
        if self.recipe.threads == 0 and before.get("world") == self.world:
            self.threads = before["threads"]  # another number of threads sums in another order
        changed = [f"{k} {before.get(k)} -> {v}" for k, v in self.topology().items() if before.get(k) != v]
        if changed:
            told.append(f"not bit for bit as before: {', '.join(changed)}")
        torch.set_num_threads(self.threads)
        self.log.rewind(self.position)
        told.append(f"going on from image {self.position} ({saved.path})")
        return told

    def go_back(self) -> int:
        """Return to the last good state and leave out what was seen since; returns that state's position. Collective."""
        self.writer.finish(self.total)
        saved, _ = newest(self.store, self.rank, self.world, self.total)
        if saved is None:
            raise CheckpointError(
                f"{self.store} holds no checkpoint to go back to; start again with a lower optimizer.lr"
            )
        then = self.feed.go_back(self.cursor, Cursor.from_json(saved.state["cursor"]))
        counted = self.guard.rolled_back
        self._load(saved)
        self.guard.rolled_back = counted
        self.guard.in_a_row = 0
        self.cursor = then.advance(self.position - then.position, committed=False)
        return then.position

    def _load(self, saved: Saved) -> None:
        self.engine.load(saved)
        buffers = saved.whole("buffers")
        for who, net in self._networks().items():
            for name, buffer in net.named_buffers():
                buffer.copy_(buffers[f"{who}/{name}"])
        self.mixture.load(saved.whole("objectives"))
        self.guard.load(saved.state["guard"])
        saved.close()

    def _same_memories(self) -> None:
        """Memories are copies of each other on all ranks; two that drifted apart would be a silent fault."""
        apart = drifted(self.mixture.state(), self.device)
        if apart:
            raise CheckpointError(
                f"{', '.join(apart)}: the ranks' copies differ, so this state must not be kept. Start again from the last "
                f"checkpoint; if it comes back, run with engine.compile=null and report it"
            )

    def _check_topology(self, saved: Saved) -> None:
        """What must not change unnoticed: who rounds the pixels, and who shares a forward.

        What is taken over a whole forward's images (batch norm, Sinkhorn-Knopp, KoLeo) is something else when other
        images share it.
        """
        before, now = saved.state["topology"].get("executor", "dali"), self.topology()["executor"]
        if before != now and self.recipe.stream.augment == "auto":
            raise CheckpointError(
                f"{saved.path} was written with views by {before}, here they would come from {now}, which rounds "
                f"otherwise: add stream.augment={before} to go on as before, or stream.augment={now} to change over"
            )
        if self.recipe.elastic == "same_topology":
            then, now = saved.state["topology"], self.topology()
            for key in ("world", "accumulate"):
                if then[key] != now[key]:
                    raise CheckpointError(
                        f"{saved.path} was written with {key} {then[key]}, this run has {now[key]}, and its batch norm "
                        f"(or balance, or KoLeo) depends on that: go on as before, or start anew with virtual_batch set"
                    )

    def _check_recipe(self, saved: Saved) -> None:
        recipes = self.recipe.model_dump(mode="json"), saved.state["recipe"]
        now, then = (flatten(without_secrets(recipe)) for recipe in recipes)
        differing = [
            f"{key}: {then.get(key, 'absent')!r} there, {now.get(key, 'absent')!r} now"
            for key in sorted(now.keys() | then.keys())
            if now.get(key) != then.get(key) and not any(key == f or key.startswith(f + ".") for f in FREE)
        ]
        if differing:
            raise CheckpointError(
                f"{saved.path} was written by another recipe ({'; '.join(differing[:3])}"
                + (f"; and {len(differing) - 3} more" if len(differing) > 3 else "")
                + "). Set these back, or name another folder with --out to start anew."
            )

    def _networks(self) -> dict[str, nn.Module]:
        return {"student": self.engine.module, "teacher": self.engine.teacher.module}

    def close(self) -> None:
        self.writer.close()
        self.engine.close()
        self.log.close()


@functools.cache
def versions() -> dict[str, str]:
    """Of what a run is made with, as imported: files that are replaced while it runs change nothing of it."""
    return {name: importlib.metadata.version(name) for name in VERSIONS}


def flatten(tree: Any, path: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}; list items by index."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else None
    if items is None:
        return {path: tree}
    return {k: v for key, value in items for k, v in flatten(value, f"{path}.{key}" if path else str(key)).items()}
