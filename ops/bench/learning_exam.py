"""What `gristmill bench learning` asks of a network: one probe for each granularity, on any of its data sets.

The drawn cloths answer all four by themselves (granularities.py): instance, fine dye, coarse dye, dye of each pixel. Other
sets have one label an image, so what is finer is asked without labels: an instance by a crop that has to find another
crop of its image among those of all others (recall at 1), places by where a patch of one crop lies in the other. Both
crops are cut by known boxes, drawn from the seed, equal for all who are asked. Local groups and groups read the label:
the share of it among the 8 nearest, and the weighted vote of 20.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ...pipeline.probing import probe_batches
from ...shards.manifest import Manifest
from ..evaluate.features import extract
from ..evaluate.knn import knn_accuracy, nearest
from ..evaluate.online import BATCH, Probing
from ..evaluate.purity import expected_purity, neighbour_purity
from ..recipe import Recipe
from .granularities import NEAR, PROBES, Eyes, Measuring, cell

GRANULARITIES = ("instance", "local group", "group", "places")
OWN = dict(zip(GRANULARITIES, PROBES, strict=True))  # the drawn cloths' probes
PAIRS = 1000  # images of which two crops are cut
AREA = (0.35, 0.8)  # of a crop, as a share of its image


class Exam(Protocol):
    """One data set's questions. Scores are 0 to 1, by granularity."""

    def scores(self, eyes: Eyes) -> dict[str, float]: ...

    def chance(self) -> dict[str, float]: ...


def set_exam(name: str, recipe: Recipe, place: Path, seed: int) -> Exam:
    return ClothExam(recipe, place) if name == "procedural" else PictureExam(recipe, place, seed)


class ClothExam:
    """The drawn cloths, which know all four answers."""

    def __init__(self, recipe: Recipe, place: Path) -> None:
        self.measuring = Measuring(recipe, place)

    def scores(self, eyes: Eyes) -> dict[str, float]:
        found = self.measuring.scores(eyes)
        return {name: found[probe] for name, probe in OWN.items()}

    def chance(self) -> dict[str, float]:
        found = self.measuring.chance()
        return {name: found[probe] for name, probe in OWN.items()}


@dataclass(frozen=True)
class Crops:
    """Of each of n images one crop: `pixels` [n, 3, S, S], `boxes` [n, 4] (left, top, width, height; shares), `flips` [n]."""

    pixels: Tensor
    boxes: Tensor
    flips: Tensor

    def points(self, side: int) -> Tensor:
        """Centres of side x side patches in their images, as shares (x, y), [n, side * side, 2]."""
        grid = (torch.arange(side) + 0.5) / side
        y, x = torch.meshgrid(grid, grid, indexing="ij")
        x = torch.where(self.flips[:, None], 1 - x.flatten(), x.flatten())
        there = torch.stack([x, y.flatten().expand_as(x)], 2)
        return self.boxes[:, None, :2] + there * self.boxes[:, None, 2:]

    def cells(self, points: Tensor, side: int) -> Tensor:
        """The patch that shows each of these points [n, p, 2] of the images, int64 [n, p]; -1 where none does."""
        there = (points - self.boxes[:, None, :2]) / self.boxes[:, None, 2:]
        inside = ((there >= 0) & (there < 1)).all(2)
        x = torch.where(self.flips[:, None], 1 - there[..., 0], there[..., 0])
        column, row = ((each * side).long().clamp(0, side - 1) for each in (x, there[..., 1]))
        return torch.where(inside, row * side + column, -1)


def cut(images: Tensor, size: int, generator: np.random.Generator) -> Crops:
    """One crop of each image [n, 3, L, L]: its area, place and mirroring drawn uniformly, its shape kept."""
    count = len(images)
    side = np.sqrt(generator.uniform(*AREA, count))
    corner = generator.uniform(0, 1, (count, 2)) * (1 - side)[:, None]
    boxes = torch.from_numpy(np.concatenate([corner, np.stack([side, side], 1)], 1)).float()
    flips = torch.from_numpy(generator.random(count) < 0.5)
    grid = (torch.arange(size) + 0.5) / size
    y, x = torch.meshgrid(grid, grid, indexing="ij")
    x = torch.where(flips[:, None, None], 1 - x, x)
    there = torch.stack([x, y.expand_as(x)], 3)
    points = boxes[:, None, None, :2] + there * boxes[:, None, None, 2:]
    # Twice as fine, then averaged: a crop of a larger picture would alias.
    fine = F.interpolate((points * 2 - 1).permute(0, 3, 1, 2), scale_factor=2, mode="bilinear").permute(0, 2, 3, 1)
    pixels = F.grid_sample(images, fine, mode="bilinear", padding_mode="border", align_corners=False)
    return Crops(F.avg_pool2d(pixels, 2), boxes, flips)


