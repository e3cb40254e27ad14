"""Schedules as pure functions of the position (images seen so far), so that a resumed run needs no state for them.

Sources: linear warm-up from 0 and cosine to the end for the learning rate, plain cosines for weight decay and for the
teacher's momentum, as in DINO and Mugs. The official code steps through arrays with one value an iteration;
`position / images` with the same number of steps gives the same values (tests/ops/test_schedule.py).
"""

from __future__ import annotations

import math


def cosine(start: float, end: float, progress: float) -> float:
    """From `start` at progress 0 to `end` at progress 1, held there afterwards."""
    progress = min(max(progress, 0.0), 1.0)
    return end + 0.5 * (start - end) * (1.0 + math.cos(math.pi * progress))


def warmup_cosine(peak: float, end: float, warmup: float, progress: float, step: float, start: float = 0.0) -> float:
    """Linear from `start` (a share of the peak) at progress 0 to `peak` at the last step inside `warmup`, then a cosine to `end`.

    `step` is the share of the run that one batch makes; the official ramp reaches the peak on the last warm-up
    iteration (np.linspace with both ends), and the cosine starts on the next one.
    """
    if progress < warmup:
        return peak * (start + (1.0 - start) * min(1.0, progress / max(warmup - step, step)))
    return cosine(peak, end, (progress - warmup) / max(1.0 - warmup, 1e-12))
