"""What the pipeline gives: a batch of augmented views, and what it asks of the executor that makes them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch import Tensor

from ..shards.errors import GristmillError
from .draws import Draws


class LoaderError(GristmillError, ValueError):
    """A batch, position or world size that cannot be served, or an executor that breaks its contract."""


class StallError(GristmillError):
    """No batch within the deadline. The message names the stage that has not delivered."""


class Executor(Protocol):
    """Carries draws out: uint8 arrays of B encoded images -> float32 [B, n, 3, H, W] a view.

    Where images do not decode it raises DecodeError with their slots, and can be run again. Views on a GPU are made on
    the calling thread's current stream, or waited for by it.
    """

    def run(self, data: list[np.ndarray], draws: Draws) -> dict[str, Tensor]: ...


@dataclass
class Batch:
    """Views of B samples. `position` is that of the global batch, which takes positions from there on."""

    position: int
    ids: np.ndarray  # int64 [B, 2]: shard, row; a substitute's own
    keys: list[str]
    views: dict[str, Tensor]  # float32 [B, n, 3, H, W] a view
    geometry: dict[str, Tensor]  # float32 [B, n, 2, 3] a view: crop pixel (x, y, 1) -> upright source pixel
