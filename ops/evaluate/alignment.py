"""Alignment: how far apart are the features of two views of one picture? (Wang and Isola, arXiv 2005.10242, eq. 1.)

The mean squared distance between unit features, alpha = 2, of two crops as MoCo v2 augments them. Together with uniformity it
tells what a contrastive loss is made of: features that collapsed are perfectly aligned, hence the same distance
between different pictures beside it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...pipeline.views import View
from ...shards.errors import GristmillError
from .knn import unit
from .pictures import Pictures
from .subject import Subject


class AlignmentError(GristmillError, ValueError):
    """Pictures without two views to compare."""


@dataclass(frozen=True)
class AlignmentOptions:
    """images: asked at most, drawn by the seed; scale: share of a picture that a crop shows; augment: a recipe's preset."""

    images: int = 1024
    scale: tuple[float, float] = (0.2, 1.0)
    augment: str = "moco"
    batch: int = 64


def run_alignment(
    subject: Subject, pictures: Pictures, options: AlignmentOptions | None = None, *, seed: int = 0
) -> dict[str, float]:
    """`alignment`, 0 to 4, and `alignment_strangers`, the same between different pictures. AlignmentError for none."""
    options = options or AlignmentOptions()
    view = View.model_validate(
        {"name": "pair", "count": 2, "size": subject.size, "scale": options.scale, "augment": options.augment}
    )
    rows = np.sort(np.random.default_rng(seed).permutation(len(pictures))[: options.images])
    found = []
    for _, crops in pictures.crops(view, seed, options.batch, rows):
        found.append(subject.features(crops.flatten(0, 1)).cpu().unflatten(0, (len(crops), 2)))
    if not found:
        raise AlignmentError(f"none of the pictures of {pictures.where} decodes, so there are no views to compare")
    return alignment(torch.cat(found))


def alignment(pairs: Tensor) -> dict[str, float]:
    """Of features [n, 2, d] of two views of n pictures."""
    rows = unit(pairs.flatten(0, 1)).double().view_as(pairs)
    near = float((rows[:, 0] - rows[:, 1]).square().sum(1).mean())
    n = len(rows)
    if n < 2:
        return {"alignment": near}
    # Over all pairs of different pictures, |a - b|^2 = 2 - 2 a.b, and the sum of a.b is that of all less the own ones.
    every = float(rows[:, 0].sum(0) @ rows[:, 1].sum(0)) - float((rows[:, 0] * rows[:, 1]).sum())
    return {"alignment": near, "alignment_strangers": 2 - 2 * every / (n * (n - 1))}
