"""The recipe's view and stream sections: presets, short forms, and refusals that say what to do."""

import pytest
import yaml
from gristmill.pipeline.views import Augment, StreamConfig, View
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
        ("{name: a, size: 8, augment: {preset: 3}}", "weak, weak-local, moco, none"),
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
    ],
)
def test_what_cannot_work_is_refused(text: str, said: str):
    with pytest.raises(ValidationError, match=said):
        view(text)


def test_a_dumped_view_reads_back():
    original = view("{name: global, size: 96, count: 2, augment: {preset: moco, flip: 0.25}}")
    assert View.model_validate(yaml.safe_load(yaml.safe_dump(original.model_dump(mode="json")))) == original


def test_stream_config_refuses_unknown_keys_and_zero_threads():
    assert StreamConfig().lanes == 64
    for wrong in ({"lane": 3}, {"reader_threads": 0}, {"seed": -1}, {"damage_bound": 2}):
        with pytest.raises(ValidationError):
            StreamConfig.model_validate(wrong)
