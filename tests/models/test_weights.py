"""Weights of others: the official layouts and numbers, an account of every tensor, and files that are refused."""

import argparse
import gzip
import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from gristmill.models.layouts import official_name, place
from gristmill.models.student import Student, StudentConfig
from gristmill.models.teacher import make_teacher
from gristmill.models.unpickle import WeightsError
from gristmill.models.vit import build_backbone, resize_pos_embed, tokens
from gristmill.models.weights import Who, import_backbone, import_student
from safetensors.torch import save_file
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor

VECTORS = Path(__file__).parent.parent / "vectors"
CONFIG = StudentConfig(
    embed_dim=48, depth=3, heads=3, drop_path=0, head_hidden=32, head_out=16, predictor_hidden=40, prototypes=64
)


def official(student: Student, prefix: str = "") -> dict[str, Tensor]:
    return OrderedDict((prefix + official_name(name), value.clone()) for name, value in student.state_dict().items())


def mugs(seed: int = 0) -> dict[str, Any]:
    """A full checkpoint in the layout of the official code, its student and teacher apart."""
    memory = {f"block.queue_{part}": torch.zeros(16, 48) for part in "qkv"} | {"block.queue_ptr": torch.zeros(1).long()}
    queue = {"queue": torch.ones(16, 32), "queue_ptr": torch.zeros(1).long()}
    return {
        "student": official(Student(CONFIG, seed=seed), "module."),
        "teacher": official(make_teacher(Student(CONFIG, seed=seed + 1))),
        "student_mem": memory, "teacher_mem": memory, "instance-sup.": queue, "local-group-sup.": queue,
        "group-sup.": {"center": torch.zeros(1, 64)}, "epoch": 3, "args": argparse.Namespace(arch="vit_small"),
        "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 0.1}]},
    }  # fmt: skip


def save(folder: Path, content: Any, name: str = "x.pth") -> Path:
    torch.save(content, folder / name)
    return folder / name


def bare(seed: int = 0) -> dict[str, Tensor]:
    return Student(CONFIG, seed=seed).backbone.state_dict()


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_the_official_checkpoint_gives_its_features():
    backbone = build_backbone("vit_tiny_patch16_224", embed_dim=48, depth=3, num_heads=3, seed=1)
    state, report = import_backbone(VECTORS / "mugs_ckpt_slim.pth", "teacher", backbone)
    backbone.load_state_dict(state, strict=True)
    expected = torch.load(VECTORS / "mugs_ckpt_slim_expect.pt", weights_only=True)
    with torch.no_grad():
        _, after = tokens(backbone, expected["x"].float())
    torch.testing.assert_close(after[:, 0], expected["teacher_cls_feature"], rtol=0, atol=1e-5)
    assert report.network == "teacher"
    assert not report.missing
    assert not report.reshaped
    assert set(report.ignored) == {
        "relation_blocks", "projectors", "last_layer", "memories", "queues", "centre", "optimizer", "bookkeeping",
    }  # fmt: skip


@pytest.mark.parametrize("name", ["vit_small", "vit_base", "vit_large"])
def test_every_key_of_the_official_checkpoints_has_its_place(name: str):
    with gzip.open(VECTORS / "mugs_ckpt_manifest.json.gz") as file:
        manifest = json.load(file)[name]
    with torch.device("meta"):
        student = Student(StudentConfig(backbone=f"{name}_patch16_224"))
    for who, network in (("student", student), ("teacher", make_teacher(student))):
        ours = {key: tuple(value.shape) for key, value in network.state_dict().items()}
        theirs = {place(key)[1]: tuple(shape) for key, shape in manifest[who].items()}
        assert len(theirs) == len(manifest[who])
        assert theirs == ours
        prefix = "module." if who == "student" else ""
        assert {prefix + official_name(key) for key in ours} == manifest[who].keys()


