"""Optimizers and their parameter groups: AdamW, SGD and LARS, with what differs by tensor kept out of the step.

DeepSpeed hands the optimizer flat fp32 shards, one group at a time, so nothing here may ask what tensor an element
belongs to. What differs by group is a key of the group (rate, decay, held back or not); what differs by tensor (clip,
trust ratio) is a vector over the student's parameters, from norms of whole tensors, that the engine applies to its
segments in `transform`. Groups and per-tensor clip follow Mugs (arXiv 2203.14415, official code), layer decay BEiT
(arXiv 2106.08254), LARS arXiv 1708.03888 as MoCo v3's code has it (no decay and no ratio for 1-D tensors and biases).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from ..shards.errors import GristmillError
from .schedule import warmup_cosine

FIRST = ("patch_embed", "cls_token", "reg_token", "mask_token", "pos_embed", "norm_pre")  # of a backbone: layer 0


class OptimizerError(GristmillError):
    """Optimizer settings that do not fit the student."""


class OptimizerConfig(BaseModel):
    """AdamW as Mugs uses it (official defaults in the comments), or SGD (DenseCL, HCSC), or LARS (MoCo v3, BYOL)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Literal["adamw", "lars", "sgd"] = "adamw"
    lr: float = Field(default=0.0008, gt=0)  # for a batch of 256; the peak is lr * batch / 256
    min_lr: float = Field(default=1e-6, ge=0)  # at the end of the cosine; not scaled by the batch
    warmup: float = Field(default=0.1, ge=0, lt=1)  # 10 of 100 epochs, linear from 0
    warmup_from: float = Field(default=0.0, ge=0)  # where the ramp begins, as a share of the peak; SwAV: 0.0625
    # After the warm-up: a cosine to min_lr, or steps down by gamma at milestones (NPID, MoCo v1: 0.6, 0.8 of the run, to a tenth).
    schedule: Literal["cosine", "steps"] = "cosine"
    milestones: tuple[float, ...] = ()  # shares of the run
    gamma: float = Field(default=0.1, gt=0, le=1)
    # Epochs of the run, for a rate that stays the same inside one (MoCo, DenseCL, HCSC); None: it moves every step.
    epochs: int | None = Field(default=None, ge=1)
    constant_predictor: bool = False  # predictors learn at the peak all along (SimSiam)
    weight_decay: tuple[float, float] = (0.04, 0.1)  # start and end of a cosine
    decay_all: bool = False  # biases and norms decay as well, as SGD does in DenseCL, HCSC and MoCo v2
    betas: tuple[float, float] = (0.9, 0.999)  # AdamW
    eps: float = Field(default=1e-8, gt=0)  # AdamW
    momentum: float = Field(default=0.9, ge=0, lt=1)  # SGD, LARS
    trust: float = Field(default=0.001, gt=0)  # LARS: length of a step as a share of the weights' norm, at rate 1
    clip: float = Field(default=3.0, ge=0)  # norm of each parameter tensor, not of all together; 0 turns it off
    # (share of the run, norm): from there on, gradients are cut to this norm instead. Mugs, ViT-L: after 101 of 250 epochs.
    clip_late: tuple[float, float] | None = None
    clip_by: Literal["tensor", "global"] = "tensor"  # global: the norm of all gradients together is what clip limits
    patch_embed_scale: float = Field(default=0.2, gt=0)  # the patch embedding learns slower
    layer_decay: float = Field(default=1.0, gt=0, le=1)  # rate of a layer over that of the next; 1 is off, as in Mugs
    freeze_last_layer: float = Field(default=0.01, ge=0, le=1)  # 1 of 100 epochs: prototypes get no step, no moments

    def lr_at(self, peak: float, progress: float, step: float) -> float:
        """The rate at a share of the run, if `peak` is that after the warm-up; `step`: a batch's share of the run."""
        if progress < self.warmup:
            return warmup_cosine(peak, self.min_lr, self.warmup, progress, step, self.warmup_from)
        if self.epochs:  # half a batch's share forgives what a division lost
            progress = math.floor(progress * self.epochs + step / 2) / self.epochs
        if self.schedule == "steps":
            return peak * self.gamma ** sum(progress >= share - step / 2 for share in self.milestones)
        return warmup_cosine(peak, self.min_lr, self.warmup, max(progress, self.warmup), step)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if (self.schedule == "steps") != bool(self.milestones):
            raise ValueError("milestones: they are for schedule: steps, which wants at least one; set both or neither")
        if self.name == "lars" and self.decay_all:
            raise ValueError("decay_all: LARS leaves 1-D tensors and biases out; leave decay_all out, or set name: sgd")
        if self.clip_late and not (self.clip and 0 <= self.clip_late[0] <= 1 and self.clip_late[1] > 0):
            raise ValueError(
                f"clip_late: {self.clip_late} is to be a share of the run (0 ... 1) and a norm above 0, after a clip of its own"
            )
        return self

    def clip_at(self, progress: float) -> float:
        """The norm to which gradients are cut at this share of the run; 0: they are not."""
        return self.clip_late[1] if self.clip_late and progress >= self.clip_late[0] else self.clip


