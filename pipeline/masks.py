"""Which patches of a crop are hidden from the student: blocks as BEiT and iBOT lay them, or patches at random.

iBOT (Zhou et al. 2022, loader.py) draws a share of patches for each crop, none for half of them in its recipe, and
lays blocks until the share is reached or ten tries in a row find no room: BEiT's algorithm (Bao et al. 2022, appendix).
It is written down here for all crops of a batch side by side, one try of every unfinished crop at a time, and done by
the loops of mask_loops.py, bit for bit the same. A mask is a function of (seed, position, index of the crop in the
recipe), like every other draw.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator

from . import philox
from .boxes import exp
from .plan import log_range

_CHUNK = 8  # tries whose numbers are drawn at once
_FIRST = 1  # block of four numbers of the first try; block 0 draws the share


class MaskConfig(BaseModel):
    """How much is masked, and in which shape. The defaults are iBOT's recipe for ViT-S/16."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["block", "random"] = "block"
    # (share, spread): one of them is taken, each as likely, and the share drawn from share - spread ... share + spread.
    shares: list[tuple[float, float]] = Field(default=[(0.0, 0.0), (0.3, 0.2)], min_length=1)
    aspect: tuple[float, float] = (0.3, 1 / 0.3)  # height to width of a block, log-uniform
    tries: int = Field(default=10, ge=1)  # in a row that find no room before a mask is left as it is

    @model_validator(mode="after")
    def _possible(self) -> MaskConfig:
        for share, spread in self.shares:
            if not 0 <= share - spread <= share + spread <= 1 or spread < 0:
                raise ValueError(f"shares: {share} +- {spread} leaves 0 ... 1")
        if not 0 < self.aspect[0] <= self.aspect[1]:
            raise ValueError(f"aspect: {self.aspect} is no range of positive numbers, smaller one first")
        return self


def draw_masks(
    seed: int,
    positions: ArrayLike,
    crops: Sequence[int],
    grid: tuple[int, int],
    config: MaskConfig = MaskConfig(),  # noqa: B008 - frozen
) -> NDArray[np.bool_]:
    """Masks of n crops of the samples at `positions` [B]: bool [B, n, h, w], True where a patch is hidden.

    `crops` are the crops' indices among all of an image (`range(V)[plan.columns[name]]`), `grid` is (h, w) patches.
    At most floor(share * h * w) patches are hidden, with kind "random" just as many.
    """
    where, streams, targets = _asked(seed, positions, crops, grid, config)
    shape = -1, len(crops), *grid
    if config.kind == "random":
        order = philox.uniform(seed, where, streams, 4 + grid[0] * grid[1])[:, 4:]
        rank = np.argsort(np.argsort(order, -1, "stable"), -1, "stable")
        return (rank < targets[:, None]).reshape(shape)
    from .mask_loops import lay_all  # only here: compiled loops take a moment to load

    masks = np.zeros((len(targets), *grid), np.bool_)
    low, high = map(int, philox.key_from(seed))
    lay_all(low, high, where, streams, targets, _FIRST, *log_range(config.aspect), config.tries, masks)
    return masks.reshape(shape)


def draw_masks_reference(
    seed: int, positions: ArrayLike, crops: Sequence[int], grid: tuple[int, int], config: MaskConfig
) -> NDArray[np.bool_]:
    """`draw_masks` of kind "block" in plain form."""
    where, streams, left = _asked(seed, positions, crops, grid, config)
    masks = np.zeros((len(left), *grid), np.bool_)
    fails, active, chunk = np.zeros_like(left), np.flatnonzero(left > 0), 0
    while len(active):
        blocks = range(_FIRST + chunk * _CHUNK, _FIRST + (chunk + 1) * _CHUNK)
        tries = philox.uniform_blocks(seed, where[active], streams[active], blocks).reshape(-1, _CHUNK, 4)
        for number in range(_CHUNK):
            gained = _lay(masks, active, left[active], tries[:, number], config)
            left[active] -= gained
            fails[active] = np.where(gained > 0, 0, fails[active] + 1)
            going = (left[active] > 0) & (fails[active] < config.tries)
            active, tries = active[going], tries[going]
        chunk += 1
    return masks.reshape(-1, len(crops), *grid)


def _asked(
    seed: int, positions: ArrayLike, crops: Sequence[int], grid: tuple[int, int], config: MaskConfig
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Position, stream and number of patches to hide at most, int64 [B * n] each, crops of an image together."""
    where = np.repeat(np.asarray(positions, np.int64), len(crops))
    streams = np.tile(philox.MASK + np.asarray(crops, np.int64), len(where) // max(1, len(crops)))
    u = philox.uniform_blocks(seed, where, streams, (0,))  # [B * n, 4]
    share, spread = np.array(config.shares, np.float64)[np.floor(u[:, 0] * len(config.shares)).astype(int)].T
    return where, streams, np.floor((share + spread * (2 * u[:, 1] - 1)) * grid[0] * grid[1]).astype(np.int64)


def _lay(
    masks: NDArray[np.bool_],
    active: NDArray[np.intp],
    left: NDArray[np.int64],
    u: NDArray[np.float64],
    config: MaskConfig,
) -> NDArray[np.int64]:
    """One try of each active mask to lay a block: how many patches it gained, int64 [m]; masks change in place.

    left [m]: patches that may still be hidden; u [m, 4]: numbers of area, aspect, top and left edge.
    """
    height, width = masks.shape[1:]
    smallest = (min(height, width) // 3) ** 2
    area = smallest + (left - smallest) * u[:, 0]  # a range that may run backwards, as in BEiT
    low, high = log_range(config.aspect)
    aspect = exp(low + (high - low) * u[:, 1])
    h, w = np.rint(np.sqrt(area * aspect)).astype(np.int64), np.rint(np.sqrt(area / aspect)).astype(np.int64)
    top = np.floor(u[:, 2] * (height - h + 1)).astype(np.int64)
    start = np.floor(u[:, 3] * (width - w + 1)).astype(np.int64)
    rows, columns = np.arange(height), np.arange(width)
    tall = (rows >= top[:, None]) & (rows < (top + h)[:, None])
    wide = (columns >= start[:, None]) & (columns < (start + w)[:, None])
    added = tall[:, :, None] & wide[:, None, :] & ~masks[active]
    gained = added.sum((1, 2))
    done = (h < height) & (w < width) & (gained > 0) & (gained <= left)
    masks[active[done]] |= added[done]
    return np.where(done, gained, 0)
