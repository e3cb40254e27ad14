"""Every random number of every crop, drawn on the host for a whole batch at once, before any pixel is touched.

A crop's numbers are a function of (seed, position, index of the crop in the recipe, size of the image) and of nothing
else: not of the batch, the rank, the device or what was drawn before. Executors only carry them out, so they cannot
differ in what they do, only in how they round. plan.py lays the views out, boxes.py says where a crop lies, strong.py
draws RandAugment and erasing; here all of it becomes one packed array. With the box comes its geometry, an affine map
from crop to source, so that pixels of two crops can be matched.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import boxes, philox
from .plan import NOISE_SIDE, Plan, PlanError
from .strong import GEOMETRIC, OPERATIONS, draw_strong, warp_maps

__all__ = ["COLUMNS", "NEVER", "NOISE_SIDE", "OPERATIONS", "Draws", "Plan", "PlanError", "draw"]

# Where each uniform number of a crop goes, in blocks of four: 0 ... 9 areas of ten tries, 10 ... 19 their ratios, then
# these. Appending is free (strong.py has the blocks from 8 on); anything else changes every stream ever drawn.
_TOP, _LEFT, _FLIP, _JITTER, _BRIGHTNESS, _CONTRAST, _SATURATION, _HUE, _GREY, _BLUR, _SIGMA, _SOLARIZE = range(20, 32)
# The first try nearly always fits: of the areas and ratios only the blocks of number 0 and of number 10.
_BLOCKS, _AREA, _RATIO, _FROM = (0, 2, 5, 6, 7), 0, 6, 12  # number n of those behind the tries lands at n - _FROM
_TRIES = (0, 1, 2, 3, 4)

COLUMNS = (
    *("x0", "y0", "x1", "y1"),  # box in upright source pixels (of the warped image), whole numbers, end not included
    "flip",  # 1: mirrored left to right
    *("brightness", "contrast", "saturation"),  # factors
    "hue",  # shift in turns
    "grey",  # 1: colours removed
    "sigma",  # of the blur, in pixels of the crop; 0: none
    "solarize",  # values (0 ... 255) from here up are inverted; NEVER: none
    "strong",  # 1: the strong form; all that follows is 0 without it
    *("op1", "arg1", "op2", "arg2"),  # 0: none, i + 1: OPERATIONS[i]; its argument, see strong.arguments
    *("erase_x0", "erase_y0", "erase_x1", "erase_y1"),  # box in crop pixels, mirrored ones; all 0: none
    *("noise_x", "noise_y"),  # pixel of the noise tile that comes to lie on the erased box's corner
)
NEVER = 256.0
_STRONG, _FLIPPED = COLUMNS.index("strong"), COLUMNS.index("flip")
_PAIR = [COLUMNS.index(name) for name in ("op1", "op2")], [COLUMNS.index(name) for name in ("arg1", "arg2")]
_WARPS = np.array([number in GEOMETRIC for number in range(len(OPERATIONS) + 1)])


@dataclass(frozen=True)
class Draws:
    """What is to be done to a batch.

    params: float32 [B, V, K], K as COLUMNS says. geometry: float32 [B, V, 2, 3], for each crop the affine map from its
    pixels to upright source pixels, (x, y, 1) -> (x, y); whole coordinates are the centres of pixels, on both sides.
    sizes: int64 [B, 2], the upright (width, height) that all this was drawn for.
    """

    params: NDArray[np.float32]
    geometry: NDArray[np.float32]
    sizes: NDArray[np.int64]

    def column(self, name: str) -> NDArray[np.float32]:
        """One column of params by name: float32 [B, V]."""
        return self.params[..., COLUMNS.index(name)]

    def take(self, slots: Sequence[int] | NDArray[np.integer]) -> Draws:
        """The draws of these samples of the batch alone."""
        chosen = np.asarray(slots, np.intp)
        return Draws(self.params[chosen], self.geometry[chosen], self.sizes[chosen])

    @cached_property
    def warp(self) -> NDArray[np.float64]:
        """What geometric operations make of the image: float64 [B, V, 2, 3], from its warped pixels to its own.

        Boxes are cut of the warped image, which is as large as the source; the identity where nothing is warped.
        """
        return warps(self.params, self.sizes)

    @cached_property
    def window(self) -> NDArray[np.int64]:
        """The part of the image that a crop needs, filters and warps included: int64 [B, V, 4] (x0, y0, x1, y1).

        But for AutoContrast, Equalize and Contrast, whose histogram or mean is that of the whole image.
        """
        box = self.params[..., :4].astype(np.float64)
        return boxes.windows(self.geometry.astype(np.float64), self.warp, box, self.sizes[:, None])


def draw(plan: Plan, seed: int, positions: ArrayLike, sizes: ArrayLike) -> Draws:
    """Draw all crops of the samples at `positions`: int64 [B]; `sizes` int32 [B, 2] are upright (width, height)."""
    positions, sizes = np.asarray(positions, np.int64), np.asarray(sizes, np.int64)
    if sizes.shape != (*positions.shape, 2) or (sizes.size and sizes.min() < 1):
        raise ValueError(f"sizes must be a positive (width, height) for each of {positions.size} positions")
    u = philox.uniform_blocks(seed, positions[:, None], philox.VIEW + np.arange(plan.crops), _BLOCKS)  # [B, V, 20]

    def behind(number: int) -> NDArray[np.float64]:
        return u[..., number - _FROM]

    def retry(again: NDArray[np.bool_]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        image, crop = np.nonzero(again)
        tries = philox.uniform_blocks(seed, positions[image], philox.VIEW + crop, _TRIES)
        return tries[:, : boxes.TRIES], tries[:, boxes.TRIES :]

    first = u[..., _AREA], u[..., _RATIO]
    box = boxes.draw_boxes(plan, first, retry, behind(_TOP), behind(_LEFT), sizes)
    params = np.zeros((*positions.shape, plan.crops, len(COLUMNS)), np.float32)
    if plan.strong.any():
        image, crop, columns = draw_strong(plan, seed, positions)
        params[image, crop, _STRONG] = 1
        params[image, crop, _STRONG + 1 :] = columns
    strong = params[..., _STRONG] > 0

    def chance(name: str) -> NDArray[np.float64]:
        """What the form of each crop says: [V] or [B, V], and what comes behind."""
        weak, other = getattr(plan.weak, name), getattr(plan.strong_form, name)
        if np.array_equal(weak, other):
            return weak
        return np.where(strong.reshape(*strong.shape, *[1] * (weak.ndim - 1)), other, weak)

    flip = behind(_FLIP) < chance("flip")
    jitter = behind(_JITTER) < chance("jitter")
    spread, turn, sigma = chance("factors"), chance("hue"), chance("sigma")
    low, high = np.maximum(1 - spread, 0), 1 + spread
    factors = low + (high - low) * u[..., _BRIGHTNESS - _FROM : _SATURATION + 1 - _FROM]
    hue = turn * (2 * behind(_HUE) - 1)
    sigma = sigma[..., 0] + (sigma[..., 1] - sigma[..., 0]) * behind(_SIGMA)

    params[..., 0:4] = box
    params[..., 4] = flip
    params[..., 5:8] = np.where(jitter[..., None], factors, 1)
    params[..., 8] = np.where(jitter, hue, 0)
    params[..., 9] = behind(_GREY) < chance("grey")
    params[..., 10] = np.where(behind(_BLUR) < chance("blur"), sigma, 0)
    params[..., 11] = np.where(behind(_SOLARIZE) < chance("solarize"), chance("threshold"), NEVER)

    maps = boxes.crop_maps(plan.size, box, flip)
    warped, warp = _warps(params, sizes)
    maps[warped] = boxes.chain(warp, maps[warped])
    return Draws(params, maps.astype(np.float32), sizes)


def warps(params: NDArray[np.float32], sizes: NDArray[np.int64]) -> NDArray[np.float64]:
    """Draws.warp of params [B, V, K] and sizes [B, 2]."""
    maps = np.broadcast_to(np.eye(2, 3), (*params.shape[:2], 2, 3)).copy()
    warped, warp = _warps(params, sizes)
    maps[warped] = warp
    return maps


def _warps(params: NDArray[np.float32], sizes: NDArray[np.int64]) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """Which crops [B, V] are cut of a warped image, and the warps of those, [m, 2, 3]."""
    operations = params[..., _PAIR[0]].astype(np.int64)
    warped: NDArray[np.bool_] = np.any(_WARPS[operations], -1)
    image, _ = np.nonzero(warped)
    arguments = params[..., _PAIR[1]][warped].astype(np.float64)
    flip = params[..., _FLIPPED][warped] > 0
    return warped, warp_maps(operations[warped], arguments, flip, sizes[image])
