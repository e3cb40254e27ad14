"""The dense head: a projector at every place of a map, and one vector for the whole of it (DenseCL, arXiv 2011.09157).

A 1x1 convolution is a linear layer at each place, so a ResNet's map and a ViT's patches come in alike, as rows
[n, h*w, d]. What objectives compare comes out: a unit vector a place, the unit features that places are matched by, and the
mean over places, normalised after it was taken, which is what the queue keeps (reference/densecl-hcsc.md 1.1, 1.2).
The pooling to a smaller grid is two small products: torch's adaptive pooling has no deterministic gradient on CUDA.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from .heads import unit


class Dense(NamedTuple):
    """What the head gives of n crops whose maps have S2 places each, row by row."""

    rows: Tensor  # [n, S2, out], unit: student output "dense"
    features: Tensor  # [n, S2, d], unit, detached: "dense.features"
    pooled: Tensor  # [n, out], unit, detached: "dense.pooled"


class DenseHead(nn.Module):
    """Linear-ReLU-...-Linear with bias and without norm at each place; draw its weights with `default_linear`.

    Official code draws the Linear layers of the global head by Kaiming's rule but leaves these at PyTorch's default.
    """

    def __init__(
        self,
        dim: int,
        hidden: int = 2048,  # DenseCL: 2048
        out: int = 128,  # DenseCL: 128
        grid: int | None = None,  # places a side after pooling; smaller maps stay. DenseCL: None, the map as it is
        layers: int = 2,  # DenseCL: 2
    ) -> None:
        super().__init__()
        if layers < 1 or (grid is not None and grid < 1):
            raise ValueError(f"a dense head needs a layer and a grid of one place at least, got {layers} and {grid}")
        self.grid = grid
        parts: list[nn.Module] = []
        for number in range(layers - 1):
            parts += [nn.Linear(hidden if number else dim, hidden), nn.ReLU()]
        self.projector = nn.Sequential(*parts, nn.Linear(hidden if layers > 1 else dim, out))

    def forward(self, locations: Tensor, size: tuple[int, int]) -> Dense:
        """Features [n, h*w, d] of maps of `size` (h, w), row by row. ValueError if they are not as many."""
        locations = pool_places(locations, size, self.grid)
        raw = self.projector(locations)
        return Dense(unit(raw), unit(locations.detach()), unit(_mean(raw.detach())))


def _mean(raw: Tensor) -> Tensor:
    """Over places [n, S2, out], in float32 at least: a mean that autocast's bf16 rounds would be off by 1 in 500."""
    return raw.mean(1, dtype=torch.promote_types(raw.dtype, torch.float32))


def pool_places(locations: Tensor, size: tuple[int, int], grid: int | None) -> Tensor:
    """Average places [n, h*w, d] over a grid of at most `grid` a side, [n, S2, d], as adaptive pooling does.

    None, or a map that is no larger, leaves them as they are. ValueError if they are not `size` (h, w).
    """
    height, width = size
    if locations.ndim != 3 or locations.shape[1] != height * width:
        raise ValueError(f"locations {list(locations.shape)} are not the {height} x {width} places [n, h*w, d] of maps")
    if grid is None or (height <= grid and width <= grid):
        return locations
    down, across = (_averages(side, min(side, grid), locations) for side in (height, width))
    pooled = across @ locations.unflatten(1, size)  # [n, h, S, d]
    return (down @ pooled.flatten(2)).unflatten(2, pooled.shape[2:]).flatten(1, 2)


def _averages(side: int, grid: int, like: Tensor) -> Tensor:
    """[grid, side]: row i averages places floor(i * side / grid) to ceil((i + 1) * side / grid)."""
    first = torch.arange(grid) * side // grid
    last = -(-(torch.arange(grid) + 1) * side // grid)
    place = torch.arange(side)
    inside = ((place >= first[:, None]) & (place < last[:, None])).double()
    return (inside / inside.sum(1, keepdim=True)).to(like, non_blocking=True)