@pytest.mark.parametrize("who", ["student", "teacher"])
def test_there_and_back_is_equal_bit_for_bit(tmp_path: Path, who: Who):
    full = mugs()
    state, report = import_student(save(tmp_path, full), who, Student(CONFIG, seed=9))
    back = {("module." if who == "student" else "") + official_name(name): value for name, value in state.items()}
    assert same(back, full[who])
    lacking = [] if who == "student" else [name for name in Student(CONFIG).state_dict() if ".predictor." in name]
    assert report.missing == lacking
    network = Student(CONFIG, seed=9)
    network.load_state_dict(state, strict=False)
    assert same(official(network if who == "student" else make_teacher(network)), {
        key.removeprefix("module."): value for key, value in full[who].items()
    })  # fmt: skip


def wrapped(prefix: str) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in bare().items()}


LAYOUTS = {
    "student": lambda: {"student": official(Student(CONFIG), "module.")},
    "state_dict": lambda: {"state_dict": bare(), "epoch": 3},
    "model": lambda: {"model": wrapped("module.")},
    "module.backbone.": lambda: wrapped("module.backbone."),
    "backbone.": lambda: wrapped("backbone."),
    "encoder.": lambda: wrapped("encoder."),
    "_orig_mod.module.": lambda: wrapped("_orig_mod.module."),
    "bare": bare,
    "flat with heads": lambda: official(Student(CONFIG)),
    "half": lambda: {key: value.to(torch.bfloat16) for key, value in bare().items()},
}


