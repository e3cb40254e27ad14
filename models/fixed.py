"""What MoCo v3 keeps a ViT from learning: its patch embedding and its positions (arXiv 2104.02057, sections 4.1 and 5).

A constant is a buffer here and not a parameter that asks for no gradient: every parameter has a gradient, a shard of the
optimizer and a place in its groups. Names stay, so that checkpoints travel as before.
"""

import math

import torch
from torch import nn

from .vit import Backbone


def fix_patch_embed(backbone: Backbone) -> None:
    """The patch embedding stays as drawn (MoCo v3, arXiv 2104.02057, 4.1): its weights become buffers of the same names.

    What never learns keeps its scale for good, so it is drawn as the official code does: uniform within sqrt(6 / (inputs + d)),
    from the uniform weights within 1 / sqrt(inputs) that are there; no bias.
    """
    weight, bias = backbone.patch_embed.proj.weight, backbone.patch_embed.proj.bias
    inputs = weight[0].numel()
    with torch.no_grad():
        weight.mul_(math.sqrt(6 * inputs / (inputs + len(weight))))
        if bias is not None:
            bias.zero_()
    _as_buffers(backbone.patch_embed.proj, "weight", "bias")


def fix_positions(backbone: Backbone) -> None:
    """Sines and cosines of the patches' two coordinates in place of a learned position embedding (MoCo v3).

    A quarter of the width each: sin y, cos y, sin x, cos x, at wavelengths from 2 pi to 20,000 pi patches; the class token
    has none. ValueError for a width that is no multiple of 4.
    """
    assert backbone.pos_embed is not None
    count, dim = backbone.pos_embed.shape[1:]
    if dim % 4:
        raise ValueError(f"embed_dim {dim} is not a multiple of 4, which fixed positions want; take learned ones")
    side = math.isqrt(count - 1)
    omega = 1.0 / 10_000 ** (torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    # The official code numbers its grid column by column: its first half turns with what is the row here.
    first, second = torch.meshgrid(torch.arange(side).double(), torch.arange(side).double(), indexing="ij")
    parts = [wave(place.flatten()[:, None] * omega) for place in (first, second) for wave in (torch.sin, torch.cos)]
    table = torch.cat([torch.zeros(1, dim, dtype=torch.float64), torch.cat(parts, dim=1)]).float()
    with torch.no_grad():
        backbone.pos_embed.copy_(table[None])
    _as_buffers(backbone, "pos_embed")


def _as_buffers(module: nn.Module, *names: str) -> None:
    for name in names:
        value = getattr(module, name)
        del module._parameters[name]
        module.register_buffer(name, value.detach())
