"""Exports: timm builds the same network from them, whatever ranks wrote the checkpoint, and nothing half-written stays."""

import json
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from click.testing import CliRunner
from gristmill.models.student import Student, StudentConfig
from gristmill.models.teacher import make_teacher
from gristmill.models.vit import Backbone, tokens
from gristmill.models.weights import import_backbone, import_student
from gristmill.ops.checkpoint import STATE, Content, Part
from gristmill.ops.cli import main
from gristmill.ops.export import ExportError, export_checkpoint, export_timm, timm_arguments, write_tensors
from gristmill.ops.recipe import Recipe, load_recipe
from gristmill.ops.stores import LocalStore
from gristmill.ops.writer import Writer
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from .writers import steps

SIZES = {
    "as named": StudentConfig(backbone="vit_tiny_patch16_224", image_size=64, objectives=("instance",)),
    "odd": StudentConfig(
        backbone="vit_tiny_patch16_224", image_size=42, patch_size=14, embed_dim=60, depth=3, heads=5, prototypes=16,
        head_hidden=8, head_out=8, predictor_hidden=8,
    ),
}  # fmt: skip


def features(student: Student, images: Tensor) -> Tensor:
    backbone = student.eval().backbone
    assert isinstance(backbone, Backbone)
    with torch.no_grad():
        return tokens(backbone, images)[1][:, 0]


# Of features of order 1: patches, and products of some size, may be another library's (models/products.py).
CLOSE: dict[str, Any] = {"rtol": 0, "atol": 1e-5}


def timms(path: Path, config: StudentConfig, size: tuple[int, int] | None = None, **more: Any) -> torch.nn.Module:
    arguments = timm_arguments(config, size) | more
    return timm.create_model(config.backbone, checkpoint_path=str(path), **arguments).eval()


