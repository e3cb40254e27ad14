"""The whole official training step: wiring, heads, losses, gradients, clipping, groups, AdamW, EMA, memories, queues.

Three ties. What the official code printed over six steps, as far as it is small enough to keep (mugs_step_later.pt: its
outputs, losses, memories and queues whole; gradients and weights as 40 elements a tensor and norms. At steps 1, 2 and 4
it printed no gradients: those are a full run's that met its prints at 3 and 5). The plain step (plain.py) against ours on
images of this test's own, everything whole, in float64. And where GRISTMILL_VECTORS names the folder of the full
vectors, both against those.
"""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from gristmill.models.ema import ema_update, pairs
from gristmill.models.student import Student, StudentConfig
from gristmill.models.teacher import make_teacher
from gristmill.objectives import (
    Dims,
    GroupConfig,
    InstanceConfig,
    LocalGroupConfig,
    Mixture,
    StepInfo,
    build_objectives,
)
from gristmill.ops.optimizers import OptimizerConfig, clip_scales, make_optimizer, parameter_groups
from gristmill.ops.schedule import cosine, warmup_cosine
from torch import Tensor
from torch.nn.functional import normalize

from .plain import PlainMugs

VECTORS = Path(__file__).parents[1] / "vectors"
FULL = Path(os.environ.get("GRISTMILL_VECTORS", "")) / "mugs_step.pt"
NAMES = ("instance", "local_group", "group")
OFFICIAL = {"instance": "instance-sup.", "local_group": "local-group-sup.", "group": "group-sup."}
OPTIMIZER = OptimizerConfig(lr=0.05, min_lr=1e-6, warmup=0.25, clip=0.05, freeze_last_layer=0.25)
STEPS, EPOCHS = 12, 4  # of the official run's schedules; six of its steps were recorded


