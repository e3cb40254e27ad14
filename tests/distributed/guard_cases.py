"""Run by zygote.py (see test_guard.py): real runs with faults injected into single steps, under several ZeRO stages.

A fault is put into the batch, a loss or a commit by wrapping what the run calls; the product has no switch for it. Each
case writes one line to found.jsonl: what every step did to everything that a run remembers, added up over the ranks.
"""

import hashlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from gristmill.objectives import Outcome
from gristmill.ops.guard import DivergedError, Guard, GuardConfig
from gristmill.ops.launch import join, leave
from gristmill.ops.monitor.metrics import Metrics
from gristmill.ops.progress import Meter
from gristmill.ops.recipe import Recipe, load_recipe
from gristmill.ops.run import Run
from gristmill.ops.train import Loop
from gristmill.ops.watchdog import Watchdog
from gristmill.shards.ingest import ingest_folder
from PIL import Image

BATCH = 12
NAN = float("nan")
KINDS = (
    "student", "teacher", "exp_avg", "exp_avg_sq", "steps", "objectives", "centre", "buffers", "student forward",
    "teacher forward",
)  # fmt: skip
SMALL = (
    f"batch={BATCH}", "views.global.size=16", "views.local.size=8", "student.image_size=16", "student.patch_size=8",
    "student.embed_dim=32", "student.depth=2", "student.heads=2", "student.head_hidden=32", "student.head_out=16",
    "student.predictor_hidden=32", "student.prototypes=48", "student.drop_path=0.1", "objectives.instance.queue=48",
    "objectives.local_group.queue=48", "objectives.local_group.memory=48", "objectives.local_group.neighbours=4",
    "probes.at=[]", "probes.size=16", "metrics.port=off", "watchdog=0", "threads=1", "checkpoint.every=1000000", "guard.captures=9",
)  # fmt: skip

Fault = Callable[[Run, Any, Callable[[], Outcome]], Outcome]  # (run, batch, the plain forward) -> outcome


def make_data(folder: Path, images: int) -> None:
    """Images of coloured squares, no two alike, in `folder`/data."""
    draws = np.random.default_rng(0)
    (folder / "images").mkdir()
    for number in range(images):
        image = Image.fromarray(draws.integers(0, 256, (6, 6, 3), np.uint8)).resize((40, 40))
        image.save(folder / "images" / f"{number}.jpg")
    ingest_folder(folder / "images", folder / "data", shard_samples=20)


def recipe_of(folder: Path, steps: int, *more: str) -> Recipe:
    return load_recipe("demo", [*SMALL, f"data={folder / 'data' / 'train'}", f"images={BATCH * steps}", *more])


def whole_share(rank: int) -> Fault:
    def fault(run, batch, forward):
        if run.rank == rank:
            for crops in batch.views.values():
                crops.fill_(NAN)
        return forward()

    return fault


def one_pixel(rank: int, row: int) -> Fault:
    """Of one local crop: the teacher never sees it."""

    def fault(run, batch, forward):
        if run.rank == rank:
            batch.views["local"][row, 1, 0, 3, 3] = NAN
        return forward()

    return fault


def objective(rank: int, name: str, factor: float) -> Fault:
    """Multiply one objective's loss, as a broken kernel would."""

    def fault(run, batch, forward):
        chosen = run.mixture.objectives[name]
        plain = chosen.loss

        def loss(*args):
            outcome = plain(*args)
            logs = outcome.logs | {f"loss/{name}": outcome.logs[f"loss/{name}"] * factor}
            return Outcome(outcome.loss * factor, logs, outcome.commit)

        if run.rank == rank:
            chosen.loss = loss
        outcome = forward()
        chosen.loss = plain
        return outcome

    return fault


def memory(rank: int, part: str) -> Fault:
    """What would be remembered is not finite, though the loss is."""

    def fault(run, batch, forward):
        outcome = forward()
        if run.rank == rank:
            (name,) = [name for name in outcome.commit if name.startswith(part)][:1]
            outcome.commit[name] = outcome.commit[name] * NAN
        return outcome

    return fault


def gradient(rank: int) -> Fault:
    """A finite loss whose gradient is not."""

    def fault(run, batch, forward):
        outcome = forward()
        if run.rank == rank:
            outcome.loss = outcome.loss + (outcome.loss - outcome.loss.detach()).sqrt()
        return outcome

    return fault


