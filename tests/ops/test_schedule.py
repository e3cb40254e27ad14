"""Schedules equal the arrays that the official code steps through."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from gristmill.ops.optimizers import OptimizerConfig
from gristmill.ops.schedule import cosine, warmup_cosine
from pydantic import ValidationError

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


def rates(**given):
    config = OptimizerConfig.model_validate({"warmup": 0.0, "min_lr": 0.0, **given})
    return [config.lr_at(1.0, step / 100, 0.01) for step in range(100)]


def test_steps_down_at_milestones():
    """NPID and MoCo v1: 120 and 160 of 200 epochs, to a tenth each."""
    found = rates(schedule="steps", milestones=[0.6, 0.8])
    np.testing.assert_allclose(found, [1.0] * 60 + [0.1] * 20 + [0.01] * 20)


def test_a_rate_that_stays_inside_an_epoch():
    """MoCo, DenseCL, HCSC: 10 epochs of 10 steps; the official rate is 0.5 (1 + cos(pi epoch / epochs))."""
    found = rates(epochs=10)
    np.testing.assert_allclose(found, [0.5 * (1 + math.cos(math.pi * (step // 10) / 10)) for step in range(100)])


def test_a_ramp_that_does_not_begin_at_zero():
    """SwAV: from .3 to 4.8 over 10 of 100 epochs; the last step of the ramp is at the peak."""
    found = rates(warmup=0.1, warmup_from=0.0625)
    np.testing.assert_allclose(found[:10], np.linspace(0.0625, 1.0, 10))
    np.testing.assert_allclose(found[10:12], [1.0, cosine(1.0, 0.0, 1 / 90)])


def test_milestones_go_with_steps_alone():
    for given in ({"schedule": "steps"}, {"milestones": [0.5]}):
        with pytest.raises(ValidationError, match="milestones"):
            OptimizerConfig.model_validate(given)
