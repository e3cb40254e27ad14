"""Exports as programs: the same numbers without the code, and none that differs; and what docs/features.md says, run."""

import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from gristmill.ops import programs
from gristmill.ops.export import ExportError, export_checkpoint
from gristmill.ops.programs import BOUND, OUTPUTS, compare, open_program, put
from PIL import Image
from torch import Tensor, nn

from .test_export import call, checkpoint, recipe_of
from .test_export_detectors import resnet_recipe

DOCS = Path(__file__).parents[2] / "docs"
LOUD = ("student.linear_std=0.3", "student.embed_dim=48", "student.heads=3")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A run of a small ViT, and its teacher's backbone."""
    folder = tmp_path_factory.mktemp("programs") / "run"
    _, teacher = checkpoint(folder, recipe_of(*LOUD), 2)
    return folder, teacher.backbone.eval()


@pytest.fixture(scope="module")
def exported(run: tuple[Path, Any]) -> tuple[Path, dict[str, str]]:
    """Its ONNX file, and what was said."""
    return export_checkpoint(str(run[0]), run[0].with_name("first.onnx"), format="onnx")


def images(count: int, height: int, width: int) -> Tensor:
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(1))


def same(got: Any, backbone: Any, batch: Tensor) -> None:
    with torch.no_grad():
        wanted = backbone.norm(backbone(batch))
    assert wanted.std() > 0.1
    bound = 1e-5 * float(wanted.abs().max())
    torch.testing.assert_close(got["class_token"], wanted[:, 0], rtol=0, atol=bound)
    torch.testing.assert_close(got["patch_tokens"], wanted[:, 1:], rtol=0, atol=bound)


def test_onnx_of_a_vit(run: tuple[Path, Any], exported: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch):
    path, about = exported
    assert 0 < float(about["gristmill.difference"]) <= BOUND
    session = onnxruntime.InferenceSession(path)
    assert [each.name for each in session.get_inputs()] == ["images"]
    assert [each.name for each in session.get_outputs()] == list(OUTPUTS)
    assert session.get_modelmeta().custom_metadata_map["gristmill.network"] == "teacher"
    for count in (1, 5):
        batch = images(count, 32, 32)
        answer: Any = session.run(list(OUTPUTS), {"images": batch.numpy()})
        same(dict(zip(OUTPUTS, map(torch.from_numpy, answer), strict=True)), run[1], batch)
    onnx.checker.check_model(onnx.load(path), full_check=True)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)  # as where it is not installed
    same(open_program(path, "onnx")(batch), run[1], batch)


def test_another_size_that_was_asked_for(tmp_path: Path, run: tuple[Path, Any]):
    path, _ = export_checkpoint(str(run[0]), tmp_path / "x.pt2", format="torch-export", size=(48, 24))
    for count in (1, 5):
        same(open_program(path, "torch-export")(images(count, 48, 24)), run[1], images(count, 48, 24))


@pytest.mark.parametrize("form", ["onnx", "torch-export"])
def test_a_resnet_takes_any_size(tmp_path: Path, form: Any):
    _, teacher = checkpoint(tmp_path / "run", resnet_recipe("probes.size=64"), 1)
    out = tmp_path / f"x{programs.SUFFIX[form]}"
    path, _ = export_checkpoint(str(tmp_path / "run"), out, format=form)
    for batch in (images(1, 64, 64), images(5, 65, 130)):
        same(open_program(path, form)(batch), teacher.backbone.eval(), batch)


class Bent(nn.Module):
    """What an exporter with a fault would make: traced, it computes something else than it does when it is run."""

    def __init__(self, wrong: float) -> None:
        super().__init__()
        self.wrong = wrong

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        mean = images.mean((2, 3))
        if torch.compiler.is_exporting():
            mean = mean * self.wrong
        return {"class_token": mean, "patch_tokens": images.flatten(2).mT}


@pytest.mark.parametrize("wrong", [1 + 10 * BOUND, float("nan")])
def test_what_differs_is_refused_and_removed(tmp_path: Path, wrong: float):
    path, batches = tmp_path / "x.pt2", [images(2, 4, 4), images(1, 4, 4)]
    assert put(path, "torch-export", Bent(1 + BOUND / 10), Bent(1.0), batches, {}) < BOUND
    old = path.read_bytes()
    with pytest.raises(
        ExportError, match=r"was not written: its class_token of 2 x 3 x 4 x 4 differs .* more than 1e-04"
    ):
        put(path, "torch-export", Bent(wrong), Bent(1.0), batches, {})
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]


