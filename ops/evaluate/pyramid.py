"""Feature maps at strides 4, 8, 16, 32 and 64, as detectors want them, from a ViT's one map or a ResNet's four.

A ViT has one resolution, so its last map is enlarged by deconvolution and reduced by pooling: the simple feature pyramid of
ViTDet (Li et al., arXiv 2203.16527, section 3 and appendix A.2). A ResNet's stages go through a feature pyramid network
(Lin et al., arXiv 1612.03144) by torchvision. Patches whose side is no power of two (14) are resampled to the next
stride that is one, in place: position (x, y) of a map is pixel (x, y) times its stride, whatever the patch.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

STRIDES = (4, 8, 16, 32)  # of what regions are pooled from
COARSEST = 64  # one more, for proposals alone; images must be multiples of it
STAGES = ("layer1", "layer2", "layer3", "layer4")


class Pyramid(nn.Module):
    """Images [B, 3, H, W], sides multiples of 64, to {"0": [B, c, H/4, W/4], ... "3": 1/32, "pool": 1/64}.

    eye: tokens [B, 1 + h * w, d] of images, with `stride`, and the stages of a ResNet in `eye.net` where it has them. It
    stays in evaluation mode, so that batch norm keeps its statistics, as detectors that are fine-tuned do; a frozen one
    keeps nothing for the backward.
    """

    def __init__(self, eye: Any, channels: int = 256, *, trainable: bool = False) -> None:
        super().__init__()
        self.eye, self.out_channels, self.trainable = eye.requires_grad_(trainable), channels, trainable
        net = getattr(eye, "net", None)
        self._stages = [getattr(net, name) for name in STAGES] if all(hasattr(net, name) for name in STAGES) else []
        self.eye.eval()
        with torch.no_grad():
            widths = [each.shape[1] for each in self._maps(next(eye.parameters()).new_zeros(1, 3, COARSEST, COARSEST))]
        if self._stages:
            self.merge = FeaturePyramidNetwork(widths, channels, LastLevelMaxPool())
        else:
            near = 2 ** round(math.log2(eye.stride))
            self.scales = nn.ModuleList([_scale(widths[0], channels, near, stride) for stride in STRIDES])

    def train(self, mode: bool = True) -> Pyramid:
        super().train(mode)
        self.eye.eval()
        return self

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        if any(side % COARSEST for side in images.shape[2:]):
            raise ValueError(f"images of {list(images.shape[2:])} pixels are no multiples of {COARSEST}")
        with torch.set_grad_enabled(self.trainable and torch.is_grad_enabled()):
            maps = self._maps(images)
        if self._stages:
            return self.merge(OrderedDict((str(number), each) for number, each in enumerate(maps)))
        levels = OrderedDict((str(number), scale(maps[0])) for number, scale in enumerate(self.scales))
        levels["pool"] = F.max_pool2d(levels["3"], 1, 2)
        return levels

    def _maps(self, images: Tensor) -> list[Tensor]:
        """Maps [B, d, h, w]: those of a ResNet's stages, or a ViT's last one."""
        if not self._stages:
            return [self._last_map(images)]
        seen: list[Tensor] = []
        # Its own forward calls the blocks of a stage, never the stage.
        hooks = [stage[-1].register_forward_hook(lambda _, __, out: seen.append(out)) for stage in self._stages]
        try:
            self.eye(images)
        finally:
            for hook in hooks:
                hook.remove()
        return seen

    def _last_map(self, images: Tensor) -> Tensor:
        patch, (height, width) = self.eye.stride, images.shape[2:]
        high, wide = -(-height // patch), -(-width // patch)
        padded = F.pad(images, (0, wide * patch - width, 0, high * patch - height))
        tokens = self.eye(padded)[:, 1:].mT.unflatten(2, (high, wide))
        near = 2 ** round(math.log2(patch))
        if near == patch:
            return tokens
        # Sampled where the centres of the new cells lie; the padded map reaches at least as far as they do.
        resampled = F.interpolate(tokens, scale_factor=patch / near, mode="bilinear", align_corners=False)
        return resampled[:, :, : height // near, : width // near]


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of each place of a map [B, c, h, w]."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def _scale(width: int, channels: int, patch: int, stride: int) -> nn.Sequential:
    """From a map of stride `patch` to one of `stride`: enlarge or pool, then 1 x 1 and 3 x 3 with norms."""
    parts: list[nn.Module] = []
    while patch > stride:
        half = max(channels, width // 2)
        parts += [nn.ConvTranspose2d(width, half, 2, 2), ChannelNorm(half), nn.GELU()]
        width, patch = half, patch // 2
    if parts:
        parts = parts[:-2]  # the last enlargement goes straight on to the next convolution
    if patch < stride:
        parts.append(nn.MaxPool2d(stride // patch))
    parts += [nn.Conv2d(width, channels, 1, bias=False), ChannelNorm(channels)]
    parts += [nn.Conv2d(channels, channels, 3, padding=1, bias=False), ChannelNorm(channels)]
    return nn.Sequential(*parts)
