"""Run by zygote.py (see test_runs.py): whole runs through `train`, with NaN, rollback, crashes, kills, and on other ranks.

`crash`: each case straight to its end, and again up to a crash; the last one is killed while a checkpoint is written.
`resume`: new processes take the crashed runs to their ends; a run that SIGTERM stops in the middle, for others to go on
with; ranks whose memories differ. `elastic`: goes on with that run on 1, 3 and 4 ranks. What was seen goes to
found.jsonl in the folder given; the runs lie beside it, for the test to compare.
"""

import hashlib
import json
import os
import random
import signal
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from gristmill.ops import train as training
from gristmill.ops.checkpoint import CheckpointError, Image
from gristmill.ops.launch import join, leave
from gristmill.ops.recipe import Recipe, load_recipe
from gristmill.ops.run import Run
from gristmill.shards.errors import GristmillError

STEPS, BATCH = 12, 12
POISON = {24: 8, 84: 2, 96: 11}  # position -> offset of the image whose pixels are NaN; two in a row roll back
STOP = 72  # where SIGTERM comes, and where a checkpoint is due anyway
# Stage 1 in fp32 with micro-batches; stage 2 in fp32 is what test_faults.py kills, stops and loses ranks of.
CASES: list[tuple[int, str, tuple[str, ...]]] = [
    (0, "fp32", ()),
    (1, "fp32", ("engine.accumulate=2", "guard.captures=1")),
    (3, "fp32", ()),
    (0, "autocast", ()),
    (2, "autocast", ()),
    (3, "bf16", ()),
    (1, "bf16", ()),
]
BATCH_NORM = ("student.head_norm=batch", "student.virtual_batch=3")


def name_of(stage: int, precision: str, more: tuple[str, ...]) -> str:
    return " ".join((f"zero{stage}", precision, *more[:1]))


def recipe_of(data: str, stage: int, precision: str = "fp32", more: tuple[str, ...] = ()) -> Recipe:
    """Small, but with everything that must come back: stochastic depth, a thawing layer, memories that wrap."""
    return load_recipe("demo", [
        f"data={data}", f"batch={BATCH}", f"images={BATCH * STEPS}", f"precision={precision}", f"engine.zero={stage}",
        "threads=1", "seed=5", "stream.lanes=4", "stream.window=8", "metrics.port=off", "probes.at=[]", "watchdog=0",
        "views.global.size=16", "views.local.size=8", "probes.size=16", "student.image_size=16", "student.patch_size=8",
        "student.embed_dim=32", "student.depth=2", "student.heads=2", "student.drop_path=0.3", "student.head_hidden=32",
        "student.head_out=16", "student.predictor_hidden=32", "student.prototypes=64", "objectives.instance.queue=64",
        "objectives.local_group.queue=64", "objectives.local_group.memory=52", "objectives.local_group.neighbours=4",
        "optimizer.lr=0.05", "optimizer.clip=0.3", "optimizer.freeze_last_layer=0.2", "guard.patience=2", "guard.captures=0",
        "checkpoint.every=24", "checkpoint.keep=2", *more,
    ])  # fmt: skip


class Crash(Exception):
    """Leaves the loop as a fault of the program would: nothing is saved."""


@dataclass
class Faults:
    """What befalls the next run. Positions are those of the step's first image."""

    crash: tuple[int, str] | None = (
        None  # from here on, at the first "forward", "applied" (not remembered) or "committed"
    )
    kill: int | None = None  # kill -9 here, with the checkpoint that is under way held up
    hold: int | None = None  # hold up writing files of a checkpoint from here on
    terminate: int | None = None  # SIGTERM to the last rank
    drift: int | None = None  # change one row of a memory on the last rank
    views: dict[int, str] = field(default_factory=dict)  # position -> digest of all crops of that image
    restored: int = -1


