"""Exports of ResNets, and for detectors: the same features under other names, settings that fit, and clear refusals."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from gristmill.models.resnet import build_resnet
from gristmill.models.vit import build_backbone
from gristmill.models.weights import import_backbone
from gristmill.ops.detectors import DETECTORS, Detector, DetectorError
from gristmill.ops.export import ExportError, export_checkpoint, export_detector, export_timm
from gristmill.ops.recipe import Recipe, load_recipe
from safetensors import safe_open
from torch import Tensor, nn
from torchvision.models import resnet50

from .test_export import call, checkpoint, no_larger_files, recipe_of


def stirred(network: nn.Module) -> Any:
    """With running statistics that are not those of a new network."""
    draw = torch.Generator().manual_seed(3)
    for name, buffer in network.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            buffer += torch.rand(buffer.shape, generator=draw)
    return network.eval()


def images(side: int = 64) -> Tensor:
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))


def resnet_recipe(*more: str) -> Recipe:
    return load_recipe("demo", [
        "student.backbone=resnet18", "student.embed_dim=64", "student.depth=1", "student.patch_size=null", "student.heads=null",
        "student.drop_path=0", "student.image_size=64", "student.head_hidden=8", "student.head_out=8",
        "student.predictor_hidden=8", "student.prototypes=16", *more,
    ])  # fmt: skip


class Normed(nn.Conv2d):
    """A convolution as detectron2 has it, with its norm inside."""

    def __init__(self, before: int, after: int, side: int, stride: int = 1) -> None:
        super().__init__(before, after, side, stride, side // 2, bias=False)
        self.norm = nn.BatchNorm2d(after)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(super().forward(x))


class Block(nn.Module):
    def __init__(self, before: int, inner: int, after: int, stride: int) -> None:
        super().__init__()
        self.shortcut = Normed(before, after, 1, stride) if before != after or stride > 1 else nn.Identity()
        # STRIDE_IN_1X1 False
        self.conv1, self.conv2, self.conv3 = (
            Normed(before, inner, 1),
            Normed(inner, inner, 3, stride),
            Normed(inner, after, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv3(self.conv2(self.conv1(x).relu()).relu())
        return (y + self.shortcut(x)).relu()


class Detectron2(nn.Module):
    """The backbone of a detector: a ResNet-50 under detectron2's names."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.ModuleDict({"conv1": Normed(3, 64, 7, 2)})
        before = 64
        for stage, blocks in enumerate((3, 4, 6, 3)):
            inner, parts = 64 << stage, []
            for number in range(blocks):
                parts.append(Block(before, inner, 4 * inner, 2 if stage and not number else 1))
                before = 4 * inner
            self.add_module(f"res{stage + 2}", nn.Sequential(*parts))

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.max_pool2d(self.stem["conv1"](x).relu(), 3, 2, 1)
        for stage in range(2, 6):
            x = getattr(self, f"res{stage}")(x)
        return x.mean((2, 3))


@pytest.fixture(scope="module")
def fifty() -> Any:
    return stirred(build_resnet("resnet50", seed=1))


def test_the_resnets_of_others_give_the_same_features(tmp_path: Path, fifty: Any):
    """timm's, torchvision's (and mmdetection's: its names), detectron2's; each takes every tensor."""
    timms = timm.create_model(
        "resnet50", num_classes=0, checkpoint_path=str(export_timm(fifty, tmp_path / "x.safetensors"))
    )
    visions, d2s = resnet50(), Detectron2()
    visions.fc = nn.Identity()  # pyright: ignore[reportAttributeAccessIssue]
    paths = {each: export_detector(fifty, tmp_path / f"{each}.pth", each, {"gristmill.x": "y"}) for each in DETECTORS}
    mm = torch.load(paths["mmdetection"], weights_only=True)
    visions.load_state_dict(mm["state_dict"], strict=True)
    assert mm["meta"] == {"gristmill": {"gristmill.x": "y"}}
    d2 = torch.load(paths["detectron2"], weights_only=True)
    assert (d2["__author__"], d2["matching_heuristics"]) == ("Gristmill", True)
    d2s.load_state_dict(d2["model"], strict=True)
    with torch.no_grad():
        wanted = fifty(images())[:, 0]
        for network in (timms, visions, d2s):
            torch.testing.assert_close(network.eval()(images()), wanted, rtol=1e-5, atol=1e-5)


