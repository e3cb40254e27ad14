"""Floating-point operations of a forward and of a training step, by walking the modules: nothing is run for it.

A multiply-add counts two, as in torch's FlopCounterMode, which tests tie this to; norms, activations and what an optimizer
does are left out, as everywhere where model FLOPs are told (PaLM, arXiv 2204.02311, appendix B). A backward costs twice its
forward, but for the first layer, whose input wants no gradient. What is computed once more to save memory is no part
of a model's FLOPs, so that utilisation computed from them cannot be raised by waste.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from .block import Read
from .dense import DenseHead
from .heads import PrototypeHead, WeightNormLinear
from .resnet import ResNetBackbone
from .student import Student
from .vit import Backbone

Crops = Sequence[tuple[int, int]]  # (pixels a side, crops of each image), the global ones first


@dataclass(frozen=True)
class Asked:
    """What the forward of one image is asked beside its crops."""

    memory: int = 0  # rows that the local group searches
    hidden: float = 0.0  # patches of an image that the patch objective hides, over all its global crops


def forward_flops(backbone: nn.Module, height: int, width: int, read: Read = "all") -> int:
    """Of one image of so many pixels through a backbone, up to its last norm. `read`: see `Backbone.forward`."""
    if isinstance(backbone, ResNetBackbone):
        return _through(nn.Sequential(*backbone.children()), height, width)[0]
    assert isinstance(backbone, Backbone)
    places = _places(backbone, height, width)
    tokens, attention = places + 1, 4 * (places + 1) ** 2 * backbone.embed_dim
    found = _first(backbone, height, width) + sum(tokens * row_flops(b) + attention for b in backbone.blocks)
    last: Any = backbone.blocks[-1]
    if read == "class":
        queries = 2 * backbone.embed_dim**2 + row_flops(last.attn.proj) + row_flops(last.mlp)
        return found - (tokens - 1) * (queries + attention // tokens)
    return found - (tokens - 2) * row_flops(last.mlp.fc2) if read == "pair" else found


def row_flops(module: nn.Module) -> int:
    """Of one row through all linear layers inside."""
    found = 0
    for part in module.modules():
        if isinstance(part, nn.Linear):
            found += 2 * part.in_features * part.out_features
        elif isinstance(part, WeightNormLinear):
            weight: Any = part.weight_v
            rows, dim = getattr(weight, "ds_shape", weight.shape)  # ZeRO 3 leaves no shape of its own
            found += 2 * rows * dim
    return found


def tokens(backbone: nn.Module, crops: Crops) -> int:
    """Tokens of one image's crops: places of the map, and one for the whole."""
    return sum(count * (_places(backbone, size, size) + 1) for size, count in crops)


def student_flops(student: Student, crops: Crops, asked: Asked | None = None) -> int:
    """Of one image's forward through backbone and heads; the teacher is a student without predictors."""
    asked = asked or Asked()
    reads = student.reads(len(crops))
    trunk = sum(
        count * forward_flops(student.backbone, size, size, read)
        for (size, count), read in zip(crops, reads, strict=True)
    )
    return trunk + _heads(student, crops, asked) + _search(student, crops, asked)


def training_flops(student: Student, teacher: Student | None, seen: Crops, aims: Crops, asked: Asked) -> int:
    """Of one image in one step: forward and backward of the student over `seen`, forward of the teacher over `aims`."""
    forward, search = student_flops(student, seen, asked), _search(student, seen, asked)
    first = sum(count * _first(student.backbone, size, size) for size, count in seen)
    shown = 0 if teacher is None or not aims else student_flops(teacher, aims, asked)
    return 3 * (forward - search) + search - first + shown  # nothing flows back through a search


def _heads(student: Student, crops: Crops, asked: Asked) -> int:
    backbone, dim = student.backbone, student.backbone.embed_dim
    every, (size, large) = sum(count for _, count in crops), crops[0]
    grid, found = backbone.grid(size, size), 0
    teacher = "patch" in student.config.objectives and backbone.mask_token is None
    patches = large * grid[0] * grid[1] if teacher else asked.hidden
    for name, head in student.heads.items():
        if isinstance(head, DenseHead):
            found += large * _dense(head, dim, *grid)
        elif isinstance(head, PrototypeHead) and "patch" in student.config.objectives:
            rows = 0 if name == "patch" else every
            last = row_flops(head.last_layer2 or head.last_layer)
            found += int((rows + patches) * row_flops(head.projector) + asked.hidden * last)
            found += rows * row_flops(head.last_layer)
        else:
            found += every * row_flops(head)
    if student.relation is not None:
        rows, attention = student.config.neighbours + 1, student.relation.attn
        joined = 2 * dim * dim + rows * 4 * dim * dim + 4 * rows * dim  # query of one token, keys and values of all
        found += every * (joined + row_flops(attention.proj) + row_flops(student.relation.mlp))
    return found


def _search(student: Student, crops: Crops, asked: Asked) -> int:
    if student.relation is None:
        return 0
    return sum(count for _, count in crops) * 2 * asked.memory * student.backbone.embed_dim


def _dense(head: DenseHead, dim: int, height: int, width: int) -> int:
    """Of one map; pooling it is two products."""
    if head.grid is None or (height <= head.grid and width <= head.grid):
        return height * width * row_flops(head)
    down, across = min(height, head.grid), min(width, head.grid)
    pooling = 2 * dim * (height * width * across + height * across * down)
    return pooling + down * across * row_flops(head)


def _places(backbone: Any, height: int, width: int) -> int:
    grid = backbone.grid(height, width)
    return grid[0] * grid[1]


def _first(backbone: Any, height: int, width: int) -> int:
    """Of the layer that sees the pixels."""
    if isinstance(backbone, ResNetBackbone):
        first = next(part for part in backbone.modules() if isinstance(part, nn.Conv2d))
        return _through(first, height, width)[0]
    proj = backbone.patch_embed.proj
    return _places(backbone, height, width) * 2 * proj.out_channels * proj.in_channels * backbone.stride**2


def _through(module: nn.Module, height: int, width: int) -> tuple[int, int, int]:
    """FLOPs of a map [.., height, width] through what convolutional networks are made of, and the size of what comes out."""
    if isinstance(module, nn.Conv2d | nn.MaxPool2d | nn.AvgPool2d):
        down, across = (_side(module, axis, side) for axis, side in enumerate((height, width)))
        found = 0
        if isinstance(module, nn.Conv2d):
            taps = module.kernel_size[0] * module.kernel_size[1] * module.in_channels // module.groups
            found = 2 * down * across * module.out_channels * taps
        return found, down, across
    found, beside, size = 0, 0, (height, width)
    for name, part in module.named_children():
        if name == "downsample":  # a second way through a residual block
            beside = _through(part, height, width)[0]
            continue
        more, *size = _through(part, *size)
        found += more
    return found + beside, size[0], size[1]


def _side(module: Any, axis: int, side: int) -> int:
    """Of the map that a convolution or a pooling gives."""
    kernel, stride, padding, dilation = (
        value[axis] if isinstance(value, tuple) else value
        for value in (module.kernel_size, module.stride, module.padding, getattr(module, "dilation", 1))
    )
    span = side + 2 * padding - dilation * (kernel - 1) - 1
    return (-(-span // stride) if getattr(module, "ceil_mode", False) else span // stride) + 1
