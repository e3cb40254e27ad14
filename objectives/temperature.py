"""The teacher's temperature over a run: linear from start to end while it warms up, then held (DINO, Mugs, iBOT).

A function of the share of the run that is done, so that nothing needs to be kept. The official codes step through an
array with one value an epoch, whose last warm epoch is at the end already; `epochs` gives just that.
"""

from __future__ import annotations

import math


def warm_temperature(ends: tuple[float, float], warmup: float, progress: float, epochs: int | None = None) -> float:
    """Temperature at `progress` (0 to 1) between `ends`, with a warm-up of this share of the run.

    epochs: of the whole run, for the official steps (the warm-up is rounded to whole epochs); None: at every step anew.
    """
    start, end = ends
    if epochs is None:
        return start + (end - start) * (min(1.0, progress / warmup) if warmup else 1.0)
    # A position is a multiple of the batch: what lies this close below an epoch has begun it.
    epoch, warm = math.floor(progress * epochs + 1e-9), round(warmup * epochs)
    return end if epoch >= warm else start + (end - start) * epoch / max(1, warm - 1)
