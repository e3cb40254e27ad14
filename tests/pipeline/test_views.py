"""The recipe's view and stream sections: presets, short forms, and refusals that say what to do."""

from typing import Any

import pytest
import yaml
from gristmill.pipeline.groups import GROUPS, named_views
from gristmill.pipeline.views import Augment, StreamConfig, Strong, View
from pydantic import ValidationError


def view(text: str) -> View:
    return View.model_validate(yaml.safe_load(text))


def test_a_preset_by_name_and_with_changes():
    weak = view("{name: global, size: 224, count: 2, augment: weak}")
    assert weak.augment.blur == [1.0, 0.1]
    assert weak.augment.solarize == [0.0, 0.2]
    assert (weak.augment.brightness, weak.augment.contrast, weak.augment.saturation, weak.augment.hue) == (
        0.4,
        0.4,
        0.2,
        0.1,
    )
    changed = view("{name: global, size: 224, augment: {preset: weak, hue: 0.0, blur: 0.3}}")
    assert changed.augment == weak.augment.model_copy(update={"hue": 0.0, "blur": [0.3]})


def test_presets_of_the_papers():
    assert Augment.model_validate("weak-local").blur == [0.5]
    moco = Augment.model_validate("moco")
    assert (moco.saturation, moco.grey, moco.blur, moco.solarize) == (0.4, 0.2, [0.5], [0.0])
    none = Augment.model_validate("none")
    assert none.crop == "centre"
    assert none.flip == none.jitter_p == none.grey == none.blur[0] == none.solarize[0] == 0


def test_probabilities_of_copies_repeat_the_last():
    weak = View(name="global", size=224, count=4)
    assert [weak.blur(copy) for copy in range(4)] == [1.0, 0.1, 0.1, 0.1]
    assert [weak.solarize(copy) for copy in range(4)] == [0.0, 0.2, 0.2, 0.2]


@pytest.mark.parametrize(("size", "share"), [(224, 1), (96, 1), (48, 1 / 2), (24, 1 / 4)])
def test_blur_is_the_papers_down_to_96_pixels_and_in_proportion_below(size: int, share: float):
    assert View(name="crop", size=size).sigma == pytest.approx((0.1 * share, 2.0 * share))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{name: a, size: 8, augment: wek}", "did you mean 'weak'"),
        ("{name: a, size: 8, augment: {preset: 3}}", "weak, weak-local, moco, moco-v1, simclr, none"),
        ("{name: a, size: 8, augment: {hues: 0.1}}", "hues"),
        ("{name: a, size: 8, augment: {flip: 1.5}}", "flip"),
        ("{name: a, size: 8, augment: {hue: 0.6}}", "hue"),
        ("{name: a, size: 8, augment: {blur: []}}", "blur"),
        ("{name: a, size: 8, augment: {blur_sigma: [2.0, 0.1]}}", "smaller one first"),
        ("{name: a, size: 8, scale: [0.5, 0.2]}", "smaller one first"),
        ("{name: a, size: 8, scale: [0.5, 1.2]}", "between 0 and 1"),
        ("{name: a, size: 8, ratio: [0.0, 1.0]}", "positive"),
        ("{name: a, size: 0}", "size"),
        ("{name: a, size: 8, count: 0}", "count"),
        ("{name: a, size: 8, role: pupil}", "role"),
        ("{name: '', size: 8}", "name"),
        ("{name: a, size: 8, crops: 3}", "crops"),
        ("{name: a, size: 8, filter: lanczos}", "filter"),
        ("{name: a, size: 8, strong: mug}", "did you mean 'mugs'"),
        ("{name: a, size: 8, strong: weak}", "there are mugs, mugs-normalised"),
        ("{name: a, size: 8, strong: {magnitude: 11}}", "magnitude"),
        ("{name: a, size: 8, strong: {operations: 3}}", "operations"),
        ("{name: a, size: 8, strong: {erase_area: [0.5, 0.1]}}", "smaller one first"),
        ("{name: a, size: 8, strong: {erase_ratio: [0, 1]}}", "positive"),
        ("{name: a, size: 8, strong: {crop: centre}}", "leave crop out"),
        ("{name: a, size: 8, strong: mugs, augment: none}", "leave augment.crop out"),
        ("{name: a, size: 8, strong: mugs, weak_p: 1.5}", "weak_p"),
        ("{name: a, size: 8, strong: mugs, coin_group: g}", "needs `coin: image`"),
    ],
)
def test_what_cannot_work_is_refused(text: str, said: str):
    with pytest.raises(ValidationError, match=said):
        view(text)


def test_a_dumped_view_reads_back():
    original = view(
        "{name: global, size: 96, count: 2, filter: bicubic, augment: {preset: moco, flip: 0.25}, "
        "strong: {preset: mugs-normalised, erase: 0.5}, coin: image, coin_group: g, weak_p: 0.25}"
    )
    assert View.model_validate(yaml.safe_load(yaml.safe_dump(original.model_dump(mode="json")))) == original


