"""What an executor has to compute, said plainly: one crop at a time, float64, NumPy and OpenCV.

Slow and meant to be read. The DALI graph folds, batches and skips; here every step stands alone, in the order in which
it happens: decode, cut and resize, mirror, blur, colours one after another, cut to the range, solarise, normalise.
Tests tie the two together, so whoever wants to know what a crop is reads this file and not the graph.
"""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..draws import COLUMNS, Draws, Plan
from . import DecodeError
from .colour import LUMA, MEAN, PIVOT, STD

Image = NDArray[np.float64]  # [H, W, 3], RGB, 0 ... 255


class ReferenceExecutor:
    """Same interface as DaliExecutor: `run(data, draws)` -> float32 [B, n, 3, H, W] for each view's name."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def run(self, data: Sequence[NDArray[np.uint8]], draws: Draws) -> dict[str, Tensor]:
        """Carry out `draws` on encoded images. DecodeError names the slots of those that do not decode as drawn for."""
        images = [decode(encoded) for encoded in data]
        sizes = draws.sizes.tolist()
        bad = [slot for slot, image in enumerate(images) if image is None or [*image.shape[1::-1]] != sizes[slot]]
        if bad:
            raise DecodeError(bad)
        views = {}
        for view in self.plan.views:
            columns = self.plan.columns[view.name]
            crops = [
                [crop(image, view.size, params) for params in draws.params[slot, columns]]
                for slot, image in enumerate(images)
                if image is not None
            ]
            views[view.name] = torch.from_numpy(np.array(crops, np.float32).transpose(0, 1, 4, 2, 3).copy())
        return views


def decode(encoded: NDArray[np.uint8]) -> Image | None:
    """Upright RGB image, or None if it does not decode."""
    if not encoded.size:
        return None
    image = cv2.imdecode(encoded, cv2.IMREAD_COLOR_RGB)  # turns by the EXIF orientation
    return None if image is None else image.astype(np.float64)


def crop(image: Image, size: int, params: NDArray[np.float32]) -> Image:
    """One crop, normalised: float64 [size, size, 3]. `params` float32 [K] as COLUMNS says."""
    p = {name: float(params[index]) for index, name in enumerate(COLUMNS)}
    out = resize(image, (p["x0"], p["y0"], p["x1"], p["y1"]), size)
    if p["flip"]:
        out = out[:, ::-1]
    if p["sigma"]:
        out = blur(out, p["sigma"])
    out = p["brightness"] * out
    out = p["contrast"] * out + (1 - p["contrast"]) * p["brightness"] * PIVOT
    out = p["saturation"] * out + (1 - p["saturation"]) * grey(out)
    out = turn_hue(out, p["hue"])
    if p["grey"]:
        out = grey(out)
    out = out.clip(0, 255)
    out = np.where(out >= p["solarize"], 255 - out, out)
    return (out / 255 - MEAN) / STD


def resize(image: Image, box: tuple[float, float, float, float], size: int) -> Image:
    """Cut `box` (x0, y0, x1, y1) and resize it to [size, size, 3], by a triangular filter that widens with the scale.

    PIL's and torchvision's antialiased bilinear, with two differences that show at edges alone: the filter sees the
    image around the box (torchvision cuts first), and where it leaves the image, the outermost pixels are repeated
    (PIL and torchvision leave them out and weigh the rest more).
    """
    x0, y0, x1, y1 = box
    rows, columns = _weights(y0, y1, size, image.shape[0]), _weights(x0, x1, size, image.shape[1])
    return np.einsum("yh,hwc,xw->yxc", rows, image, columns, optimize=True)


def _weights(start: float, end: float, size: int, length: int) -> NDArray[np.float64]:
    """How much each of `length` source pixels gives to each of `size` pixels laid over start ... end."""
    step = (end - start) / size
    radius = max(step, 1.0)
    weights = np.zeros((size, length))
    for out in range(size):
        centre = start + (out + 0.5) * step - 0.5
        taps = np.arange(np.floor(centre - radius), np.ceil(centre + radius) + 1).astype(int)
        weight = np.maximum(0, 1 - np.abs(taps - centre) / radius)
        np.add.at(weights[out], taps.clip(0, length - 1), weight / weight.sum())
    return weights


def blur(image: Image, sigma: float) -> Image:
    """Gaussian of `sigma` pixels, cut at 3 sigma, the image mirrored at its edges (edge pixels not doubled)."""
    radius = int(np.ceil(3 * sigma))
    taps = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    taps /= taps.sum()
    return cv2.sepFilter2D(image, cv2.CV_64F, taps, taps, borderType=cv2.BORDER_REFLECT_101).astype(np.float64)


def grey(image: Image) -> Image:
    """Luma in all three channels."""
    luma = image @ (np.array(LUMA) / sum(LUMA))
    return np.repeat(luma[..., None], 3, -1)


def turn_hue(image: Image, hue: float) -> Image:
    """Turn the colours about the grey axis by `hue` turns, from red towards green (Rodrigues' formula)."""
    angle, axis = 2 * np.pi * hue, np.full(3, 1 / np.sqrt(3))
    along = (image @ axis)[..., None] * axis
    return along + np.cos(angle) * (image - along) + np.sin(angle) * np.cross(axis, image)
