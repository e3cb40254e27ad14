"""Every operation of RandAugment against PIL's and timm's on textured pictures, to the last bit where pixels stay in place."""

import math

import cv2
import numpy as np
import pytest
from gristmill.pipeline.augment.operations import FILL, apply, strengthened, table
from gristmill.pipeline.draws import OPERATIONS
from gristmill.pipeline.strong import GEOMETRIC, NUMBER, warp_maps
from PIL import Image
from timm.data.auto_augment import NAME_TO_OP

from .textures import textures

TIMMS = {"Posterize": "PosterizeIncreasing", "Solarize": "SolarizeIncreasing"} | {
    name: f"{name}Increasing" for name in ("Color", "Contrast", "Brightness", "Sharpness")
}
ARGUMENTS = {
    "Rotate": [-30, -3.7, 12.5, 27, 30],
    "Posterize": [1, 2, 3, 4],
    "Solarize": [0, 26, 128, 255, 256],
    "SolarizeAdd": [0, 55, 99, 110],
    **{name: [0.1, 0.19, 0.73, 1.0, 1.31, 1.81, 1.9] for name in ("Color", "Contrast", "Brightness", "Sharpness")},
    **{name: [-0.3, -0.27, 0.05, 0.3] for name in ("ShearX", "ShearY")},
    **{name: [-0.45, -0.1, 0.031, 0.4] for name in ("TranslateXRel", "TranslateYRel")},
}
CASES = [(name, argument) for name in OPERATIONS for argument in ARGUMENTS.get(name, [0])]


def timms(image: np.ndarray, name: str, argument: float, resample: Image.Resampling) -> np.ndarray:
    arguments = [argument] if name in ARGUMENTS else []
    operation = NAME_TO_OP[TIMMS.get(name, name)]
    return np.asarray(operation(Image.fromarray(image), *arguments, fillcolor=FILL, resample=resample))


def warp_of(image: np.ndarray, *steps: tuple[str, float], flip: bool = False) -> np.ndarray:
    """Draws.warp of one image and up to two operations."""
    steps = (*steps, ("Invert", 0.0))[:2]
    numbers = np.array([[NUMBER[name] for name, _ in steps]])
    arguments = np.array([[argument for _, argument in steps]], float)
    return warp_maps(numbers, arguments, np.array([flip]), np.array([image.shape[1::-1]]))[0]


def ours(image: np.ndarray, *steps: tuple[str, float]) -> np.ndarray:
    """Up to two operations on the full image: whole levels as float64."""
    padded = (*[(NUMBER[name], argument) for name, argument in steps], (0, 0.0))[:2]
    operations, arguments = zip(*padded, strict=True)
    return strengthened(image, operations, arguments, warp_of(image, *steps)).astype(float)


@pytest.mark.parametrize(("name", "argument"), [case for case in CASES if NUMBER[case[0]] not in GEOMETRIC])
def test_operations_on_pixels_are_pils_bit_for_bit(name: str, argument: float):
    for image in [
        *textures(),
        np.full((9, 9, 3), 77, np.uint8),
        textures()[0][:2, :3],
        textures()[0] // 8 + 90,
    ]:
        expected = timms(image, name, argument, Image.Resampling.BILINEAR)
        assert np.array_equal(apply(NUMBER[name], argument, image), expected)
        values = table(NUMBER[name], argument, image)
        assert (values is None) == (name in ("Color", "Sharpness"))
        if values is not None:
            assert np.array_equal(cv2.LUT(image, values.reshape(1, 256, 3)), expected)


@pytest.mark.parametrize(("name", "argument"), [case for case in CASES if NUMBER[case[0]] in GEOMETRIC])
def test_operations_on_places_are_pils_bilinear(name: str, argument: float):
    """Every pixel within a level, since PIL truncates and we round; the fill comes in at the same pixels."""
    for image in textures():
        expected = timms(image, name, argument, Image.Resampling.BILINEAR).astype(float)
        assert set(np.unique(ours(image, (name, argument)) - expected)) <= {0.0, 1.0}


def test_bicubic_which_timm_takes_half_the_time_differs_by_this_much():
    """Mean difference of our one bilinear warp from PIL's bicubic: under 2.5 levels of 255 on textured images."""
    for name in ("Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel"):
        for argument in ARGUMENTS[name]:
            far = [
                np.abs(ours(image, (name, argument)) - timms(image, name, argument, Image.Resampling.BICUBIC)).mean()
                for image in textures()
            ]
            assert np.mean(far) < 2.5


def one_after_another(image: np.ndarray, first: tuple[str, float], second: tuple[str, float]) -> np.ndarray:
    for step in (first, second):
        image = timms(image, *step, Image.Resampling.BILINEAR)
    return image.astype(float)


