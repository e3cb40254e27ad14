"""Weights of others for ResNets: the layouts of DenseCL, HCSC, MoCo, SwAV, BYOL, SimCLR and SimSiam, to the last tensor."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from gristmill.models.detectors import detectron2_name
from gristmill.models.mlp import MlpConfig
from gristmill.models.resnet import build_resnet
from gristmill.models.student import Student, StudentConfig
from gristmill.models.teacher import make_teacher
from gristmill.models.vit import build_backbone
from gristmill.models.weights import Who, import_backbone, import_student
from torchvision.models import resnet50

from .resnet_files import (
    SMALL,
    State,
    head,
    hollow,
    layer,
    left,
    manifest,
    moco1,
    moco2,
    plain,
    same,
    save,
    trained,
    under,
)


@pytest.mark.parametrize("who", ["student", "teacher"])
def test_every_key_of_densecl(tmp_path: Path, who: Who):
    state = hollow(manifest("densecl")["full"])
    path = save(tmp_path, {"meta": {"env": "x"}, "state_dict": state, "optimizer": {"param_groups": []}})
    got, report = import_student(path, who)
    side = {"student": "encoder_q", "teacher": "encoder_k"}[who]
    wanted = {f"backbone.{name.removeprefix(f'{side}.0.')}" for name in state if name.startswith(f"{side}.0.")}
    heads = {f"heads.{head}.projector.{n}.{part}": f"{side}.1.{mlp}.{n}.{part}"
             for head, mlp in (("instance", "mlp"), ("dense", "mlp2")) for n in (0, 2) for part in ("weight", "bias")}  # fmt: skip
    assert got.keys() == wanted | heads.keys()
    for ours, theirs in heads.items():
        assert torch.equal(got[ours], state[theirs].flatten(1) if state[theirs].dim() == 4 else state[theirs])
    assert torch.equal(got["backbone.layer3.5.bn2.running_var"], state[f"{side}.0.layer3.5.bn2.running_var"])
    assert set(report.reshaped.values()) == {"1x1 convolution to linear layer"}
    assert len(report.reshaped) == 2
    assert {group: len(names) for group, names in report.ignored.items()} == {
        "copies": 318, "other network": 326, "queues": 4, "bookkeeping": 1, "optimizer": 1,
    }  # fmt: skip
    assert len(got) + 318 + 326 + 4 == len(state) == 974
    assert report.network == who
    assert report.what == "a ResNet of 3 + 4 + 6 + 3 bottlenecks, width 2048, timm's resnet50"


def test_densecl_as_released(tmp_path: Path):
    state = hollow(manifest("densecl")["released_backbone_only"])
    got, report = import_backbone(save(tmp_path, {"state_dict": state, "author": "DenseCL"}))
    assert same(got, {name: value.clone() for name, value in state.items()})
    assert (report.network, report.ignored, report.notes) == ("the only one", {"bookkeeping": ["author"]}, [])
    resnet50(num_classes=1).load_state_dict(got | head_of_one(), strict=True)
    timm.create_model("resnet50", num_classes=0).load_state_dict(got, strict=True)
    build_resnet("resnet50").load_state_dict(got, strict=True)


def head_of_one() -> State:
    return {"fc.weight": torch.zeros(1, 2048), "fc.bias": torch.zeros(1)}


@pytest.mark.parametrize("who", ["student", "teacher"])
def test_every_key_of_hcsc(tmp_path: Path, who: Who):
    state = hollow(manifest("hcsc"))
    got, report = import_student(save(tmp_path, {"epoch": 200, "arch": "resnet50", "state_dict": state}), who)
    side = {"student": "module.encoder_q.", "teacher": "module.encoder_k."}[who]
    theirs = {name.removeprefix(side): value for name, value in state.items() if name.startswith(side)}
    assert same(got, {
        f"heads.hierarchy.projector.{name[3:]}" if name.startswith("fc.") else f"backbone.{name}": value.clone()
        for name, value in theirs.items()
    })  # fmt: skip
    assert {group: len(names) for group, names in report.ignored.items()} == {
        "other network": 322, "queues": 2, "bookkeeping": 3,
    }  # fmt: skip
    assert len(got) + 322 + 2 + 1 == len(state) == 647


def moco3() -> State:
    state = under("module.predictor.", head(5, 16, 32, 16, norm=True))
    for seed, side in enumerate(("base_encoder", "momentum_encoder")):
        state |= under(f"module.{side}.", plain(seed) | under("fc.", head(seed, 64, 32, 16, norm=True)))
    return state


def byol(online: str, target: str, backbone: str = "net.", predictor: str = "online_predictor.") -> State:
    state = under(predictor, head(5, 16, 32, 16, norm=True))
    for seed, side in enumerate((online, target)):
        state |= under(
            f"{side}.", under(backbone, plain(seed)) | under("projector.", head(seed, 64, 32, 16, norm=True))
        )
    return state


def solo() -> State:
    return (
        under("backbone.", plain(0)) | under("momentum_backbone.", plain(1))
        | under("projector.", head(0, 64, 32, 16)) | under("momentum_projector.", head(1, 64, 32, 16))
    )  # fmt: skip


PAIRS: dict[str, tuple[Callable[[], Any], str | None]] = {
    "moco v1": (lambda: {"epoch": 1, "state_dict": moco1(), "optimizer": {}}, "instance"),
    "moco v2": (lambda: {"epoch": 1, "state_dict": moco2(), "optimizer": {}}, "instance"),
    "moco v2, no prefix": (lambda: moco2(""), "instance"),
    "moco v3": (lambda: {"state_dict": moco3(), "scaler": {}}, "batch_contrast"),
    "byol": (lambda: byol("online_encoder", "target_encoder"), "bootstrap"),
    "byol, another": (lambda: {"model": byol("online_network", "target_network", "encoder.", "predictor.")}, "bootstrap"),
    "byol, one more": (lambda: under("learner.", byol("online_backbone", "target_backbone", "")), "bootstrap"),
    "solo-learn": (lambda: {"state_dict": solo()}, None),
    "mmselfsup": (
        lambda: {"state_dict": under("backbone.", plain(0)) | under("encoder_k.module.0.", plain(1))}, "instance"
    ),
}  # fmt: skip


@pytest.mark.parametrize("who", ["student", "teacher", None])
@pytest.mark.parametrize("layout", PAIRS)
def test_either_of_two_networks(tmp_path: Path, layout: str, who: Who | None):
    content, objective = PAIRS[layout][0](), PAIRS[layout][1]
    path = save(tmp_path, content)
    got, report = import_backbone(path, who, build_resnet("resnet18", **SMALL))
    seed = 1 if who == "teacher" else 0
    assert same(got, plain(seed))
    assert report.network == (who or "student")  # what its authors evaluate
    whole, report = import_student(path, who)
    heads = {name for name in whole if not name.startswith("backbone.")}
    assert all(name.startswith(f"heads.{objective}.") for name in heads)
    if objective and layout != "mmselfsup":
        sizes = [whole[name].shape for name in sorted(heads) if name.endswith(".weight") and whole[name].dim() == 2]
        predictor = [(32, 16), (16, 32)] if objective != "instance" and who != "teacher" else []
        assert sizes == [*predictor, *([(16, 64)] if layout == "moco v1" else [(32, 64), (16, 32)])]
    inner = content.get("state_dict", content.get("model", content))
    assert len(report.used) + len([name for name in left(report) if name in inner]) == len(inner)


def swav(prototypes: State) -> State:
    return under("module.", plain() | under("projection_head.", head(3, 64, 32, 16, norm=True)) | prototypes)


def simsiam() -> State:
    projector = under("encoder.fc.", head(1, 64, 32, 32, 16, norm=True))
    return under("module.", under("encoder.", plain()) | projector | under("predictor.", head(2, 16, 8, 16, norm=True)))


SINGLE: dict[str, tuple[Callable[[], Any], dict[str, int]]] = {
    "swav": (lambda: swav({"prototypes.weight": torch.ones(30, 16)}), {"swapped": 15}),
    "swav, one layer": (
        lambda: plain() | layer("projection_head", 3, 16), {"swapped": 2}
    ),
    "deepcluster v2": (
        lambda: {"epoch": 3, "state_dict": swav({f"prototypes.prototypes{i}.weight": torch.ones(3, 16) for i in (0, 1)})},
        {"clusters": 14},
    ),
    "simsiam": (lambda: {"epoch": 1, "arch": "resnet18", "state_dict": simsiam(), "optimizer": {}}, {"bootstrap": 35}),
    "simclr": (
        lambda: {"state_dict": under("backbone.", plain() | under("fc.", head(1, 64, 64, 16)))}, {"batch_contrast": 4}
    ),
    "simclr, another": (
        lambda: under("encoder.", plain()) | under("projector.", head(1, 64, 64, 16)), {"batch_contrast": 4}
    ),
    "simclr, one more": (
        lambda: under("convnet.", plain()) | under("projection.", head(1, 64, 64, 16)), {"batch_contrast": 4}
    ),
    "torchvision": (lambda: plain() | layer("fc", 0, 10), {}),
    "dino": (lambda: {"teacher": under("backbone.", plain()), "student": under("module.backbone.", plain(1))}, {}),
    "vissl": (
        lambda: {"phase_idx": 3, "classy_state_dict": {
            "train": True, "base_model": {"model": {
                "trunk": under("_feature_blocks.", plain()), "heads": under("0.clf.", head(1, 64, 16))
            }},
        }}, {}
    ),
    "vissl, converted": (lambda: {"model_state_dict": plain()}, {}),
    "detectron2": (
        lambda: {"model": {f"backbone.bottom_up.{detectron2_name(name)}": value for name, value in plain().items()},
                 "__author__": "x", "matching_heuristics": True}, {}
    ),
    "mmdetection": (lambda: {"meta": {"x": 1}, "state_dict": under("backbone.", plain())}, {}),
}  # fmt: skip


@pytest.mark.parametrize("layout", SINGLE)
def test_the_same_backbone_out_of_every_layout(tmp_path: Path, layout: str):
    build, heads = SINGLE[layout]
    path = save(tmp_path, build())
    got, report = import_backbone(path, None, build_resnet("resnet18", **SMALL))
    assert same(got, plain())
    assert not report.missing
    whole, report = import_student(path, None)
    found: dict[str, int] = {}
    for name in whole:
        if not name.startswith("backbone."):
            found[name.split(".")[1]] = found.get(name.split(".")[1], 0) + 1
    assert found == heads
    text = "\n".join(report.lines())
    assert all(group in text for group in report.ignored)
    network = timm.create_model("resnet18", num_classes=0, layers=[1] * 4, channels=(8, 16, 32, 64))
    network.load_state_dict(got, strict=True)
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    ours = build_resnet("resnet18", **SMALL)
    ours.load_state_dict(got, strict=True)
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(images)[:, 0], network.eval()(images), rtol=1e-5, atol=1e-5)


def test_moco_v3_on_a_vit(tmp_path: Path):
    small = build_backbone("vit_small_patch16_224", img_size=32, depth=12)
    state: State = under("module.predictor.", head(5, 16, 32, 16, norm=True))
    for seed, side in enumerate(("base_encoder", "momentum_encoder")):
        projector = under("head.", head(seed, 384, 32, 32, 16, norm=True))
        state |= under(f"module.{side}.", trained(small, seed) | projector)
    sides: dict[Who, int] = {"student": 0, "teacher": 1}
    for who, seed in sides.items():
        got, report = import_backbone(save(tmp_path, {"state_dict": state}), who, small)
        assert same(got, trained(small, seed))
        assert report.notes == ["MoCo v3's ViT-S has 12 attention heads, timm's has 6: set student.heads=12"]
    whole, _ = import_student(tmp_path / "x.pth", "student")
    assert {name.split(".")[2] for name in whole if name.startswith("heads.batch_contrast.")} == {
        "projector",
        "predictor",
    }


def test_heads_go_into_a_student(tmp_path: Path):
    mlp = MlpConfig(hidden=32, out=16)
    config = StudentConfig(
        backbone="resnet18", **SMALL, objectives=("instance", "dense"), projections={"instance": mlp, "dense": mlp}
    )
    student = Student(config, seed=1)
    state = {name: value.clone() for name, value in student.state_dict().items()}
    theirs: State = {}
    for side in ("encoder_q", "encoder_k"):
        for name, value in state.items():
            if name.startswith("backbone."):
                theirs[f"{side}.0.{name.removeprefix('backbone.')}"] = value
                theirs[name] = value
            else:
                dense = name.startswith("heads.dense.")
                number = name.split(".projector.")[1]
                wide = value[:, :, None, None] if dense and value.dim() == 2 else value
                theirs[f"{side}.1.{'mlp2' if dense else 'mlp'}.{number}"] = wide
    other = Student(config, seed=2)
    sides: dict[Who, Student] = {"student": other, "teacher": make_teacher(other)}
    for who, network in sides.items():
        got, report = import_student(save(tmp_path, {"state_dict": theirs}), who, network)
        assert (report.missing, len(got)) == ([], len(state))
        network.load_state_dict(got, strict=True)
        assert same(dict(network.state_dict()), state)


def test_the_head_of_moco_v2_is_that_of_hcsc(tmp_path: Path):
    mlp = MlpConfig(hidden=32, out=16)
    student = Student(
        StudentConfig(backbone="resnet18", **SMALL, objectives=("hierarchy",), projections={"hierarchy": mlp})
    )
    got, report = import_student(save(tmp_path, {"state_dict": moco2()}), "student", student)
    assert not report.missing
    assert torch.equal(got["heads.hierarchy.projector.2.weight"], moco2()["module.encoder_q.fc.2.weight"])


def test_norms_without_a_count_of_batches(tmp_path: Path):
    old = {name: value for name, value in plain().items() if not name.endswith("num_batches_tracked")}
    got, report = import_backbone(save(tmp_path, old), None, build_resnet("resnet18", **SMALL))
    assert same({name: got[name] for name in old}, old)
    assert got["layer4.0.bn2.num_batches_tracked"] == 0
    assert got.keys() == plain().keys()
    assert report.notes == ["13 batch norms have no count of batches in the file; it begins at 0"]