def test_presets_of_strong_augmentation():
    mugs = Strong.model_validate("mugs")
    assert (mugs.operations, mugs.operation_p, mugs.replacement) == (2, 0.5, False)
    assert (mugs.magnitude, mugs.magnitude_std) == (9, 0.5)
    assert (mugs.erase, mugs.erase_area, mugs.erase_ratio) == (0.25, (0.02, 1 / 3), (0.3, 1 / 0.3))
    assert (mugs.flip, mugs.jitter_p, mugs.grey, mugs.blur, mugs.solarize) == (0.5, 0, 0, [0.0], [0.0])
    assert mugs.erase_noise == "raw"
    assert Strong.model_validate("mugs-normalised").erase_noise == "normalised"
    assert view("{name: a, size: 8, strong: {erase: 0}}").strong == mugs.model_copy(update={"erase": 0.0})


def crops(name: str) -> list[tuple[Any, ...]]:
    views = [View.model_validate(v) for v in named_views(name)]
    return [(v.name, v.count, v.size, v.scale, v.role, v.filter) for v in views]


def test_sets_of_views_are_the_papers():
    assert crops("dino") == [
        ("global", 2, 224, (0.4, 1.0), "both", "bicubic"),
        ("local", 8, 96, (0.05, 0.4), "student", "bicubic"),
    ]
    assert crops("mugs") == [
        ("teacher", 2, 224, (0.25, 1.0), "teacher", "bicubic"),
        ("global", 2, 224, (0.25, 1.0), "student", "bicubic"),
        ("local", 10, 96, (0.05, 0.25), "student", "bicubic"),
    ]
    assert crops("ibot") == [
        ("global", 2, 224, (0.25, 1.0), "both", "bicubic"),
        ("local", 10, 96, (0.05, 0.25), "student", "bicubic"),
    ]
    pair = [("query", 1, 224, (0.2, 1.0), "student", "bilinear"), ("key", 1, 224, (0.2, 1.0), "teacher", "bilinear")]
    assert crops("moco-v1") == crops("moco-v2") == pair
    assert crops("hcsc-multicrop")[:2] == pair
    local = crops("hcsc-multicrop")[2:]
    assert [(v[2], v[3]) for v in local] == [
        (192, (0.172, 0.86)),
        (160, (0.143, 0.715)),
        (128, (0.114, 0.571)),
        (96, (0.086, 0.429)),
    ]
    assert {v[4] for v in local} == {"student"}
    assert crops("moco-v3") == [("global", 2, 224, (0.08, 1.0), "both", "bilinear")]
    assert crops("simclr") == crops("byol") == [("global", 2, 224, (0.08, 1.0), "both", "bicubic")]


def test_augmentations_of_sets_of_views_are_the_papers():
    def colours(name: str) -> list[tuple[Any, ...]]:
        views = [View.model_validate(v) for v in named_views(name)]
        every = [(v.augment, copy) for v in views for copy in range(v.count)]
        strength = [(a.jitter_p, a.brightness, a.contrast, a.saturation, a.hue, a.grey, a.flip) for a, _ in every]
        blurs = [(v.blur(copy), v.solarize(copy)) for v in views for copy in range(v.count)]
        return [(*s, *b) for s, b in zip(strength, blurs, strict=True)]

    dino = (0.8, 0.4, 0.4, 0.2, 0.1, 0.2, 0.5)
    first, second, local = (*dino, 1.0, 0.0), (*dino, 0.1, 0.2), (*dino, 0.5, 0.0)
    assert colours("mugs") == [first, second, first, second] + [local] * 10
    assert colours("dino") == [first, second] + [local] * 8
    assert colours("byol") == colours("moco-v3") == [first, second]
    assert colours("moco-v2") == [(0.8, 0.4, 0.4, 0.4, 0.1, 0.2, 0.5, 0.5, 0.0)] * 2
    assert colours("hcsc-multicrop") == [(0.8, 0.4, 0.4, 0.4, 0.1, 0.2, 0.5, 0.5, 0.0)] * 6
    assert colours("moco-v1") == [(1.0, 0.4, 0.4, 0.4, 0.4, 0.2, 0.5, 0.0, 0.0)] * 2
    assert colours("simclr") == [(0.8, 0.8, 0.8, 0.8, 0.2, 0.2, 0.5, 0.5, 0.0)] * 2


def test_a_set_of_views_is_the_callers_own():
    named_views("mugs")[0]["size"] = 3
    assert named_views("mugs")[0]["size"] == 224
    with pytest.raises(ValueError, match="did you mean 'simclr'"):
        named_views("simcrl")


def test_mugs_and_infomin_have_a_strong_form():
    strong = {name for name in GROUPS for v in named_views(name) if View.model_validate(v).strong}
    assert strong == {"mugs", "infomin"}
    teacher, large, local = (View.model_validate(v) for v in named_views("mugs"))
    assert teacher.strong is None
    assert (large.coin, large.weak_p, local.coin, local.weak_p) == ("image", 0.5, "crop", 0.5)


def test_stream_config_refuses_unknown_keys_and_zero_threads():
    assert StreamConfig().lanes == 64
    for wrong in ({"lane": 3}, {"reader_threads": 0}, {"seed": -1}, {"damage_bound": 2}):
        with pytest.raises(ValidationError):
            StreamConfig.model_validate(wrong)