def translated(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights under our names."""
    return {ours(key): value for key, value in state.items()}


def ours(key: str) -> str:
    key = key.replace("backbone.relation_blocks.0.", "relation.")
    for name in NAMES:
        key = key.replace(f"{name}_head.", f"heads.{name}.")
    return key


def mixture(dtype: torch.dtype = torch.float32, *, memory: int = 16, queue: int = 16, features: int = 48) -> Mixture:
    configs = {
        "instance": InstanceConfig(queue=queue),
        "local_group": LocalGroupConfig(queue=queue, memory=memory, neighbours=4, compat=True),
        "group": GroupConfig(warmup=0.5, epochs=EPOCHS),
    }
    return build_objectives(configs, dims=Dims(features, 16, 16, 64), seed=0, dtype=dtype)


def fill(made: Mixture, queues: dict[str, Tensor], memories: dict[str, Tensor], center: Tensor) -> None:
    """queues [K, D], memories [M, d]."""
    rows = {f"{name}.queue.rows": queue.contiguous() for name, queue in queues.items()}
    rows |= {f"local_group.{who}.rows": memory for who, memory in memories.items()}
    made.load(made.state() | rows | {"group.center": center})


def info(step: int, weak: Tensor) -> StepInfo:
    return StepInfo(
        batch=3,
        student_crops=4,
        student_globals=2,
        teacher_crops=2,
        progress=step / STEPS,
        weak=weak,
        position=step * 3,
    )


def near(found: Tensor, wanted: Tensor, tolerance: float, what: object) -> None:
    """Within `tolerance` of the largest number wanted."""
    gap, size = float((found.detach() - wanted).abs().max()), float(wanted.abs().max())
    assert gap <= tolerance * max(size, 1e-30), (what, gap / max(size, 1e-30))


# What the official code printed.


def test_objectives_follow_six_official_steps() -> None:
    """Outputs and rows in; losses, queues, centre, memories and the skipping pointers out, with temperatures by epoch."""
    later = torch.load(VECTORS / "mugs_step_later.pt", weights_only=True)
    made, start = mixture(), later["start"]
    fill(made, {k: v.T for k, v in start["queues"].items()}, start["memories"], torch.zeros(1, 64))
    instance, local, group = (made.objectives[name] for name in NAMES)
    for number, step in enumerate(later["steps"]):
        sides: dict[str, dict[str, Tensor]] = {}
        for who in ("student", "teacher"):
            sides[who] = {name: step["outputs"][name][who] for name in NAMES}
            sides[who]["memory_row"] = torch.cat([step["rows"][who], torch.zeros(3, 48)])
        outcome = made.loss(sides["student"], sides["teacher"], info(number, step["weak"]))
        for name in NAMES:
            assert float(outcome.logs[f"loss/{name}"]) == pytest.approx(step["losses"][name], rel=1e-6)
        assert float(outcome.loss) == pytest.approx(step["total_loss"], rel=1e-6)
        made.commit(outcome)
        pointers = {who: getattr(local, who).pointer for who in ("student", "teacher")}
        assert pointers == step["pointers"]
        if "center" in step:
            near(group.center, step["center"], 1e-6, number)  # pyright: ignore[reportAttributeAccessIssue]
            for name, objective in (("instance", instance), ("local_group", local)):
                assert torch.equal(objective.queue.rows.T, step["queues"][name])  # pyright: ignore[reportAttributeAccessIssue]
            for who in ("student", "teacher"):
                assert torch.equal(getattr(local, who).rows, step["memories"][who])


def test_updates_follow_six_official_steps() -> None:
    """Gradients in; clipped gradients, weights and the teacher out, with the official groups, rates and frozen layer."""
    later = torch.load(VECTORS / "mugs_step_later.pt", weights_only=True)
    student = Student(CONFIG)
    groups = parameter_groups(student, OPTIMIZER)
    start = translated(torch.load(VECTORS / "mugs_step_slim.pt", weights_only=True)["student"])
    names, lengths = [ours(key) for key in later["names"]], {}
    weights: dict[str, torch.nn.Parameter] = {}
    for name in names:  # 40 elements stand for a tensor: its norm is given, and all else goes by element
        count = min(start[name].numel(), 40)
        at = torch.arange(count) * start[name].numel() // count
        weights[name], lengths[name] = torch.nn.Parameter(start[name].flatten()[at].clone()), count
    kept = [ours(key) for key in later["teacher_names"]]
    pieces = later["start"]["teacher"].split([lengths[name] for name in kept])
    teacher = {name: piece.clone() for name, piece in zip(kept, pieces, strict=True)}
    for group in groups:
        group["params"] = [weights[name] for name in group["names"]]
    optimizer = make_optimizer(groups, OPTIMIZER, "cpu")
    for number, step in enumerate(later["steps"]):
        scales = clip_scales(step["norms"], OPTIMIZER)
        raw = step["raw"].split(list(lengths.values()))
        for name, scale, gradient in zip(names, scales, raw, strict=True):
            weights[name].grad = gradient * scale
        if "clipped" in step:
            near(torch.cat([weights[name].grad for name in names]), step["clipped"], 1e-6, number)  # type: ignore[misc]
        progress = number / STEPS
        for group in optimizer.param_groups:
            rate = warmup_cosine(OPTIMIZER.lr * 3 / 256, OPTIMIZER.min_lr, OPTIMIZER.warmup, progress, 1 / STEPS)
            assert rate == pytest.approx(step["lr"], rel=1e-12)
            group["lr"] = rate * group["lr_scale"]
            group["weight_decay"] = cosine(*OPTIMIZER.weight_decay, progress) if group["decays"] else 0.0
            group["held"] = group["last_layer"] and progress < OPTIMIZER.freeze_last_layer
        optimizer.step()
        ema_update(([weights[n].detach() for n in kept], [teacher[n] for n in kept]), cosine(0.996, 1.0, progress))
        if "student" in step:
            # Weights moved by up to 2e-3 by now; the longest step off is 2e-7.
            found = torch.cat([weights[name].detach() for name in names])
            torch.testing.assert_close(found, step["student"], rtol=0, atol=2e-6)
            found = torch.cat([teacher[name] for name in kept])
            torch.testing.assert_close(found, step["teacher"], rtol=0, atol=5e-7)


def test_groups_are_the_official_four() -> None:
    later = torch.load(VECTORS / "mugs_step_later.pt", weights_only=True)
    ours_by = {}
    for group in parameter_groups(Student(CONFIG), OPTIMIZER):
        kind = ("patch_embed" if group["lr_scale"] == 0.2 else "normal_params", group["decays"])
        ours_by.setdefault(kind, set()).update(group["names"])
    kinds = {
        "normal_params": ("normal_params", True), "patch_embed": ("patch_embed", True),
        "no_wd": ("normal_params", False), "patch_embed_no_wd": ("patch_embed", False),
    }  # fmt: skip
    assert {kinds[g["name"]]: {ours(p) for p in g["params"]} for g in later["groups"]} == ours_by


# The plain step, and the full vectors.

CONFIG = StudentConfig(
    embed_dim=48, depth=3, heads=3, drop_path=0, head_hidden=32, head_out=16, predictor_hidden=40, prototypes=64,
    neighbours=4,
)  # fmt: skip


class Ours:
    """Our parts, put together as the loop does it, in one process and without an engine."""

    def __init__(self, config: StudentConfig, dtype: torch.dtype, streams: bool = False):
        self.streams = streams  # prototypes, as a run does it: then there are no logits of the student
        self.student = Student(config).to(dtype)
        self.teacher = make_teacher(self.student)
        self.mixture = mixture(dtype, features=self.student.backbone.embed_dim)
        self.searched: dict[str, Tensor] = {}  # the official code starts with rows to compare and rows to return apart
        groups = parameter_groups(self.student, OPTIMIZER)
        self.names = [name for group in groups for name in group["names"]]
        self.optimizer = make_optimizer(groups, OPTIMIZER, "cpu")
        self.number = 0

    def context(self, who: str) -> dict[str, Tensor]:
        made = self.mixture
        context = made.context() if who == "student" else made.teacher_context()
        if who in self.searched:
            memory = getattr(made.objectives["local_group"], who)
            never = (memory.state()["written"] < 0)[:, None]
            context["local_group.unit_bank"] = normalize(torch.where(never, self.searched[who], memory.rows), dim=-1)
        return context

    def step(self, teacher_crops: list[Tensor], student_crops: list[Tensor], weak: Tensor) -> dict[str, Any]:
        by_size = [torch.cat(student_crops[:2]), torch.cat(student_crops[2:])]
        with torch.no_grad():
            t = self.teacher([torch.cat(teacher_crops)], self.context("teacher"))
        aims = self.mixture.aims(t, info(self.number, weak)) if self.streams else {}
        s = self.student(by_size, self.context("student") | aims)
        assert ("group" in s) != self.streams
        outcome = self.mixture.loss(s, t | aims, info(self.number, weak))
        self.student.zero_grad()
        outcome.loss.backward()
        parameters = dict(self.student.named_parameters())
        gradients = [parameters[name].grad for name in self.names]
        assert all(gradient is not None for gradient in gradients)
        raw = {name: g.clone() for name, g in zip(self.names, gradients, strict=True) if g is not None}
        scales = clip_scales(torch.stack([g.norm() for g in raw.values()]), OPTIMIZER)
        for gradient, scale in zip(gradients, scales, strict=True):
            gradient.mul_(scale)  # pyright: ignore[reportOptionalMemberAccess]
        clipped = {name: g.clone() for name, g in zip(self.names, gradients, strict=True) if g is not None}
        rates = self.rates()
        for group in self.optimizer.param_groups:
            group["lr"] = rates["lr"] * group["lr_scale"]
            group["weight_decay"] = rates["wd"] if group["decays"] else 0.0
            group["held"] = group["last_layer"] and rates["held"]
        self.optimizer.step()
        if s["instance"].dtype == torch.float32:
            ema_update(pairs(self.student, self.teacher), rates["m"])
        else:  # ours insists on float32
            for target, source in zip(*reversed(pairs(self.student, self.teacher)), strict=True):
                target.lerp_(source, 1 - rates["m"])
        self.mixture.commit(outcome)
        self.number += 1
        losses = {name: outcome.logs[f"loss/{name}"] for name in NAMES}
        return {"student": s, "teacher": t, "losses": losses, "raw": raw, "clipped": clipped}

    def rates(self) -> dict[str, Any]:
        progress = self.number / STEPS
        return {
            "lr": warmup_cosine(OPTIMIZER.lr * 3 / 256, OPTIMIZER.min_lr, OPTIMIZER.warmup, progress, 1 / STEPS),
            "wd": cosine(*OPTIMIZER.weight_decay, progress),
            "m": cosine(0.996, 1.0, progress),
            "held": progress < OPTIMIZER.freeze_last_layer,
        }


def plain_of(mine: Ours) -> PlainMugs:
    """The plain step from where ours stands."""
    config, made = mine.student.config, mine.mixture.state()
    plain = PlainMugs(
        dict(mine.student.named_parameters()), dict(mine.teacher.named_parameters()), heads=mine.student.backbone.heads,
        depth=len(mine.student.backbone.blocks), patch=mine.student.backbone.stride,
        neighbours=config.neighbours,
    )  # fmt: skip
    plain.queues = {name: made[f"{name}.queue.rows"].double() for name in ("instance", "local_group")}
    plain.memories = {who: made[f"local_group.{who}.rows"].double() for who in ("student", "teacher")}
    searched = plain.memories | mine.searched
    plain.searched = {who: searched[who].double().clone() for who in plain.memories}
    plain.center = made["group.center"].double()
    return plain


def same_state(mine: Ours, plain: PlainMugs, tolerance: float) -> None:
    weights, averages = dict(mine.student.named_parameters()), dict(mine.teacher.named_parameters())
    for kind, found, wanted in (("student", weights, plain.student), ("teacher", averages, plain.teacher)):
        for name, value in wanted.items():
            near(found[name], value.detach(), tolerance, (kind, name))
    state = mine.mixture.state()
    for name, queue in plain.queues.items():
        near(state[f"{name}.queue.rows"], queue, tolerance, name)
        assert int(state[f"{name}.queue.pointer"]) == plain.pointer[name]
    for who, memory in plain.memories.items():
        near(state[f"local_group.{who}.rows"], memory, tolerance, who)
        assert int(state[f"local_group.{who}.pointer"]) == plain.pointer[who]
    near(state["group.center"], plain.center, tolerance, "centre")


@pytest.mark.parametrize("streams", [False, True])
def test_ours_is_the_plain_step(streams: bool) -> None:
    """Six steps in float64, every output, gradient, weight, memory and queue, on small images."""
    small = {"image_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "heads": 2, "linear_std": 0.1}
    mine = Ours(CONFIG.model_copy(update=small), torch.float64, streams)
    plain = plain_of(mine)
    generator = torch.Generator().manual_seed(0)
    for number in range(6):
        crops = [torch.randn(3, 3, s, s, generator=generator, dtype=torch.float64) for s in (32, 32, 32, 32, 16, 16)]
        weak = torch.rand(3, generator=generator) < 0.5
        rates = mine.rates()
        temperature = 0.04 if number < 3 else 0.07
        wanted = plain.step(
            crops[:2], crops[2:], weak, lr=rates["lr"], wd=rates["wd"], m=rates["m"], temperature=temperature,
            clip=OPTIMIZER.clip, held=rates["held"],
        )  # fmt: skip
        found = mine.step(crops[:2], crops[2:], weak)
        for name in NAMES:
            for who in ("student", "teacher"):
                if name in found[who]:
                    near(found[who][name], wanted[who][name], 1e-9, (number, who, name))
            near(found["losses"][name], wanted["losses"][name], 1e-9, (number, name))
        for kind in ("raw", "clipped"):
            largest = max(float(g.abs().max()) for g in wanted[kind].values())
            for name, gradient in wanted[kind].items():
                gap = float((found[kind][name] - gradient).abs().max())
                assert gap <= 1e-9 * largest, (number, kind, name)
        same_state(mine, plain, 1e-7)
    moved = max(
        float((p.detach() - plain.teacher[n]).abs().max()) for n, p in plain.student.items() if n in plain.teacher
    )
    assert moved > 1e-3


def check_full(form: str) -> None:
    """Every number that the official code printed, over six steps; the bounds are the README's beside the vectors."""
    official = torch.load(FULL, weights_only=True)
    mine = Ours(CONFIG, torch.float32, "streamed" in form)
    mine.student.load_state_dict(translated(official["student0"]))
    mine.teacher.load_state_dict(translated(official["teacher0"]))
    state = official["loss_state0"]
    queues = {name: state[OFFICIAL[name]]["queue"].T for name in ("instance", "local_group")}
    memories = {who: official[f"{who}_mem0"]["block.queue_k"] for who in ("student", "teacher")}
    mine.searched = {who: official[f"{who}_mem0"]["block.queue_q"] for who in ("student", "teacher")}
    fill(mine.mixture, queues, memories, state["group-sup."]["center"])
    plain = plain_of(mine)
    for number, step in enumerate(official["epochs"]):
        batch, rates = official["batches"][number % 3], mine.rates()
        crops = [image.float() for image in batch["images"]]
        assert [rates["lr"], rates["wd"], rates["m"]] == pytest.approx([step["lr"], step["wd"], step["m"]], rel=1e-12)
        if form.startswith("ours"):
            found = mine.step(crops[:2], crops[2:], batch["weak"])
        else:
            mine.number += 1
            temperature = 0.04 if step["epoch"] == 0 else 0.07
            found = plain.step(
                crops[:2], crops[2:], batch["weak"], lr=step["lr"], wd=step["wd"], m=step["m"], temperature=temperature,
                clip=OPTIMIZER.clip, held=step["epoch"] < 1,
            )  # fmt: skip
        for name in NAMES:
            heads = step["head_outputs"][OFFICIAL[name]]
            for who in ("student", "teacher"):
                if name in found[who]:
                    near(found[who][name], heads[who], 2e-5, (number, who, name))
            near(found["losses"][name], heads["loss"], 1e-5, (number, name))
        if "grad_raw" not in step:
            continue
        for kind in ("raw", "clipped"):
            for key, wanted in step[f"grad_{kind}"].items():
                near(found[kind][ours(key)], wanted, 1e-5 if number == 0 else 1e-4, (number, kind, key))
        weights = dict(mine.student.named_parameters()) if form.startswith("ours") else plain.student
        averages = dict(mine.teacher.named_parameters()) if form.startswith("ours") else plain.teacher
        for kind, found_by in (("student", weights), ("teacher", averages)):
            for key, wanted in step[kind].items():
                if "qkv.bias" in key:  # a key's bias has no gradient but rounding, which AdamW makes into steps
                    torch.testing.assert_close(found_by[ours(key)].double(), wanted.double(), rtol=0, atol=2e-3)
                else:
                    near(found_by[ours(key)], wanted, 1e-4, (number, kind, key))
        held = mine.mixture.state() if form.startswith("ours") else {}
        for name in ("instance", "local_group"):
            queue = held[f"{name}.queue.rows"] if held else plain.queues[name]
            near(queue.T, step["loss_state"][OFFICIAL[name]]["queue"], 2e-5, (number, name))
        near(held["group.center"] if held else plain.center, step["loss_state"]["group-sup."]["center"], 2e-5, number)
        for who in ("student", "teacher"):
            memory = held[f"local_group.{who}.rows"] if held else plain.memories[who]
            near(memory, step[f"{who}_mem"]["block.queue_k"], 2e-5, (number, who))
            pointer = int(held[f"local_group.{who}.pointer"]) if held else plain.pointer[who]
            assert pointer == step[f"{who}_mem_ptr"]


if FULL.is_file():  # nowhere else is there anything to collect, or to skip

    @pytest.mark.parametrize("form", ["ours", "ours, streamed", "plain"])
    def test_full_vectors(form: str) -> None:
        check_full(form)
