"""A hierarchy of prototypes: k-means of rows, then of the centroids found, level upon level (HCSC, section 2.3 of the notes).

Level 0 is the finest. A row belongs to its nearest centroid there, and above to that one's ancestors: the tree decides,
not the distance. Centroids are means, as searches need them; contrast asks for their directions. Kept are the means,
the concentration, each one's parent and the highest number in use on a level; all else follows from these.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from .concentration import concentration
from .kmeans import Share, kmeans, nearest, squared_distances


@dataclass(frozen=True)
class Tree:
    """Prototypes of all levels. Derived: `prototypes`, the means' directions, unit rows [k, d]."""

    means: list[Tensor]  # [k, d] of each level, level 0 the finest
    phi: list[Tensor]  # [k]: concentration, of mean T at every level
    parents: list[Tensor]  # [k] int64 of each level but the last: which of the next level's a prototype belongs to
    highest: list[int]  # the highest number that any clustered row has, of each level
    prototypes: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "prototypes", [F.normalize(means, dim=1) for means in self.means])

    def assign(self, rows: Tensor, share: Share = Share()) -> Tensor:  # noqa: B008 - a tuple
        """Number of each row's prototype on level 0, int64 [n]: the nearest mean, as a clustering assigns it."""
        return nearest(rows.to(self.means[0]), self.means[0], share=share)

    def lineage(self, numbers: Tensor) -> Tensor:
        """From numbers on level 0, int64 [...], those on all levels, [levels, ...]."""
        found = [numbers]
        for parents in self.parents:
            found.append(parents[found[-1]])
        return torch.stack(found)

    def logits(self, level: int) -> Tensor:
        """Cosines of a level's prototypes with the next one's, [k, k above]. Small levels only: nothing here needs it whole."""
        return self.prototypes[level] @ self.prototypes[level + 1].t()


@dataclass(frozen=True)
class Growth:
    """A tree with what its making showed: each row's number on level 0, the objective and the reseeded of each level."""

    tree: Tree
    assignment: Tensor  # int64 [n]
    objectives: list[float]  # sum of squared distances
    reseeded: list[Tensor]  # bool [k]


@torch.no_grad()
def grow(
    rows: Tensor,
    levels: Sequence[int],
    *,
    temperature: float,
    smoothing: float = 10.0,
    seed: int = 0,
    niter: int = 20,
    nredo: int = 5,
    before: Tree | None = None,
    share: Share = Share(),  # noqa: B008 - a tuple
) -> Growth:
    """Cluster unit rows [n, d] into `levels` prototypes, each level those below it. Collective if `share` says so.

    before: an earlier tree whose means every level begins with, so that prototypes keep their numbers; one attempt then.
    ValueError where a level asks for more prototypes than there are rows (or prototypes below) to make them of.
    """
    means, phi, below, objectives, reseeded = [], [], [], [], []
    points = rows
    for level, k in enumerate(levels):
        found = kmeans(
            points,
            k,
            seed=seed,
            name=f"hierarchy, level {level}",
            niter=niter,
            nredo=nredo,
            starts=None if before is None else [before.means[level]],
            share=share,
        )
        squared = squared_distances(points, found.centroids, found.assignment)
        phi.append(concentration(squared, found.assignment, k, temperature=temperature, smoothing=smoothing))
        means.append(found.centroids)
        below.append(found.assignment)
        objectives.append(found.objective)
        reseeded.append(found.reseeded)
        points = F.normalize(found.centroids, dim=1)
    highest, numbers = [], below[0]
    for parents in [*below[1:], None]:
        highest.append(int(numbers.max()))
        numbers = numbers if parents is None else parents[numbers]
    return Growth(Tree(means, phi, below[1:], highest), below[0], objectives, reseeded)


@torch.no_grad()
def stable_share(before: Tree, after: Tree, level: int = 0) -> float:
    """Of a level's prototypes, the share whose nearest earlier one has the same number."""
    same = nearest(after.prototypes[level], before.prototypes[level]).cpu() == torch.arange(len(after.means[level]))
    return float(same.float().mean())