class FaultyRun(Run):
    """The run, and what befalls it."""

    faults = Faults()
    last = property(lambda self: self.rank == self.world - 1)

    def restore(self) -> list[str]:
        told = super().restore()
        self.faults.restored = self.position
        return told

    def forward(self, batch, part):
        faults, size = self.faults, BATCH // self.world
        if part == 0:
            first = self.position + self.rank * size
            faults.views |= {first + i: digest(batch.keys[i], batch.views, i) for i in range(size)}
            offset = POISON.get(self.position, -1) - self.rank * size
            if 0 <= offset < size:
                batch.views = {name: crops.clone() for name, crops in batch.views.items()}
                batch.views["global"][offset, 1, :, 3] = float("nan")
            if self.position == faults.terminate and self.last:
                os.kill(os.getpid(), signal.SIGTERM)
            if self.position == faults.kill:
                assert self.writer.busy
                assert not any(self.writer.flags())
                try:
                    dist.barrier()
                finally:
                    os.kill(os.getpid(), signal.SIGKILL)
            self.maybe_crash("forward")
        return super().forward(batch, part)

    def commit(self, outcomes) -> None:
        self.maybe_crash("applied")
        super().commit(outcomes)
        if self.position == self.faults.drift and self.last:
            memory = self.mixture.objectives["local_group"].teacher  # pyright: ignore[reportAttributeAccessIssue]
            memory.rows[memory.pointer - 1, 0] += 1e-6
        self.maybe_crash("committed")

    def maybe_crash(self, spot: str) -> None:
        if self.faults.crash and self.position >= self.faults.crash[0] and self.faults.crash[1] == spot:
            raise Crash

    def content(self):
        if self.faults.hold is not None and self.position >= self.faults.hold:
            Image.chunks = held  # pyright: ignore[reportAttributeAccessIssue]
        return super().content()


def held(image: Image):
    """The file's header reaches the disk, the rest takes its time."""
    yield memoryview(image.header)
    time.sleep(30)
    yield from chunks(image)


chunks = Image.chunks


def digest(key: str, views: dict[str, torch.Tensor], row: int) -> str:
    seen = hashlib.blake2b(key.encode(), digest_size=16)
    for name in sorted(views):
        seen.update(views[name][row].contiguous().numpy().tobytes())
    return seen.hexdigest()


