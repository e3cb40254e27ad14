"""All colour operations of a crop folded into one affine map of (R, G, B).

Brightness, contrast, saturation, hue and grey are linear in the colours, or close enough, so that one 3 x 4 matrix a
crop replaces five passes over the pixels. The order is fixed, as named, where torchvision shuffles the first four.
Three things differ from torchvision.transforms.ColorJitter, and a test states by how much: contrast pivots on a
constant instead of the crop's own mean, hue turns the colours about the grey axis instead of passing through HSV, and
values are cut to 0 ... 255 once, at the end, instead of after every step.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..draws import COLUMNS

LUMA = (0.2989, 0.587, 0.114)  # ITU-R BT.601, torchvision's digits (they add up to 0.9999, see _LUMA)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, for values in 0 ... 1
PIVOT = 255 * sum(weight * mean for weight, mean in zip(LUMA, MEAN, strict=True))  # luma of ImageNet's mean colour

_LUMA = np.array(LUMA) / sum(LUMA)  # grey has to stay as light as it is
_CROSS = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / np.sqrt(3)  # v -> axis x v for the unit grey axis


def colour_matrices(params: NDArray[np.float32]) -> NDArray[np.float32]:
    """Draws.params float32 [..., K] -> float32 [..., 3, 4]: colour' = M[:, :3] colour + M[:, 3], in 0 ... 255.

    Brightness b scales. Contrast c moves away from, or towards, the pivot as brightness left it: c x + (1 - c) b p.
    Saturation s blends with luma: S = s I + (1 - s) 1 l'. Hue h turns red to green to blue about the grey axis (1, 1,
    1): H = cos I + (1 - cos) 11'/3 + sin K, which takes pure red to pure green at a third of a turn, as HSV does. Grey
    takes the luma of what came out: G = 1 l'. Together b c G H S and an offset (1 - c) b p, which S, H and G leave.
    """
    named = {name: params[..., index].astype(np.float64) for index, name in enumerate(COLUMNS)}
    brightness, contrast = named["brightness"], named["contrast"]
    saturation, angle = named["saturation"][..., None, None], 2 * np.pi * named["hue"][..., None, None]
    hue = np.cos(angle) * np.eye(3) + (1 - np.cos(angle)) / 3 + np.sin(angle) * _CROSS
    turned = saturation * hue + (1 - saturation) * _LUMA  # H S, as H leaves the column 1 alone
    luma = sum(_LUMA[row] * turned[..., row : row + 1, :] for row in range(3))
    mixed = np.where(named["grey"][..., None, None] > 0, luma, turned)
    scaled = (brightness * contrast)[..., None, None] * mixed
    offset = np.broadcast_to(((1 - contrast) * brightness * PIVOT)[..., None, None], (*brightness.shape, 3, 1))
    return np.concatenate([scaled, offset], -1).astype(np.float32)
