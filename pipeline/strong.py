"""Draws of the strong form: whose turn it is, RandAugment's operations with their arguments, and the erased box.

The operations, their ranges and their order are timm's `_RAND_INCREASING_TRANSFORMS` (Cubuk et al. 2020), which Mugs
takes over (InfoMin: `_RAND_TRANSFORMS`); where timm draws operations with replacement, Mugs does without. An argument is drawn as it is carried out,
sign included, so that an executor looks nothing up. Geometric operations act on the whole image, mirrored first where
the crop is: a rotation turns about the centre, shears leave the top and the left edge where they are, as in PIL.
Random erasing is timm's RandomErasing (Zhong et al. 2020): ten tries, none of them as wide or high as the crop.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from . import philox
from .boxes import TRIES, Floats, chain, exp, shifted
from .plan import NOISE_SIDE, Plan

OPERATIONS = (
    *("AutoContrast", "Equalize", "Invert", "Rotate", "Posterize", "Solarize", "SolarizeAdd"),
    *("Color", "Contrast", "Brightness", "Sharpness", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel"),
)
NONE = 0  # operation i of OPERATIONS has the number i + 1
NUMBER = {name: index + 1 for index, name in enumerate(OPERATIONS)}
GEOMETRIC = frozenset(NUMBER[name] for name in ("Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel"))

# Blocks of four uniform numbers behind the eight that every crop has; see draws.py. Only what is needed is drawn.
_COIN, _OPERATIONS, _PLACES = 8, (9, 10), 11
_AREAS, _RATIOS = (12, 13, 14), (15, 16, 17)

_TOP = 10.0  # the magnitude at which an operation is at its strongest
_SYMMETRIC = {"Rotate": 30.0, "ShearX": 0.3, "ShearY": 0.3, "TranslateXRel": 0.45, "TranslateYRel": 0.45}
_ENHANCE = ("Color", "Contrast", "Brightness", "Sharpness")


def strong_crops(plan: Plan, seed: int, positions: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which crops of the samples at `positions` [B] take their strong form: bool [B, V]. Only the coins are drawn."""
    strong = np.zeros((len(positions), plan.crops), np.bool_)
    able = np.flatnonzero(plan.strong)
    if len(able):
        strong[:, able] = _tossed(plan, able, _first(able, seed, positions))
    return strong


def _first(able: NDArray[np.intp], seed: int, positions: NDArray[np.int64]) -> Floats:
    """The block of numbers that holds the coin, of each crop that has a strong form: float64 [B, S, 4]."""
    return philox.uniform_blocks(seed, positions[:, None], philox.VIEW + able, (_COIN,))


def _tossed(plan: Plan, able: NDArray[np.intp], first: Floats) -> NDArray[np.bool_]:
    """Which of them are strong, bool [B, S]: each goes by the coin of the crop that tosses for it."""
    return first[:, np.searchsorted(able, plan.coin[able]), 0] >= plan.weak_p[able]


def draw_strong(
    plan: Plan, seed: int, positions: NDArray[np.int64]
) -> tuple[NDArray[np.intp], NDArray[np.intp], Floats]:
    """The strong crops of a batch: their image and crop indices, int [m] each, and their columns, float64 [m, 10].

    The columns are op1, arg1, op2, arg2, the erased box (x0, y0, x1, y1) and the noise's offset (x, y).
    """
    settings = plan.strong_settings
    able = np.flatnonzero(plan.strong)
    first = _first(able, seed, positions)
    image, place = np.nonzero(_tossed(plan, able, first))
    crop = able[place]
    own = first[image, place]
    u = philox.uniform_blocks(seed, positions[image], philox.VIEW + crop, _OPERATIONS)  # [m, 8]

    columns = np.zeros((len(image), 10))
    count = len(OPERATIONS)
    one = np.floor(own[:, 1] * count)
    fewer = ~settings.replacement[crop]
    two = np.floor(own[:, 2] * (count - fewer))
    two += fewer & (two >= one)
    normal = np.rint(philox.boxed(u[:, 4:6]) * 2.0**24) * 2.0**-24  # the C library's last bits make no difference
    magnitude = (settings.magnitude[crop, None] + settings.deviation[crop, None] * normal).clip(0, _TOP)
    for slot, chosen in enumerate((one, two)):
        done = u[:, slot] < settings.chance[crop, slot]
        operation = np.where(done, chosen + 1, NONE).astype(np.int64)
        columns[:, 2 * slot] = operation
        columns[:, 2 * slot + 1] = arguments(
            operation, magnitude[:, slot], u[:, 2 + slot] < 0.5, settings.increasing[crop]
        )

    erased = np.flatnonzero(own[:, 3] < settings.erase[crop])
    if len(erased):
        where = positions[image[erased]], philox.VIEW + crop[erased]
        columns[erased, 4:10] = _erased(
            plan, crop[erased], philox.uniform_blocks(seed, *where, (_PLACES, *_AREAS, *_RATIOS))
        )
    return image, crop, columns


