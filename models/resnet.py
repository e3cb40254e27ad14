"""ResNets behind the ViT's interface: timm's, with batch norm whose statistics are outputs.

The last map is handed on as tokens, its average first: that is the class token of a ResNet, and its locations are the
patches, so that heads, objectives and probes ask one thing of either kind. Batch norm is models/batch_norm.py's, so that
a bad step can be dropped and the world size does not matter. Initial weights are torchvision's, as MoCo, SwAV and BYOL
take them (He et al., arXiv 1512.03385 and 1502.01852), or with `fan_in` those of DenseCL's code base.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import timm
import torch
from timm.models.resnet import ResNet
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .batch_norm import BatchNorm
from .initial import generator


class ResNetBackbone(nn.Module):
    """A timm ResNet without its classifier, its parameters under timm's (and torchvision's) names."""

    pos_interp = "official"  # there are no positions to carry over
    recompute: bool = False  # as a ViT's: each block is computed once more in the backward
    mask_token: None = None

    def __init__(self, net: ResNet) -> None:
        super().__init__()
        for name, part in net.named_children():
            if name not in ("global_pool", "fc"):
                self.add_module(name, part)
        self._stem = [name for name in ("conv1", "bn1", "act1", "maxpool") if hasattr(net, name)]
        self.embed_dim: int = int(net.num_features)
        self.heads = max(1, self.embed_dim // 64)  # of a local-group block, where there is one
        self.stride = 32
        self.blocks: list[nn.Module] = []  # stochastic depth and compilation by blocks are for ViTs
        self.norm = nn.Identity()

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Locations of the map of images of so many pixels."""
        return math.ceil(height / self.stride), math.ceil(width / self.stride)

    def forward(self, x: Tensor, branch_scale: None = None, masks: None = None) -> Tensor:
        """Images [n, 3, H, W] to [n, 1 + h * w, d]: the average of the last map, then its locations, row by row."""
        for name in self._stem:
            x = getattr(self, name)(x)
        recompute = self.recompute and self.training and torch.is_grad_enabled()
        for name in ("layer1", "layer2", "layer3", "layer4"):
            for block in getattr(self, name):
                # Statistics are collected in the forward alone: nobody asks for them any more in the backward.
                x = checkpoint(block, x, use_reentrant=False, preserve_rng_state=False) if recompute else block(x)
        x = x.flatten(2).mT
        return torch.cat([x.mean(1, keepdim=True), x], dim=1)


def is_resnet(name: str) -> bool:
    """Whether timm has a ResNet of this name; what stands behind a point says whose weights, which are not taken."""
    return name.partition(".")[0] in timm.list_models(module="resnet")


def build_resnet(
    name: str,
    *,
    embed_dim: int | None = None,
    depth: int | None = None,
    seed: int = 0,
    virtual: int | None = None,
    init_conv: Literal["fan_out", "fan_in"] = "fan_out",
    zero_init_residual: bool = False,
) -> ResNetBackbone:
    """A timm ResNet by name, drawn from `seed`. ValueError for one whose norms are not batch norm.

    embed_dim: width of the last map, where it is not as named; the maps before it have a half, a quarter and an eighth.
    depth: blocks in each stage. virtual: images of a virtual batch; each location of their maps counts, as in torch.nn.BatchNorm2d.
    """
    with torch.random.fork_rng(devices=[]):
        net: Any = timm.create_model(name, num_classes=0, device="meta")
        more: dict[str, Any] = {} if depth is None else {"layers": [depth] * 4}
        if embed_dim is not None:
            last, rest = divmod(embed_dim, net.num_features // 512)
            if rest or last % 8:
                raise ValueError(
                    f"embed_dim {embed_dim} of {name!r} is not a multiple of {8 * net.num_features // 512}"
                )
            more["channels"] = (last // 8, last // 4, last // 2, last)
        net = timm.create_model(name, num_classes=0, **more)
    odd = [part for part in net.modules() if "Norm" in type(part).__name__ and type(part) is not nn.BatchNorm2d]
    if not isinstance(net, ResNet) or odd or not hasattr(net, "maxpool"):
        raise ValueError(f"backbone {name!r} is not a plain ResNet with batch norm; try resnet50")
    for part in list(net.modules()):
        for child, module in list(part.named_children()):
            if type(module) is nn.BatchNorm2d:
                norm = BatchNorm(module.num_features, module.eps, module.momentum or 0.1, virtual=virtual)
                setattr(part, child, norm)
    backbone = ResNetBackbone(net)
    _draw(backbone, seed, init_conv)
    if zero_init_residual:
        for part in backbone.modules():
            last = getattr(part, "bn3", None) or getattr(part, "bn2", None)
            if isinstance(last, BatchNorm) and hasattr(part, "downsample"):
                assert last.weight is not None
                nn.init.zeros_(last.weight)
    return backbone


def _draw(backbone: ResNetBackbone, seed: int, mode: Literal["fan_out", "fan_in"]) -> None:
    for prefix, part in backbone.named_modules():
        if isinstance(part, nn.Conv2d):
            draws = generator(f"{seed}/backbone/{prefix}.weight")
            nn.init.kaiming_normal_(part.weight, mode=mode, nonlinearity="relu", generator=draws)
        elif isinstance(part, BatchNorm) and part.weight is not None and part.bias is not None:
            nn.init.ones_(part.weight)
            nn.init.zeros_(part.bias)
