"""Where a crop lies: its box, the warp that strong operations make of its image, and the affine map of both together.

Boxes follow torchvision.transforms.RandomResizedCrop: ten tries, log-uniform ratio, whole pixels, a box in the middle
if all of them fail. Nearly always the first one fits, so the other nine are drawn only where it does not.
A map goes from an output pixel to the source pixel that it shows. Whole coordinates are the centres of pixels; inside,
"edge coordinates" put a pixel's centre at + 1/2, so that an image of W pixels reaches from 0 to W, as PIL counts.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from .plan import Plan

TRIES = 10

Floats = NDArray[np.float64]
# Uniform numbers of all tries of some crops: bool [B, V] with m set -> areas and ratios, float64 [m, TRIES] each.
Retry = Callable[[NDArray[np.bool_]], tuple[Floats, Floats]]


def draw_boxes(
    plan: Plan, first: tuple[Floats, Floats], retry: Retry, top: Floats, left: Floats, sizes: NDArray[np.int64]
) -> Floats:
    """Crop boxes (x0, y0, x1, y1): float64 [B, V, 4] of whole numbers, in pixels of the image.

    `first`: uniform numbers of the first try's area and ratio, [B, V] each; `top`, `left`: of the place, [B, V].
    """
    width, height = (sizes[:, None, axis].astype(np.float64) for axis in (0, 1))  # [B, 1]
    w, h, found = _try(first[0], first[1], plan.scale, plan.log_ratio, width, height)
    if not found.all():
        again = ~found
        image, crop = np.nonzero(again)
        area, ratio = retry(again)
        wide, high = width[image], height[image]  # [m, 1]
        tried_w, tried_h, fits = _try(area, ratio, plan.scale[crop, None], plan.log_ratio[crop, None], wide, high)
        best = fits.argmax(-1)[:, None]
        w[again] = np.take_along_axis(tried_w, best, -1)[:, 0]
        h[again] = np.take_along_axis(tried_h, best, -1)[:, 0]
        found[again] = fits.any(-1)

    # No try fitted: the largest box in the middle whose ratio is allowed.
    low, high = plan.ratio[:, 0], plan.ratio[:, 1]
    whole = width / height
    spare_w = np.where(whole > high, np.rint(height * high), width)
    spare_h = np.where(whole < low, np.rint(width / low), height)

    found &= ~plan.centre
    w = np.where(found, w, np.maximum(spare_w, 1))
    h = np.where(found, h, np.maximum(spare_h, 1))
    shorter = np.minimum(width, height)
    w, h = np.where(plan.centre, shorter, w), np.where(plan.centre, shorter, h)
    # floor(u * n) < n holds for every u below 1 as long as n < 2**21.
    y0 = np.floor(np.where(found, top * (height - h + 1), (height - h) / 2))
    x0 = np.floor(np.where(found, left * (width - w + 1), (width - w) / 2))
    return np.stack([x0, y0, x0 + w, y0 + h], -1)


def _try(
    area: Floats, ratio: Floats, scale: Floats, log_ratio: Floats, width: Floats, height: Floats
) -> tuple[Floats, Floats, NDArray[np.bool_]]:
    """Width and height of tried boxes, and which of them fit; uniform numbers of one shape in, the same shape out."""
    area = (scale[..., 0] + (scale[..., 1] - scale[..., 0]) * area) * (width * height)
    proportion = exp(log_ratio[..., 0] + (log_ratio[..., 1] - log_ratio[..., 0]) * ratio)
    w, h = np.rint(np.sqrt(area * proportion)), np.rint(np.sqrt(area / proportion))
    return w, h, (w > 0) & (w <= width) & (h > 0) & (h <= height)


def crop_maps(size: Floats, box: Floats, flip: NDArray[np.bool_]) -> Floats:
    """Crop pixel to pixel of the image that it is cut of: float64 [B, V, 2, 3]; size [V], box [B, V, 4], flip [B, V]."""
    step = (box[..., 2:4] - box[..., 0:2]) / size[:, None]  # source pixels a crop pixel, (x, y)
    start = box[..., 0:2].copy()
    step[..., 0] = np.where(flip, -step[..., 0], step[..., 0])
    start[..., 0] = np.where(flip, box[..., 2], start[..., 0])
    maps = np.zeros((*flip.shape, 2, 3))
    maps[..., 0, 0], maps[..., 1, 1] = step[..., 0], step[..., 1]
    maps[..., 2] = start + step / 2 - 0.5
    return maps


def chain(outer: Floats, inner: Floats) -> Floats:
    """The map that does `inner` first and then `outer`: [..., 2, 3] each, broadcast."""
    linear = outer[..., :2] @ inner[..., :2]
    offset = (outer[..., :2] @ inner[..., 2:])[..., 0] + outer[..., 2]
    return np.concatenate([linear, offset[..., None]], -1)


def shifted(maps: Floats, by: float) -> Floats:
    """The same maps [..., 2, 3] in coordinates that are larger by `by` on both sides."""
    moved = maps.copy()
    moved[..., 2] += by * (1 - maps[..., 0] - maps[..., 1])
    return moved


def windows(maps: Floats, warps: Floats, box: Floats, sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Bounding box (x0, y0, x1, y1) of the source pixels that crops need: int64 [..., 4], never empty.

    maps [..., 2, 3]: crop to source; warps [..., 2, 3] (whole-number coordinates); box [..., 4]; sizes [..., 2].
    Room is left for the widest filter (cubic, two crop pixels), for the warp's interpolation and for sharpening.
    """
    size = sizes.astype(np.float64)
    step = np.sqrt((maps[..., :2] ** 2).sum(-2) / (warps[..., :2] ** 2).sum(-2))  # source pixels a crop pixel, (x, y)
    support = 2 * np.maximum(step, 1) + 1
    low = np.maximum(box[..., :2] - support, 0) - 0.5
    high = np.minimum(box[..., 2:] + support, size) - 0.5
    # The box of an affine image of a box: each term at whichever end makes it smaller, or larger.
    linear, offset = warps[..., :2], warps[..., 2] + 0.5
    ends = linear * low[..., None, :], linear * high[..., None, :]
    least, most = np.minimum(*ends).sum(-1) + offset, np.maximum(*ends).sum(-1) + offset
    start = (np.floor(least) - 2).clip(0, size - 1)
    end = np.maximum((np.ceil(most) + 2).clip(1, size), start + 1)
    return np.concatenate([start, end], -1).astype(np.int64)


def exp(x: Floats) -> Floats:
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
