"""`gristmill replay`: feed a captured step again, rank by rank, in one process, and say what turns out not finite.

The forward, the losses and the backward are the training's own, from the weights, memories and crops of the capture. Data
and arithmetic fail again; a fault of the hardware, or of code that is not Gristmill's, does not, which is worth knowing
before looking for it in the recipe. Everything runs on the CPU, so another device's kernels count as its software.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor, nn

from ..models import statistics_of
from ..models.student import Student
from ..objectives import Mixture
from ..pipeline.cursor import Cursor, CursorError
from ..shards.errors import GristmillError
from .capture import FOLDER, origin_of
from .checkpoint import FINE, WHAT, CheckpointError, Saved
from .findings import Finding, Replay, ranks_text
from .inputs import Inputs
from .launch import flushing
from .networks import build_mixture, saved_networks
from .progress import Meter
from .recipe import Recipe, RecipeError, parse_recipe
from .stores import POSITION, LocalStore


class CaptureError(GristmillError):
    """No capture, or one that cannot be fed again."""


def replay(path: Path, ranks: Collection[int] = (), progress: Callable[[int, int], object] | None = None) -> Replay:
    """Feed a captured step again: all ranks, or those given. `path`: RUN/captures/POSITION, or RUN if it holds just one.

    Raises CaptureError for what is no capture, is damaged, or was written for another Gristmill.
    """
    path = find(path)
    saved = _open(path)
    noted = saved.state["capture"]
    try:
        recipe = parse_recipe(saved.state["recipe"], str(path))
        cursor = Cursor.from_json(saved.state["cursor"])
        student, teacher = saved_networks(saved, recipe, "student", "teacher")
        if recipe.precision == "bf16":
            for parameter in (*student.parameters(), *teacher.parameters()):
                parameter.data = parameter.data.bfloat16()
        if "images" not in saved.state:
            raise CheckpointError("it does not say where its images came from")
        mixture = build_mixture(recipe, student, images=saved.state["images"])
        mixture.load(saved.whole("objectives"))
        world = int(saved.state["topology"]["world"])
        losses = {n.removeprefix("loss/"): float(v) for n, v in noted["logs"].items() if n.startswith("loss")}
        again = Replay(
            path,
            cursor.position,
            recipe.batch,
            recipe.precision,
            bad=[str(what) for what in noted["bad"]],
            culprits=[(int(rank), str(what)) for rank, what in noted["culprits"]],
            losses=losses,
            hosts=[str(host) for host in noted["hosts"]],
        )
    except (RecipeError, CursorError, CheckpointError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise CaptureError(_foreign(path, noted, error)) from error
    _check_ranks(again, ranks, world)
    networks = {"teacher": teacher, "student": student}
    tensors = {f"{who}.{name}": t for who, net in networks.items() for name, t in net.state_dict().items()}
    again.state = [name for name, t in (tensors | mixture.state()).items() if not _finite(t)]
    chosen = sorted(ranks) or list(range(world))
    with flushing():
        for done, rank in enumerate(chosen):
            if progress:
                progress(done, len(chosen))
            inputs = Inputs(recipe, rank, world, "cpu")
            keys = noted["keys"][rank * inputs.micro * inputs.parts :]
            again.findings.append(_one(saved, recipe, inputs, cursor.position, keys, mixture, student, teacher))
    saved.close()
    return again


def find(path: Path) -> Path:
    """The capture that a user means by `path`: itself, or the only one of a run. CaptureError lists what is there."""
    path = path.absolute()
    if POSITION.fullmatch(path.name) and path.is_dir():
        return path
    held: list[Path] = []
    for folder in (path / FOLDER, path):
        if folder.is_dir() and not held:
            held = sorted(each for each in folder.iterdir() if POSITION.fullmatch(each.name))
    if len(held) == 1:
        return held[0]
    if held:
        raise CaptureError(
            f"{path} holds {len(held)} captures; name one:\n" + "\n".join(f"  {_label(p)}" for p in held)
        )
    hint = "bad steps are kept in RUN/captures/, as many as guard.captures says"
    raise CaptureError(f"{path} " + (f"holds no capture: {hint}" if path.is_dir() else f"is not there; {hint}"))


def _label(path: Path) -> str:
    try:
        noted = Saved(LocalStore(path.parent), int(path.name)).state["capture"]
    except (CheckpointError, OSError, KeyError):
        return f"{path} (damaged)"
    return f"{path}  ({', '.join(noted['bad'])})"


def _open(path: Path) -> Saved:
    """The capture with its digests verified: a flipped bit would look like a fault of the run."""
    try:
        saved = Saved(LocalStore(path.parent), int(path.name))
        names = sorted(saved.digests)
        wrong = [f"{n} {WHAT[c]}{why}" for n, (c, why) in zip(names, saved.verify(names), strict=True) if c != FINE]
    except (CheckpointError, OSError) as error:
        wrong = [str(error)]
    if wrong:
        raise CaptureError(f"{path} is damaged ({'; '.join(wrong)}) and cannot be fed again; take another capture")
    if "capture" not in saved.state:
        raise CaptureError(f"{path} is a checkpoint, not a capture; captures lie in RUN/{FOLDER}/")
    return saved


def _foreign(path: Path, noted: dict[str, Any], error: Exception) -> str:
    then, now = noted.get("gristmill", "another version"), importlib.metadata.version("gristmill")
    text = f"it lacks {error}" if isinstance(error, KeyError) else str(error).removeprefix(f"{path}:")
    why = next((line.strip() for line in text.splitlines() if line.strip()), type(error).__name__)
    return (
        f"{path} was written by Gristmill {then}, and this one ({now}) cannot read what it needs of it: {why}. "
        f"Replay it with the version that wrote it"
    )


def _check_ranks(again: Replay, ranks: Collection[int], world: int) -> None:
    if any(not 0 <= rank < world for rank in ranks):
        raise CaptureError(f"--rank: this step was taken by ranks 0 to {world - 1}")
    named = sorted({rank for rank, _ in again.culprits})
    if ranks and not named:
        raise CaptureError(f"--rank: {', '.join(again.bad)} was found on all ranks together; leave --rank out")
    if ranks and not set(named) & set(ranks):
        raise CaptureError(f"--rank: the verdict names {ranks_text(named)}; replay one of these, or leave --rank out")


def _one(
    saved: Saved, recipe: Recipe, inputs: Inputs, position: int, keys: list[str], mixture: Mixture, student: Student,
    teacher: Student,
) -> Finding:  # fmt: skip
    """One rank's share of the step."""
    finding = Finding(inputs.rank)
    views = saved.assembled(f"views.{inputs.rank}")
    origin, images = origin_of(saved, inputs.rank), saved.state["images"]
    finite = torch.stack([torch.isfinite(crops.flatten(1)).all(1) for crops in views.values()]).all(0)
    finding.samples = [keys[i] for i in (~finite).nonzero().flatten().tolist()]
    progress = position / (recipe.images // recipe.batch * recipe.batch)
    mixed = nullcontext() if recipe.precision == "fp32" else torch.autocast("cpu", dtype=torch.bfloat16)
    losses: dict[str, list[float]] = {}
    student.zero_grad()
    for part in range(inputs.parts):
        info = inputs.info(position, progress, part, origin, images)
        masked = inputs.masked(info)
        with mixed, _watching(finding, {"teacher": teacher, "student": student}):
            targets: dict[str, Tensor] = {}
            if mixture.needs_teacher:
                shown = mixture.teacher_context() | masked | inputs.shuffled(position, part)
                with torch.no_grad():
                    targets = teacher(inputs.crops(views, inputs.teacher, part), shown)
            aims = mixture.aims(targets, info)
            context = mixture.context() | aims | masked | inputs.draws(position, part, len(student.backbone.blocks))
            outputs = student(inputs.crops(views, inputs.student, part), context)
        outcome = mixture.loss(outputs, targets | aims, info)
        (outcome.loss / inputs.parts).backward()
        for name, value in outcome.logs.items():
            if name.startswith("loss"):
                losses.setdefault(name.removeprefix("loss/"), []).append(float(value))
        if not _finite([outcome.commit, statistics_of(outputs), statistics_of(targets)]):
            finding.bad = ["memory"]
    finding.losses = {name: sum(values) / len(values) for name, values in losses.items()}
    finding.bad = [n for n, v in finding.losses.items() if not math.isfinite(v)] + finding.bad
    gradients = [(name, p.grad) for name, p in student.named_parameters() if p.grad is not None]
    finding.gradients = [name for name, gradient in gradients if not _finite(gradient)]
    finding.parameters = len(gradients)
    return finding


@contextmanager
def _watching(finding: Finding, networks: dict[str, nn.Module]) -> Iterator[None]:
    """Note each network's first module whose output is not finite; hooks of inner modules come before their parents'."""

    def hook(who: str, name: str):
        def look(module: nn.Module, given: Any, output: Any) -> None:
            if who not in finding.modules and not _finite(output):
                finding.modules[who] = name or type(module).__name__
                finding.inputs[who] = _finite(given)

        return look

    handles = [
        module.register_forward_hook(hook(who, name))
        for who, network in networks.items()
        for name, module in network.named_modules()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _finite(tree: Any) -> bool:
    if isinstance(tree, Tensor):
        return not tree.is_floating_point() or bool(torch.isfinite(tree).all())
    if isinstance(tree, dict):
        return all(map(_finite, tree.values()))
    return all(map(_finite, tree)) if isinstance(tree, list | tuple) else True


def show_replay(path: Path, ranks: Collection[int], *, as_json: bool) -> int:
    """Print what a replay found; returns the exit code."""
    with Meter("replay", 0, unit="ranks", quiet=as_json) as meter:
        again = replay(path, ranks, meter)
    if as_json:
        click.echo(json.dumps(again.as_dict()))
    else:
        for line in again.lines():
            click.echo(line)
    return int(not again.reproduced)