def parameter_groups(student: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """What is trained, as groups of equal treatment, in the order in which each first appears in the student.

    Keys: params; names, in the same order; lr_scale; decays (False for 1-D tensors and biases; the class token, position
    embedding and weight_g do decay); last_layer, held back while it is frozen; teacher, False for predictors and the mask token,
    which the teacher lacks; constant, learning at the peak all along. Raises OptimizerError when layer_decay finds no blocks to go by.
    """
    trained = [(name, p) for name, p in student.named_parameters() if p.requires_grad]
    depth = 1 + max((_block(name) for name, _ in student.named_parameters()), default=-1)
    if config.layer_decay < 1 and depth == 0:
        raise OptimizerError("optimizer.layer_decay: this backbone has no blocks to count layers by; set it to 1")
    groups: dict[tuple[float, bool, bool, bool, bool], dict[str, Any]] = {}
    for name, parameter in trained:
        scale = config.patch_embed_scale if "patch_embed" in name else 1.0
        scale *= config.layer_decay ** (depth + 1 - layer_of(name, depth))
        decays = config.decay_all or (parameter.ndim > 1 and not name.endswith(".bias"))
        both = ".predictor." not in name and not name.endswith("mask_token")
        constant = config.constant_predictor and ".predictor." in name
        key = (scale, decays, "last_layer" in name, both, constant)
        group = dict(zip(("lr_scale", "decays", "last_layer", "teacher", "constant"), key, strict=True))
        group = groups.setdefault(key, {"params": [], "names": [], **group})
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


def layer_of(name: str, depth: int) -> int:
    """Layer of a parameter in a student whose backbone has `depth` blocks, as BEiT, MAE and DINOv2 count them.

    0: patch embedding, tokens and positions; i + 1: block i; depth + 1: everything after, the heads included.
    """
    if (block := _block(name)) >= 0:
        return block + 1
    return 0 if re.match(rf"(.*\.)?backbone\.({'|'.join(FIRST)})(\.|$)", name) else depth + 1


def _block(name: str) -> int:
    found = re.match(r"(?:.*\.)?backbone\.blocks\.(\d+)\.", name)
    return int(found.group(1)) if found else -1


class Stepper(torch.optim.Optimizer):
    """Mixed into torch's optimizers: leaves groups out whose "held" is true, and transforms gradients just before use.

    A held group gets no step and no moments, as if its gradients were None (which flat shards cannot say). `transform`
    is called with each group that is stepped, and may change its gradients, fp32 and laid out like its params, in place.
    DeepSpeed calls `step` with `param_groups` cut down to one group, or with the params of the others taken out.
    """

    transform: Callable[[dict[str, Any]], None] | None = None

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        groups = self.param_groups
        live = [group for group in groups if group["params"] and not group.get("held")]
        if not live:
            return
        if self.transform is not None:
            for group in live:
                self.transform(group)
        self.param_groups = live
        try:
            super().step()
        finally:
            self.param_groups = groups


class AdamW(Stepper, torch.optim.AdamW):
    """torch's AdamW with held groups and a transform."""


class SGD(Stepper, torch.optim.SGD):
    """torch's SGD with held groups and a transform; with LARS' trust ratios in the transform, LARS."""


def make_optimizer(groups: list[dict[str, Any]], config: OptimizerConfig, device_type: str) -> Stepper:
    """The optimizer of a run, over `parameter_groups`. Rate and decay are 0 until the engine sets them.

    All groups start held, until the engine says otherwise: without ZeRO, DeepSpeed's bf16 optimizer steps once on zero
    gradients while it is built, and that must not count as a first step. For LARS, weight_decay stays 0 in the groups;
    the decay is part of the transformed gradient.
    """
    groups = [{**group, "held": True} for group in groups]
    if config.name == "adamw":
        # One pass over weights, gradients and moments; foreach makes four, and a tensor as large as all of them.
        fast = {"fused": True} if device_type in ("cuda", "cpu") else {"foreach": True}
        return AdamW(groups, lr=0.0, betas=config.betas, eps=config.eps, weight_decay=0.0, **fast)
    return SGD(groups, lr=0.0, momentum=config.momentum, weight_decay=0.0, foreach=True)


def clip_scales(norms: Tensor, config: OptimizerConfig, progress: float = 0.0) -> Tensor:
    """Factor [P] for each parameter's gradient so that norms [P], over whole tensors, come to at most `clip_at`.

    The coefficient is clip / (norm + 1e-6), at most 1, of each tensor (the official Mugs) or of all together.
    """
    if not config.clip:
        return torch.ones_like(norms)
    if config.clip_by == "global":
        norms = torch.linalg.vector_norm(norms).expand_as(norms)
    return (config.clip_at(progress) / (norms + 1e-6)).clamp(max=1.0)


@torch.no_grad()
def clip_reference(gradients: list[Tensor], config: OptimizerConfig, progress: float = 0.0) -> None:
    """Clip whole gradients in place, one tensor at a time: what `clip_scales` must equal."""
    if not config.clip:
        return
    together = sum(float(gradient.square().sum()) for gradient in gradients) ** 0.5
    for gradient in gradients:
        norm = together if config.clip_by == "global" else float(gradient.norm(2))
        if (coefficient := config.clip_at(progress) / (norm + 1e-6)) < 1:
            gradient.mul_(coefficient)


def lars_scales(weight_norms: Tensor, update_norms: Tensor, config: OptimizerConfig, excluded: Tensor) -> Tensor:
    """LARS' trust ratio [P]: trust * ||p|| / ||g + wd p||, and 1 where either is 0 or the parameter is excluded.

    weight_norms, update_norms: [P], over whole tensors, the latter of the gradient after clipping with the decay added.
    excluded: [P] bool, parameters that do not decay (1-D and biases). The gradient becomes ratio * (g + wd p).
    """
    ratio = config.trust * weight_norms / update_norms
    return torch.where((weight_norms > 0) & (update_norms > 0) & ~excluded, ratio, torch.ones_like(ratio))


class LarsReference(torch.optim.Optimizer):
    """LARS on whole parameters, one at a time, from MoCo v3's formula: what SGD under `lars_scales` must equal.

    Groups with `decays` false, and 1-D parameters, get plain momentum.
    """

    def __init__(self, params: Any, lr: float, weight_decay: float, momentum: float = 0.9, trust: float = 0.001):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "trust": trust})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                update = p.grad
                if p.ndim > 1 and group.get("decays", True):
                    update = update + group["weight_decay"] * p
                    weight, length = float(p.norm()), float(update.norm())
                    if weight > 0 and length > 0:
                        update = update * (group["trust"] * weight / length)
                mu = self.state[p].setdefault("mu", torch.zeros_like(p))
                mu.mul_(group["momentum"]).add_(update)
                p.add_(mu, alpha=-group["lr"])
