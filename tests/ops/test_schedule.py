"""Schedules equal the arrays that the official code steps through."""

from pathlib import Path

import numpy as np
import torch
from gristmill.ops.schedule import cosine, warmup_cosine

VECTORS = torch.load(Path(__file__).parent.parent / "vectors" / "mugs_schedules.pt", weights_only=True)
STEPS, WARM = 30, 10  # of the recorded curves


def test_learning_rate():
    peak = float(VECTORS["lr"].max())
    ours = [warmup_cosine(peak, 1e-6, WARM / STEPS, step / STEPS, 1 / STEPS) for step in range(STEPS)]
    np.testing.assert_allclose(ours, VECTORS["lr"].numpy(), rtol=1e-12, atol=1e-18)


def test_weight_decay_and_momentum():
    for name, start, end in (("wd", 0.04, 0.2), ("mom", 0.996, 1.0)):
        ours = [cosine(start, end, step / STEPS) for step in range(STEPS)]
        np.testing.assert_allclose(ours, VECTORS[name].numpy(), rtol=1e-12)


def test_held_beyond_the_end():
    assert cosine(1.0, 0.1, 1.7) == cosine(1.0, 0.1, 1.0) == 0.1
    assert warmup_cosine(1.0, 0.1, 0.0, 0.0, 0.01) == 1.0
