"""ResNets: timm's features to the bit, batch norm by virtual batches, shuffled or not, and what a ViT alone has refused."""

from typing import Any

import pytest
import timm
import torch
from gristmill.models import BatchNorm, Student, StudentConfig, make_teacher, merge_statistics, statistics_of
from gristmill.models.resnet import build_resnet
from pydantic import ValidationError

SMALL = {"backbone": "resnet18", "embed_dim": 64, "depth": 1, "objectives": ["hierarchy"], "virtual_batch": 4}


def resnet(name: str, **how: Any) -> Any:
    return build_resnet(name, **how)


def images(count: int = 8, side: int = 64) -> torch.Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(count))


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_features_and_names_are_timms(name):
    theirs, ours = timm.create_model(name, num_classes=0), resnet(name)
    ours.load_state_dict(theirs.state_dict())
    for training in (False, True):  # timm's moves its statistics in training
        theirs.train(training)
        ours.train(training)
        tokens = ours(images(3, 96))
        assert torch.equal(tokens[:, 0], theirs(images(3, 96)))
        torch.testing.assert_close(tokens[:, 1:].mean(1), tokens[:, 0])
    assert ours.grid(96, 80) == (3, 3)
    assert tokens.shape[1] == 10


def test_the_map_keeps_its_places():
    """Token 1 + y * w + x is what is seen around there."""
    net = resnet("resnet18", seed=1).eval()
    blank, spot = torch.zeros(1, 3, 160, 160), torch.zeros(1, 3, 160, 160)
    spot[:, :, 100:156, 36:60] = 3.0  # low, and left of the middle
    change = (net(spot) - net(blank))[0, 1:].norm(dim=1).view(5, 5)
    y, x = divmod(int(change.argmax()), 5)
    assert y in (3, 4)
    assert x in (1, 2)


def test_narrower_and_shallower():
    small = resnet("resnet50", embed_dim=256, depth=1)
    assert small(images(2)).shape == (2, 5, 256)
    assert [len(getattr(small, f"layer{i}")) for i in range(1, 5)] == [1, 1, 1, 1]
    with pytest.raises(ValueError, match="multiple of 32"):
        build_resnet("resnet50", embed_dim=100)


def test_initial_weights_hang_on_the_seed_alone():
    torch.manual_seed(1)
    first, state = resnet("resnet18", seed=5, embed_dim=64), torch.get_rng_state()
    torch.manual_seed(1)
    assert torch.equal(state, torch.get_rng_state())
    second = resnet("resnet18", seed=5, embed_dim=64)
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )
    wide, narrow = resnet("resnet50", seed=5).layer3[0].conv3.weight, resnet("resnet50", init_conv="fan_in")
    assert float(wide.std()) == pytest.approx((2 / 1024) ** 0.5, rel=0.02)  # 1x1, 256 -> 1024: fan out
    assert float(narrow.layer3[0].conv3.weight.std()) == pytest.approx((2 / 256) ** 0.5, rel=0.02)
    zeroed = resnet("resnet50", embed_dim=256, depth=1, zero_init_residual=True)
    assert not any(float(getattr(zeroed, f"layer{i}")[0].bn3.weight.abs().max()) for i in range(1, 5))


def test_norms_that_are_not_batch_norm_are_refused():
    with pytest.raises(ValueError, match="not a plain ResNet"):
        build_resnet("resnet50_gn")


def test_statistics_are_outputs_and_virtual_batches_hide_the_world_size():
    """Eight images at once or four and four: the same rows, and together the same statistics."""
    student = Student(StudentConfig.model_validate(SMALL))
    x = images()
    before = {name: value.clone() for name, value in student.state_dict().items()}
    whole, parts = student([x]), [student([half]) for half in x.split(4)]
    assert all(torch.equal(before[name], value) for name, value in student.state_dict().items())
    torch.testing.assert_close(whole["hierarchy"], torch.cat([part["hierarchy"] for part in parts]))
    for name, value in statistics_of(whole).items():
        torch.testing.assert_close(value, torch.cat([statistics_of(part)[name] for part in parts]))
    merge_statistics(student, statistics_of(whole))
    assert int(student.state_dict()["backbone.bn1.num_batches_tracked"]) == 1


def test_shuffled_batches_are_those_of_the_other_order():
    """Each image gets what it would get if the images had come in that order, at its own place."""
    student = Student(StudentConfig.model_validate(SMALL | {"shuffle": 8}))
    x, order = images(16), torch.randperm(8, generator=torch.Generator().manual_seed(3))  # two crops of eight images
    shuffled = student([x], {"shuffle.order": order})
    rows = torch.cat([order, 8 + order])
    reordered = student([x[rows]])
    torch.testing.assert_close(shuffled["hierarchy"][rows], reordered["hierarchy"])
    assert not torch.allclose(shuffled["hierarchy"], student([x])["hierarchy"], atol=1e-4)


def test_recomputed_blocks_give_the_same_bits_and_statistics():
    student, x = Student(StudentConfig.model_validate(SMALL)), images()
    found = []
    for recompute in (False, True):
        student.backbone.recompute = recompute
        student.zero_grad()
        out = student([x])
        out["hierarchy"].square()[:, 0].sum().backward()
        found.append([*out.values(), *(p.grad.clone() for p in student.parameters() if p.grad is not None)])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_teacher_has_the_norms_and_no_gradient():
    teacher = make_teacher(Student(StudentConfig.model_validate(SMALL)))
    assert sum(isinstance(part, BatchNorm) for part in teacher.modules()) > 5
    assert not any(p.requires_grad for p in teacher.parameters())


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"patch_size": 16}, "patch_size is for ViTs"),
        ({"drop_path": 0.1}, "drop_path is for ViTs"),
        ({"objectives": ["patch"]}, "hides patches"),
        ({"shuffle": 6}, "multiple of virtual_batch"),
        ({"virtual_batch": None, "shuffle": 8}, "multiple of virtual_batch"),
        ({"projections": {"group": {}}}, "of Mugs' kind"),
    ],
)
def test_what_only_a_vit_has_is_refused(given, said):
    with pytest.raises(ValidationError, match=said):
        StudentConfig.model_validate(SMALL | given)


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({**SMALL, "positions": "fixed"}, "positions is for ViTs"),
        ({"objectives": ["instance"], "init_conv": "fan_in"}, "init_conv is for ResNets"),
        ({"objectives": ["instance"], "zero_init_residual": True}, "zero_init_residual is for ResNets"),
    ],
)
def test_what_the_other_kind_has_is_refused(given, why):
    with pytest.raises(ValidationError, match=why):
        StudentConfig.model_validate(given)


def test_a_name_with_its_weights_is_the_same_network():
    config = StudentConfig.model_validate({**SMALL, "backbone": "resnet18.a1_in1k"})
    assert config.resnet
    plain = Student(StudentConfig.model_validate(SMALL))
    for name, value in Student(config).state_dict().items():
        assert torch.equal(value, plain.state_dict()[name]), name