def apart(first: tuple[str, float], second: tuple[str, float]) -> float:
    """Mean difference in levels of 255 over the textures."""
    both = [(ours(image, first, second), one_after_another(image, first, second)) for image in textures()]
    return float(np.mean([np.abs(mine - theirs).mean() for mine, theirs in both]))


def test_two_operations_on_pixels_are_timms_bit_for_bit():
    for first, second in [
        (("Equalize", 0), ("Posterize", 2)),
        (("Sharpness", 1.8), ("AutoContrast", 0)),
        (("Color", 0.2), ("Contrast", 1.81)),
    ]:
        assert apart(first, second) == 0


def test_operations_on_pixels_and_on_places_in_either_order_are_timms():
    """Up to rounding a level up instead of down, which discontinuous tables and histograms can make more of."""
    for name in ("Equalize", "Sharpness", "Invert", "Solarize", "Color"):
        assert apart((name, ARGUMENTS.get(name, [0])[1 if name in ARGUMENTS else 0]), ("Rotate", 27.0)) < 0.6
    for second in [("Invert", 0), ("Color", 0.19), ("Sharpness", 1.81), ("Brightness", 1.81), ("Contrast", 1.81)]:
        assert apart(("Rotate", 27.0), second) < 1.2, second
    for second in [("Equalize", 0), ("AutoContrast", 0), ("Solarize", 26), ("SolarizeAdd", 99), ("Posterize", 1)]:
        assert apart(("ShearX", 0.27), second) < 2.5, second


def test_two_warps_in_one_pass_differ_where_one_brings_back_what_the_other_moved_out():
    """There two passes show the fill, up to a tenth of the image here, and one pass what was there.

    All else differs by an interpolation less: on a smooth image by two levels at most, along edges of the fill more.
    """
    y, x = np.mgrid[:120, :160]
    smooth = np.stack([x, y, (x + y) / 2], -1).astype(np.uint8)
    for first, second in [
        (("Rotate", 27.0), ("ShearX", -0.27)),
        (("ShearY", 0.25), ("TranslateXRel", 0.4)),
        (("TranslateYRel", -0.3), ("Rotate", -20.0)),
    ]:
        assert apart(first, second) < 5
        mine, theirs = ours(smooth, first, second), one_after_another(smooth, first, second)
        back = (theirs == FILL).all(-1) & (mine != FILL).any(-1)
        assert back.mean() < 0.1
        assert (np.abs(mine - theirs)[~back].max(-1) > 2.1).mean() < 0.02
    there_and_back = ("TranslateXRel", 0.4), ("TranslateXRel", -0.4)
    assert np.array_equal(ours(smooth, *there_and_back), smooth)
    assert (one_after_another(smooth, *there_and_back)[:, :64] == FILL).all()


def test_the_fill_is_treated_as_the_pixels_beside_it():
    image = textures()[0]
    far = ours(image, ("TranslateXRel", 0.45), ("Invert", 0))
    assert far[:, -1].tolist() == [[255.0 - value for value in FILL]] * len(image)
    assert (ours(image, ("Invert", 0), ("TranslateXRel", 0.45))[:, -1] == FILL).all()
    assert ours(image, ("TranslateYRel", -0.45), ("Solarize", 120.0))[0, 0].tolist() == [255 - 124, 116, 104]


def test_mirrored_crops_see_the_operation_after_the_mirror():
    """Mirror, then rotate, as Mugs does; our image stays as it is and the crop is mirrored at the end."""
    image = textures()[1]
    for step in [("Rotate", 20.0), ("ShearY", 0.2137), ("ShearX", -0.2137), ("TranslateXRel", 0.2)]:
        theirs = ours(np.ascontiguousarray(image[:, ::-1]), step)[:, ::-1]
        mine = strengthened(image, (NUMBER[step[0]], 0), (step[1], 0.0), warp_of(image, step, flip=True))
        # Ties of rounding by a level, and of the fill's edge by more.
        assert (np.abs(mine.astype(float) - theirs).max(-1) > 1).mean() < 0.01
        assert (np.abs(mine.astype(float) - theirs).max(-1) > 0).mean() < 0.01
        assert np.abs(ours(image, step) - theirs).mean() > 5  # and not the other way round


def test_rotation_keeps_the_centre_and_turns_against_the_clock():
    image = np.zeros((101, 101, 3), np.uint8)
    image[50, 90] = 255  # to the right of the centre
    turned = ours(image, ("Rotate", 30.0))[..., 0]
    peak = np.unravel_index((turned * (turned != FILL[0])).argmax(), turned.shape)
    angle = math.degrees(math.atan2(50 - peak[0], peak[1] - 50))
    assert angle == pytest.approx(30, abs=1.5)
