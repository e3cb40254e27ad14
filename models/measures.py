"""What the shapes of a backbone's weights tell: which plain ViT or ResNet it is, and every shape that such a one has.

A file is measured before anything is made of it, so that an error can name the network that would fit. What shapes do not
tell: a ViT's number of attention heads, and where a ResNet's stages take their stride (timm and torchvision: in the 3x3).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import timm
from torch import Tensor

SIZES = {(192, 12): "tiny", (384, 12): "small", (768, 12): "base", (1024, 24): "large", (1280, 32): "huge"}
# timm's ResNets by (bottlenecks, blocks of the stages, width inside the first stage's).
RESNETS: dict[tuple[bool, tuple[int, ...], int], str] = {
    (False, (2, 2, 2, 2), 64): "resnet18", (False, (3, 4, 6, 3), 64): "resnet34", (True, (3, 4, 6, 3), 64): "resnet50",
    (True, (3, 4, 23, 3), 64): "resnet101", (True, (3, 8, 36, 3), 64): "resnet152",
    (True, (3, 4, 6, 3), 128): "wide_resnet50_2", (True, (3, 4, 23, 3), 128): "wide_resnet101_2",
}  # fmt: skip
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Measures:
    """A ViT's. They do not tell the number of attention heads."""

    kind: ClassVar[str] = "plain ViT"
    marks: ClassVar[str] = "class token, learned positions, GELU"
    needs: ClassVar[str] = "patch_embed.proj.weight, pos_embed or blocks.0"

    width: int
    depth: int
    patch: int
    hidden: int  # width of the MLPs
    tokens: int  # rows of the position embedding, class token included

    @property
    def timm_name(self) -> str | None:
        """timm's name of a plain ViT of these measures, if it has one."""
        name = f"vit_{SIZES.get((self.width, self.depth))}_patch{self.patch}_224"
        return name if self.hidden == 4 * self.width and timm.is_model(name) else None

    @property
    def remedy(self) -> str:
        """What to do about a student of another size."""
        if self.timm_name:
            return f"set student.backbone={self.timm_name}"
        return f"set student.embed_dim={self.width} student.depth={self.depth} student.patch_size={self.patch}"

    def shapes(self) -> Shapes:
        """Names and shapes of all weights, timm's."""
        d, h, p = self.width, self.hidden, self.patch
        block: Shapes = {
            "norm1.weight": (d,), "norm1.bias": (d,), "attn.qkv.weight": (3 * d, d), "attn.qkv.bias": (3 * d,),
            "attn.proj.weight": (d, d), "attn.proj.bias": (d,), "norm2.weight": (d,), "norm2.bias": (d,),
            "mlp.fc1.weight": (h, d), "mlp.fc1.bias": (h,), "mlp.fc2.weight": (d, h), "mlp.fc2.bias": (d,),
        }  # fmt: skip
        shapes: Shapes = {
            "cls_token": (1, 1, d), "pos_embed": (1, self.tokens, d), "patch_embed.proj.weight": (d, 3, p, p),
            "patch_embed.proj.bias": (d,), "norm.weight": (d,), "norm.bias": (d,),
        }  # fmt: skip
        return shapes | {f"blocks.{i}.{key}": shape for i in range(self.depth) for key, shape in block.items()}

    def __str__(self) -> str:
        named = f", timm's {self.timm_name}" if self.timm_name else ""
        return f"a ViT of width {self.width}, {self.depth} blocks, patches of {self.patch} pixels{named}"


