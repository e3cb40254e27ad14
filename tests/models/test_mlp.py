"""Heads by numbers: layers, norms and biases where the papers have them; MoCo v3's fixed parts of a ViT."""

import math

import pytest
import torch
from gristmill.models import BatchNorm, Student, StudentConfig, make_teacher
from gristmill.models.dense import DenseHead
from gristmill.models.mlp import HEADS, MlpConfig, MlpHead, SwapHead, normed
from torch import nn
from torch.nn.functional import normalize

TINY = {"backbone": "vit_tiny_patch16_224", "image_size": 64, "embed_dim": 64, "depth": 1, "heads": 4, "drop_path": 0.0}


def parts(module: nn.Sequential) -> str:
    """L: linear with bias, l: without; B: batch norm, b: without weight and bias; r, g: activations."""
    marks = []
    for part in module:
        if isinstance(part, nn.Linear):
            marks.append("L" if part.bias is not None else "l")
        elif isinstance(part, BatchNorm):
            marks.append("B" if part.weight is not None else "b")
        else:
            marks.append({"ReLU": "r", "GELU": "g"}[type(part).__name__])
    return "".join(marks)


# facebookresearch/moco, moco-v3, simsiam, swav; deepmind's byol; lemniscate.pytorch (models).
@pytest.mark.parametrize(
    ("config", "projector", "predictor"),
    [
        (HEADS["bank"], "L", None),
        (HEADS["hierarchy"], "LrL", None),
        (HEADS["batch_contrast"], "lBrlb", "lBrl"),
        (HEADS["bootstrap"], "LBrl", "LBrl"),
        (HEADS["swapped"], "LBrL", None),
        (
            MlpConfig.model_validate(
                {"layers": 3, "bias": False, "norm": "batch", "last_norm": "plain", "out": 2048,
                 "predictor": {"hidden": 512, "bias": False, "last_bias": True, "norm": "batch"}}
            ),
            "lBrlBrlb", "lBrL",
        ),  # SimSiam
    ],
)  # fmt: skip
def test_layers_are_the_papers(config, projector, predictor):
    head = MlpHead(32, config)
    assert parts(head.projector) == projector
    assert (None if head.predictor is None else parts(head.predictor)) == predictor
    assert normed(config) == ("B" in projector + (predictor or "") or "b" in projector)
    rows, projection = head(torch.randn(6, 32))
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(6))
    torch.testing.assert_close(projection.norm(dim=1), torch.ones(6))
    assert rows.requires_grad
    assert not projection.requires_grad
    assert rows.shape == projection.shape == (6, config.out)


def test_scores_are_cosines_with_prototypes_that_keep_their_length():
    head = SwapHead(16, MlpConfig(out=8, hidden=16), 5)
    with torch.no_grad():
        head.last_layer.weight_v.mul_(torch.arange(1.0, 6)[:, None])
    x, queue = torch.randn(7, 16), normalize(torch.randn(3, 8), dim=1)
    scores, rows, told = head.scores(x, queue)
    prototypes = normalize(head.last_layer.weight_v, dim=1)
    torch.testing.assert_close(scores, normalize(head.projector(x), dim=1) @ prototypes.mT)
    torch.testing.assert_close(told, queue @ prototypes.mT)
    assert told is not None
    assert not told.requires_grad
    assert not rows.requires_grad
    assert [name for name, p in head.named_parameters() if "weight_g" in name] == []


def test_the_teacher_has_no_predictor_and_the_student_tells_its_projection():
    config = {
        "objectives": ["bootstrap"],
        "projections": {"bootstrap": {"out": 8, "hidden": 16, "predictor": {"hidden": 16}}},
    }
    student = Student(StudentConfig.model_validate(TINY | config))
    teacher, x = make_teacher(student), [torch.randn(4, 3, 64, 64)]
    seen, told = student(x), teacher(x)
    torch.testing.assert_close(seen["bootstrap.projection"], told["bootstrap"])
    assert not torch.allclose(seen["bootstrap"], told["bootstrap"])
    assert not [name for name, _ in teacher.named_parameters() if "predictor" in name]