class Watched(Loop):
    """The real loop; `faults` by step. Notes each step, and steps in `absent` never happen."""

    def __init__(self, run: Run, meter: Meter, faults: dict[int, Fault], absent: tuple[int, ...] = ()):
        super().__init__(run, Metrics(run.recipe.name, run.topology()), meter, Watchdog(0, 1, deadline=0), [])
        self.faults, self.absent, self.steps, self.kept = faults, absent, [], {}
        self.reduced: list[int] = []  # all_reduces in each verdict
        self.backs: list[dict[str, Any]] = []
        self.seen: dict[str, str] = {}  # digests after the last step
        forward, judge, begin = run.forward, run.guard.judge, run.writer.begin

        def poisoned(batch, part):
            fault = faults.get(run.position // BATCH)
            return fault(run, batch, lambda: forward(batch, part)) if fault else forward(batch, part)

        def counted(*args, **kwargs):
            calls, plain = [], dist.all_reduce
            dist.all_reduce = lambda *a, **k: calls.append(1) or plain(*a, **k)
            try:
                return judge(*args, **kwargs)
            finally:
                dist.all_reduce = plain
                self.reduced.append(len(calls))

        def keeping(position, content):
            self.kept[position] = digests(run, content)
            return begin(position, content)

        run.forward, run.guard.judge, run.writer.begin = poisoned, counted, keeping  # pyright: ignore[reportAttributeAccessIssue]

    def step(self, feed, loader) -> bool:
        run, start = self.run, self.run.position
        if start // BATCH in self.absent:
            feed.take()
            feed.fetch()
            run.cursor = run.cursor.advance(BATCH, committed=False)
            return False
        if self.absent:
            return super().step(feed, loader)
        before = self.seen or digests(run)
        stop = super().step(feed, loader)
        self.seen = after = digests(run)
        changed = [float(before[name] != after[name]) for name in before]
        self.steps.append({
            "step": start // BATCH, "advanced": run.position - start, "skipped": [list(r) for r in run.cursor.skipped],
            "changed": [name for name, count in zip(before, run.total(changed), strict=True) if count],
        })  # fmt: skip
        return stop

    def go_back(self, verdict, batch) -> None:
        super().go_back(verdict, batch)
        run, kept = self.run, self.kept[max(self.kept)]
        differs = run.total([float(digest != kept[kind]) for kind, digest in digests(run).items()])
        self.backs.append({"to": max(self.kept), "differs": sum(differs), "cursor": json.loads(run.cursor.to_json())})


def digests(run: Run, content=None) -> dict[str, str]:
    """Of all that a run remembers on this rank, by kind: masters, moments, EMA, memories, statistics, and the weights
    and averages as the forwards read them."""
    content = content or run.content()
    found: dict[str, Any] = {}
    for part in content.parts:
        _add(found, part.group, f"{part.name} {part.start}", part.tensor)
    for group, tensors in content.whole.items():
        for name, tensor in tensors.items():
            _add(found, "centre" if name.endswith("center") else group, name, tensor)
    for who, net in (("student", run.engine.module), ("teacher", run.engine.teacher.module)):
        for name, parameter in net.named_parameters():
            _add(found, f"{who} forward", name, _held(parameter, run.rank))
    return {kind: found[kind].hexdigest() if kind in found else "" for kind in KINDS}


def _held(parameter: Any, rank: int) -> torch.Tensor:
    """The parameter, or under ZeRO 3 this rank's part of it without the padding behind, which nobody reads or sets."""
    if not hasattr(parameter, "ds_tensor"):
        return parameter
    size = parameter.ds_tensor.numel()
    return parameter.ds_tensor.view(-1)[: max(0, parameter.ds_numel - rank * size)]


def _add(found: dict[str, Any], kind: str, name: str, tensor: torch.Tensor) -> None:
    digest = found.setdefault(kind, hashlib.blake2b())
    digest.update(name.encode())
    if tensor.numel():
        digest.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy())


def go(
    folder: Path, recipe: Recipe, faults: dict[int, Fault] | None = None, absent: tuple[int, ...] = ()
) -> dict[str, Any]:
    """A run in `folder`, from its newest checkpoint if it has one; what it did, and how it ended."""
    rank, world = dist.get_rank(), dist.get_world_size()
    run, error = Run(recipe, folder, rank, world, torch.device("cpu")), ""
    try:
        with Meter("case", run.end, quiet=True) as meter:
            run.restore()
            restored = run.guard.state()
            loop = Watched(run, meter, faults or {}, absent)
            try:
                loop.run_to_end()
            except DivergedError as diverged:
                error = str(diverged)
        last = digests(run)
        return {
            "steps": loop.steps, "cursor": json.loads(run.cursor.to_json()), "error": error, "last": run.everyones(list(last.values())),
            "reduced": sorted(set(loop.reduced)), "kept": sorted(loop.kept), "backs": loop.backs, "guard": run.guard.state(), "restored": restored,
        }  # fmt: skip
    finally:
        run.close()


FAULTS: dict[int, Fault] = {
    1: whole_share(1),
    3: objective(0, "group", NAN),
    4: memory(1, "instance."),
    6: one_pixel(1, 2),
    7: gradient(0),
}


def left_out(folder: Path, stage: int, *more: str, compare: bool = False) -> dict[str, Any]:
    """Each fault once; and, to compare, the same run in which those steps never happened."""
    recipe = recipe_of(folder, 9, f"engine.zero={stage}", *more)
    name = f"zero{stage}"
    found = go(folder / name, recipe, FAULTS)
    return found | ({"absent": go(folder / f"{name}-absent", recipe, absent=tuple(FAULTS))["last"]} if compare else {})


