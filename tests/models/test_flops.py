"""The counted FLOPs against those that torch counts while it computes."""

from typing import Any

import pytest
import torch
from gristmill.models.flops import Asked, forward_flops, student_flops, tokens, training_flops
from gristmill.models.products import COUNTED
from gristmill.models.resnet import build_resnet
from gristmill.models.student import Student, StudentConfig
from gristmill.models.teacher import make_teacher
from gristmill.models.vit import build_backbone
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

SMALL: dict[str, Any] = {
    "image_size": 32, "head_hidden": 32, "head_out": 16, "predictor_hidden": 24, "prototypes": 40, "neighbours": 3,
    "drop_path": 0.0,
}  # fmt: skip
VIT = {**SMALL, "patch_size": 8, "embed_dim": 32, "depth": 2, "heads": 2}
CROPS = [(32, 2), (16, 3)]
MEMORY = 24


def counted(call: Any) -> int:
    """Attention by plain products: torch does not count inside the kernel that a CPU has for it."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False, custom_mapping=COUNTED) as counter:
        call()
    return counter.get_total_flops()


@pytest.mark.parametrize(("height", "width"), [(32, 32), (16, 48)])
def test_a_vits_forward(height: int, width: int):
    vit = build_backbone("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=48, depth=3, num_heads=3)
    images = torch.randn(2, 3, height, width)
    with torch.no_grad():
        assert 2 * forward_flops(vit, height, width) == counted(lambda: vit(images))


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnet26d"])
@pytest.mark.parametrize("side", [64, 50])
def test_a_resnets_forward(name: str, side: int):
    net = build_resnet(name, depth=1).eval()
    images = torch.randn(1, 3, side, side)
    with torch.no_grad():
        assert forward_flops(net, side, side) == counted(lambda: net(images))


CASES = {
    "mugs": {**VIT, "objectives": ["instance", "local_group", "group"]},
    "multigrain": {
        **VIT,
        "objectives": ["instance", "dense", "local_group", "hierarchy", "group"],
        "projections": {"dense": {"hidden": 32, "out": 8, "grid": 3}, "hierarchy": {"hidden": 24, "out": 8}},
    },
    "swapped": {
        **SMALL,
        "backbone": "resnet18",
        "embed_dim": 64,
        "depth": 1,
        "objectives": ["swapped", "bootstrap"],
    },
    "patches": {**VIT, "objectives": ["group", "patch"], "shared_head": False, "patch_prototypes": 24},
    "shared": {**VIT, "objectives": ["group", "patch"]},
}


def context(student: Student, images: int) -> tuple[dict[str, torch.Tensor], int]:
    given: dict[str, torch.Tensor] = {"local_group.bank": torch.randn(MEMORY, 32)}
    masks = torch.zeros(2 * images, 4, 4, dtype=torch.bool)
    masks[:, 1] = True
    return given | {"patch.masks": masks}, int(masks.sum())


@pytest.mark.parametrize("case", CASES)
def test_a_students_forward(case: str):
    student = Student(StudentConfig.model_validate(CASES[case])).train()
    images = 2
    given, hidden = context(student, images)
    views = [torch.randn(count * images, 3, size, size) for size, count in CROPS]
    asked = Asked(memory=MEMORY, hidden=hidden / images)
    with torch.no_grad():
        teacher = make_teacher(student)
        found = counted(lambda: student(views, given)), counted(lambda: teacher(views[:1], given))
    # Of each forward, not of an image: the row of the patches' mean.
    mean = 2 * 16 * (24 if case == "patches" else 40) if "patch" in CASES[case]["objectives"] else 0
    wanted = student_flops(student, CROPS, asked), student_flops(teacher, CROPS[:1], asked)
    assert found == tuple(images * flops + mean for flops in wanted)


def test_a_training_step_of_a_resnet():
    student = Student(StudentConfig.model_validate(CASES["swapped"])).train()
    views = [torch.randn(4, 3, 32, 32)]
    crops = [(32, 2)]

    def step() -> None:
        out = student(views)
        (out["swapped"].sum() + out["bootstrap"].sum()).backward()

    assert counted(step) == 2 * training_flops(student, None, crops, [], Asked())


def test_a_training_step_of_a_vit():
    student = Student(StudentConfig.model_validate({**VIT, "objectives": ["instance"]})).train()
    teacher = make_teacher(student)
    views = [torch.randn(count, 3, size, size) for size, count in CROPS]

    def step() -> None:
        with torch.no_grad():
            teacher(views[:1])
        student(views)["instance"].sum().backward()

    assert counted(step) == training_flops(student, teacher, CROPS, CROPS[:1], Asked())
    assert tokens(student.backbone, CROPS) == 2 * 17 + 3 * 5
