"""The one tile of noise that all erased boxes are filled from, the same on every machine and in every run.

Noise that had to be drawn for each crop would be the most random numbers of all by far, and no GPU operator can be
keyed by sample; so a box is cut of a fixed tile at a drawn offset. Made by Philox, rounded to what every C library
agrees on.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray

from .. import philox
from ..plan import NOISE_SIDE

_SEED = 0  # of the tile: not the run's


@cache
def noise_tile() -> NDArray[np.float32]:
    """Standard normal numbers: float32 [NOISE_SIDE, NOISE_SIDE, 3], read-only; multiples of 2**-16."""
    rows = philox.normal(_SEED, np.arange(NOISE_SIDE), philox.NOISE, 3 * NOISE_SIDE)
    tile = (np.rint(rows * 2.0**16) * 2.0**-16).astype(np.float32).reshape(NOISE_SIDE, NOISE_SIDE, 3)
    tile.setflags(write=False)
    return tile
