"""MoCo, DenseCL and HCSC at the start of a run: both encoders with their heads, and the queues that they left."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from gristmill.models.student import Student
from gristmill.models.teacher import make_teacher
from gristmill.models.unpickle import WeightsError, read_weights
from gristmill.models.weights import Who
from gristmill.ops.importing import import_everything, import_memories, read_initial, run_import
from gristmill.ops.networks import build_mixture
from gristmill.ops.recipe import Recipe, load_recipe
from safetensors.torch import load_file
from torch import Tensor

NETWORK = [
    "student.backbone=resnet18", "student.embed_dim=64", "student.depth=1", "student.patch_size=null", "student.heads=null",
    "student.drop_path=0", "student.image_size=64", "batch=8",
]  # fmt: skip
HEAD = "{hidden: 16, out: 8}"


def recipe_of(*objectives: str) -> Recipe:
    heads = ", ".join(f"{name}: {HEAD}" for name in objectives)
    queues = [f"objectives.{name}={{queue: 24}}" for name in objectives]
    others = [f"objectives.{name}=null" for name in ("instance", "local_group", "group") if name not in objectives]
    weights = "objectives.weights={" + ", ".join(f"{name}: 1.0" for name in objectives) + "}"
    return load_recipe("demo", [*NETWORK, f"student.projections={{{heads}}}", *queues, *others, weights])


def official(recipe: Recipe, form: str) -> dict[str, Any]:
    """A checkpoint in the layout of DenseCL or MoCo v2, of the recipe's sizes."""
    student, teacher = Student(recipe.student, seed=11), make_teacher(Student(recipe.student, seed=12))
    state: dict[str, Tensor] = {}
    for side, network in (("encoder_q", student), ("encoder_k", teacher)):
        for name, value in network.state_dict().items():
            kind, _, rest = name.partition(".")
            if form == "densecl" and kind == "backbone":
                state[f"{side}.0.{rest}"] = value
                if side == "encoder_q":
                    state[name] = value
            elif form == "densecl":
                _, objective, _, rest = name.split(".", 3)
                dense = objective == "dense"
                wide = value[:, :, None, None] if dense and value.dim() == 2 else value
                state[f"{side}.1.{'mlp2' if dense else 'mlp'}.{rest}"] = wide
            else:
                state[f"module.{side}.{rest if kind == 'backbone' else f'fc.{name.split(chr(46), 3)[3]}'}"] = value
    prefix = "" if form == "densecl" else "module."
    for number in ("", "2") if form == "densecl" else ("",):
        rows = torch.nn.functional.normalize(
            torch.randn(24, 8, generator=torch.Generator().manual_seed(len(number))), dim=1
        )
        state |= {f"{prefix}queue{number}": rows.t().contiguous(), f"{prefix}queue{number}_ptr": torch.tensor([16])}
    return {"state_dict": state, "meta": {"epoch": 3}, "optimizer": {"state": {}, "param_groups": []}}


FORMS = {"densecl": ("instance", "dense"), "moco": ("instance",)}


@pytest.mark.parametrize("form", FORMS)
def test_everything_of_them_goes_into_a_run(tmp_path: Path, form: str, capsys: pytest.CaptureFixture[str]):
    recipe = recipe_of(*FORMS[form])
    checkpoint = official(recipe, form)
    torch.save(checkpoint, tmp_path / "x.pth")
    out = tmp_path / "x.safetensors"
    assert run_import(tmp_path / "x.pth", out, None, everything=True, as_json=True) == 0
    reports = json.loads(capsys.readouterr().out)["reports"]
    names = {name for name in checkpoint["state_dict"] if "queue" not in name and not name.startswith("backbone.")}
    used = [name for report in reports for name in report["used"]]
    queues = 2 if form == "densecl" else 1
    assert len(used) == len(names) + 4 * queues
    for report in reports:
        wanted = {"bookkeeping": ["meta"], "optimizer": ["optimizer"]}
        copies = [name for name in checkpoint["state_dict"] if name.startswith("backbone.")]
        assert report["ignored"] == wanted | ({"copies": copies} if form == "densecl" else {})
    init = load_recipe("demo", [f"student.init={out}"]).student.init
    begun = recipe.model_copy(update={"student": recipe.student.model_copy(update={"init": init})})
    student = Student(recipe.student, seed=0)
    teacher = make_teacher(student)
    initial = read_initial(begun, student, list)
    assert initial is not None
    initial.fill(student, teacher)
    for network, seed in ((student, 11), (teacher, 12)):
        wanted = Student(recipe.student, seed=seed).state_dict()
        assert all(torch.equal(value, wanted[name]) for name, value in network.state_dict().items())
    mixture = build_mixture(recipe, student)
    initial.check(mixture)
    mixture.load(mixture.state() | initial.objectives)
    state = mixture.state()
    for theirs, ours in (("queue", "instance"), ("queue2", "dense"))[:queues]:
        prefix = "" if form == "densecl" else "module."
        assert torch.equal(state[f"{ours}.queue.rows"], checkpoint["state_dict"][f"{prefix}{theirs}"].t())
        assert state[f"{ours}.queue.pointer"] == 16
        assert (state[f"{ours}.queue.written"] == 0).all()


