"""The colour matrix against torchvision, one operation at a time, with the differences stated as numbers."""

import numpy as np
import pytest
import torch
from gristmill.pipeline.augment import reference
from gristmill.pipeline.augment.colour import PIVOT, colour_matrices
from gristmill.pipeline.draws import COLUMNS, NEVER
from torchvision.transforms.v2 import functional

NEUTRAL = dict(zip(COLUMNS, [0, 0, 1, 1, 0, 1, 1, 1, 0, 0, 0, NEVER, *[0] * 11], strict=True))


def photograph(seed: int = 0) -> np.ndarray:
    """Smooth patches of moderate colours: float64 [64, 64, 3] in 0 ... 255, away from both ends."""
    rng = np.random.default_rng(seed)
    coarse = torch.from_numpy(rng.uniform(70, 170, (1, 3, 6, 6)))
    return torch.nn.functional.interpolate(coarse, 64, mode="bilinear")[0].permute(1, 2, 0).numpy()


def apply(image: np.ndarray, **changes: float) -> np.ndarray:
    matrix = colour_matrices(np.array(list((NEUTRAL | changes).values()), np.float32)).astype(np.float64)
    return image @ matrix[:, :3].T + matrix[:, 3]


def torchvisions(image: np.ndarray, operation: str, *arguments: float) -> np.ndarray:
    planes = torch.from_numpy(image / 255).permute(2, 0, 1)
    return getattr(functional, operation)(planes, *arguments).permute(1, 2, 0).numpy() * 255


def test_nothing_drawn_changes_nothing():
    assert np.abs(apply(photograph()) - photograph()).max() < 1e-4


@pytest.mark.parametrize("factor", [0.6, 1.0, 1.4])
def test_brightness_is_torchvisions(factor: float):
    image = photograph()
    assert np.abs(apply(image, brightness=factor) - torchvisions(image, "adjust_brightness", factor)).max() < 1e-4


@pytest.mark.parametrize("factor", [0.0, 0.6, 0.8, 1.2])
def test_saturation_and_grey_are_torchvisions(factor: float):
    """Up to the fourth digit of the luma weights: torchvision's add up to 0.9999, ours to 1."""
    image = photograph()
    assert np.abs(apply(image, saturation=factor) - torchvisions(image, "adjust_saturation", factor)).max() < 0.03
    assert np.abs(apply(image, grey=1) - torchvisions(image, "rgb_to_grayscale", 3)).max() < 0.03


@pytest.mark.parametrize("factor", [0.6, 1.4])
def test_contrast_is_torchvisions_but_for_the_pivot(factor: float):
    """torchvision pivots on the crop's own mean luma: the difference is (1 - c) times that mean's way to the pivot."""
    image = photograph()
    mean = reference.grey(image).mean()
    expected = torchvisions(image, "adjust_contrast", factor) + (1 - factor) * (PIVOT - mean)
    assert np.abs(apply(image, contrast=factor) - expected).max() < 0.03


def test_contrast_pivots_on_what_brightness_left():
    pivot = np.full((1, 1, 3), PIVOT)
    assert apply(pivot, brightness=0.6, contrast=1.4) == pytest.approx(0.6 * PIVOT, abs=1e-4)


def hue_of(image: np.ndarray) -> np.ndarray:
    """Angle of the colour about the grey axis, in turns."""
    red, green, blue = np.moveaxis(image, -1, 0)
    return np.arctan2(np.sqrt(3) * (green - blue), 2 * red - green - blue) / (2 * np.pi)


@pytest.mark.parametrize("shift", [-0.1, -0.03, 0.05, 0.1])
def test_hue_turns_as_far_as_torchvisions(shift: float):
    """HSV's hue runs along a hexagon, ours along a circle: under 1.5 degrees off in the mean.

    What is left is lightness: HSV keeps the largest channel, we keep the mean of the three.
    """
    image = photograph()
    ours, theirs = apply(image, hue=shift), torchvisions(image, "adjust_hue", shift)
    coloured = image.max(-1) - image.min(-1) > 15  # the hue of grey is noise
    apart = (hue_of(ours) - hue_of(theirs) + 0.5) % 1 - 0.5
    assert np.abs(apart[coloured]).mean() < 1.5 / 360
    assert np.abs(apart[coloured]).max() < 3 / 360
    assert np.abs(ours.mean(-1) - image.mean(-1)).max() < 1e-4
    assert np.abs(ours - theirs).mean() < np.abs(image - theirs).mean()


def test_a_third_of_a_turn_takes_red_to_green():
    assert apply(np.array([[[200.0, 10, 10]]]), hue=1 / 3) == pytest.approx(np.array([[[10.0, 200, 10]]]), abs=1e-3)


def test_together_they_are_the_steps_one_after_another():
    rng = np.random.default_rng(1)
    image = photograph(1)
    for grey in (0, 1):
        b, c, s = rng.uniform(0.5, 1.5, 3)
        h = rng.uniform(-0.5, 0.5)
        steps = c * b * image + (1 - c) * b * PIVOT
        steps = reference.turn_hue(s * steps + (1 - s) * reference.grey(steps), h)
        steps = reference.grey(steps) if grey else steps
        together = apply(image, brightness=b, contrast=c, saturation=s, hue=h, grey=grey)
        assert np.abs(together - steps).max() < 1e-3