def test_kaiming_draws_by_fan_in_and_leaves_no_bias():
    config = {"objectives": ["hierarchy"], "projections": {"hierarchy": {"hidden": 512, "init": "kaiming"}}}
    head = Student(StudentConfig.model_validate(TINY | config)).heads["hierarchy"]
    assert isinstance(head, MlpHead)
    first, second = (part for part in head.projector if isinstance(part, nn.Linear))
    assert float(second.weight.detach().std()) == pytest.approx((2 / 512) ** 0.5, rel=0.02)
    assert float(first.weight.detach().std()) == pytest.approx((2 / 64) ** 0.5, rel=0.02)
    assert not first.bias.any()
    assert not second.bias.any()


def test_fixed_parts_of_a_vit_are_buffers_under_the_same_names():
    learned = Student(StudentConfig.model_validate(TINY | {"objectives": ["bank"]}))
    fixed = Student(
        StudentConfig.model_validate(TINY | {"objectives": ["bank"], "freeze_patch_embed": True, "positions": "fixed"})
    )
    assert learned.state_dict().keys() == fixed.state_dict().keys()
    kept = {name for name, _ in fixed.named_buffers()}
    assert kept == {"backbone.pos_embed", "backbone.patch_embed.proj.weight", "backbone.patch_embed.proj.bias"}
    ours, theirs = (each.state_dict() for each in (fixed, learned))
    widest, inputs = ours["backbone.patch_embed.proj.weight"].abs().max(), 3 * 16 * 16
    assert float(widest) == pytest.approx((6 / (inputs + 64)) ** 0.5, rel=1e-3)  # MoCo v3, vits.py
    torch.testing.assert_close(
        ours["backbone.patch_embed.proj.weight"] / widest,
        theirs["backbone.patch_embed.proj.weight"] / theirs["backbone.patch_embed.proj.weight"].abs().max(),
    )
    assert not ours["backbone.patch_embed.proj.bias"].any()
    x = [torch.randn(2, 3, 64, 64), torch.randn(2, 3, 32, 32)]
    fixed(x)["bank"].sum().backward()
    assert all(p.grad is not None for p in fixed.parameters())
    half = fixed.to(torch.bfloat16)
    for _, buffer in half.named_buffers():  # as the engine leaves them
        buffer.data = buffer.data.float()
    assert half([x[0].bfloat16()])["class_token"].dtype == torch.bfloat16


def test_positions_are_sines_and_cosines():
    """MoCo v3's formula, a place at a time: temperature 10,000, a quarter of the width each, none for the class token."""
    config = StudentConfig.model_validate(TINY | {"objectives": ["bank"], "positions": "fixed"})
    table = Student(config).state_dict()["backbone.pos_embed"][0]
    assert not table[0].any()
    for y, x in ((0, 0), (1, 3), (3, 2)):
        for i in (0, 5, 15):
            omega = 10_000 ** (-i / 16)
            wanted = [math.sin(y * omega), math.cos(y * omega), math.sin(x * omega), math.cos(x * omega)]
            assert table[1 + 4 * y + x, i::16].tolist() == pytest.approx(wanted, abs=1e-6)
    with pytest.raises(ValueError, match="multiple of 4"):
        Student(config.model_copy(update={"embed_dim": 66, "heads": 2}))


@pytest.mark.parametrize(
    ("objective", "head", "field"),
    [
        ("dense", {"norm": "batch"}, "norm"),
        ("dense", {"predictor": {}}, "predictor"),
        ("dense", {"bias": False}, "bias"),
        ("hierarchy", {"grid": 7}, "grid"),
    ],
)
def test_what_a_head_would_not_heed_is_refused(objective, head, field):
    with pytest.raises(ValueError, match=rf"projections\.{objective}\.{field}: this head has none"):
        StudentConfig.model_validate({**TINY, "objectives": [objective], "projections": {objective: head}})


def test_a_dense_head_is_told_layers_widths_grid_and_init():
    head = {"layers": 3, "hidden": 32, "out": 16, "grid": 2, "init": "kaiming"}
    config = StudentConfig.model_validate({**TINY, "objectives": ["dense"], "projections": {"dense": head}})
    dense = Student(config).heads["dense"]
    assert isinstance(dense, DenseHead)
    first = dense.projector[0]
    assert isinstance(first, nn.Linear)
    assert (len(dense.projector), first.out_features, dense.grid) == (5, 32, 2)
    assert not first.bias.any()
