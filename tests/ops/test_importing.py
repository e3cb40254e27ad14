"""Weights of others at the start of a run: backbones, and everything that an official Mugs checkpoint goes on from."""

import argparse
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from click.testing import CliRunner
from gristmill.models.layouts import official_name
from gristmill.models.student import Student
from gristmill.models.teacher import make_teacher
from gristmill.models.unpickle import WeightsError, read_weights
from gristmill.ops.cli import main
from gristmill.ops.importing import ImportRefused, import_memories, read_initial
from gristmill.ops.launch import join
from gristmill.ops.networks import build_mixture
from gristmill.ops.recipe import Recipe, load_recipe
from gristmill.ops.run import Run
from gristmill.ops.runlog import read_log
from huggingface_hub import constants
from safetensors.torch import load_file
from timm.models import _registry
from torch import Tensor

from ..distributed.guard_cases import make_data, recipe_of

VECTORS = Path(__file__).parent.parent / "vectors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("importing")
    make_data(folder, 40)
    return folder


@pytest.fixture(autouse=True)
def group() -> Iterator[None]:
    """Training leaves the group; other tests of this process use it, too."""
    join()
    yield
    join()


def full(recipe: Recipe) -> dict[str, Any]:
    """A checkpoint in Mugs' layout of the recipe's sizes; the first half of the memories' slots were written."""
    draw = torch.Generator().manual_seed(7)
    student, teacher = Student(recipe.student, seed=11), make_teacher(Student(recipe.student, seed=12))
    mixture = build_mixture(recipe, student).state()

    def queue(name: str) -> dict[str, Tensor]:
        rows = torch.nn.functional.normalize(torch.randn(mixture[f"{name}.rows"].shape, generator=draw), dim=1)
        return {"queue": rows.t().contiguous(), "queue_ptr": torch.tensor([6])}

    def memory() -> dict[str, Tensor]:
        rows = torch.randn(mixture["local_group.student.rows"].shape, generator=draw)
        other = rows.clone()
        other[len(rows) // 2 :] += 1
        return {
            "block.queue_k": rows,
            "block.queue_q": other,
            "block.queue_v": rows,
            "block.queue_ptr": torch.tensor([len(rows)]),
        }

    return {
        "student": {f"module.{official_name(k)}": v for k, v in student.state_dict().items()},
        "teacher": {official_name(k): v for k, v in teacher.state_dict().items()},
        "student_mem": memory(), "teacher_mem": memory(), "epoch": 3, "args": argparse.Namespace(arch="x"),
        "instance-sup.": queue("instance.queue"), "local-group-sup.": queue("local_group.queue"),
        "group-sup.": {"center": torch.randn(mixture["group.center"].shape, generator=draw)},
        "optimizer": {"state": {}, "param_groups": []},
    }  # fmt: skip


def call(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(main, [str(each) for each in arguments])
    return result.exit_code, result.output


def assembled(run: Run) -> dict[str, dict[str, Tensor]]:
    """What a checkpoint of this run, of one process, would hold."""
    content, networks = run.content(), {}
    for part in content.parts:
        whole = networks.setdefault(part.group, {}).setdefault(part.name, torch.full(part.shape, float("nan")))
        whole.view(-1)[part.start : part.start + part.tensor.numel()] = part.tensor
    return networks | {"objectives": content.whole["objectives"]}


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_everything_of_mugs_goes_into_a_run(folder: Path, tmp_path: Path, stage: int):
    official = full(recipe_of(folder, 2))
    torch.save(official, tmp_path / "mugs.pth")
    out = tmp_path / "mugs.safetensors"
    code, text = call("import", tmp_path / "mugs.pth", "--everything", "--out", out)
    assert code == 0, text
    assert "objectives (17)" in text
    assert "slots were never written" in text
    recipe = recipe_of(folder, 2, f"student.init={out}", f"engine.zero={stage}")
    run = Run(recipe, tmp_path / "run", 0, 1, torch.device("cpu"))
    try:
        told = run.restore()
        held = assembled(run)
    finally:
        run.close()
    assert any(out.name in line for line in told)
    for who, prefix in (("student", "module."), ("teacher", "")):
        assert held[who]
        for name, value in held[who].items():
            assert torch.equal(value, official[who][prefix + official_name(name)]), f"{who} {name}"
    assert held["student"].keys() - held["teacher"].keys() == {n for n in held["student"] if ".predictor." in n}
    state = held["objectives"]
    for ours, theirs in (("instance", "instance-sup."), ("local_group", "local-group-sup.")):
        assert torch.equal(state[f"{ours}.queue.rows"], official[theirs]["queue"].t())
        assert state[f"{ours}.queue.pointer"] == 6
        assert (state[f"{ours}.queue.written"] == 0).all()
    for who in ("student", "teacher"):
        rows = official[f"{who}_mem"]["block.queue_k"]
        assert torch.equal(state[f"local_group.{who}.rows"], rows)
        assert (state[f"local_group.{who}.written"] == torch.tensor([0, -1]).repeat_interleave(len(rows) // 2)).all()
        assert state[f"local_group.{who}.pointer"] == 0  # one past the last slot is the first
    assert torch.equal(state["group.center"], official["group-sup."]["center"])
    (event,) = [line for line in read_log(tmp_path / "run" / "metrics.jsonl") if line.get("event") == "initial"]
    assert event["sha256"] == read_weights(out).sha256


def test_a_run_begins_with_a_backbone_and_goes_on_without_the_file(folder: Path, tmp_path: Path):
    torch.save(full(recipe_of(folder, 2)), tmp_path / "mugs.pth")
    recipe = recipe_of(folder, 2, f"student.init={tmp_path / 'mugs.pth'}")
    official = torch.load(tmp_path / "mugs.pth", weights_only=False)["teacher"]
    from gristmill.ops.train import train

    run = Run(recipe, tmp_path / "other", 0, 1, torch.device("cpu"))
    try:
        held = assembled(run)
    finally:
        run.close()
    fresh = Student(recipe.student, seed=recipe.seed).state_dict()
    for who in ("student", "teacher"):
        for name, value in held[who].items():
            wanted = official[official_name(name)] if name.startswith("backbone.") else fresh[name]
            assert torch.equal(value, wanted), f"{who} {name}"
    assert train(recipe, tmp_path / "run", quiet=True).code == 0
    (tmp_path / "mugs.pth").unlink()
    assert train(recipe, tmp_path / "run", quiet=True).code == 0  # its weights are in the checkpoint
    with pytest.raises(ImportRefused, match=r"student\.init: .*mugs\.pth: there is no such file"):
        train(recipe, tmp_path / "anew", quiet=True)


def test_what_does_not_fit_is_refused(folder: Path, tmp_path: Path):
    torch.save(full(recipe_of(folder, 2)), tmp_path / "mugs.pth")
    out = tmp_path / "mugs.safetensors"
    assert call("import", tmp_path / "mugs.pth", "--everything", "--out", out)[0] == 0
    for more, message in (
        ("student.depth=1", r"set student\.embed_dim=.* student\.depth=2"),
        ("student.prototypes=8", r"heads differ .*give the recipe's student those sizes"),
        ("objectives.instance.queue=96", r"instance\.queue\.rows .*give the recipe's objectives"),
        ("student.init=timm:vit_tinny_patch16_224", "timm knows no such network; near it are vit_"),
        (f"student.init={tmp_path}", "is a folder"),
    ):
        with pytest.raises(ImportRefused, match=message):
            Run(recipe_of(folder, 2, f"student.init={out}", more), tmp_path / "run", 0, 1, torch.device("cpu"))
    code, text = call("import", VECTORS / "mugs_ckpt_slim.pth", "--everything", "--out", tmp_path / "no.safetensors")
    assert (code, "holds no student, only a teacher" in text) == (2, True)
    torch.save(full(recipe_of(folder, 2))["teacher"], tmp_path / "flat.pth")
    code, text = call("import", tmp_path / "flat.pth", "--everything", "--out", tmp_path / "no.safetensors")
    assert (code, "leave --everything out" in text) == (2, True)
    assert not (tmp_path / "no.safetensors").exists()


def test_ranks_that_read_different_files_stop_all(folder: Path, tmp_path: Path):
    torch.save(full(recipe_of(folder, 2)), tmp_path / "mugs.pth")
    recipe = recipe_of(folder, 2, f"student.init={tmp_path / 'mugs.pth'}")
    with pytest.raises(ImportRefused, match="not the same file on all nodes"):
        read_initial(recipe, Student(recipe.student), lambda texts: [*texts, "another digest"])
    with pytest.raises(ImportRefused, match="no such file on rank 1"):
        read_initial(recipe, Student(recipe.student), lambda texts: [*texts, "student.init: no such file on rank 1"])


@pytest.mark.parametrize(("part", "name", "value", "message"), [
    ("instance-sup.", "queue", torch.full((4, 8), float("inf")), "instance-sup. has values that are not finite"),
    ("instance-sup.", "queue_ptr", torch.tensor([99]), "pointer of instance-sup. is outside its 8 slots"),
    ("instance-sup.", "queue", None, "instance-sup. has no queue of 2 dimensions"),
    ("student_mem", "block.queue_q", torch.ones(3, 4), r"searches \(3, 4\), fetches \(8, 4\)"),
])  # fmt: skip
def test_broken_memories_are_refused(tmp_path: Path, part: str, name: str, value: Any, message: str):
    tree: dict[str, Any] = {
        "instance-sup.": {"queue": torch.ones(4, 8), "queue_ptr": torch.tensor([0])},
        "student_mem": {"block.queue_k": torch.ones(8, 4), "block.queue_q": torch.ones(8, 4), "block.queue_ptr": torch.tensor([0])},
    }  # fmt: skip
    torch.save(tree, tmp_path / "x.pth")
    assert len(import_memories(read_weights(tmp_path / "x.pth"))[0]) == 8
    tree[part][name] = value
    torch.save(tree, tmp_path / "y.pth")
    with pytest.raises(WeightsError, match=message):
        import_memories(read_weights(tmp_path / "y.pth"))


def test_timm_without_a_network_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    recipe = load_recipe("demo", ["student.init=timm:vit_tiny_patch16_224"])
    with pytest.raises(ImportRefused, match=r"could not be fetched .* give student\.init=init\.safetensors"):
        read_initial(recipe, Student(recipe.student), list)


def test_timm_weights_that_are_at_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Found where timm's own table says that they are: here, in a file."""
    name = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"
    plain = timm.create_model("vit_tiny_patch16_224")
    torch.save(plain.state_dict(), tmp_path / "x.pth")
    stored = _registry._model_pretrained_cfgs[name]
    here = dataclasses.replace(stored, file=str(tmp_path / "x.pth"), hf_hub_id=None, custom_load=False)
    monkeypatch.setitem(_registry._model_pretrained_cfgs, name, here)
    sizes = ["embed_dim=null", "depth=null", "heads=null", "patch_size=16", "image_size=224"]
    recipe = load_recipe("demo", [f"student.init=timm:{name}", *(f"student.{each}" for each in sizes)])
    initial = read_initial(recipe, Student(recipe.student), list)
    assert initial is not None
    for key, value in plain.state_dict().items():
        if not key.startswith("head."):
            assert torch.equal(initial.student[f"backbone.{key}"], value)
    assert initial.student is initial.teacher


def test_the_report_of_the_official_file(tmp_path: Path):
    out = tmp_path / "x.safetensors"
    code, text = call("import", VECTORS / "mugs_ckpt_slim.pth", "--out", out)
    assert code == 0, text
    for line in ("network   teacher", "used      42 tensors: backbone (42)", "relation_blocks (12)", "optimizer (1)"):
        assert line in text
    assert len(load_file(out)) == 42
    (report,) = json.loads(call("import", VECTORS / "mugs_ckpt_slim.pth", "--out", out, "--json")[1])["reports"]
    assert (len(report["used"]), len(report["ignored"]["relation_blocks"])) == (42, 12)
    assert load_recipe("demo", ["student.init=x.safetensors"], tiny=True).student.init == "x.safetensors"
    for arguments, message in (
        (("/no/x.pth", "--out", out), "no such file"),
        ((VECTORS / "mugs_ckpt_slim.pth", "--student", "--out", out), "only a teacher; ask for --teacher"),
        ((VECTORS / "mugs_ckpt_slim.pth", "--out", tmp_path / "x.bin"), "end in .safetensors"),
    ):
        code, text = call("import", *arguments)
        assert (code, message in text) == (2, True), text
    assert list(tmp_path.iterdir()) == [out]