def test_another_shape_differs(tmp_path: Path):
    with pytest.raises(ExportError, match=r"patch_tokens of 1 x 3 x 2 x 2 is \[1, 3, 3\], not \[1, 4, 3\]"):
        compare(lambda x: {"class_token": x.mean((2, 3)), "patch_tokens": torch.zeros(1, 3, 3)}, Bent(1.0), [images(1, 2, 2)], tmp_path)  # fmt: skip


def test_mistakes_leave_nothing(tmp_path: Path, run: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch):
    folder, _ = run
    for arguments, message in (
        (("--format", "onnx", "--out", tmp_path / "x.pt2"), "what is written is ONNX, so let its name end in .onnx"),
        (("--format", "torch-export", "--out", tmp_path / "x.onnx"), "let its name end in .pt2"),
        (("--format", "onnx", "--out", tmp_path / "x.onnx", "--size", "12x8"), "multiples of the patch, 8"),
    ):
        code, text = call("export", folder, *arguments)
        assert (code, message in text) == (2, True), text
    monkeypatch.setattr(programs, "LARGEST", 1000)
    code, text = call("export", folder, "--format", "onnx", "--out", tmp_path / "x.onnx")
    assert (code, "an ONNX file holds 2 GiB; take --format torch-export" in text) == (2, True), text
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    code, text = call("export", folder, "--format", "onnx", "--out", tmp_path / "x.onnx")
    assert (code, "needs the package onnxscript" in text, "pip install 'gristmill[export]'" in text) == (2, True, True)
    assert not list(tmp_path.iterdir())


def test_the_docs(
    tmp_path: Path, run: tuple[Path, Any], exported: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch, capsys: Any
):
    """Every block of docs/features.md, as somebody would copy it."""
    folder, backbone = run
    monkeypatch.chdir(tmp_path)
    shutil.copy(exported[0], "first.onnx")
    for form, out in (("timm", "first.safetensors"), ("huggingface", "first-hf"), ("torch-export", "first.pt2")):
        code, text = call("export", folder, "--format", form, "--out", out)
        assert (code, "checked: it differs from torch by at most" in text) == (0, form in programs.SUFFIX), text
    draw = np.random.Generator(np.random.PCG64(0))
    for number in range(4):
        (tmp_path / "pictures" / f"{number % 2}").mkdir(parents=True, exist_ok=True)
        picture = Image.fromarray(draw.integers(0, 256, (40, 40, 3), dtype=np.uint8))
        picture.save(tmp_path / "pictures" / f"{number % 2}" / f"{number}.png")
    names: dict[str, Any] = {}
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / "features.md").read_text(), re.DOTALL)
    assert len(blocks) == 4
    for block in blocks:
        exec(block, names)
    with torch.no_grad():
        batch = torch.stack([names["prepare"](Image.open(file)) for file in names["files"]])
        wanted = backbone.norm(backbone(batch))
    assert [file.name for file in names["files"]] == ["0.png", "2.png", "1.png", "3.png"]
    for name in ("features", "class_token_too"):
        torch.testing.assert_close(names[name], wanted[:, 0], rtol=0, atol=1e-4)
    torch.testing.assert_close(torch.from_numpy(names["class_token"]), wanted[:, 0], rtol=0, atol=1e-4)
    torch.testing.assert_close(torch.from_numpy(names["patch_tokens"]), wanted[:, 1:], rtol=0, atol=1e-4)
    # Pixels differ by a rounding between timm's and transformers' preparation.
    assert torch.cosine_similarity(names["same"], wanted[:, 0]).min() > 0.99
    closest = sorted("123", key=lambda name: -torch.cosine_similarity(wanted[0, 0], wanted[[0, 2, 1, 3].index(int(name)), 0], dim=0))  # fmt: skip
    assert capsys.readouterr().out.splitlines()[-1] == str([f"{name}.png" for name in closest])
