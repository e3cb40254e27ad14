"""k-means by Lloyd's iteration, as faiss does it: some rows to begin with, several attempts of which the best is kept.

Plain in arithmetic, particular in order: the result must have the same bits on any number of ranks. Rows meet the
centroids in blocks of fixed place and size, of which each rank takes a run; only the assignments, integers, travel;
every rank then adds up all rows of a cluster in one order, in float64. A centroid that lost all its rows gets half of the
largest cluster's, moved apart by a hair, without a random number (faiss draws whose half). A start that is given keeps its
numbering, since Lloyd only ever moves a centroid: so clusters keep their identities from one clustering to the next.
Lloyd, "Least squares quantization in PCM", 1982; faiss, Clustering.cpp (what it does: section 2.3 of the notes on HCSC).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..models.products import product
from ..pipeline.philox import words
from .protocol import StepInfo

BLOCK = 1024  # rows that meet all centroids together
COLUMNS = 32  # of the rows, added up at a time: float64 copies of no more
APART = 1 / 1024  # of each coordinate, by which the halves of a cluster that is split are moved apart; faiss: the same


class Share(NamedTuple):
    """How the rows are divided among ranks. `gather`: rows of all ranks in their order; None: this one does all."""

    gather: Callable[[Tensor], Tensor] | None = None
    rank: int = 0
    world: int = 1

    @classmethod
    def of(cls, info: StepInfo) -> Share:
        return cls(info.gather, info.rank, info.world) if info.gather else cls()


class Clusters(NamedTuple):
    """What k-means found; equal on all ranks."""

    centroids: Tensor  # [k, d] the means (unit rows if spherical), in the rows' precision
    assignment: Tensor  # [n] int64: each row's nearest centroid
    objective: float  # sum of squared distances (of cosines, if spherical) before the last move of the centroids
    reseeded: Tensor  # [k] bool: was empty in some iteration and got half of another cluster


@torch.no_grad()
def kmeans(
    rows: Tensor,
    k: int,
    *,
    seed: int = 0,
    name: str = "kmeans",
    niter: int = 20,
    nredo: int = 1,
    spherical: bool = False,
    starts: Sequence[Tensor] | None = None,
    share: Share = Share(),  # noqa: B008 - a tuple
) -> Clusters:
    """Cluster rows [n, d] into k by `niter` iterations, the best of `nredo` attempts, and assign them once more.

    Attempt r begins with the first k rows of a permutation keyed by (seed, name, r), or with `starts[r]` [k, d].
    spherical: nearest by cosine, centroids scaled to unit length (rows should be unit). ValueError with fewer rows than k.
    """
    if not 1 <= k <= len(rows):
        raise ValueError(f"{name}: {len(rows)} rows cannot make {k} clusters; ask for fewer or give more rows")
    if starts is None:
        starts = [rows[first_rows(len(rows), k, seed, f"{name}/{attempt}").to(rows.device)] for attempt in range(nredo)]
    best: Clusters | None = None
    with torch.autocast(rows.device.type, enabled=False):
        for start in starts:
            if start.shape != (k, rows.shape[1]):
                raise ValueError(f"{name}: a start of shape {tuple(start.shape)} for {k} centroids of {rows.shape[1]}")
            found = _lloyd(rows, start.to(rows), niter, spherical, share)
            if best is None or (found.objective > best.objective if spherical else found.objective < best.objective):
                best = found
        assert best is not None
        return best._replace(assignment=nearest(rows, best.centroids, spherical=spherical, share=share))


def first_rows(count: int, k: int, seed: int, name: str) -> Tensor:
    """The first k of a permutation of `count` numbers, int64 on the host, keyed by (seed, name)."""
    key = int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest(), "little")
    order = np.argsort(words(key, 0, 0, count), kind="stable")
    return torch.from_numpy(order[:k].astype(np.int64))


@torch.no_grad()
def nearest(rows: Tensor, centroids: Tensor, *, spherical: bool = False, share: Share = Share()) -> Tensor:  # noqa: B008
    """Number of the nearest centroid [k, d] of each row [n, d], int64 [n]; the lowest of several. No [n, k] exists.

    Collective if `share` says so.
    """
    blocks = -(-len(rows) // BLOCK)
    mine = -(-blocks // share.world) * BLOCK  # rows of a rank: whole blocks
    begin, end = min(share.rank * mine, len(rows)), min((share.rank + 1) * mine, len(rows))
    found = torch.zeros(mine, dtype=torch.int64, device=rows.device)
    offsets = None if spherical else centroids.square().sum(1).mul_(0.5)
    for start in range(begin, end, BLOCK):
        block = rows[start : min(start + BLOCK, end)]
        # |x - c|^2 / 2 less what all centroids have in common, with its sign turned.
        scores = product(block, centroids)
        if offsets is not None:
            scores.sub_(offsets)
        found[start - begin : start - begin + len(block)] = scores.argmax(1)
    return (share.gather(found) if share.gather else found)[: len(rows)]


def squared_distances(rows: Tensor, centroids: Tensor, assignment: Tensor) -> Tensor:
    """Of each row [n, d] from its centroid, [n]: by differences, so that a row on its centroid gets zero."""
    found = rows.new_empty(len(rows))
    for start in range(0, len(rows), BLOCK):
        part = slice(start, start + BLOCK)
        found[part] = (rows[part] - centroids[assignment[part]]).square().sum(1)
    return found


def _lloyd(rows: Tensor, start: Tensor, niter: int, spherical: bool, share: Share) -> Clusters:
    k = len(start)
    centroids = F.normalize(start, dim=1) if spherical else start.clone()
    reseeded = torch.zeros(k, dtype=torch.bool)
    assignment, objective = torch.zeros(len(rows), dtype=torch.int64, device=rows.device), 0.0
    for _ in range(niter):
        assignment = nearest(rows, centroids, spherical=spherical, share=share)
        objective = _objective(rows, centroids, assignment, spherical)
        counts = torch.bincount(assignment, minlength=k)
        sums = _sums(rows, assignment, counts)
        moved = (sums / counts.clamp(min=1).unsqueeze(1)).to(rows.dtype)
        if spherical:
            moved = F.normalize(moved, dim=1)
        centroids, split = _split(moved, counts)
        if spherical:
            centroids = F.normalize(centroids, dim=1)
        reseeded |= split
    return Clusters(centroids, assignment, objective, reseeded)


def _objective(rows: Tensor, centroids: Tensor, assignment: Tensor, spherical: bool) -> float:
    if not spherical:
        return float(squared_distances(rows, centroids, assignment).sum(dtype=torch.float64))
    parts = range(0, len(rows), BLOCK)
    cosines = [(rows[s : s + BLOCK] * centroids[assignment[s : s + BLOCK]]).sum(1) for s in parts]
    return float(torch.cat(cosines).sum(dtype=torch.float64))


def _sums(rows: Tensor, assignment: Tensor, counts: Tensor) -> Tensor:
    """Of each cluster's rows, float64 [k, d]: one after the other in the rows' order, on a GPU, too."""
    order = torch.argsort(assignment, stable=True)
    sums = torch.empty(len(counts), rows.shape[1], dtype=torch.float64, device=rows.device)
    for first in range(0, rows.shape[1], COLUMNS):
        columns = slice(first, first + COLUMNS)
        sorted_ = rows[:, columns][order].double()
        sums[:, columns] = torch.segment_reduce(sorted_, "sum", lengths=counts, axis=0, unsafe=True, initial=0)
    return sums


def _split(centroids: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Each empty cluster takes half of the largest one, lowest number first. Also which were empty, bool [k] on the host."""
    size = counts.cpu().numpy().copy()
    empty = np.flatnonzero(size == 0)
    sign = 1 - 2 * (torch.arange(centroids.shape[1], device=centroids.device) % 2).to(centroids.dtype)
    for number in empty:
        largest = int(size.argmax())
        whole = centroids[largest].clone()
        centroids[number], centroids[largest] = whole * (1 + APART * sign), whole * (1 - APART * sign)
        size[number] = size[largest] // 2
        size[largest] -= size[number]
    return centroids, torch.from_numpy(counts.cpu().numpy() == 0)
