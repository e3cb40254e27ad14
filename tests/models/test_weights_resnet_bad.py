"""Files that are no plain ResNet, or another one, and names of weights in detectors."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from gristmill.models.detectors import detectron2_name, from_detectors, openmmlab_name
from gristmill.models.measures import ResNetMeasures, measure
from gristmill.models.resnet import build_resnet
from gristmill.models.student import Student, StudentConfig
from gristmill.models.unpickle import WeightsError
from gristmill.models.vit import build_backbone
from gristmill.models.weights import import_backbone
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from .resnet_files import State, moco2, plain, save, under


def changed(**values: Tensor | None) -> State:
    state = plain() | {key.replace("__", "."): value for key, value in values.items() if value is not None}
    return {name: value for name, value in state.items() if values.get(name.replace(".", "__"), value) is not None}


BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "deep stem": (
        lambda: timm.create_model("resnet18d").state_dict(), r"not a plain ResNet .* it has conv1\.\d\.\w+, without which"
    ),
    "small images": (lambda: changed(conv1__weight=torch.ones(64, 3, 3, 3)), r"conv1\.weight has shape \(64, 3, 3, 3\)"),
    "groups": (lambda: timm.create_model("resnext50_32x4d").state_dict(), r"conv2\.weight has shape \(128, 4, 3, 3\) where"),
    "attention": (lambda: timm.create_model("seresnet18").state_dict(), r"not a plain ResNet .* has layer1\.0\.se\."),
    "cut short": (
        lambda: {name: value for name, value in plain().items() if not name.startswith("layer4.0.bn2")},
        r"incomplete: it lacks layer4\.0\.bn2\.bias",
    ),
    "no stem": (
        lambda: {name: value for name, value in plain().items() if name != "conv1.weight"},
        "incomplete: it lacks conv1.weight, or a stage's first block",
    ),
    "nan": (lambda: changed(bn1__running_var=torch.full((64,), float("nan"))), r"bn1\.running_var has values that are not"),
    "twice": (lambda: plain() | under("module.", plain()), r"are both backbone\.conv1\.weight"),
    "no teacher": (
        lambda: {name: value for name, value in moco2().items() if "encoder_k" not in name},
        "holds no teacher, only a student; ask for --student",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_fit_is_refused_by_name(tmp_path: Path, name: str):
    path = save(tmp_path, BAD[name][0]())
    with pytest.raises(WeightsError, match=BAD[name][1]) as error:
        import_backbone(path, "teacher")
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("file", "student", "message"),
    [
        (
            "resnet18",
            {"backbone": "resnet50"},
            r"the student .* timm's resnet50 .* set student\.backbone=resnet18 .*depth=1$",
        ),
        (
            "resnet18",
            {},
            r"the student a ViT .*conv1\.weight \S+ .*there, absent here.* set student\.backbone=resnet18 .*depth=1$",
        ),
        (
            "vit",
            {"backbone": "resnet18"},
            r"is a ViT .* the student a ResNet .* set student\.backbone=vit_tiny_patch16_224$",
        ),
        ("tiny", {"backbone": "resnet18"}, r"set student\.backbone=resnet50 student\.embed_dim=64 student\.depth=1$"),
    ],
)
def test_another_architecture_is_named_with_what_would_fit(
    tmp_path: Path, file: str, student: dict[str, Any], message: str
):
    files = {
        "resnet18": plain,
        "vit": lambda: build_backbone("vit_tiny_patch16_224").state_dict(),
        "tiny": lambda: build_resnet("resnet50", embed_dim=64, depth=1).state_dict(),
    }
    with torch.device("meta"):
        backbone = Student(StudentConfig(**student, objectives=("instance",))).backbone
    with pytest.raises(WeightsError, match=message):
        import_backbone(save(tmp_path, dict(files[file]())), None, backbone)


@pytest.mark.parametrize(
    "name", ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "wide_resnet50_2", "wide_resnet101_2"]
)
def test_shapes_are_timms(name: str):
    state = timm.create_model(name, num_classes=0, device="meta").state_dict()
    measures = measure(state)
    assert isinstance(measures, ResNetMeasures)
    assert measures.timm_name == name
    assert measures.shapes() == {key: tuple(value.shape) for key, value in state.items()}


@given(
    deep=st.booleans(),
    blocks=st.lists(st.integers(1, 3), min_size=4, max_size=4),
    channels=st.lists(st.integers(1, 4), min_size=4, max_size=4),
)
@settings(max_examples=15)
def test_shapes_of_any_plain_resnet(deep: bool, blocks: list[int], channels: list[int]):
    name, wide = ("resnet50" if deep else "resnet18"), [16 * each for each in channels]
    state = timm.create_model(name, num_classes=0, device="meta", layers=blocks, channels=wide).state_dict()
    measures = measure(state)
    assert isinstance(measures, ResNetMeasures)
    assert (list(measures.blocks), list(measures.inner), measures.bottleneck) == (blocks, wide, deep)
    assert measures.shapes() == {key: tuple(value.shape) for key, value in state.items()}


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "vit_tiny_patch16_224"])
def test_names_in_detectors_and_back(name: str):
    keys = list(timm.create_model(name, num_classes=0, device="meta").state_dict())
    for there in (detectron2_name, openmmlab_name):
        renamed = [there(key) for key in keys]
        assert len(set(renamed)) == len(keys)
        assert [from_detectors(key) for key in renamed] == keys


def test_detectron2_calls_them_so():
    """As the documentation of its converter for torchvision's files has it."""
    assert {name: detectron2_name(name) for name in (
        "conv1.weight", "bn1.running_mean", "layer1.0.conv1.weight", "layer4.2.bn3.bias", "layer2.0.downsample.0.weight",
        "layer3.0.downsample.1.running_var", "blocks.0.norm1.weight",
    )} == {
        "conv1.weight": "stem.conv1.weight", "bn1.running_mean": "stem.conv1.norm.running_mean",
        "layer1.0.conv1.weight": "res2.0.conv1.weight", "layer4.2.bn3.bias": "res5.2.conv3.norm.bias",
        "layer2.0.downsample.0.weight": "res3.0.shortcut.weight",
        "layer3.0.downsample.1.running_var": "res4.0.shortcut.norm.running_var", "blocks.0.norm1.weight": "blocks.0.norm1.weight",
    }  # fmt: skip
