"""One way to look through any backbone: tokens after the last norm, class token first, and parameters by depth.

Evaluators never ask what kind of network they have. A plain ViT gives its last blocks each after the final norm, as DINO's and
Mugs' linear probes read them; a ResNet gives its last map, whose average stands for the class token; of whatever else
timm builds, the last features as timm pools them; and raw pixels are the baseline that all of them have to beat. Images
come normalised by ImageNet's mean and spread; a network that was trained on others has them turned into its own.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.models._manipulate import group_parameters
from torch import Tensor, nn

from ...models.batch_norm import BatchNorm
from ...models.resnet import ResNetBackbone
from ...models.vit import Backbone
from ...pipeline.augment.colour import MEAN, STD

Seen = tuple[Tensor, Tensor]  # class [B, d], patches [B, h * w, d]


class Eye(nn.Module):
    """A network as evaluators see it: `forward(images [B, 3, H, W])` -> tokens [B, 1 + h*w, d] after the final norm."""

    width: int  # d
    depth: int  # blocks of a ViT, stages of a ResNet
    stride: int  # pixels a side of a patch, or of a location of the last map
    exact: bool = False  # whether sides of images must be multiples of the stride

    def __init__(self, mean: Sequence[float] = MEAN, std: Sequence[float] = STD) -> None:
        super().__init__()
        if tuple(mean) != tuple(MEAN) or tuple(std) != tuple(STD):
            theirs, ours = (torch.tensor([m, s], dtype=torch.float64) for m, s in ((mean, std), (MEAN, STD)))
            factor, offset = ours[1] / theirs[1], (ours[0] - theirs[0]) / theirs[1]
            self.register_buffer("factor", factor.float().view(3, 1, 1), persistent=False)
            self.register_buffer("offset", offset.float().view(3, 1, 1), persistent=False)

    def blocks(self, images: Tensor, n: int = 1) -> list[Seen]:
        """The last n blocks, the last one last; fewer where the network has no more to give."""
        raise NotImplementedError

    def layers(self) -> list[list[nn.Parameter]]:
        """Parameters by depth, the embedding first, the final norm with the last block; each exactly once."""
        raise NotImplementedError

    def forward(self, images: Tensor) -> Tensor:
        first, patches = self.blocks(images)[-1]
        return torch.cat([first[:, None], patches], dim=1)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Patches, or locations of the last map, of images of so many pixels."""
        return -(-height // self.stride), -(-width // self.stride)

    def trainable(self) -> Eye:
        """A deep copy in training mode whose parameters ask for gradients, with torch's own batch norm."""
        other = copy.deepcopy(self)
        for part in list(other.modules()):
            for name, child in list(part.named_children()):
                if isinstance(child, BatchNorm):
                    setattr(part, name, _plain_norm(child))
        return other.requires_grad_(True).train()

    def _turned(self, images: Tensor) -> Tensor:
        if not hasattr(self, "factor"):
            return images
        return torch.addcmul(self.get_buffer("offset"), images, self.get_buffer("factor"))


class VitEye(Eye):
    """Gristmill's plain ViT."""

    exact = True

    def __init__(self, net: Backbone, **normal: Any) -> None:
        super().__init__(**normal)
        self.net = net
        self.width, self.depth, self.stride = net.embed_dim, len(net.blocks), net.stride

    def blocks(self, images: Tensor, n: int = 1) -> list[Seen]:
        net: Any = self.net
        x = net._pos_embed(net._embed(self._turned(images)))
        seen = []
        for number, block in enumerate(net.blocks):
            x = block(x)
            if number >= self.depth - n:
                tokens = net.norm(x)
                seen.append((tokens[:, 0], tokens[:, 1:]))
        return seen

    def layers(self) -> list[list[nn.Parameter]]:
        net = self.net
        inside = {id(p) for part in (net.blocks, net.norm) for p in part.parameters()}
        found = [[p for p in net.parameters() if id(p) not in inside]]
        found += [list(block.parameters()) for block in net.blocks]
        found[-1] += list(net.norm.parameters())
        return found


class ResNetEye(Eye):
    """Gristmill's ResNet: the average of the last map, and the map."""

    def __init__(self, net: ResNetBackbone, **normal: Any) -> None:
        super().__init__(**normal)
        self.net = net
        self.width, self.depth, self.stride = net.embed_dim, 4, net.stride

    def blocks(self, images: Tensor, n: int = 1) -> list[Seen]:
        tokens = self.net(self._turned(images))
        return [(tokens[:, 0], tokens[:, 1:])]

    def layers(self) -> list[list[nn.Parameter]]:
        stages = [list(getattr(self.net, f"layer{stage}").parameters()) for stage in range(1, 5)]
        inside = {id(p) for stage in stages for p in stage}
        return [[p for p in self.net.parameters() if id(p) not in inside], *stages]


class TimmEye(Eye):
    """Any other image model of timm: its last features, and what it would hand to its classifier."""

    def __init__(self, net: Any, size: int, **normal: Any) -> None:
        super().__init__(**normal)
        self.net = net
        with torch.no_grad():
            first, patches = _detached(self, torch.zeros(1, 3, size, size))
        self.width, side = first.shape[1], round(patches.shape[1] ** 0.5)
        self.depth, self.stride = len(self.layers()) - 1, max(1, round(size / side))
        self.exact = hasattr(net, "patch_embed")

    def blocks(self, images: Tensor, n: int = 1) -> list[Seen]:
        net: Any = self.net
        features = net.forward_features(self._turned(images))
        first = net.forward_head(features, pre_logits=True)
        if features.ndim == 4:
            nhwc = getattr(net, "output_fmt", "NCHW") == "NHWC"
            patches = features.flatten(1, 2) if nhwc else features.flatten(2).mT
        else:
            patches = features[:, int(getattr(net, "num_prefix_tokens", 0)) :]
        if first.shape[-1] != patches.shape[-1]:  # a layer between the last map and the classifier
            first = patches.mean(1)
        return [(first, patches)]

    def layers(self) -> list[list[nn.Parameter]]:
        net, known = self.net, dict(self.net.named_parameters())
        groups: dict[str, Any] = group_parameters(net, net.group_matcher(coarse=False), reverse=True)
        found: dict[Any, list[nn.Parameter]] = {}
        for name, depth in groups.items():
            if name in known:
                found.setdefault(depth, []).append(known[name])
        return [found[depth] for depth in sorted(found)]


class PixelEye(Eye):
    """Nothing but the pixels: the image averaged down to at most 16 a side, and patches of 8 pixels. It trains nothing."""

    def __init__(self, size: int, patch: int = 8, side: int = 16) -> None:
        super().__init__()
        self.side = side
        # A patch that does not divide the image would leave a border unseen.
        self.stride = next(p for p in range(min(patch, size), 0, -1) if size % p == 0)
        self.width, self.depth = 3 * min(size, side) ** 2, 1

    def blocks(self, images: Tensor, n: int = 1) -> list[Seen]:
        small = F.adaptive_avg_pool2d(images, self.side) if min(images.shape[-2:]) > self.side else images
        patches = F.unfold(images, self.stride, stride=self.stride).mT
        return [(small.flatten(1), patches)]

    def layers(self) -> list[list[nn.Parameter]]:
        return []


def _plain_norm(norm: BatchNorm) -> nn.BatchNorm2d:
    plain = nn.BatchNorm2d(norm.features, norm.eps, norm.momentum, affine=norm.weight is not None)
    plain.load_state_dict(norm.state_dict())
    return plain.to(norm.running_mean.device)


def _detached(eye: Eye, images: Tensor) -> Seen:
    training = eye.training
    eye.eval()
    seen = eye.blocks(images)[-1]
    eye.train(training)
    return seen