class Cases:
    """One launch: its group stays while runs come and go, as they would come and go with processes."""

    def __init__(self, folder: Path, data: str):
        self.folder, self.data = folder, data
        self.rank, self.world, self.device = join()
        training.Run = FaultyRun
        training.join = lambda: (self.rank, self.world, self.device)
        training.leave = lambda: None

    def go(self, recipe: Recipe, folder: Path, faults: Faults) -> dict[str, Any]:
        """One call of `train`; returns how it ended."""
        FaultyRun.faults, start, before = faults, time.perf_counter(), set(threading.enumerate())
        try:
            ended: Any = training.train(recipe, folder, quiet=True).code
        except Crash:
            ended = "crash"
        except GristmillError as error:
            ended = str(error)
        for thread in set(threading.enumerate()) - before:
            thread.join(60.0)
        left = sum(thread.is_alive() for thread in set(threading.enumerate()) - before)
        return {"ended": ended, "restored": faults.restored, "threads": left, "seconds": time.perf_counter() - start}

    def found(self, case: str, what: str, **values: Any) -> None:
        """Rank 0 says what it saw."""
        if self.rank == 0:
            with (self.folder / "found.jsonl").open("a") as file:
                file.write(json.dumps({"case": f"{what}: {case}", **values}) + "\n")

    def crash(self, seed: int) -> None:
        """Straight runs, and runs that end at a step and a spot of their own."""
        draw = random.Random(seed)
        # Of each two steps in a row one, so that every checkpoint is gone on from; a sixth anywhere else.
        steps = [draw.choice(pair) for pair in zip(range(2, STEPS, 2), range(3, STEPS, 2), strict=True)]
        steps.append(draw.choice(sorted({*range(2, STEPS)} - {*steps})))
        draw.shuffle(steps)
        assert len(steps) == len(CASES) - 1
        for case in CASES:
            recipe = recipe_of(self.data, *case[:2], (*BATCH_NORM, *case[2]))
            name = name_of(*case)
            self.found(name, "straight", **self.go(recipe, self.folder / name / "straight", Faults()))
            if case == CASES[-1]:
                faults = Faults(hold=72, kill=draw.randint(6, 8) * BATCH)
                self.found(name, "crashed", kill=faults.kill)
            else:
                faults = Faults(crash=(steps.pop() * BATCH, draw.choice(["forward", "applied", "committed"])))
            ended = self.go(recipe, self.folder / name / "broken", faults)
            self.found(name, "crashed", at=faults.crash, **ended)

    def resume(self) -> None:
        for case in CASES:
            recipe = recipe_of(self.data, *case[:2], (*BATCH_NORM, *case[2]))
            name = name_of(*case)
            self.found(name, "resumed", **self.go(recipe, self.folder / name / "broken", Faults()))
        self.elastic_first()
        self.drift()
        self.remember("engine.accumulate=2")

    def elastic_first(self) -> None:
        """Half a run, ended by SIGTERM to one rank."""
        faults = Faults(terminate=STOP - BATCH)
        ended = self.go(recipe_of(self.data, 2), self.folder / "half", faults)
        self.found("half", "stopped", **ended)
        self.note_views("half", faults)

    def elastic(self) -> None:
        """The other half on the ranks at hand; on one, the whole as well."""
        world = self.world
        stage, more = {1: (0, ("engine.accumulate=2",)), 3: (3, ()), 4: (1, ())}[world]
        jobs = {f"ranks{world}": recipe_of(self.data, stage, more=more)}
        if world == 1:
            jobs["whole"] = recipe_of(self.data, 0)
        for name, recipe in jobs.items():
            faults = Faults()
            self.found(name, "elastic", **self.go(recipe, self.folder / name, faults))
            self.note_views(name, faults)
        self.remember(f"engine.accumulate={2 if world < 4 else 3}")

    def note_views(self, name: str, faults: Faults) -> None:
        (self.folder / f"views-{name}-{self.rank}.json").write_text(json.dumps(faults.views))

    def drift(self) -> None:
        """A memory that one rank holds otherwise: through the loop, and each tensor of the objectives by its lowest bit."""
        recipe, folder = recipe_of(self.data, 0), self.folder / "drift"
        self.found("loop", "drift", **self.go(recipe, folder, Faults(drift=48)))
        run = Run(recipe, self.folder / "drift-each", self.rank, self.world, self.device)
        state = run.mixture.state()
        messages = {}
        for name, tensor in state.items():
            changed = tensor.clone()
            if self.rank == 1:
                changed.view(-1).view(torch.uint8)[-tensor.element_size()] ^= 1
            run.mixture.load(state | {name: changed})
            try:
                run.content()
            except CheckpointError as error:
                messages[name] = str(error)
        run.mixture.load(state)
        run.content()
        run.close()
        self.found("each", "drift", names=list(state), messages=messages)

    def remember(self, *more: str) -> None:
        """Rows that carry position and crop, through `commit`: what the memories hold afterwards, oldest first."""
        folder = self.folder / f"remember{self.world}"
        run = Run(recipe_of(self.data, 0, more=more), folder, self.rank, self.world, self.device)
        parts, micro = run.inputs.parts, run.inputs.micro
        with run.loader() as loader:
            for _ in range(2):
                batch, outcomes = next(loader), []
                for part in range(parts):
                    outcomes.append(run.forward(batch, part))
                    positions = run.position + (self.rank * parts + part) * micro + torch.arange(micro)
                    for name, rows in outcomes[-1].commit.items():
                        if name != "group.mean":
                            crops = torch.arange(rows.shape[1]) if rows.ndim == 3 else torch.tensor(0)
                            rows[..., 0] = positions.view(-1, *[1] * (rows.ndim - 2))
                            rows[..., 1] = crops
                run.commit(outcomes)
                run.cursor = run.cursor.advance(BATCH, committed=True)
        state, held = run.mixture.state(), {}
        for name in (key.removesuffix(".rows") for key in state if key.endswith(".rows")):
            at, written = int(state[f"{name}.pointer"]), int((state[f"{name}.written"] >= 0).sum())
            rows = state[f"{name}.rows"].roll(-at, 0)[-written:]
            held[name] = rows[:, :2].long().tolist()
        run.close()
        self.found(f"ranks{self.world}", "remember", **held)


def main() -> None:
    folder, data, what = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    cases = Cases(folder, data)
    if what == "crash":
        cases.crash(int(sys.argv[4]))
    elif what == "resume":
        cases.resume()
    else:
        cases.elastic()
    leave()