class PictureExam:
    """Pictures with one label each, of which the deepest level is read."""

    def __init__(self, recipe: Recipe, place: Path, seed: int) -> None:
        self.probing = Probing(recipe.probes, place / "train")
        size = recipe.probes.size
        self.side = size // cell(recipe)
        manifest = Manifest.open(place / "probe")
        pieces = [images for _, images in probe_batches(manifest, 2 * size, BATCH, limit=PAIRS)]
        generator = np.random.Generator(np.random.Philox(key=seed))
        images = torch.cat(pieces)
        self.pairs = cut(images, size, generator), cut(images, size, generator)
        sources = (self.probing.reference, self.probing.query)
        keys = [[key for names, _ in self.probing.batches(m) for key in names] for m in sources if m is not None]
        self.labels = [torch.from_numpy(self.probing.codes(each)[:, -1]) for each in keys]

    def scores(self, eyes: Eyes) -> dict[str, float]:
        rows = [
            extract(lambda images: torch.cat(eyes(images)[:2], 1), self.probing.batches(m)).rows for m in self._sets()
        ]
        width = eyes(self.pairs[0].pixels[:1])[0].shape[1]
        (image, near), (asked, around) = ((each[:, :width], each[:, width:]) for each in rows)
        k, temperature = self.probing.config.neighbours, self.probing.config.temperature
        seen = [_through(eyes, crops.pixels) for crops in self.pairs]
        _, first = nearest(seen[1][0], seen[0][0], k=1)
        return {
            "instance": float((first[:, 0] == torch.arange(len(first))).double().mean()),
            "local group": neighbour_purity(near, self.labels[0], around, self.labels[1], k=NEAR),
            "group": knn_accuracy(image, self.labels[0], asked, self.labels[1], k=k, temperature=temperature),
            "places": self._places(seen[0][1], seen[1][1]),
        }

    def chance(self) -> dict[str, float]:
        reference, query = self.labels
        return {
            "instance": 1 / len(self.pairs[0].pixels),
            "local group": expected_purity(reference, query),
            "group": float(torch.bincount(query).max()) / len(query),
            "places": 1 / self.side**2,
        }

    def _places(self, one: Tensor, other: Tensor) -> float:
        """Share of patches whose most similar patch of the other crop is the one that shows the same point, [n, P * d] each."""
        one, other = (F.normalize(each.unflatten(1, (self.side**2, -1)), dim=2) for each in (one, other))
        truth = self.pairs[1].cells(self.pairs[0].points(self.side), self.side)
        found = torch.cat([(a @ b.mT).argmax(2) for a, b in zip(one.split(BATCH), other.split(BATCH), strict=True)])
        known = truth >= 0
        return float((found == truth)[known].double().mean())

    def _sets(self) -> list[Manifest]:
        assert self.probing.query is not None
        return [self.probing.reference, self.probing.query]


def _through(eyes: Eyes, pixels: Tensor) -> tuple[Tensor, Tensor]:
    parts = [eyes(part) for part in pixels.split(BATCH)]
    return torch.cat([part[0] for part in parts]), torch.cat([part[2] for part in parts])


def ranks(scores: dict[str, dict[str, float]]) -> dict[str, float]:
    """Average rank of each arm over the probes, 1 the best; equal scores share the mean of their ranks."""
    arms = list(scores)
    found = dict.fromkeys(arms, 0.0)
    probes = list(scores[arms[0]])
    for probe in probes:
        for arm in arms:
            own = scores[arm][probe]
            better = sum(scores[other][probe] > own for other in arms)
            level = sum(scores[other][probe] == own for other in arms)
            found[arm] += (better + (level + 1) / 2) / len(probes)
    return found


def spread(values: list[float]) -> tuple[float, float]:
    """Mean and sample standard deviation, 0 for one value."""
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return mean, 0.0
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))