def networks() -> dict[str, Any]:
    return {
        "resnet18": stirred(build_resnet("resnet18")),
        "vit": build_backbone("vit_tiny_patch16_224", img_size=64, embed_dim=48, depth=3, num_heads=3, seed=1),
    }


@pytest.mark.parametrize("detector", DETECTORS)
@pytest.mark.parametrize("name", networks())
def test_there_and_back_is_equal_bit_for_bit(tmp_path: Path, name: str, detector: Detector):
    network = networks()[name]
    path = export_detector(network, tmp_path / "x.pth", detector)
    state, report = import_backbone(path, None, network)
    wanted = network.state_dict()
    assert state.keys() == wanted.keys()
    assert all(torch.equal(state[key], wanted[key]) for key in wanted)
    assert set(report.ignored) <= {"bookkeeping"}
    assert not report.notes or name == "vit"


def test_names_of_a_vit_in_mmpretrain(tmp_path: Path):
    path = export_detector(networks()["vit"], tmp_path / "x.pth", "mmdetection")
    names = set(torch.load(path, weights_only=True)["state_dict"])
    parts = ("weight", "bias")
    first = {f"layers.0.{layer}.{part}" for part in parts
             for layer in ("ln1", "ln2", "attn.qkv", "attn.proj", "ffn.layers.0.0", "ffn.layers.1")}  # fmt: skip
    assert {name for name in names if name.startswith("layers.0.")} == first
    assert {name for name in names if not name.startswith("layers.")} == {"cls_token", "pos_embed"} | {
        f"{layer}.{part}" for layer in ("patch_embed.projection", "ln1") for part in parts
    }


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("who", ["student", "teacher"])
def test_a_resnet_of_a_checkpoint(tmp_path: Path, who: Any, ranks: int):
    pair = checkpoint(tmp_path / "run", resnet_recipe(), ranks)
    network = dict(zip(("student", "teacher"), pair, strict=True))[who].backbone.eval()
    path, about = export_checkpoint(str(tmp_path / "run"), tmp_path / "x.safetensors", who)
    assert json.loads(about["gristmill.arguments"]) == {
        "num_classes": 0,
        "layers": [1] * 4,
        "channels": [8, 16, 32, 64],
    }
    with torch.no_grad(), safe_open(path, "pt") as file:
        named = file.metadata()
        model = timm.create_model(
            named["gristmill.model"], checkpoint_path=str(path), **json.loads(named["gristmill.arguments"])
        )
        torch.testing.assert_close(model.eval()(images()), network(images())[:, 0], rtol=1e-5, atol=1e-5)
    state, _ = import_backbone(path, None, network)
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())