@pytest.mark.parametrize("sizes", SIZES)
def test_timm_gives_the_same_features(tmp_path: Path, sizes: str):
    config = SIZES[sizes]
    student = Student(config, seed=3)
    path = export_timm(student, tmp_path / "x.safetensors", {"recipe": "mine"})
    images = torch.randn(2, 3, config.image_size, config.image_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        theirs = timms(path, config)(images)
    torch.testing.assert_close(theirs, features(student, images), **CLOSE)
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt", "recipe": "mine"}


def test_timm_carries_positions_as_we_do_in_its_form(tmp_path: Path):
    config = SIZES["odd"].model_copy(update={"pos_interp": "timm"})
    student = Student(config)
    path = export_timm(student.backbone, tmp_path / "x.safetensors")
    images = torch.randn(2, 3, 70, 28, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        theirs = timms(path, config)(images)
    torch.testing.assert_close(theirs, features(student, images), **CLOSE)


def test_there_and_back_is_equal_bit_for_bit(tmp_path: Path):
    config = SIZES["odd"].model_copy(update={"objectives": ("patch", "group")})
    student = Student(config, seed=1)
    path = export_timm(student, tmp_path / "x.safetensors")
    state, report = import_backbone(path, "student", Student(config, seed=2).backbone)
    wanted = {k: v for k, v in student.backbone.state_dict().items() if k != "mask_token"}
    assert state.keys() == wanted.keys()
    assert all(torch.equal(state[name], wanted[name]) for name in wanted)
    assert report.missing == ["backbone.mask_token"]
    assert timms(path, config).pos_embed.shape == (1, 10, 60)  # timm takes no mask token


def recipe_of(*more: str) -> Recipe:
    return load_recipe("demo", [
        "student.image_size=32", "student.patch_size=8", "student.embed_dim=32", "student.depth=2", "student.heads=2",
        "student.head_hidden=8", "student.head_out=8", "student.predictor_hidden=8", "student.prototypes=16", *more,
    ])  # fmt: skip


def checkpoint(folder: Path, recipe: Recipe, ranks: int, position: int = 64) -> tuple[Student, Student]:
    """A run folder with a checkpoint of two different networks, cut into ranges over `ranks`."""
    student = Student(recipe.student, seed=1)
    teacher = make_teacher(Student(recipe.student, seed=2))
    draw = torch.Generator().manual_seed(3)
    for name, buffer in [*student.named_buffers(), *teacher.named_buffers()]:
        # As training leaves them, and such that something is left of an image behind the last ReLU.
        if name.endswith("running_mean"):
            buffer += 0.2 * torch.rand(buffer.shape, generator=draw) - 0.1
        elif name.endswith("running_var"):
            buffer *= 0.2 + 0.3 * torch.rand(buffer.shape, generator=draw)
    store = LocalStore(folder / "checkpoints")
    writers = [Writer(store, rank, ranks, keep=9) for rank in range(ranks)]
    buffers = {f"{w}/{n}": b for w, net in (("student", student), ("teacher", teacher)) for n, b in net.named_buffers()}
    for rank, writer in enumerate(writers):
        parts = []
        for group, network in (("student", student), ("teacher", teacher)):
            for name, value in network.named_parameters():
                flat = value.detach().reshape(-1)
                cuts = [len(flat) * each // ranks for each in (rank, rank + 1)]
                parts.append(Part(group, name, cuts[0], tuple(value.shape), flat[cuts[0] : cuts[1]]))
        writer.begin(position, Content(parts, {"buffers": buffers}, {"recipe": recipe.model_dump(mode="json")}))
    assert all(settled.failure is None for settled in steps(writers))
    return student, teacher


@pytest.mark.parametrize("who", ["student", "teacher"])
@pytest.mark.parametrize("ranks", [1, 3])
def test_a_checkpoint_of_any_ranks(tmp_path: Path, ranks: int, who: Any):
    recipe = recipe_of("student.norm_last_layer=true")
    networks = dict(zip(("student", "teacher"), checkpoint(tmp_path / "run", recipe, ranks), strict=True))
    network, out = networks[who], tmp_path / "x.safetensors"
    path, about = export_checkpoint(str(tmp_path / "run"), out, who)
    got, wanted = load_file(path), network.backbone.state_dict()
    assert got.keys() == wanted.keys()
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)
    assert about["gristmill.recipe"] == "demo"
    assert about["gristmill.source"] == "run/checkpoints/000000000064"
    assert (about["gristmill.position"], about["gristmill.network"]) == ("64", who)
    images = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), safe_open(path, "pt") as file:
        named = file.metadata()
        model = timm.create_model(
            named["gristmill.model"], checkpoint_path=str(path), **json.loads(named["gristmill.arguments"])
        )
        torch.testing.assert_close(model.eval()(images), features(network, images), **CLOSE)
    export_checkpoint(str(tmp_path / "run"), out, who, format="official")
    state, _ = import_student(out, who)
    assert state.keys() == network.state_dict().keys()
    assert all(torch.equal(value, network.state_dict()[name]) for name, value in state.items())


@pytest.mark.parametrize("interp", ["official", "timm"])
def test_positions_for_another_size(tmp_path: Path, interp: str):
    recipe = recipe_of(f"student.pos_interp={interp}")
    _, teacher = checkpoint(tmp_path / "run", recipe, 1)
    path, _ = export_checkpoint(
        str(tmp_path / "run" / "checkpoints" / "000000000064"), tmp_path / "x.safetensors", size=(48, 24)
    )
    images = torch.randn(1, 3, 48, 24, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        theirs = timms(path, recipe.student, (48, 24), dynamic_img_size=False)(images)
    torch.testing.assert_close(theirs, features(teacher, images), **CLOSE)


def call(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(main, [str(each) for each in arguments])
    return result.exit_code, result.output


def test_the_command_line(tmp_path: Path):
    checkpoint(tmp_path / "run", recipe_of(), 2)
    run, out = tmp_path / "run", tmp_path / "x.safetensors"
    code, text = call("export", run, "--out", out)
    assert code == 0, text
    assert "the teacher after 64 images" in text
    line = text.strip().splitlines()[-1]
    assert line.startswith("timm.create_model('vit_tiny_patch16_224', checkpoint_path=")
    assert eval(line, {"timm": timm}).embed_dim == 32
    code, text = call("export", run, "--out", out, "--student", "--json")
    assert json.loads(text)["gristmill.network"] == "student"
    code, text = call("import", out, "--out", tmp_path / "y.safetensors")
    assert code == 0, text
    assert "used      30 tensors: backbone (30)" in text
    for arguments, message in (
        ((tmp_path / "no", "--out", out), "no such folder"),
        ((tmp_path, "--out", out), "holds no checkpoint"),
        ((run / "checkpoints" / "000000000032", "--out", out), "no such folder"),
        ((run, "--out", tmp_path / "x.pth"), "end in .safetensors"),
        ((run, "--out", tmp_path / "no" / "x.safetensors"), "there is no folder"),
        ((run, "--out", out, "--size", "12"), "HEIGHTxWIDTH"),
        ((run, "--out", out, "--size", "0x8"), "HEIGHTxWIDTH"),
        ((run, "--out", out, "--size", "12x8"), "multiples of the patch, 8"),
    ):
        code, text = call("export", *arguments)
        assert (code, message in text) == (2, True), text
    broken = run / "checkpoints" / "000000000064" / "rank-00001.safetensors"
    content = bytearray(broken.read_bytes())
    content[-1] ^= 1
    broken.write_bytes(content)
    for where in (run, run / "checkpoints" / "000000000064"):
        code, text = call("export", where, "--out", tmp_path / "z.safetensors")
        assert (code, "rank-00001.safetensors" in text) == (2, True), text
    (run / "checkpoints" / "000000000064" / STATE).write_text("{}")
    assert call("export", run / "checkpoints" / "000000000064", "--out", tmp_path / "z.safetensors")[0] == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "run",
        "x.safetensors",
        "x.safetensors.md",
        "y.safetensors",
    ]


@contextmanager
def no_larger_files(limit: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_leaves_the_old_file(tmp_path: Path):
    path = tmp_path / "x.safetensors"
    write_tensors(path, {"a": torch.ones(3)})
    old = path.read_bytes()
    with no_larger_files(1 << 16), pytest.raises(OSError, match="File too large"):
        write_tensors(path, {"a": torch.ones(1 << 20)})
    with pytest.raises(ExportError, match="not as announced"):
        write_tensors(path, {"a": torch.ones(2, device="meta")}, read=lambda _: torch.ones(3))
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]


def test_one_tensor_at_a_time(tmp_path: Path):
    """What is read is written before the next is asked for."""
    shapes = {f"{i}": torch.empty(1000 + i, device="meta") for i in range(5)}
    alive: list[Any] = []

    def read(name: str) -> Tensor:
        import weakref

        assert all(each() is None for each in alive[:-1])
        value = torch.full((1000 + int(name),), float(name))
        alive.append(weakref.ref(value))
        return value

    got = load_file(write_tensors(tmp_path / "x.safetensors", shapes, read=read))
    assert {name: (len(value), value[0].item()) for name, value in got.items()} == {
        f"{i}": (1000 + i, float(i)) for i in range(5)
    }
