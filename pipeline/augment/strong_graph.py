"""The part of the DALI graph that carries out RandAugment and random erasing, on the crops concerned alone.

Each operation on pixels is one conditional: DALI hands the samples concerned to a branch and joins them with the others
after it, without a copy. All of it works on uint8 windows at the source's scale (packed.py says which), as PIL does.
Statistics are those of the whole image, taken where a crop asks for them; what a crop's second operation needs to know
of the first one's result is taken of that result, whose window is then the whole image. Numbers that meet pixels have
to be where the pixels are (`here`), those that choose or configure stay on the CPU (`row`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from nvidia.dali import fn, math, types

from . import packed as at
from .colour import MEAN, STD
from .noise import noise_tile
from .operations import FILL

# DALI's nodes are annotated as Any: its stubs say "node or list of nodes", and that a node has no truth value.
Node = Any
_NO_NORM = {"normalized_anchor": False, "normalized_shape": False, "axes": [0, 1], "out_of_bounds_policy": "pad"}


def here(numbers: Node, device: str) -> Node:
    """Numbers for the operators of `device`."""
    return numbers.gpu() if device == "gpu" else numbers


def upright(pixels: Node) -> Node:
    """Arithmetic forgets the layout."""
    return fn.reshape(pixels, layout="HWC")


def _range(pixels: Node) -> tuple[Node, Node]:
    """AutoContrast's scale and offset, float [1, 1, 3] each; a channel of one value stays."""
    low: Node = fn.cast(fn.reductions.min(pixels, axes=[0, 1], keep_dims=True), dtype=types.FLOAT)
    high: Node = fn.cast(fn.reductions.max(pixels, axes=[0, 1], keep_dims=True), dtype=types.FLOAT)
    flat: Node = low == high
    scale: Node = 255.0 / (high - low + flat * 255.0)
    return upright(scale), upright(-1.0 * low * scale * (low != high))


def _mean(pixels: Node, device: str) -> Node:
    """The mean luma as PIL rounds it, float [1, 1, 3], thrice the same."""
    weights = types.Constant(np.array(at.LUMA, np.float32).reshape(1, 1, 3), device=device)
    means: Node = fn.reductions.mean(pixels, axes=[0, 1], keep_dims=True)
    luma: Node = fn.reductions.sum(means * weights, axes=[2], keep_dims=True)
    return upright(math.floor(luma + 0.5) + means * 0.0)


def prepared(image: Node, row: Node, device: str) -> Node:
    """What a crop with operations is resized from: uint8 [h, w, 3]."""
    source = image
    if row[at.EQUALIZED] > 0:
        source = fn.equalize(image)
    part: Node = fn.slice(source, row[at.FROM], row[at.WINDOW_SHAPE], fill_values=list(FILL), **_NO_NORM)
    part = _on_pixels(part, row, 0, image, device)
    if row[at.KINDS[1]] > 0:
        part = _on_pixels(part, row, 1, None, device)
    if row[at.PADDED] > 0:
        part = fn.slice(part, row[at.PAD_FROM], row[at.PAD_SHAPE], fill_values=list(FILL), **_NO_NORM)
    return part


def _on_pixels(part: Node, row: Node, slot: int, image: Node | None, device: str) -> Node:
    """One operation on pixels, or none; statistics are those of the image, or (None) of `part` itself."""
    kind, first = row[at.KINDS[slot]], at.ARGUMENTS[slot]
    if kind == at.LINEAR:
        part = fn.brightness_contrast(part, brightness=row[first], brightness_shift=row[first + 1])
    if kind == at.POSTERIZE:
        part = upright(part & fn.cast(here(row[first], device), dtype=types.UINT8))
    if kind == at.SOLARIZE:
        part = upright(part ^ ((part >= here(row[first], device)) * types.Constant(255, types.UINT8)))
    if kind == at.ADD:
        more = fn.cast(here(row[first], device), dtype=types.UINT8)
        part = upright(part + (part < types.Constant(128, types.UINT8)) * more)
    if kind == at.STATISTICAL:
        whole = part if image is None else image
        scale, offset = _range(whole)
        mean = _mean(whole, device)
        stretch, factor = here(row[first], device), here(row[first + 1], device)
        times: Node = stretch * scale + (1.0 - stretch) * factor
        plus: Node = stretch * offset + (1.0 - stretch) * (1.0 - factor) * mean + at.TRUNCATE
        part = upright(fn.cast(part * times + plus, dtype=types.UINT8))
    if kind == at.MIX:
        matrix = fn.reshape(row[first : first + 12], shape=[3, 4])
        part = fn.coord_transform(part, MT=matrix, dtype=types.UINT8)
    if kind == at.SHARPEN:
        part = fn.filter(part, here(fn.reshape(row[first : first + 9], shape=[3, 3]), device))
    if image is None:  # a first operation's is that of the image, see `prepared`
        equalize = kind == at.EQUALIZE
        if equalize:
            part = fn.equalize(part)
    return part


def noise(raw: bool, device: str) -> Node:
    """The noise tile in levels, so that normalising makes N(0, 1) of it, or what raw noise becomes."""
    tile = noise_tile().astype(np.float64)
    levels = 255 * (tile if raw else tile * STD + MEAN)
    return fn.constant(
        fdata=levels.astype(np.float32).ravel().tolist(), shape=list(levels.shape), dtype=types.FLOAT, device=device
    )


def erased(crop: Node, row: Node, tile: Node, size: int) -> Node:
    """Noise in the drawn box of a crop, float [size, size, 3]."""
    patch = fn.slice(tile, row[at.NOISE], row[at.HOLE_SHAPE], **_NO_NORM)
    laid = fn.slice(patch, row[at.PLACE], np.array([size, size], np.float32), fill_values=[0.0], **_NO_NORM)
    return upright(fn.erase(crop, anchor=row[at.HOLE], shape=row[at.HOLE_SHAPE], axes=[0, 1], fill_value=0.0) + laid)
