"""Every random number of every crop, drawn on the host for a whole batch at once, before any pixel is touched.

A crop's numbers are a function of (seed, position, index of the crop in the recipe, size of the image) and of nothing
else: not of the batch, the rank, the device or what was drawn before. Executors only carry them out, so they cannot
differ in what they do, only in how they round. The crop box follows torchvision.transforms.RandomResizedCrop
(ten tries, log-uniform ratio, whole pixels, a box in the middle if all tries fail), all tries at once.
With the box comes its geometry, an affine map from crop to source, so that pixels of two crops can be matched.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..shards.errors import GristmillError
from . import philox
from .views import View

TRIES = 10
# Where each uniform number of a crop goes. Appending is free; anything else changes every stream ever drawn.
_AREA, _RATIO = slice(0, TRIES), slice(TRIES, 2 * TRIES)
_TOP, _LEFT, _FLIP, _JITTER, _BRIGHTNESS, _CONTRAST, _SATURATION, _HUE, _GREY, _BLUR, _SIGMA, _SOLARIZE = range(20, 32)
_COUNT = 32

COLUMNS = (
    *("x0", "y0", "x1", "y1"),  # box in upright source pixels, whole numbers, end not included
    "flip",  # 1: mirrored left to right
    *("brightness", "contrast", "saturation"),  # factors
    "hue",  # shift in turns
    "grey",  # 1: colours removed
    "sigma",  # of the blur, in pixels of the crop; 0: none
    "solarize",  # values (0 ... 255) from here up are inverted; NEVER: none
)
NEVER = 256.0


class PlanError(GristmillError, ValueError):
    """Views that cannot be drawn together."""


class Plan:
    """The views of a recipe laid out as columns: crop v of an image is copy `copies[v]` of view `views[owner[v]]`.

    `crops` is V, the crops of an image; `columns[name]` is the slice of V that belongs to a view.
    """

    def __init__(self, views: Sequence[View]) -> None:
        if not views:
            raise PlanError("the recipe has no views: give it at least one")
        names = [view.name for view in views]
        if len(set(names)) != len(names):
            raise PlanError(f"views need different names, these are given: {', '.join(names)}")
        self.views = tuple(views)
        self.owner = tuple(index for index, view in enumerate(views) for _ in range(view.count))
        self.copies = tuple(copy for view in views for copy in range(view.count))
        self.crops = len(self.owner)
        if self.crops > philox.SUBSTITUTE:
            raise PlanError(f"{self.crops} crops of an image are more than {philox.SUBSTITUTE}: lower a view's count")
        ends = np.cumsum([view.count for view in views]).tolist()
        self.columns = {view.name: slice(end - view.count, end) for view, end in zip(views, ends, strict=True)}

        each = [(views[owner], copy) for owner, copy in zip(self.owner, self.copies, strict=True)]
        self.size = np.array([view.size for view, _ in each], np.float64)
        self.scale = np.array([view.scale for view, _ in each], np.float64)
        self.ratio = np.array([view.ratio for view, _ in each], np.float64)
        # Rounded, so that a C library whose last bit differs gives the same boxes.
        self.log_ratio = np.array([[round(math.log(end), 12) for end in view.ratio] for view, _ in each], np.float64)
        self.centre = np.array([view.augment.crop == "centre" for view, _ in each])
        self.flip = np.array([view.augment.flip for view, _ in each])
        self.jitter = np.array([view.augment.jitter_p for view, _ in each])
        self.factors = np.array(
            [(view.augment.brightness, view.augment.contrast, view.augment.saturation) for view, _ in each]
        )
        self.hue = np.array([view.augment.hue for view, _ in each])
        self.grey = np.array([view.augment.grey for view, _ in each])
        self.coloured = (self.jitter > 0) & ((self.factors > 0).any(-1) | (self.hue > 0)) | (self.grey > 0)
        self.blur = np.array([view.blur(copy) for view, copy in each])
        self.sigma = np.array([view.sigma for view, _ in each], np.float64)
        self.solarize = np.array([view.solarize(copy) for view, copy in each])
        self.threshold = np.array([view.augment.solarize_threshold for view, _ in each], np.float64)


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


def draw(plan: Plan, seed: int, positions: ArrayLike, sizes: ArrayLike) -> Draws:
    """Draw all crops of the samples at `positions`: int64 [B]; `sizes` int32 [B, 2] are upright (width, height)."""
    positions, sizes = np.asarray(positions, np.int64), np.asarray(sizes, np.int64)
    if sizes.shape != (*positions.shape, 2) or (sizes.size and sizes.min() < 1):
        raise ValueError(f"sizes must be a positive (width, height) for each of {positions.size} positions")
    u = philox.uniform(seed, positions[:, None], philox.VIEW + np.arange(plan.crops), _COUNT)  # [B, V, 32]

    box = _boxes(plan, u, sizes)
    flip = u[..., _FLIP] < plan.flip
    jitter = u[..., _JITTER] < plan.jitter
    low, high = np.maximum(1 - plan.factors, 0), 1 + plan.factors
    factors = low + (high - low) * u[..., _BRIGHTNESS : _SATURATION + 1]
    hue = plan.hue * (2 * u[..., _HUE] - 1)
    sigma = plan.sigma[:, 0] + (plan.sigma[:, 1] - plan.sigma[:, 0]) * u[..., _SIGMA]

    params = np.empty((*positions.shape, plan.crops, len(COLUMNS)), np.float32)
    params[..., 0:4] = box
    params[..., 4] = flip
    params[..., 5:8] = np.where(jitter[..., None], factors, 1)
    params[..., 8] = np.where(jitter, hue, 0)
    params[..., 9] = u[..., _GREY] < plan.grey
    params[..., 10] = np.where(u[..., _BLUR] < plan.blur, sigma, 0)
    params[..., 11] = np.where(u[..., _SOLARIZE] < plan.solarize, plan.threshold, NEVER)
    return Draws(params, _geometry(plan, box, flip), sizes)


def _boxes(plan: Plan, u: NDArray[np.float64], sizes: NDArray[np.int64]) -> NDArray[np.float64]:
    """Crop boxes (x0, y0, x1, y1): float64 [B, V, 4] of whole numbers."""
    width, height = (sizes[:, None, axis].astype(np.float64) for axis in (0, 1))  # [B, 1]

    area = plan.scale[:, :1] + (plan.scale[:, 1:] - plan.scale[:, :1]) * u[..., _AREA]
    area = area * (width * height)[..., None]
    ratio = _exp(plan.log_ratio[:, :1] + (plan.log_ratio[:, 1:] - plan.log_ratio[:, :1]) * u[..., _RATIO])
    tried_w, tried_h = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))  # [B, V, tries]
    fits = (tried_w > 0) & (tried_w <= width[..., None]) & (tried_h > 0) & (tried_h <= height[..., None])
    first = fits.argmax(-1)[..., None]

    # No try fitted: the largest box in the middle whose ratio is allowed.
    low, high = plan.ratio[:, 0], plan.ratio[:, 1]
    whole = width / height
    spare_w = np.where(whole > high, np.rint(height * high), width)
    spare_h = np.where(whole < low, np.rint(width / low), height)

    found = fits.any(-1) & ~plan.centre
    w = np.where(found, np.take_along_axis(tried_w, first, -1)[..., 0], np.maximum(spare_w, 1))
    h = np.where(found, np.take_along_axis(tried_h, first, -1)[..., 0], np.maximum(spare_h, 1))
    shorter = np.minimum(width, height)
    w, h = np.where(plan.centre, shorter, w), np.where(plan.centre, shorter, h)
    # floor(u * n) < n holds for every u below 1 as long as n < 2**21.
    y0 = np.floor(np.where(found, u[..., _TOP] * (height - h + 1), (height - h) / 2))
    x0 = np.floor(np.where(found, u[..., _LEFT] * (width - w + 1), (width - w) / 2))
    return np.stack([x0, y0, x0 + w, y0 + h], -1)


def _geometry(plan: Plan, box: NDArray[np.float64], flip: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Crop to source: float32 [B, V, 2, 3]. The centre of crop pixel x lies at x + 1/2 from the crop's edge."""
    step = (box[..., 2:4] - box[..., 0:2]) / plan.size[:, None]  # source pixels a crop pixel, (x, y)
    start = box[..., 0:2].copy()
    step[..., 0] = np.where(flip, -step[..., 0], step[..., 0])
    start[..., 0] = np.where(flip, box[..., 2], start[..., 0])
    geometry = np.zeros((*flip.shape, 2, 3), np.float32)
    geometry[..., 0, 0], geometry[..., 1, 1] = step[..., 0], step[..., 1]
    geometry[..., 2] = start + step / 2 - 0.5
    return geometry


def _exp(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """exp by sums and products alone, good to 1e-14 for |x| < 5.

    NumPy's own picks its kernel by the processor, and kernels differ in the last bit: a box would be another one on
    another machine, once in very many crops. Additions and products are the same everywhere.
    """
    small = x / 32
    result = np.ones_like(x)
    for n in range(12, 0, -1):
        result = 1 + result * small / n
    for _ in range(5):
        result = result * result
    return result