def arguments(
    operation: NDArray[np.int64],
    magnitude: Floats,
    negative: NDArray[np.bool_],
    increasing: NDArray[np.bool_] | bool = True,
) -> Floats:
    """What the operations of these numbers are carried out with at these magnitudes (0 ... 10): float64 as given.

    Degrees, bits kept, threshold, what is added, factor, tangent of the shear, share of the side; 0 where none is used.
    increasing: timm's `_RAND_INCREASING_TRANSFORMS`, else its `_RAND_TRANSFORMS`, whose factors have no sign.
    """
    level, sign = magnitude / _TOP, np.where(negative, -1.0, 1.0)
    table = np.zeros((len(OPERATIONS) + 1, *operation.shape))
    for name, strongest in _SYMMETRIC.items():
        table[NUMBER[name]] = sign * level * strongest
    for name in _ENHANCE:
        table[NUMBER[name]] = np.where(increasing, np.maximum(0.1, 1 + sign * level * 0.9), level * 1.8 + 0.1)
    bits, threshold = np.floor(level * 4), np.minimum(256, np.floor(level * 256))
    table[NUMBER["Posterize"]] = np.where(increasing, 4 - bits, bits)
    table[NUMBER["Solarize"]] = np.where(increasing, 256 - threshold, threshold)
    table[NUMBER["SolarizeAdd"]] = np.floor(level * 110)
    return np.take_along_axis(table, operation[None], 0)[0]


def _erased(plan: Plan, crop: NDArray[np.intp], u: Floats) -> Floats:
    """Erased boxes and noise offsets of crops [k]: float64 [k, 6], zeros where no try fits; u [k, 28]."""
    place, areas, ratios = u[:, :4], u[:, 4 : 4 + TRIES], u[:, 16 : 16 + TRIES]
    settings, size = plan.strong_settings, plan.size[crop, None]
    low, high = settings.area[crop, :1], settings.area[crop, 1:]
    area = (low + (high - low) * areas) * size**2
    log_low, log_high = settings.log_ratio[crop, :1], settings.log_ratio[crop, 1:]
    ratio = exp(log_low + (log_high - log_low) * ratios)
    h, w = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
    fits = (h < size) & (w < size) & (h > 0) & (w > 0)
    best = fits.argmax(-1)[:, None]
    h, w = np.take_along_axis(h, best, -1)[:, 0], np.take_along_axis(w, best, -1)[:, 0]
    side = size[:, 0]
    y0, x0 = np.floor(place[:, 0] * (side - h + 1)), np.floor(place[:, 1] * (side - w + 1))
    noise_x, noise_y = np.floor(place[:, 2] * (NOISE_SIDE - w + 1)), np.floor(place[:, 3] * (NOISE_SIDE - h + 1))
    boxes = np.stack([x0, y0, x0 + w, y0 + h, noise_x, noise_y], -1)
    return np.where(fits.any(-1, keepdims=True), boxes, 0)


def warp_maps(
    operations: NDArray[np.int64], arguments: Floats, flip: NDArray[np.bool_], sizes: NDArray[np.int64]
) -> Floats:
    """What geometric operations make of images: maps from a pixel of the result to the source's, float64 [m, 2, 3].

    operations, arguments [m, 2], first one first; flip bool [m]: mirrored before and back after; sizes [m, 2] (width,
    height). Other operations leave everything where it is.
    """
    width, height = sizes[:, 0].astype(np.float64), sizes[:, 1].astype(np.float64)
    maps = np.broadcast_to(np.eye(2, 3), (len(operations), 2, 3)).copy()
    mirror = maps.copy()
    mirror[:, 0, 0] = np.where(flip, -1, 1)
    mirror[:, 0, 2] = np.where(flip, width, 0)
    for slot in (0, 1):
        maps = chain(maps, _operation_maps(operations[:, slot], arguments[:, slot], width, height))
    return shifted(chain(mirror, chain(maps, mirror)), -0.5)


def _operation_maps(operation: NDArray[np.int64], argument: Floats, width: Floats, height: Floats) -> Floats:
    """One geometric operation each, output to input, in edge coordinates: float64 [m, 2, 3]."""
    maps = np.broadcast_to(np.eye(2, 3), (len(operation), 2, 3)).copy()

    def amount(name: str) -> Floats:
        return np.where(operation == NUMBER[name], argument, 0)

    angle = np.deg2rad(amount("Rotate"))  # against the clock, so the map turns with it
    cos, sin = np.rint(np.cos(angle) * 2.0**40) * 2.0**-40, np.rint(np.sin(angle) * 2.0**40) * 2.0**-40
    maps[:, 0, 0], maps[:, 0, 1], maps[:, 1, 0], maps[:, 1, 1] = cos, -sin, sin, cos
    centre = np.stack([width, height], -1) / 2
    maps[:, :, 2] = centre - (maps[:, :, :2] @ centre[..., None])[..., 0]
    maps[:, 0, 1] += amount("ShearX")
    maps[:, 1, 0] += amount("ShearY")
    maps[:, 0, 2] += amount("TranslateXRel") * width
    maps[:, 1, 2] += amount("TranslateYRel") * height
    return maps
