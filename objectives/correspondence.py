"""Which place of the key's map shows what a place of the query's shows.

By features it is the place whose backbone feature is nearest in angle, one way (DenseCL, arXiv 2011.09157, section 3.3; what
the official code does stands in reference/densecl-hcsc.md 1.2): no geometry is asked. Mutual keeps only pairs that
find each other, as its author does for pictures. By geometry it is the place that shows the same point of the source image,
which the crops' affine maps tell; these measure the other two as well. Places are cells of a square grid over a
crop, row by row, and a cell stands for its centre. (A ResNet's cells look a little up and to the left of it, half a stride
by padding; both crops' do so alike.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Matches:
    """For each place of each query map the place of its key map: all [B, Sq], on the features' device."""

    index: Tensor  # int64; means something where kept
    kept: Tensor  # bool
    similarity: Tensor | None = None  # cosine of the two features; None where no feature was looked at


@dataclass(frozen=True)
class Counterparts:
    """Where each place of the query map lies in the key's: tensors [B, Sq, ...] of one device."""

    place: Tensor  # float [B, Sq, 2]: (x, y) on the key's grid, whole numbers are centres of cells
    inside: Tensor  # bool [B, Sq]: it lies in the key crop at all
    nearest: Tensor  # int64 [B, Sq]: the cell whose centre is nearest in the source image, the first of equals
    side: int  # cells a side of the key's grid

    def correct(self, index: Tensor, within: float = 1.0) -> Tensor:
        """bool [B, Sq]: place and cell `index` [B, Sq] are no further apart than `within` cells on both axes."""
        cell = torch.stack([index % self.side, index // self.side], -1)
        return self.inside & ((cell - self.place).abs() <= within).all(-1)

    def chance(self, within: float = 1.0) -> Tensor:
        """Share of the key's cells that would count as correct, float [B, Sq]: what guessing finds."""
        last = self.side - 1
        count = (self.place + within).clamp(max=last).floor() - (self.place - within).clamp(min=0).ceil() + 1
        return count.clamp(min=0).prod(-1) / self.side**2


def match_features(query: Tensor, key: Tensor, *, mutual: bool = False, min_similarity: float | None = None) -> Matches:
    """Nearest key feature of each query feature: unit rows [B, Sq, d] and [B, Sk, d], the first of equals.

    mutual: keep only i -> j where j -> i, too; min_similarity: and only where their cosine is no less. No gradient.
    """
    with torch.no_grad():
        cosine = query.detach() @ key.detach().mT
        similarity, index = cosine.max(2)
        kept = torch.ones_like(index, dtype=torch.bool)
        if mutual:
            back = cosine.argmax(1).gather(1, index)
            kept = back == torch.arange(index.shape[1], device=index.device)
        if min_similarity is not None:
            kept = kept & (similarity >= min_similarity)
        return Matches(index, kept, similarity)


def match_geometry(where: Counterparts) -> Matches:
    """The cell that shows the same point; kept where the key crop holds that point."""
    return Matches(where.nearest, where.inside)


def counterparts(
    query: Tensor,
    key: Tensor,
    *,
    query_size: int,
    key_size: int,
    query_places: int,
    key_places: int,
    device: torch.device | str = "cpu",
) -> Counterparts:
    """From the crops' maps [B, 2, 3] on the host (pixel (x, y, 1) to source pixel, whole coordinates are pixels' centres).

    Sizes are pixels a side of the crops, places the cells of their square grids. What [B, Sq, Sk] arithmetic there is
    happens on `device`. ValueError for grids that are not square and maps that do not come in pairs.
    """
    if query.shape != key.shape or query.shape[1:] != (2, 3):
        raise ValueError(f"geometry {list(query.shape)} and {list(key.shape)} are not two times [B, 2, 3]")
    rows, side = side_of(query_places), side_of(key_places)
    of_query, of_key = _to_source(query, query_size, rows), _to_source(key, key_size, side)
    # In float64 on the host: maps of large images lose pixels to each other in float32. They are a few numbers each.
    across = (torch.linalg.inv(of_key) @ of_query)[:, :2].to(torch.float32)
    metric = of_key[:, :2, :2].mT @ of_key[:, :2, :2]  # squared lengths in the source of steps on the key's grid
    metric = (metric / metric.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]).to(torch.float32)
    across, metric = across.to(device, non_blocking=True), metric.to(device, non_blocking=True)

    place = _cells(rows, device) @ across[:, :, :2].mT + across[:, None, :, 2]  # [B, Sq, 2]
    inside = ((place >= -0.5) & (place <= side - 0.5)).all(-1)
    apart = place[:, :, None] - _cells(side, device)  # [B, Sq, Sk, 2]
    distance = torch.einsum("bqka,bac,bqkc->bqk", apart, metric, apart)
    return Counterparts(place, inside, distance.argmin(2), side)


def side_of(places: int) -> int:
    """Cells a side of a square grid. ValueError if `places` is no square."""
    side = math.isqrt(places)
    if side * side != places or not side:
        raise ValueError(f"{places} places make no square grid; matches by geometry want square crops")
    return side


def _cells(side: int, device: torch.device | str) -> Tensor:
    """(x, y) of each cell, float32 [side * side, 2], row by row."""
    step = torch.arange(side, dtype=torch.float32, device=device)
    return torch.stack([step.repeat(side), step.repeat_interleave(side)], -1)


def _to_source(geometry: Tensor, size: int, side: int) -> Tensor:
    """Grid (x, y, 1) to source (x, y, 1), float64 [B, 3, 3]: cell i is centred on pixel (i + 1/2) * size / side - 1/2."""
    step = size / side
    grid = torch.tensor([[step, 0, step / 2 - 0.5], [0, step, step / 2 - 0.5], [0, 0, 1]], dtype=torch.float64)
    last = grid.new_tensor([[0.0, 0.0, 1.0]]).expand(len(geometry), 1, 3)
    return torch.cat([geometry.detach().cpu().double(), last], 1) @ grid