def through_batch_norm(folder: Path, stage: int) -> dict[str, Any]:
    recipe = recipe_of(folder, 6, f"engine.zero={stage}", "student.head_norm=batch")
    faults = {2: one_pixel(1, 0), 4: memory(0, "student/batch_norm.")}
    return go(folder / f"norm{stage}", recipe, faults)


def rolled_back(folder: Path, stage: int, compare: bool = False) -> dict[str, Any]:
    """Bad steps 5, 6 lead back to image 48; 9, 10 are once too often."""
    recipe = recipe_of(
        folder,
        14,
        f"engine.zero={stage}",
        "checkpoint.every=24",
        "checkpoint.keep=9",
        "guard.patience=2",
        "guard.rollbacks=1",
        "guard.captures=1",
    )
    bad = {step: objective(1, "instance", NAN) for step in (5, 6, 9, 10)}
    found = go(folder / f"back{stage}", recipe, bad)
    never = (4, 5, 6, 9, 10, 11, 12, 13)
    return found | ({"absent": go(folder / f"back{stage}-absent", recipe, absent=never)["last"]} if compare else {})


def spiked(folder: Path) -> dict[str, Any]:
    recipe = recipe_of(folder, 14, "engine.zero=1", "guard.spike=6", "guard.spike_window=10")
    found = go(folder / "spike", recipe, {11: objective(1, "instance", 50.0)})
    return found | {"again": go(folder / "spike", recipe)["restored"]}


def refused(folder: Path) -> dict[str, Any]:
    """A folder that cannot be made, a disk without room (if the test could mount one), and a bound on captures."""
    recipe = recipe_of(folder, 4, "engine.zero=1")
    bad: dict[int, Fault] = {1: one_pixel(0, 1), 2: one_pixel(1, 1)}
    if dist.get_rank() == 0:
        (folder / "blocked").mkdir()
        (folder / "blocked" / "captures").write_text("in the way")
    bounded = recipe_of(folder, 4, "engine.zero=1", "guard.captures=1")
    return {
        "blocked": go(folder / "blocked", recipe, bad),
        "full": go(folder / "full", recipe, bad) if (folder / "full" / "captures").is_mount() else None,
        "bounded": go(folder / "bounded", bounded, bad),
    }


def agreed(folder: Path) -> dict[str, Any]:
    """One verdict on what differs by rank: flags, culprits, logs over micro-batches, partial squares."""
    rank, world = dist.get_rank(), dist.get_world_size()
    guard = Guard(GuardConfig(), rank, world)
    outcomes = []
    for part in range(2):
        loss = torch.tensor(NAN if (rank, part) == (1, 1) else 1.0 + rank)
        logs = {"loss/group": loss, "loss": loss, "seen": torch.tensor(float(10 * rank + part)), "fixed": 0.5}
        outcomes.append(
            Outcome(loss, logs, {"rows": torch.full((2, 2), float("inf") if (rank, part) == (0, 0) else 1.0)})
        )
    squares = torch.tensor([1.0 + rank, 4.0], dtype=torch.float64)
    one = guard.judge(outcomes, squares, partial=True, flags={"stop": float(rank == 1), "fault": 2.0 + rank})
    two = guard.judge(outcomes[:1], squares, partial=False)
    return {
        "bad": one.bad, "culprits": one.culprits, "flags": one.flags, "norms": one.norms.square().tolist(), "seen": one.logs["seen"],
        "fixed": one.logs["fixed"], "grad_norm": one.grad_norm**2, "two": two.bad, "two_norms": two.norms.square().tolist(),
    }  # fmt: skip


TWO: dict[str, Callable[[Path], dict[str, Any]]] = {
    "agreed": agreed,
    "zero0": lambda folder: left_out(folder, 0),
    "zero2": lambda folder: left_out(folder, 2, "engine.accumulate=2", "precision=bf16", compare=True),
    "zero3": lambda folder: left_out(folder, 3, compare=True),
    "norm0": lambda folder: through_batch_norm(folder, 0),
    "back0": lambda folder: rolled_back(folder, 0),
    "back2": lambda folder: rolled_back(folder, 2, compare=True),
    "spike": spiked,
    "refused": refused,
}
THREE: dict[str, Callable[[Path], dict[str, Any]]] = {
    "zero1": lambda folder: left_out(folder, 1, "precision=autocast"),
    "norm2": lambda folder: through_batch_norm(folder, 2),
}


def main() -> None:
    folder, only = Path(sys.argv[1]), sys.argv[2:]
    rank, world, _ = join()
    torch.set_flush_denormal(True)
    for name, case in (TWO if world == 2 else THREE).items():
        if only and name not in only:
            continue
        start, worked = time.perf_counter(), time.process_time()
        found = case(folder)
        if rank == 0:
            with (folder / "found.jsonl").open("a") as file:
                file.write(
                    json.dumps(
                        {
                            "case": name,
                            **found,
                            "seconds": time.perf_counter() - start,
                            "cpu": time.process_time() - worked,
                        }
                    )
                    + "\n"
                )
    leave()


if __name__ == "__main__":
    main()
