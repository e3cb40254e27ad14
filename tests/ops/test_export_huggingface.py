"""Exports for transformers: it loads them without a word, and its features are ours."""

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from gristmill.models.resnet import build_resnet
from gristmill.ops.export import ExportError, export_checkpoint
from gristmill.ops.exported import PARTIAL, published_folder
from gristmill.ops.huggingface import configuration, names_of
from gristmill.pipeline.augment.colour import MEAN, STD
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.transforms import v2

from .test_export import call, checkpoint, no_larger_files, recipe_of
from .test_export_detectors import resnet_recipe

# By name, or the type checker reads all models that transformers has, for minutes.
transformers: Any = importlib.import_module("transformers")

# Wide enough weights that an approximate GELU or another epsilon shows.
LOUD = "student.linear_std=0.3"


def images(height: int, width: int) -> Tensor:
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(0))


def loaded(folder: Path) -> Any:
    model, info = transformers.AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def same(theirs: Any, backbone: Any, batch: Tensor, **more: Any) -> None:
    with torch.no_grad():
        answer, wanted = theirs(batch, **more), backbone.norm(backbone(batch))
    assert wanted.std() > 0.1
    last = answer.last_hidden_state
    if last.ndim == 4:
        torch.testing.assert_close(last.flatten(2).mT, wanted[:, 1:], rtol=0, atol=1e-5)
    else:
        torch.testing.assert_close(last, wanted, rtol=0, atol=1e-5)
    torch.testing.assert_close(answer.pooler_output.flatten(1), wanted[:, 0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("who", ["student", "teacher"])
def test_a_vit_has_the_same_features(tmp_path: Path, who: Any):
    pair = checkpoint(tmp_path / "run", recipe_of(LOUD), 3)
    backbone: Any = dict(zip(("student", "teacher"), pair, strict=True))[who].backbone.eval()
    folder, about = export_checkpoint(str(tmp_path / "run"), tmp_path / "hf", who, format="huggingface")
    model = loaded(folder)
    same(model, backbone, images(32, 32))
    assert sorted(each.name for each in folder.iterdir()) == [
        "README.md", "config.json", "model.safetensors", "preprocessor_config.json",
    ]  # fmt: skip
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert file.metadata()["gristmill.network"] == who
    assert about["gristmill.card"] == str(folder / "README.md")
    # A size that was not asked for: all but the positions is ours, and these are bicubic in torch's plain form.
    positions = backbone.pos_embed
    grid = positions[:, 1:].unflatten(1, (4, 4)).permute(0, 3, 1, 2)
    carried = nn.functional.interpolate(grid, size=(7, 7), mode="bicubic").flatten(2).mT
    backbone.pos_embed = nn.Parameter(torch.cat([positions[:, :1], carried], 1))
    same(model, backbone, images(56, 56), interpolate_pos_encoding=True)


@pytest.mark.parametrize("interp", ["official", "timm"])
@pytest.mark.parametrize("size", [(56, 56), (48, 24)])
def test_another_size_that_was_asked_for(tmp_path: Path, size: tuple[int, int], interp: str):
    _, teacher = checkpoint(tmp_path / "run", recipe_of(LOUD, f"student.pos_interp={interp}"), 1)
    folder, _ = export_checkpoint(str(tmp_path / "run"), tmp_path / "hf", format="huggingface", size=size)
    same(loaded(folder), teacher.backbone.eval(), images(*size))


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_a_resnet_has_the_same_features_at_any_size(tmp_path: Path, name: str):
    recipe = resnet_recipe(f"student.backbone={name}", f"student.embed_dim={64 if name == 'resnet18' else 256}")
    _, teacher = checkpoint(tmp_path / "run", recipe, 2)
    folder, _ = export_checkpoint(str(tmp_path / "run"), tmp_path / "hf", format="huggingface")
    model = loaded(folder)
    for size in ((64, 64), (96, 41)):
        same(model, teacher.backbone.eval(), images(*size))


def test_every_weight_of_a_named_resnet_has_its_place():
    """What the small ones above lack: several blocks a stage, of torchvision's widths."""
    backbone = build_resnet("resnet50")
    config = configuration(backbone.state_dict(), backbone, (224, 224), "resnet50")
    model = transformers.AutoModel.from_config(transformers.ResNetConfig(**config))
    wanted = {name: value.shape for name, value in model.state_dict().items()}
    assert {names_of(name)[0]: value.shape for name, value in backbone.state_dict().items()} == wanted


def test_pictures_are_prepared_as_probes_do(tmp_path: Path):
    checkpoint(tmp_path / "run", recipe_of(), 1)
    for name, size in (("hf", None), ("oblong", (48, 24))):
        export_checkpoint(str(tmp_path / "run"), tmp_path / name, format="huggingface", size=size)
    noise = torch.rand(3, 8, 12, generator=torch.Generator().manual_seed(0))
    smooth = nn.functional.interpolate(noise[None], size=(64, 96), mode="bicubic")[0].clamp(0, 1)
    picture: Any = v2.functional.to_pil_image(smooth)
    square = picture.crop((16, 0, 80, 64)).resize((32, 32), Image.Resampling.BILINEAR)
    wanted = v2.functional.normalize(
        v2.functional.to_dtype(v2.functional.to_image(square), scale=True), list(MEAN), list(STD)
    )
    got = transformers.AutoImageProcessor.from_pretrained(tmp_path / "hf")(picture, return_tensors="pt")["pixel_values"]
    assert got.shape == (1, 3, 32, 32)
    # Its own rounding and the rows at the edge, in units of one of 255 grey levels over the deviation (0.017).
    torch.testing.assert_close(got[0, :, 2:-2, 2:-2], wanted[:, 2:-2, 2:-2], rtol=0, atol=0.04)
    got = transformers.AutoImageProcessor.from_pretrained(tmp_path / "oblong")(picture, return_tensors="pt")[
        "pixel_values"
    ]
    assert got.shape == (1, 3, 48, 24)


@pytest.mark.parametrize(
    ("name", "message"),
    [("resnet18d", "is neither; export it with --format timm"), ("wide_resnet50_2", "no blocks as wide as those of")],
)
def test_networks_that_transformers_lacks(name: str, message: str):
    odd = timm.create_model(name, num_classes=0, device="meta")
    with pytest.raises(ExportError, match=message):
        configuration(odd.state_dict(), odd, (224, 224), name)


def test_mistakes_leave_nothing(tmp_path: Path):
    checkpoint(tmp_path / "run", recipe_of(), 1)
    run, out = tmp_path / "run", tmp_path / "hf"
    (tmp_path / "full").mkdir()
    (tmp_path / "mine.partial").mkdir()
    (tmp_path / "mine.partial" / "diary").touch()
    for arguments, message in (
        (("--out", tmp_path / "full"), "full exists; name a folder that does not"),
        (("--out", tmp_path / "x.safetensors"), "what is written is a folder"),
        (("--out", tmp_path / "no" / "hf"), "there is no folder"),
        (("--out", tmp_path / "mine"), "mine.partial is in the way, and holds what no export left"),
        (("--out", out, "--size", "12x8"), "multiples of the patch, 8"),
    ):
        code, text = call("export", run, "--format", "huggingface", *arguments)
        assert (code, message in text) == (2, True), text
    with no_larger_files(1 << 14), pytest.raises(OSError, match="File too large"):
        export_checkpoint(str(run), out, format="huggingface")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "mine.partial", "run"]
    # What a kill left is no obstacle.
    out.with_name("hf" + PARTIAL).mkdir()
    (out.with_name("hf" + PARTIAL) / ("model.safetensors" + PARTIAL)).write_bytes(b"half")
    code, text = call("export", run, "--format", "huggingface", "--out", out, "--json")
    assert code == 0, text
    assert json.loads(text)["out"] == str(out)
    assert len(load_file(out / "model.safetensors")) == 40  # 30 of timm, two qkv of two tensors as six each, the pooler
    assert json.loads((out / "config.json").read_text())["layer_norm_eps"] == 1e-6


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path):
    with pytest.raises(ZeroDivisionError), published_folder(tmp_path / "x", ("a",)) as folder:  # noqa: PT012
        (folder / "a").touch()
        assert not (tmp_path / "x").exists()
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())