@pytest.mark.parametrize("kind", ["pth", "old", "safetensors"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_same_backbone_out_of_every_layout(tmp_path: Path, layout: str, kind: str):
    content, path = LAYOUTS[layout](), tmp_path / "x.weights"
    if kind == "safetensors":
        if any(not isinstance(value, Tensor) for value in content.values()):
            content = next(value for value in content.values() if isinstance(value, dict))
        save_file({key: value.contiguous() for key, value in content.items()}, path)
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "pth")
    state, report = import_backbone(path, "student")
    wanted = bare()
    if layout == "half":
        wanted = {key: value.to(torch.bfloat16).float() for key, value in wanted.items()}
        assert report.reshaped["backbone.norm.weight"] == "bfloat16 to float32"
    assert same(state, wanted)
    assert report.used == sorted(f"backbone.{name}" for name in wanted)
    assert report.what.startswith("a ViT of width 48, 3 blocks, patches of 16")


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("who", ["student", "teacher"])
def test_every_tensor_of_a_file_is_accounted_for(tmp_path: Path, who: Who, whole: bool):
    full = mugs()
    importer = import_student if whole else import_backbone
    _, report = importer(save(tmp_path, full), who)
    networks = [f"{other}/{key}" for other in ("student", "teacher") if other != who for key in full[other]]
    parts = ("student_mem", "teacher_mem", "instance-sup.", "local-group-sup.", "group-sup.")
    rest = [f"{part}/{key}" for part in parts for key in full[part]] + ["epoch", "args", "optimizer"]
    left = [name for names in report.ignored.values() for name in names]
    assert sorted(left) == sorted({*networks, *rest, *(k for k in full[who] if place(k)[1] not in report.used)})
    assert len(report.used) + len(left) == len(full[who]) + len(networks) + len(rest)
    text = "\n".join(report.lines())
    assert all(group in text for group in report.ignored)
    assert json.loads(json.dumps(report.as_dict()))["network"] == who


def test_dino_and_ibot(tmp_path: Path):
    ours = Student(CONFIG)
    flat = {f"module.{k}": v for k, v in ours.state_dict().items() if k.startswith("backbone.")}
    head = {k.replace("heads.group.projector", "module.head.mlp").replace("heads.group", "module.head"): v
            for k, v in ours.state_dict().items() if k.startswith("heads.group")}  # fmt: skip
    dino = {"student": flat | head, "dino_loss": {"center": torch.zeros(1, 64)}, "epoch": 1}
    state, report = import_student(save(tmp_path, dino), "student", ours)
    assert len(state) == len(flat) + len(head)
    assert same(state, {k: v for k, v in ours.state_dict().items() if k in state})
    assert report.ignored == {"centre": ["dino_loss/center"], "bookkeeping": ["epoch"]}
    assert {name.split(".")[0] for name in report.missing} == {"relation", "heads"}
    more = {"module.backbone.masked_embed": torch.zeros(1, 48)} | {
        k.replace("last_layer", "last_layer2"): v for k, v in head.items() if "last_layer" in k
    }
    newer = {  # as today's weight norm names them
        k.replace("weight_g", "parametrizations.weight.original0").replace("weight_v", "parametrizations.weight.original1"): v
        for k, v in head.items()
    }  # fmt: skip
    ibot = {"student": flat | newer | more, "ibot_loss": {"center": torch.zeros(1, 64)}}
    again, report = import_student(save(tmp_path, ibot), "student", ours)
    assert same(again, state)
    assert report.ignored["mask_token"] == ["module.backbone.masked_embed"]
    assert len(report.ignored["last_layer"]) == 2


@pytest.mark.parametrize("interp", ["official", "timm"])
def test_the_position_embedding_is_carried_over_as_the_student_does_it(tmp_path: Path, interp: Any):
    other = StudentConfig(**{**CONFIG.model_dump(), "image_size": 96, "pos_interp": interp})
    state, report = import_student(save(tmp_path, bare()), "student", Student(other))
    stored = bare()["pos_embed"]
    wanted = resize_pos_embed(stored, 6, 6) if interp == "official" else resample_abs_pos_embed(stored, [6, 6])
    assert torch.equal(state["backbone.pos_embed"], wanted)
    assert report.reshaped == {"backbone.pos_embed": f"14 x 14 to 6 x 6 patches, bicubic, {interp} form"}


def changed(**values: Any) -> dict[str, Any]:
    state: dict[str, Any] = bare()
    for key, value in values.items():
        key = key.replace("__", ".")
        state.pop(key, None)
        if value is not None:
            state[key] = value
    return state


BAD = {
    "holds a Tensor": lambda: torch.ones(3),
    "nothing in it matches a ViT .* or a ResNet .* it holds stages.0.weight": lambda: {"stages.0.weight": torch.ones(3)},
    "holds nothing": dict,
    "incomplete: it lacks norm.weight": lambda: changed(norm__weight=None),
    "incomplete: it lacks patch_embed": lambda: changed(pos_embed=None),
    "incomplete: it lacks blocks.1.attn.qkv.bias": lambda: changed(blocks__1__attn__qkv__bias=None),
    "not a plain ViT .* has blocks.0.ls1.gamma": lambda: changed(blocks__0__ls1__gamma=torch.ones(48)),
    "not a plain ViT .* has reg_token": lambda: changed(reg_token=torch.ones(1, 4, 48)),
    "norm.weight has values that are not finite": lambda: changed(norm__weight=torch.full((48,), float("nan"))),
    "cls_token has shape": lambda: changed(cls_token=torch.ones(1, 2, 48)),
    "are both backbone.norm.weight": lambda: bare() | {"module.norm.weight": torch.ones(48)},
    "plain one": lambda: changed(norm__weight=torch.ones(48).to_sparse()),
    "holds no teacher, only a student": lambda: {"student": bare()},
}  # fmt: skip


@pytest.mark.parametrize("message", BAD)
def test_what_does_not_fit_is_refused_by_name(tmp_path: Path, message: str):
    path = save(tmp_path, BAD[message]())
    with pytest.raises(WeightsError, match=message) as error:
        import_backbone(path, "teacher")
    assert str(path) in str(error.value)


def test_another_architecture_is_named_with_what_would_fit(tmp_path: Path):
    small = timm.create_model("vit_small_patch16_224", num_classes=0).state_dict()
    with pytest.raises(
        WeightsError, match=r"width 384, 12 blocks.*pos_embed \(1, 197, 384\) there, .* here.*"
    ) as error:
        import_backbone(save(tmp_path, small), "teacher", Student(CONFIG).backbone)
    assert str(error.value).endswith("set student.backbone=vit_small_patch16_224")
    shallow = StudentConfig(**{**CONFIG.model_dump(), "depth": 2})
    with pytest.raises(WeightsError, match=r"blocks\.2\.\S+ \(48,\) there, absent here.*student.depth=3"):
        import_backbone(save(tmp_path, bare()), "teacher", Student(shallow).backbone)
    few = StudentConfig(**{**CONFIG.model_dump(), "prototypes": 32})
    with pytest.raises(WeightsError, match=r"heads differ .*weight_v \(64, 16\) there, \(32, 16\) here"):
        import_student(save(tmp_path, mugs()), "student", Student(few))
