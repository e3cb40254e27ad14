"""iBOT: its losses, centres, head and masked student against the official numbers, and the objective's own promises."""

from pathlib import Path
from typing import Any

import pytest
import torch
from gristmill.models.ema import pairs
from gristmill.models.heads import PrototypeHead
from gristmill.models.student import Student, StudentConfig
from gristmill.models.teacher import make_teacher
from gristmill.models.vit import build_backbone, tokens
from gristmill.objectives import Dims, GroupConfig, MixtureConfig, StepInfo, build_objectives
from gristmill.objectives.patch import PatchConfig, PatchObjective, patch_cross_entropy_reference
from gristmill.ops.optimizers import OptimizerConfig, parameter_groups
from pydantic import ValidationError
from torch import Tensor, nn

VECTORS = Path(__file__).parents[1] / "vectors"
EXACT: dict[str, Any] = {"rtol": 1e-12, "atol": 1e-12}
TINY = StudentConfig(
    image_size=16, patch_size=4, embed_dim=32, depth=2, heads=2, drop_path=0, head_hidden=24, head_out=8,
    predictor_hidden=20, prototypes=40, patch_prototypes=30, objectives=("group", "patch"),
)  # fmt: skip
INFO = StepInfo(batch=3, student_crops=5, student_globals=2, teacher_crops=2, same_views=True)


def load(name: str) -> dict[str, Any]:
    return torch.load(VECTORS / f"{name}.pt", weights_only=True)


def random_masks(crops: int = 6, side: int = 4, seed: int = 0) -> Tensor:
    masks = torch.rand(crops, side, side, generator=torch.Generator().manual_seed(seed)) < 0.4
    masks[1] = False  # as for half of iBOT's crops
    return masks


def views(batch: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(c * batch, 3, s, s, generator=generator) for c, s in ((2, 16), (3, 8))]


def test_official_losses_gradients_and_centres() -> None:
    """Class-token and patch loss of three steps: the group objective in DINO's form, and this one, added up."""
    vector = load("ibot_loss")
    epochs, batch = len(vector["temp_schedule"]), vector["B"]
    schedule: dict[str, Any] = {"teacher_temperature": (0.04, 0.07), "warmup": 3 / epochs, "epochs": epochs}
    made = build_objectives(
        {"group": GroupConfig(form="dino", **schedule), "patch": PatchConfig(**schedule)},
        dims=Dims(prototypes=vector["out_dim"], patch_prototypes=vector["out_dim"]),
        seed=0, mixture=MixtureConfig(add="sum"), dtype=torch.float64,
    )  # fmt: skip
    for step in vector["steps"]:
        masks = torch.cat(step["masks"])
        info = StepInfo(
            batch=batch, student_crops=4, student_globals=2, teacher_crops=2, progress=step["epoch"] / epochs,
            same_views=True, masks=masks,
        )  # fmt: skip
        leaves = {name: step[name].clone().requires_grad_() for name in ("s_cls", "s_patch", "s_local")}
        hidden = masks.flatten(1)
        student = {"group": torch.cat([leaves["s_cls"], leaves["s_local"]]), "patch": leaves["s_patch"][hidden]}
        mean = step["t_patch"].flatten(0, 1).mean(0, keepdim=True)
        outcome = made.loss(
            student, {"group": step["t_cls"], "patch": step["t_patch"][hidden], "patch_mean": mean}, info
        )
        torch.testing.assert_close(outcome.logs["loss/group"], step["cls"], **EXACT)
        torch.testing.assert_close(outcome.logs["loss/patch"], step["patch"], **EXACT)
        torch.testing.assert_close(outcome.loss, step["loss"], **EXACT)
        outcome.loss.backward()
        for name, leaf in leaves.items():
            torch.testing.assert_close(leaf.grad, step[name.replace("s_", "g_")], **EXACT)
        made.commit(outcome)
        torch.testing.assert_close(made.state()["group.center"], step["center"], **EXACT)
        torch.testing.assert_close(made.state()["patch.center"], step["center2"][0], **EXACT)


