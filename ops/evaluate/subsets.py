"""Which images a probe trains on: the papers' 1 % and 10 %, and the part that is held out to choose a setting by.

A draw is a function of (seed, class, place of the image in its class) through the data path's Philox, never of a
global generator: the same rows on every machine, and the few images of a small share are among those of a larger one,
so that 1 % against 10 % compares amounts and not luck. SimCLR (Chen et al., arXiv 2002.05709, section 4.1) fixed the
protocol: the same number of images of each class.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...pipeline.philox import paired, words
from ...shards.errors import GristmillError

STREAM = 10_000  # class c is shuffled by stream STREAM + c; nothing is drawn from streams above


class SubsetError(GristmillError, ValueError):
    """A share or labels of which no subset can be drawn."""


def draw_balanced(labels: Tensor | NDArray[np.integer], share: float, seed: int) -> Tensor:
    """Rows, int64 [m] ascending, of a share of the labelled images: the same number of each class, at least one.

    labels: int64 [n], negative is unknown and never drawn. m is the share of the known ones to rounding; a class that
    has fewer than its part gives all. Raises SubsetError for a share outside (0, 1] or where no label is known.
    """
    places = _shuffled(labels, share, seed)
    each = max(1, round(share * sum(map(len, places)) / len(places)))
    return _joined([rows[:each] for rows in places])


def draw_stratified(labels: Tensor | NDArray[np.integer], share: float, seed: int) -> Tensor:
    """Rows, int64 [m] ascending, of a share of every class: what is held out keeps the classes' frequencies.

    A class keeps at least one image on either side; one with a single image gives none. Arguments and errors as
    `draw_balanced`; also where no class has two images.
    """
    places = _shuffled(labels, share, seed)
    taken = [rows[: min(len(rows) - 1, max(1, round(share * len(rows))))] for rows in places]
    if not any(map(len, taken)):
        raise SubsetError("no class has two images, so none can be held out: give more images of each class")
    return _joined(taken)


def _shuffled(labels: Tensor | NDArray[np.integer], share: float, seed: int) -> list[NDArray[np.int64]]:
    """The rows of each class that there is, in an order drawn for it."""
    if not 0.0 < share <= 1.0:
        raise SubsetError(f"cannot draw a share of {share}: choose one above 0 and at most 1")
    codes = np.asarray(labels, np.int64)
    if codes.ndim != 1 or not (codes >= 0).any():
        raise SubsetError(f"no image of {codes.shape} has a known label: give one class code, 0 or more, per image")
    places = []
    for label in np.unique(codes[codes >= 0]):
        rows = np.flatnonzero(codes == label)
        drawn = paired(words(seed, np.arange(len(rows)), STREAM + label, 2))[:, 0]
        places.append(rows[np.argsort(drawn, kind="stable")].astype(np.int64))
    return places


def _joined(parts: list[NDArray[np.int64]]) -> Tensor:
    return torch.from_numpy(np.sort(np.concatenate(parts)))
