"""Weights of others for a run: `gristmill import`, the memories of an official checkpoint, and `student.init`.

Two kinds of file are written: a backbone under timm's names, for anyone, and with --everything what a run of Mugs, MoCo,
DenseCL or HCSC goes on from: `student/...` and `teacher/...` under the names of our Student, `objectives/...` as the
objectives keep their state. Optimizer moments and schedules are not carried over: such a run begins at position 0.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import timm
import torch
from torch import Tensor

from ..models.choice import choose
from ..models.student import Student
from ..models.unpickle import WeightFile, WeightsError, read_weights
from ..models.weights import Report, Who, import_backbone, import_student
from ..objectives import Mixture
from ..shards.errors import GristmillError
from .engine import Engine
from .export import write_tensors
from .recipe import Recipe

TIMM = "timm:"
QUEUES = {"instance-sup.": "instance.queue", "local-group-sup.": "local_group.queue"}
MEMORIES = {"student_mem": "local_group.student", "teacher_mem": "local_group.teacher"}


class ImportRefused(GristmillError):
    """A file of weights that cannot be taken, and why."""


def run_import(source: Path, out: Path, who: Who | None, *, everything: bool, as_json: bool) -> int:
    """Read `source`, write `out`, print the report. who: None for the network that its authors evaluate. Raises ImportRefused."""
    try:
        file = read_weights(source)
        if everything:
            tensors, reports = import_everything(file)
        else:
            tensors, report = import_backbone(file, who)
            reports = [report]
    except WeightsError as error:
        raise ImportRefused(str(error)) from error
    about = {
        "gristmill.source": file.path.name,
        "gristmill.sha256": file.sha256,
        "gristmill.network": "everything" if everything else reports[0].network,
    }
    write_tensors(out, tensors, about)
    if as_json:
        click.echo(json.dumps({"out": str(out), "reports": [report.as_dict() for report in reports]}))
        return 0
    for report in reports:
        click.echo("\n".join(report.lines()))
    click.echo(f"written: {out} ({len(tensors)} tensors); begin a run from it with student.init={out}")
    return 0


def import_everything(file: WeightFile) -> tuple[dict[str, Tensor], list[Report]]:
    """Both networks and the memories of a full checkpoint, or of one of our own files of this kind."""
    tensors: dict[str, Tensor] = {}
    reports = []
    for who in ("student", "teacher"):
        state, report = import_student(file, who)
        if report.network != who:
            raise WeightsError(
                f"{file.path} holds one network only; leave --everything out (it wants a full checkpoint of Mugs, MoCo, "
                "DenseCL or HCSC)"
            )
        # One report accounts for the whole file: the other network and the memories are listed with their own.
        report.ignored.pop("other network", None)
        tensors |= {f"{who}/{name}": value for name, value in state.items()}
        reports.append(report)
    memories, notes = import_memories(file)
    tensors |= {f"objectives/{name}": value for name, value in memories.items()}
    for report in reports:
        for group in ("memories", "queues", "centre"):
            report.ignored.pop(group, None)
    reports[0].used.extend(f"objectives.{name}" for name in memories)
    reports[0].notes.extend(notes)
    return tensors, reports


def import_memories(file: WeightFile) -> tuple[dict[str, Tensor], list[str]]:
    """(what the objectives' `load` takes, notes) of the queues, memories and centre that a file holds.

    Official queues [d, K] become rows [K, d]. When a slot was written is not in the file: all that were count as
    written by one enqueue. A memory's rows are equal in its search and its fetch copy once they were written.
    """
    ours = {k.removeprefix("objectives/"): v for k, v in file.tree.items() if str(k).startswith("objectives/")}
    if ours:
        return {name: value.clone() for name, value in ours.items()}, []
    state: dict[str, Tensor] = {}
    notes: list[str] = []
    flat, _, _, pair = choose(file.tree, None, file.path)
    queues = {} if pair is None else pair.queues(map(str, flat))
    parts = file.tree | {key: {"queue": flat[key], "queue_ptr": flat.get(f"{key}_ptr")} for key in queues.values()}
    for key, name in {**QUEUES, **{theirs: ours for ours, theirs in queues.items()}, **MEMORIES}.items():
        part = parts.get(key)
        if not isinstance(part, Mapping):
            continue
        if key not in MEMORIES:
            rows, pointer = _tensor(file, part, key, "queue", 2).t(), _tensor(file, part, key, "queue_ptr", 1)
            written = torch.zeros(len(rows), dtype=torch.int64)
        else:
            rows, pointer = (
                _tensor(file, part, key, "block.queue_k", 2),
                _tensor(file, part, key, "block.queue_ptr", 1),
            )
            searched = _tensor(file, part, key, "block.queue_q", 2)
            if searched.shape != rows.shape:
                raise WeightsError(f"{file.path}: {key} searches {tuple(searched.shape)}, fetches {tuple(rows.shape)}")
            real = (searched == rows).all(1)
            written = torch.where(real, 0, -1)
            if not real.all():
                notes.append(f"{name}: {int((~real).sum())} of {len(real)} slots were never written and stay random")
        if not torch.isfinite(rows).all():
            raise WeightsError(f"{file.path}: {key} has values that are not finite; this checkpoint is not usable")
        if pointer.numel() != 1 or not 0 <= int(pointer) <= len(rows):
            raise WeightsError(f"{file.path}: the pointer of {key} is outside its {len(rows)} slots")
        state |= {
            f"{name}.rows": rows.to(torch.float32, copy=True, memory_format=torch.contiguous_format),
            f"{name}.written": written,
            f"{name}.pointer": torch.tensor(int(pointer) % len(rows), dtype=torch.int64),
            f"{name}.step": torch.tensor(1, dtype=torch.int64),
        }
    for key in ("group-sup.", "dino_loss", "ibot_loss"):
        if isinstance(part := file.tree.get(key), Mapping) and "center" in part:
            state["group.center"] = _tensor(file, part, key, "center", 2).to(torch.float32, copy=True)
            if "center2" in part:
                state["patch.center"] = _tensor(file, part, key, "center2", 3)[0].to(torch.float32, copy=True)
    return state, notes


def _tensor(file: WeightFile, part: Mapping[str, Any], where: str, name: str, dims: int) -> Tensor:
    value = part.get(name)
    if not isinstance(value, Tensor) or value.dim() != dims:
        raise WeightsError(f"{file.path}: {where} has no {name} of {dims} dimensions; fetch the checkpoint again")
    return value


@dataclass
class Initial:
    """What a run begins with: weights for the student, and where the file has them a teacher and memories of its own."""

    student: dict[str, Tensor]
    teacher: dict[str, Tensor]
    objectives: dict[str, Tensor]
    report: Report

    def fill(self, student: Student, teacher: Student) -> None:
        """Put the weights in, before an engine wraps the networks."""
        student.load_state_dict(self.student, strict=False)
        teacher.load_state_dict(self.teacher, strict=False)

    def finish(self, engine: Engine, mixture: Mixture) -> None:
        """Once the engine is there: it begins with the student as teacher, and objectives with fresh memories."""
        for shard, shadow in zip(engine.segments.shards, engine.teacher.shadows, strict=True):
            for segment in shard.segments if shadow is not None else ():
                if segment.name in self.teacher:
                    whole = self.teacher[segment.name].reshape(-1)
                    segment.of(shadow.view(-1)).copy_(whole[segment.start : segment.stop])  # pyright: ignore[reportOptionalMemberAccess]
        engine.teacher.publish()
        if self.objectives:
            mixture.load(mixture.state() | self.objectives)

    def check(self, mixture: Mixture) -> None:
        """Keep of the memories those that the recipe has. Raises ImportRefused where one is of another size."""
        state = mixture.state()
        if left := sorted(self.objectives.keys() - state.keys()):
            self.report.ignored["memories"] = left
        self.objectives = {name: value for name, value in self.objectives.items() if name in state}
        for name, value in self.objectives.items():
            if value.shape != state[name].shape or value.dtype != state[name].dtype:
                raise ImportRefused(
                    f"student.init: {self.report.source} has {name} {tuple(value.shape)}, the recipe {tuple(state[name].shape)}: "
                    "give the recipe's objectives and heads the sizes of the file, or begin with its backbone alone "
                    "(gristmill import without --everything)"
                )


def read_initial(recipe: Recipe, student: Student, everyones: Callable[[list[str]], list[str]]) -> Initial | None:
    """What `student.init` names, fitted to the student; None without it. Collective: all ranks must read the same.

    Raises ImportRefused, on all ranks, with the message of the first that could not.
    """
    if recipe.student.init is None:
        return None
    initial, answer = None, ""
    try:
        initial = _read(recipe.student.init, student)
        answer = initial.report.sha256
    except WeightsError as error:
        answer = f"student.init: {error}"
    answers = everyones([answer])
    for each in answers:
        if each.startswith("student.init: "):
            raise ImportRefused(each)
    if len(set(answers)) > 1:
        raise ImportRefused(f"student.init: {recipe.student.init} is not the same file on all nodes; copy it anew")
    return initial


def _read(init: str, student: Student) -> Initial:
    if init.startswith(TIMM):
        state, report = _from_timm(init.removeprefix(TIMM), student)
    else:
        file = read_weights(init)
        if any(str(name).startswith("student/") for name in file.tree):
            own, report = import_student(file, "student", student)
            average, _ = import_student(file, "teacher", student)
            memories, _ = import_memories(file)
            report.used.extend(f"objectives.{name}" for name in memories)
            for group in ("memories", "other network"):
                report.ignored.pop(group, None)
            if lost := [name for name in student.state_dict() if name not in average and ".predictor." not in name]:
                report.missing.extend(f"teacher: {name}" for name in lost if name not in report.missing)
            return Initial(own, average, memories, report)
        state, report = import_backbone(file, None, student.backbone)
    whole = {f"backbone.{name}": value for name, value in state.items()}
    return Initial(whole, whole, {}, report)


def _from_timm(name: str, student: Student) -> tuple[dict[str, Tensor], Report]:
    """A network that timm has weights for; they come over the network unless they are in its cache."""
    if not timm.is_model(name.split(".")[0]):
        near = ", ".join(difflib.get_close_matches(name, timm.list_models(), n=3)) or "vit_small_patch16_224, resnet50"
        raise WeightsError(f"{TIMM}{name}: timm knows no such network; near it are {near}")
    try:
        tree = timm.create_model(name, pretrained=True, num_classes=0).state_dict()
    except Exception as error:
        # Without a network, or weights: its libraries' errors have no common base.
        why = str(error).strip().split("\n")[0][:160]
        raise WeightsError(
            f"{TIMM}{name}: its weights could not be fetched ({type(error).__name__}: {why}). On a machine with a network, "
            f'run `python -c "import timm, safetensors.torch as s; s.save_file(timm.create_model({name!r}, '
            "pretrained=True, num_classes=0).state_dict(), 'init.safetensors')\"` and give student.init=init.safetensors"
        ) from error
    digest = hashlib.sha256()
    for key in sorted(tree):
        digest.update(key.encode() + tree[key].contiguous().view(torch.uint8).numpy().tobytes())
    return import_backbone(WeightFile(Path(f"{TIMM}{name}"), digest.hexdigest(), tree), "teacher", student.backbone)