@pytest.mark.parametrize("shared", [True, False])
def test_head_is_the_official_one(shared: bool) -> None:
    case = load("ibot_head")[f"shared_{shared}"]
    state = {key.replace("mlp.", "projector."): value for key, value in case["state"].items()}
    second = None if shared else len(state["last_layer2.weight_g"])
    trained = case["grad_params"]["last_layer.weight_g"] is not None
    head = PrototypeHead(24, 32, 16, 48, norm_last_layer=not trained, second=second).double()
    if shared:  # the same tensors under two names
        assert torch.equal(state["last_layer.weight_v"], state.pop("last_layer2.weight_v"))
        state.pop("last_layer2.weight_g")
    head.load_state_dict(state, strict=True)
    x = case["x"].clone().requires_grad_()
    logits, patches, mean = head(x[:, 0], x[:, 1:].flatten(0, 1))
    torch.testing.assert_close(logits, case["y_cls"], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(patches.view_as(case["y_patch"]), case["y_patch"], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(mean, patches.mean(0, keepdim=True), rtol=1e-10, atol=1e-10)
    ((logits * case["cot_cls"]).sum() + (patches.view_as(case["y_patch"]) * case["cot_patch"]).sum()).backward()
    torch.testing.assert_close(x.grad, case["grad_x"], rtol=1e-9, atol=1e-10)
    for key, parameter in head.named_parameters():
        wanted = case["grad_params"][key.replace("projector.", "mlp.")]
        torch.testing.assert_close(parameter.grad, wanted, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(head(case["x2d"]), case["y2d"], rtol=1e-10, atol=1e-10)


def test_hidden_patches_enter_the_backbone_as_the_official_mask_token() -> None:
    vector = load("ibot_vit_masked_slim")
    backbone = build_backbone("vit_small_patch16_224", embed_dim=48, depth=2, num_heads=3)
    backbone.mask_token = nn.Parameter(torch.empty(1, 48))
    state = {key.replace("masked_embed", "mask_token"): value for key, value in vector["state"].items()}
    backbone.load_state_dict(state, strict=True)
    x, at = vector["x"].float(), vector["at"]
    with torch.no_grad():
        masked = backbone.norm(backbone(x, masks=vector["mask"]))[:, at]
        plain = tokens(backbone, x)[1][:, at]
    torch.testing.assert_close(masked, vector["tokens_masked"], rtol=0, atol=1e-5)
    torch.testing.assert_close(plain, vector["tokens_plain"], rtol=0, atol=1e-5)
    assert (vector["tokens_masked"] - vector["tokens_plain"]).abs().max() > 0.1


def heads_of(student: Student) -> set[str]:
    return {name.rsplit(".", 1)[0] for name in student.state_dict() if "last_layer" in name}


@pytest.mark.parametrize(
    ("change", "width", "layers"),
    [
        ({}, 40, {"heads.group.last_layer"}),
        ({"shared_head": False}, 30, {"heads.group.last_layer", "heads.group.last_layer2"}),
        ({"objectives": ("instance", "patch")}, 30, {"heads.patch.last_layer"}),
    ],
)
def test_one_forward_of_student_and_teacher(change: dict[str, Any], width: int, layers: set[str]) -> None:
    """Student: hidden patches only. Teacher: whole crops, the same patches, and the mean over all of them."""
    student = Student(TINY.model_copy(update=change))
    teacher, masks, crops = make_teacher(student), random_masks(), views()
    assert heads_of(student) == layers
    context = {"patch.masks": masks}
    out, targets = student(crops, context), teacher(crops[:1], context)
    hidden = int(masks.sum())
    assert out["patch"].shape == targets["patch"].shape == (hidden, width)
    assert targets["patch_mean"].shape == (1, width)
    assert "patch_mean" not in out
    whole = teacher(crops[:1], {"patch.masks": torch.ones_like(masks)})
    torch.testing.assert_close(targets["patch"], whole["patch"][masks.flatten()], rtol=0, atol=1e-5)
    torch.testing.assert_close(targets["patch_mean"], whole["patch"].mean(0, keepdim=True), rtol=0, atol=1e-6)
    # The student's class token has seen the masks, its local crops have not.
    bare = student(crops, {"patch.masks": torch.zeros_like(masks)})
    changed = (out["class_token"] != bare["class_token"]).any(1)
    assert changed[:6].tolist() == masks.flatten(1).any(1).tolist()
    assert not changed[6:].any()
    given = student(crops, {"patch.masks": masks, "patch.index": masks.flatten().nonzero().squeeze(1)})
    assert all(torch.equal(given[name], out[name]) for name in out)


@pytest.mark.parametrize("masked", [True, False])
def test_every_weight_has_a_gradient_with_or_without_masks(masked: bool) -> None:
    """Ranks without a hidden patch run the same graph, the mask token and the patches' prototypes included."""
    student = Student(TINY.model_copy(update={"shared_head": False}))
    teacher = make_teacher(student)
    masks = random_masks() if masked else torch.zeros(6, 4, 4, dtype=torch.bool)
    made = build_objectives({"group": GroupConfig(form="dino"), "patch": PatchConfig()},
                            dims=Dims(prototypes=40, patch_prototypes=30), seed=0)  # fmt: skip
    context, crops = {"patch.masks": masks}, views()
    info = StepInfo(**{**INFO.__dict__, "masks": masks})
    outcome = made.loss(student(crops, context), teacher(crops[:1], context), info)
    outcome.loss.backward()
    assert [name for name, p in student.named_parameters() if p.grad is None] == []
    token = student.backbone.mask_token
    assert token is not None
    assert token.grad is not None
    assert bool(token.grad.any()) == masked
    assert float(outcome.logs["loss/patch"]) > 0 if masked else float(outcome.logs["loss/patch"]) == 0
    assert bool(outcome.finite())
    assert all(bool(torch.isfinite(torch.as_tensor(v))) for v in outcome.logs.values())


def test_only_the_student_has_a_mask_token_and_it_is_grouped_apart() -> None:
    student = Student(TINY)
    teacher = make_teacher(student)
    assert not student.state_dict()["backbone.mask_token"].any()
    assert "backbone.mask_token" not in teacher.state_dict()
    assert len(pairs(student, teacher)[0]) == len(list(teacher.parameters()))
    known = {name for name, _ in teacher.named_parameters()}
    for group in parameter_groups(student, OptimizerConfig()):
        assert {name in known for name in group["names"]} == {group["teacher"]}
    plain = Student(TINY.model_copy(update={"objectives": ("group",)}))
    assert "backbone.mask_token" not in plain.state_dict()
    assert all(torch.equal(v, student.state_dict()[k]) for k, v in plain.state_dict().items())
    # For probes it sees whole images.
    whole = student.eval()(views()[:1], {"patch.masks": random_masks()})["class_token"]
    torch.testing.assert_close(whole, plain.eval()(views()[:1])["class_token"])


@pytest.mark.parametrize("seed", range(3))
def test_loss_is_its_formula(seed: int) -> None:
    masks, generator = random_masks(seed=seed), torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(6, 16, 9, generator=generator, dtype=torch.float64) for _ in range(2))
    objective = PatchObjective(PatchConfig(warmup=0.0), 9, dtype=torch.float64)
    objective.center = torch.randn(1, 9, generator=generator, dtype=torch.float64)
    hidden, info = masks.flatten(1), StepInfo(**{**INFO.__dict__, "masks": masks})
    sides = {"patch": teacher[hidden], "patch_mean": teacher.flatten(0, 1).mean(0, keepdim=True)}
    found = objective.loss({"patch": student[hidden]}, sides, info)
    targets = torch.softmax((teacher - objective.center) / 0.07, -1)
    wanted = patch_cross_entropy_reference(student, targets, hidden, temperature=0.1)
    torch.testing.assert_close(found.loss, wanted, **EXACT)


def test_masks_and_their_temperature_may_begin_later() -> None:
    config = PatchConfig(start=0.25, warmup=0.5, teacher_temperature=(0.04, 0.08))
    assert [config.teacher_temperature_at(p) for p in (0.0, 0.25, 0.5, 0.75, 1.0)] == pytest.approx(
        [0.04, 0.04, 0.06, 0.08, 0.08]
    )


def test_state_comes_back_and_loss_changes_nothing() -> None:
    objective, twin = PatchObjective(PatchConfig(), 5), PatchObjective(PatchConfig(), 5)
    masks = random_masks()
    hidden, info = int(masks.sum()), StepInfo(**{**INFO.__dict__, "masks": masks})
    sides = {"patch": torch.ones(hidden, 5), "patch_mean": torch.ones(1, 5)}
    outcome = objective.loss({"patch": torch.ones(hidden, 5)}, sides, info)
    assert not objective.center.any()
    objective.commit(outcome)
    torch.testing.assert_close(objective.center, torch.full((1, 5), 0.1))
    twin.load(objective.state())
    assert torch.equal(twin.center, objective.center)
    with pytest.raises(ValueError, match=r"patch\.center"):
        twin.load({"center": torch.zeros(1, 6)})


def test_mistakes_are_named() -> None:
    masks = random_masks()
    hidden = int(masks.sum())
    good = {"patch": torch.ones(hidden, 5), "patch_mean": torch.ones(1, 5)}
    objective = PatchObjective(PatchConfig(), 5)
    info = {**INFO.__dict__, "masks": masks}
    for change, said in [
        ({"same_views": False}, "must be the teacher's 2; give the views of the largest size the role both"),
        ({"student_globals": 3}, "3 global crops must be the teacher's 2"),
        ({"masks": None}, r"masks \[6, h, w\] are wanted, there are none"),
        ({"masks": masks[1:]}, r"there are \(5, 4, 4\)"),
        ({"masks": ~masks}, "hidden patches"),
    ]:
        with pytest.raises(ValueError, match=said):
            objective.loss(good, good, StepInfo(**{**info, **change}))
    with pytest.raises(ValueError, match="the teacher gives no 'patch_mean'"):
        objective.loss(good, {"patch": good["patch"]}, StepInfo(**info))
    with pytest.raises(ValueError, match=r"dims\.patch_prototypes"):
        build_objectives({"patch": PatchConfig()}, dims=Dims(), seed=0)
    student = Student(TINY)
    with pytest.raises(ValueError, match=r"patch\.masks"):
        student(views())
    with pytest.raises(ValueError, match=r"\(6, 2, 2\); the global crops want \(6, 4, 4\)"):
        student(views(), {"patch.masks": torch.zeros(6, 2, 2, dtype=torch.bool)})
    with pytest.raises(ValidationError, match="head_norm batch does not go with the patch objective"):
        StudentConfig.model_validate({**TINY.model_dump(), "head_norm": "batch"})
