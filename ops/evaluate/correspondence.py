"""Dense correspondence with known geometry: does a patch find the patch of another crop that shows the same place?

Two crops of one picture, each resized (differently in both directions) and perhaps mirrored; where a place of the one lies in
the other, their affine maps say. A match is the nearest patch token by angle; it is right within one cell, or
within a tenth of the crop's side (PCK, the percentage of correct keypoints; Yang and Ramanan, PAMI 2013). Asked are
all places whose counterpart lies in the other crop. Nothing is trained, and no label is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ...objectives.correspondence import Counterparts, counterparts, match_features, match_geometry
from ...pipeline.boxes import crop_maps
from ...pipeline.philox import integers, uniform
from ...shards.errors import GristmillError
from .sight import Progress, Sees, normalised, see

STREAM, TRIES = 0x636F7272, 16


class CorrespondenceError(GristmillError):
    """Pictures on which correspondence cannot be asked."""


class Loads(Protocol):
    """Pictures by row; `Pictures` is such."""

    @property
    def keys(self) -> Sequence[str]: ...

    def load(self, row: int) -> Image.Image: ...


@dataclass(frozen=True)
class CorrespondenceOptions:
    """area: share of the picture that a crop takes, as drawn; ratio: how much wider than the picture's own proportion.

    alpha: the share of the crop's side within which a match is right in `correspondence_pck`. common: share of a crop's
    places that the other one must show, or both are drawn anew.
    """

    area: tuple[float, float] = (0.3, 0.9)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    alpha: float = 0.1
    common: float = 0.2
    batch: int = 16


def run_correspondence(
    subject: Sees,
    pictures: Loads,
    *,
    seed: int,
    images: int = 256,
    options: CorrespondenceOptions | None = None,
    progress: Progress | None = None,
) -> dict[str, float]:
    """Shares of right matches, 0 to 1: `correspondence_cell` and `correspondence_pck`, and what guessing finds of each.

    `correspondence_ceiling`: what the nearest cell reaches within one cell where features were perfect. `images`: pictures
    asked, drawn by `seed`, all where there are fewer. Raises CorrespondenceError for none, and where the grid is one cell.
    """
    options = options or CorrespondenceOptions()
    if not len(pictures.keys) or images < 1:
        raise CorrespondenceError("correspondence wants a picture at least")
    rows = _chosen(len(pictures.keys), images, seed)
    right = dict.fromkeys(("cell", "pck", "cell_chance", "pck_chance", "ceiling"), 0.0)
    places = 0
    for start in range(0, len(rows), options.batch):
        part = rows[start : start + options.batch]
        crops, maps = zip(*(crop_pair(pictures.load(row), row, subject, seed, options) for row in part), strict=True)
        tokens = see(subject, torch.cat(crops))
        if tokens.shape[1] != tokens.shape[2] or tokens.shape[1] < 2:
            raise CorrespondenceError(
                f"images of {subject.size} pixels give {list(tokens.shape[1:3])} patches; two a side are needed: --size"
            )
        one, other = F.normalize(tokens.flatten(1, 2), dim=-1).unflatten(0, (-1, 2)).unbind(1)
        where = located(torch.stack(maps), subject.size, one.shape[1])
        found = match_features(one, other).index
        reach, asked = options.alpha * where.side, where.inside
        right["cell"] += float(where.correct(found).sum())
        right["pck"] += float(where.correct(found, reach).sum())
        right["cell_chance"] += float(where.chance()[asked].double().sum())
        right["pck_chance"] += float(where.chance(reach)[asked].double().sum())
        right["ceiling"] += float(where.correct(match_geometry(where).index).sum())
        places += int(asked.sum())
        if progress:
            progress(start + len(part), len(rows), "correspondence")
    return {f"correspondence_{name}": value / places for name, value in right.items()}


def crop_pair(
    picture: Image.Image, row: int, subject: Sees, seed: int, options: CorrespondenceOptions
) -> tuple[Tensor, Tensor]:
    """Two crops of a picture, fp32 [2, 3, S, S], and their maps from crop pixel to picture pixel, float64 [2, 2, 3]."""
    boxes, flips = _draw(picture.size, row, seed, options)
    crops = []
    for box, flip in zip(boxes, flips, strict=True):
        crop = picture.resize((subject.size, subject.size), Image.Resampling.BICUBIC, box=tuple(box.tolist()))
        pixels = normalised(crop, crop.size, subject.mean, subject.std)
        crops.append(pixels.flip(2) if flip else pixels)
    return torch.stack(crops), _maps(boxes, flips, subject.size)


def located(maps: Tensor, size: int, places: int) -> Counterparts:
    """Where each place of first crops lies in their second ones; maps [B, 2, 2, 3] of crops of `size` pixels."""
    return counterparts(maps[:, 0], maps[:, 1], query_size=size, key_size=size, query_places=places, key_places=places)


def _maps(boxes: NDArray[np.float64], flips: NDArray[np.bool_], size: int) -> Tensor:
    return torch.from_numpy(crop_maps(np.full(len(boxes), float(size)), boxes[None], flips[None])[0])


def _draw(
    size: tuple[int, int], row: int, seed: int, options: CorrespondenceOptions
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Two boxes (left, top, right, bottom), float64 [2, 4], that share enough of the picture, and who is mirrored, bool [2].

    The last of the tries is taken as both boxes, so that there is always something to find.
    """
    sides = np.array(size, np.float64)
    for attempt in range(TRIES):
        area, ratio, left, top, flip = uniform(seed, row, STREAM + attempt, 10).reshape(5, 2)
        low, high = np.log(options.ratio)
        stretch = np.exp((low + (high - low) * ratio) / 2)
        scale = np.sqrt(options.area[0] + (options.area[1] - options.area[0]) * area)
        extent = np.stack([np.minimum(scale * stretch, 1), np.minimum(scale / stretch, 1)], -1) * sides  # [2, 2]
        start = np.stack([left, top], -1) * (sides - extent)
        boxes, flips = np.concatenate([start, start + extent], -1), flip < 0.5
        shared = (np.minimum(*boxes[:, 2:]) - np.maximum(*boxes[:, :2])).clip(min=0).prod()
        if shared >= options.common * extent.prod(-1).max():
            return boxes, flips
    return boxes[:1].repeat(2, 0), flips


def _chosen(rows: int, most: int, seed: int) -> list[int]:
    """At most so many rows, drawn by the seed, in order."""
    if rows <= most:
        return list(range(rows))
    keys = integers(seed, np.arange(rows), STREAM - 1, 1, 1 << 60)[:, 0]
    return sorted(np.argsort(keys, kind="stable")[:most].tolist())