def test_the_command_line(tmp_path: Path):
    checkpoint(tmp_path / "run", resnet_recipe("student.embed_dim=null", "student.depth=null"), 2)
    run, out = tmp_path / "run", tmp_path / "x.pth"
    code, text = call("export", run, "--out", out, "--format", "detectron2")
    assert code == 0, text
    assert "the teacher after 64 images" in text
    assert f"MODEL.WEIGHTS {out} MODEL.RESNETS.DEPTH 18 MODEL.RESNETS.STRIDE_IN_1X1 False" in text
    assert "INPUT.FORMAT RGB MODEL.PIXEL_MEAN [123.675,116.28,103.53] MODEL.PIXEL_STD [58.395,57.12,57.375]" in text
    code, text = call("import", out, "--out", tmp_path / "y.safetensors")
    assert code == 0, text
    assert "timm's resnet18" in text
    code, text = call("export", run, "--out", out, "--format", "mmdetection", "--student")
    assert (code, "type='ResNet', depth=18, style='pytorch'" in text, "bgr_to_rgb=True" in text) == (0, True, True), (
        text
    )
    code, text = call("export", run, "--out", out, "--format", "mmdetection", "--json")
    assert len(json.loads(json.loads(text)["gristmill.settings"])) == 2
    for arguments, message in (
        (("--out", tmp_path / "x.safetensors", "--format", "detectron2"), "end in .pth"),
        (("--out", tmp_path / "no" / "x.pth", "--format", "mmdetection"), "there is no folder"),
        (("--out", out, "--format", "official"), "Mugs' layout, which has no place for resnet18"),
        (("--out", out, "--size", "96x96"), "no position embedding and takes any size"),
        (
            ("--out", out, "--format", "caffe"),
            "'caffe' is not one of 'timm', 'huggingface', 'onnx', 'torch-export', 'detectron2'",
        ),
    ):
        code, text = call("export", run, *arguments)
        assert (code, message in text) == (2, True), text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "x.pth", "x.pth.md", "y.safetensors"]


def test_a_vit_of_a_checkpoint(tmp_path: Path):
    _, teacher = checkpoint(tmp_path / "run", recipe_of(), 2)
    run, out = tmp_path / "run", tmp_path / "x.pth"
    code, text = call("export", run, "--out", out, "--format", "detectron2", "--size", "64x64")
    assert code == 0, text
    assert (
        f"train.init_checkpoint={out} model.backbone.net.pretrain_img_size=64 model.backbone.net.patch_size=8" in text
    )
    assert torch.load(out, weights_only=True)["model"]["pos_embed"].shape == (1, 65, 32)
    code, text = call("export", run, "--out", out, "--format", "mmdetection")
    sizes = "arch=dict(embed_dims=32, num_layers=2, num_heads=2, feedforward_channels=128), img_size=32, patch_size=8"
    assert (code, f"type='mmpretrain.VisionTransformer', {sizes}" in text) == (0, True), text
    state, _ = import_backbone(out, None, teacher.backbone)
    assert all(torch.equal(value, state[name]) for name, value in teacher.backbone.state_dict().items())
    for more, message in (
        (("--size", "64x32"), "square images only"),
        (("--size", "12x12"), "multiples of the patch, 8"),
    ):
        code, text = call("export", run, "--out", out, "--format", "mmdetection", *more)
        assert (code, message in text) == (2, True), text


def test_heads_that_the_official_layout_lacks(tmp_path: Path):
    head = "student.projections={instance: {hidden: 8, out: 8}}"
    checkpoint(tmp_path / "run", recipe_of(head), 1)
    with pytest.raises(ExportError, match="has no place for the objective instance"):
        export_checkpoint(str(tmp_path / "run"), tmp_path / "x.safetensors", format="official")


@pytest.mark.parametrize("detector", DETECTORS)
def test_networks_that_detectors_lack(tmp_path: Path, detector: Detector):
    odd = timm.create_model("resnet18d", num_classes=0, device="meta")
    with pytest.raises(DetectorError, match=f"{detector} has torchvision's ResNets .* is neither; .* --format timm"):
        export_detector(odd, tmp_path / "x.pth", detector)
    wide = timm.create_model("wide_resnet50_2", num_classes=0, device="meta")
    with pytest.raises(
        DetectorError, match=rf"{detector} builds resnet18, .* and this is a ResNet of .*wide_resnet50_2"
    ):
        export_detector(wide, tmp_path / "x.pth", detector)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_the_old_file(tmp_path: Path):
    network = networks()["vit"]
    path = export_detector(network, tmp_path / "x.pth", "detectron2")
    old = path.read_bytes()
    with no_larger_files(1 << 16), pytest.raises(OSError, match="File too large"):
        export_detector(network, path, "mmdetection")
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]