@dataclass(frozen=True)
class ResNetMeasures:
    """A ResNet's (He et al., arXiv 1512.03385), of basic blocks or bottlenecks."""

    kind: ClassVar[str] = "plain ResNet"
    marks: ClassVar[str] = "one 7x7 convolution first, batch norm, no groups"
    needs: ClassVar[str] = "conv1.weight, or a stage's first block"

    stem: int  # channels after the first convolution
    blocks: tuple[int, ...]  # of each stage
    inner: tuple[int, ...]  # channels inside a stage's blocks
    outer: tuple[int, ...]  # and those that come out of them
    bottleneck: bool

    @property
    def timm_name(self) -> str | None:
        """timm's name of a ResNet of these measures, if it has one."""
        first, grown = self.inner[0], 256 if self.bottleneck else self.inner[0]
        regular = all(
            inner == first << stage and outer == grown << stage
            for stage, (inner, outer) in enumerate(zip(self.inner, self.outer, strict=True))
        )
        return RESNETS.get((self.bottleneck, self.blocks, first)) if regular and self.stem == 64 else None

    @property
    def remedy(self) -> str:
        """What to do about a student of another size."""
        if self.timm_name:
            return f"set student.backbone={self.timm_name}"
        if self.stem != 64 or len(set(self.blocks)) > 1:
            return "timm has no such ResNet; take another file"
        kind = "resnet50" if self.bottleneck else "resnet18"
        return f"set student.backbone={kind} student.embed_dim={self.outer[-1]} student.depth={self.blocks[0]}"

    def shapes(self) -> Shapes:
        """Names and shapes of all weights and running statistics, timm's and torchvision's."""
        shapes: Shapes = {"conv1.weight": (self.stem, 3, 7, 7)} | _norm("bn1", self.stem)
        incoming = self.stem
        for stage, (blocks, inner, outer) in enumerate(zip(self.blocks, self.inner, self.outer, strict=True)):
            for number in range(blocks):
                block = f"layer{stage + 1}.{number}."
                convs = [(incoming, inner, 1), (inner, inner, 3), (inner, outer, 1)]
                if not self.bottleneck:
                    convs = [(incoming, inner, 3), (inner, outer, 3)]
                for which, (before, after, side) in enumerate(convs, 1):
                    shapes[f"{block}conv{which}.weight"] = (after, before, side, side)
                    shapes |= _norm(f"{block}bn{which}", after)
                if number == 0 and (stage or incoming != outer):
                    shapes[f"{block}downsample.0.weight"] = (outer, incoming, 1, 1)
                    shapes |= _norm(f"{block}downsample.1", outer)
                incoming = outer
        return shapes

    def __str__(self) -> str:
        named = f", timm's {self.timm_name}" if self.timm_name else ""
        blocks = f"{' + '.join(map(str, self.blocks))} {'bottlenecks' if self.bottleneck else 'basic blocks'}"
        return f"a ResNet of {blocks}, width {self.outer[-1]}{named}"


def measure(backbone: Mapping[str, Tensor]) -> Measures | ResNetMeasures | None:
    """Measures of a backbone under timm's names; None if it lacks what would tell them."""
    return _resnet(backbone) if is_resnet(backbone) else _vit(backbone)


def is_resnet(backbone: Mapping[str, Tensor]) -> bool:
    """Whether these are a ResNet's names, complete or not."""
    return any(re.match(r"(?:conv1|bn1|layer[1-4])\.", name) for name in backbone)


def _vit(backbone: Mapping[str, Tensor]) -> Measures | None:
    try:
        width, _, patch, _ = backbone["patch_embed.proj.weight"].shape
        tokens = backbone["pos_embed"].shape[1]
        hidden = backbone["blocks.0.mlp.fc1.weight"].shape[0]
    except (KeyError, ValueError, IndexError):
        return None
    return Measures(width, _count(backbone, r"blocks\.(\d+)\."), patch, hidden, tokens)


def _resnet(backbone: Mapping[str, Tensor]) -> ResNetMeasures | None:
    bottleneck = "layer1.0.conv3.weight" in backbone
    last = "conv3" if bottleneck else "conv2"
    try:
        stem = backbone["conv1.weight"].shape[0]
        inner = tuple(backbone[f"layer{stage}.0.conv1.weight"].shape[0] for stage in range(1, 5))
        outer = tuple(backbone[f"layer{stage}.0.{last}.weight"].shape[0] for stage in range(1, 5))
    except (KeyError, IndexError):
        return None
    blocks = tuple(_count(backbone, rf"layer{stage}\.(\d+)\.") for stage in range(1, 5))
    return ResNetMeasures(stem, blocks, inner, outer, bottleneck)


def _count(backbone: Mapping[str, Tensor], pattern: str) -> int:
    return 1 + max(int(match[1]) for name in backbone if (match := re.match(pattern, name)))


def _norm(name: str, channels: int) -> Shapes:
    parts = ("weight", "bias", "running_mean", "running_var")
    return {f"{name}.{part}": (channels,) for part in parts} | {f"{name}.num_batches_tracked": ()}