def test_a_run_begins_with_the_query_encoder(tmp_path: Path):
    """It is what their authors evaluate; a file of one network, and our own, begin both networks as well."""
    recipe = recipe_of("instance")
    checkpoint = official(recipe, "moco")
    torch.save(checkpoint, tmp_path / "x.pth")
    sides: dict[Who | None, int] = {None: 11, "student": 11, "teacher": 12}
    for who, seed in sides.items():
        assert run_import(tmp_path / "x.pth", tmp_path / "y.safetensors", who, everything=False, as_json=False) == 0
        wanted = Student(recipe.student, seed=seed).backbone.state_dict()
        got = load_file(tmp_path / "y.safetensors")
        assert got.keys() == wanted.keys()
        assert all(torch.equal(got[name], wanted[name]) for name in wanted)
    for name, seed in (("x.pth", 11), ("y.safetensors", 12)):
        changed = recipe.student.model_copy(update={"init": str(tmp_path / name)})
        initial = read_initial(recipe.model_copy(update={"student": changed}), Student(recipe.student), list)
        assert initial is not None
        wanted = Student(recipe.student, seed=seed).backbone.state_dict()
        assert initial.student.keys() == {f"backbone.{key}" for key in wanted}
        assert all(torch.equal(initial.teacher[f"backbone.{key}"], value) for key, value in wanted.items())


def test_hcsc_queues_are_the_hierarchys(tmp_path: Path):
    checkpoint = official(recipe_of("instance"), "moco")
    state = checkpoint["state_dict"] | {"module.queue_index": torch.zeros(24, dtype=torch.int64)}
    torch.save({"state_dict": state}, tmp_path / "x.pth")
    tensors, reports = import_everything(read_weights(tmp_path / "x.pth"))
    heads = {name.split("/")[1].split(".")[1] for name in tensors if "/heads." in name}
    assert heads == {"hierarchy"}
    assert {name.rpartition(".")[0] for name in tensors if name.startswith("objectives/")} == {
        "objectives/hierarchy.queue"
    }
    assert reports[0].ignored == {"bookkeeping": ["module.queue_index"]}


@pytest.mark.parametrize(("name", "value", "message"), [
    ("module.queue", torch.full((8, 24), float("inf")), "module.queue has values that are not finite"),
    ("module.queue", torch.ones(24), "module.queue has no queue of 2 dimensions"),
    ("module.queue_ptr", torch.tensor([99]), "pointer of module.queue is outside its 24 slots"),
    ("module.queue_ptr", None, "module.queue has no queue_ptr of 1 dimensions"),
])  # fmt: skip
def test_broken_queues_are_refused(tmp_path: Path, name: str, value: Any, message: str):
    state = official(recipe_of("instance"), "moco")["state_dict"]
    for flat in (False, True):
        torch.save(state if flat else {"state_dict": state}, tmp_path / "x.pth")
        assert len(import_memories(read_weights(tmp_path / "x.pth"))[0]) == 4
        bad = {key: each for key, each in (state | {name: value}).items() if each is not None}
        torch.save(bad if flat else {"state_dict": bad}, tmp_path / "y.pth")
        with pytest.raises(WeightsError, match=message):
            import_memories(read_weights(tmp_path / "y.pth"))


def test_one_network_is_not_everything(tmp_path: Path):
    student = Student(recipe_of("instance").student)
    torch.save(student.backbone.state_dict(), tmp_path / "x.pth")
    with pytest.raises(WeightsError, match="holds one network only; leave --everything out"):
        import_everything(read_weights(tmp_path / "x.pth"))
