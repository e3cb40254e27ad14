"""What an executor has to compute, said plainly: one crop at a time, float64, NumPy and OpenCV.

Slow and meant to be read. The other executors fold, batch and skip; here every step stands alone, in the order in which
it happens: decode, strong operations on the whole image (operations.py), cut and resize, mirror, blur, colours one
after another, cut to the range, solarise, normalise, erase. Tests tie them together, so whoever wants to know what a
crop is reads this file.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..draws import COLUMNS, Draws, Plan
from . import DecodeError
from .colour import LUMA, MEAN, PIVOT, STD
from .noise import noise_tile
from .operations import strengthened

Image = NDArray[np.float64]  # [H, W, 3], RGB, 0 ... 255
Filter = Literal["bilinear", "bicubic"]


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
            columns = range(self.plan.crops)[self.plan.columns[view.name]]
            raw = view.strong is None or view.strong.erase_noise == "raw"
            crops = [
                [crop(image, view.size, draws.params[slot, v], view.filter, draws.warp[slot, v], raw) for v in columns]
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


def crop(
    image: Image,
    size: int,
    params: NDArray[np.float32],
    filter: Filter = "bilinear",
    warp: NDArray[np.float64] | None = None,
    raw_noise: bool = True,
) -> Image:
    """One crop, normalised: float64 [size, size, 3]. `params` float32 [K] as COLUMNS says, of whole-number `image`.

    warp [2, 3] is Draws.warp of this crop; raw_noise says that erasing is Strong.erase_noise "raw".
    """
    p = {name: float(params[index]) for index, name in enumerate(COLUMNS)}
    if p["op1"] or p["op2"]:
        operations, arguments = (int(p["op1"]), int(p["op2"])), (p["arg1"], p["arg2"])
        whole = np.eye(2, 3) if warp is None else warp
        image = strengthened(image.astype(np.uint8), operations, arguments, whole).astype(np.float64)
    out = resize(image, (p["x0"], p["y0"], p["x1"], p["y1"]), size, filter)
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
    out = (out / 255 - MEAN) / STD
    return erase(out, p, raw_noise)


def erase(out: Image, p: dict[str, float], raw_noise: bool) -> Image:
    """Noise in the drawn box, if one is drawn; raw noise takes the place of values in 0 ... 1, so it is normalised."""
    x0, y0, x1, y1 = (int(p[f"erase_{end}"]) for end in ("x0", "y0", "x1", "y1"))
    x, y = int(p["noise_x"]), int(p["noise_y"])
    noise = noise_tile()[y : y + y1 - y0, x : x + x1 - x0].astype(np.float64)
    out[y0:y1, x0:x1] = (noise - MEAN) / STD if raw_noise else noise
    return out


def resize(image: Image, box: tuple[float, float, float, float], size: int, filter: Filter = "bilinear") -> Image:
    """Cut `box` (x0, y0, x1, y1) and resize it to [size, size, 3], by a filter that widens with the scale.

    PIL's and torchvision's antialiased bilinear (a triangle) or bicubic (a = -0.5, cut to 0 ... 255 as their uint8
    pixels are), with two differences that show at edges alone: the filter sees the image around the box (torchvision
    cuts first), and where it leaves the image, the outermost pixels are repeated (PIL and torchvision leave them out
    and weigh the rest more).
    """
    x0, y0, x1, y1 = box
    rows, columns = _weights(y0, y1, size, image.shape[0], filter), _weights(x0, x1, size, image.shape[1], filter)
    out = np.einsum("yh,hwc,xw->yxc", rows, image, columns, optimize=True)
    return out.clip(0, 255) if filter == "bicubic" else out


def _weights(start: float, end: float, size: int, length: int, filter: Filter) -> NDArray[np.float64]:
    """How much each of `length` source pixels gives to each of `size` pixels laid over start ... end."""
    step = (end - start) / size
    scale = max(step, 1.0)
    kernel, radius = (cubic, 2 * scale) if filter == "bicubic" else (triangle, scale)
    weights = np.zeros((size, length))
    for out in range(size):
        centre = start + (out + 0.5) * step - 0.5
        taps = np.arange(np.floor(centre - radius), np.ceil(centre + radius) + 1).astype(int)
        weight = kernel((taps - centre) / scale)
        np.add.at(weights[out], taps.clip(0, length - 1), weight / weight.sum())
    return weights


def triangle(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """The bilinear filter: 1 at 0, 0 from 1 on."""
    return np.maximum(0, 1 - np.abs(x))


def cubic(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Keys' cubic with a = -0.5, as PIL and torchvision's antialiased bicubic have it (OpenCV's is -0.75)."""
    x = np.abs(x)
    near, far = (1.5 * x - 2.5) * x**2 + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
    return np.where(x < 1, near, np.where(x < 2, far, 0))


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
