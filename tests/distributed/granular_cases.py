"""Run by zygote.py (see test_granular.py): runs of the recipes with several granularities, killed, gone on with, on other ranks.

`straight`: each case to its end on two ranks. `kill CASE`: again, until kill -9 of both ranks at a step drawn by the test,
with nothing said before. `resume`: new processes take the killed runs to their ends, and one case goes on under ZeRO 2 and 3. `alone`: each
case that does not hang on its ranks, on one. Runs lie in the folder given, by name.
"""

import os
import signal
import sys
from pathlib import Path

import torch.distributed as dist
from gristmill.ops import train as training
from gristmill.ops.launch import join, leave
from gristmill.ops.recipe import Recipe, load_recipe
from gristmill.ops.run import Run

BATCH, STEPS = 16, 8
NARROW = ("student.virtual_batch=4", "student.shuffle=8")
# Shipped recipes, shrunk, with what makes everything happen within eight steps: several clusterings, selection at full weight.
CASES: dict[str, tuple[str, ...]] = {
    "densecl-r50-200": (*NARROW, "objectives.instance.queue=64", "objectives.dense.queue=64"),
    "hcsc-multicrop-r50-200": (
        *NARROW, "objectives.hierarchy.queue=64", "objectives.hierarchy.levels=[12, 6, 3]", "objectives.hierarchy.warmup=0.2",
        "objectives.hierarchy.exclusion_batch=4", "objectives.hierarchy.every=48",
    ),
    "hcsc-stream-r50": (
        *NARROW, "objectives.hierarchy.queue=64", "objectives.hierarchy.memory=48", "objectives.hierarchy.levels=[12, 6, 3]",
        "objectives.hierarchy.every=48", "objectives.hierarchy.warmup=0.2", "objectives.hierarchy.ramp=0.2",
        "objectives.hierarchy.exclusion_batch=4",
    ),
    "multigrain-vits16": (
        "objectives.hierarchy.memory=48", "objectives.hierarchy.levels=[12, 6, 3]", "objectives.hierarchy.every=48",
        "objectives.hierarchy.warmup=0.2", "objectives.hierarchy.ramp=0.2", "views.local.count=2",
        "objectives.local_group.memory=64", "objectives.local_group.queue=64", "optimizer.freeze_last_layer=0.2",
    ),
    "swav-r50-200": ("student.virtual_batch=4", "objectives.swapped={queue: 48, virtual_batch: 8}", "views.local.count=2"),
    "deepcluster-v2-r50-400": (
        "student.virtual_batch=4", "objectives.clusters.prototypes=[6, 6]", "objectives.clusters.every=48",
        "views.local.count=1",
    ),
    "npid-r50": ("student.virtual_batch=4",),
    "moco-v3-vits16-300": ("student.virtual_batch=4", "objectives.batch_contrast.virtual_batch=8"),
    "simsiam-r50-100": ("student.virtual_batch=4",),
}  # fmt: skip
KILLED = tuple(CASES)[:4]
PASSES = ("hcsc-multicrop-r50-200", "deepcluster-v2-r50-400")  # passes over the data: of few images
STAGES = (2, 3)


def recipe_of(case: str, data: str, *more: str) -> Recipe:
    own = [
        f"data={data}", f"batch={BATCH}", f"images={BATCH * STEPS}", "threads=1", "seed=5", "precision=fp32", "stream.lanes=4",
        "stream.window=8", "metrics.port=off", "probes.at=[]", "watchdog=0", "guard.captures=0", "checkpoint.every=32",
        # Small steps: batch norm over four images would make much of a rounding at the recipes' rates.
        "optimizer.lr=0.001", "optimizer.warmup=0",
    ]  # fmt: skip
    return load_recipe(case, [*own, *CASES[case], *more], tiny=True)


class Killed(Run):
    """Every rank ends here, as if its machine had lost power."""

    at = -1

    def forward(self, batch, part):
        if self.position == self.at:
            dist.barrier()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(batch, part)


def main() -> None:
    folder, many, few, what, *arguments = Path(sys.argv[1]), *sys.argv[2:]
    # What needs no other rank is shared by two processes, before either has threads: one would use one core of two.
    cases, other = list(CASES), 0
    if what == "alone":
        other = os.fork()
        cases = cases[other == 0 :: 2]
    rank, world, device = join()
    training.Run = Killed
    training.join = lambda: (rank, world, device)
    training.leave = lambda: None

    def go(case: str, name: str, *more: str) -> None:
        data = few if case in PASSES else many
        assert training.train(recipe_of(case, data, *more), folder / name / case, quiet=True).code == 0

    if what == "kill":
        case, at = arguments
        Killed.at = int(at)
        go(case, "broken")
    elif what == "resume":
        for case in KILLED:
            go(case, "broken")
        for stage in STAGES:
            go("densecl-r50-200", f"zero{stage}", f"engine.zero={stage}")
    else:
        for case in cases:
            go(case, what)
    leave()
    if other:
        code = os.waitstatus_to_exitcode(os.waitpid(other, 0)[1])
        assert code == 0, f"the process with the other half of the cases ended with {code}"
