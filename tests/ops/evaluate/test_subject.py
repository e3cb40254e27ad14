"""Whatever is evaluated is looked through in one way, and gives what the network itself gives."""

import json
from pathlib import Path

import pytest
import timm
import torch
from gristmill.models.student import Student, StudentConfig
from gristmill.ops.evaluate.subject import SubjectError, open_subject
from gristmill.ops.export import export_timm
from gristmill.pipeline.augment.colour import MEAN, STD
from safetensors.torch import save_file

VIT = "timm:vit_tiny_patch16_224"


def images(size: int = 48, count: int = 3) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(
    ("where", "size", "stride", "width"),
    [(VIT, 48, 16, 192), ("timm:resnet10t", 64, 32, 512), ("timm:resnet18", 64, 32, 512), ("timm:convnext_atto", 64, 32, 320)],
)  # fmt: skip
def test_all_kinds_give_the_same_four_things(where, size, stride, width):
    subject = open_subject(where, size=size)
    x = images(size)
    side = -(-size // stride)
    assert (subject.stride, subject.width, subject.size) == (stride, width, size)
    first, patches = subject.blocks(x)[-1]
    assert first.shape == (3, width)
    assert torch.equal(first, subject.features(x))
    assert torch.equal(patches.unflatten(1, (side, side)), subject.patches(x))
    assert not first.requires_grad
    net = subject.backbone()
    assert torch.equal(net.eval()(x), torch.cat([first[:, None], patches], 1))
    layers = subject.layers(net)
    assert {id(p) for layer in layers for p in layer} == {id(p) for p in net.parameters()}
    assert sum(map(len, layers)) == len(list(net.parameters()))
    assert len(layers) == subject.depth + 1


def test_training_the_copy_leaves_the_subject_alone():
    subject = open_subject("timm:resnet18", size=64)
    before = subject.features(images(64))
    net = subject.backbone()
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    net(images(64)).square().sum().backward()
    assert all(p.grad is not None for p in net.parameters())
    optimizer.step()
    assert torch.equal(subject.features(images(64)), before)
    assert not torch.equal(net.eval()(images(64))[:, 0], before)
    # Its batch norm is torch's own: running statistics move in the forward.
    assert net.get_submodule("net.bn1").running_mean.abs().sum() > 0  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]


def test_blocks_are_those_of_timm_after_the_norm():
    subject = open_subject(VIT, size=48)
    net = timm.create_model("vit_tiny_patch16_224", img_size=48, num_classes=0).eval()
    net.load_state_dict(subject.backbone().net.state_dict())  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
    x = images()
    with torch.no_grad():
        theirs = net.forward_intermediates(  # pyright: ignore[reportCallIssue]
            x, indices=3, norm=True, output_fmt="NLC", return_prefix_tokens=True, intermediates_only=True
        )
    for (first, patches), (map_, prefix) in zip(subject.blocks(x, 3), theirs, strict=True):
        torch.testing.assert_close(first, prefix[:, 0], rtol=0, atol=1e-5)
        torch.testing.assert_close(patches, map_, rtol=0, atol=1e-5)


def test_random_weights_are_a_function_of_the_seed():
    torch.manual_seed(1)
    one = open_subject(VIT, size=48)
    torch.manual_seed(2)
    assert open_subject(VIT, size=48).identity == one.identity
    assert open_subject(VIT, size=48, seed=1).identity != one.identity
    assert open_subject(VIT, size=32).identity != one.identity  # the same weights, read otherwise
    other = open_subject("timm:convnext_atto", size=64)
    assert open_subject("timm:convnext_atto", size=64).identity == other.identity


@pytest.mark.parametrize(
    "config",
    [
        {
            "backbone": "vit_tiny_patch16_224",
            "embed_dim": 64,
            "depth": 3,
            "heads": 4,
            "image_size": 32,
            "patch_size": 8,
        },
        {"backbone": "resnet18", "embed_dim": 64, "depth": 1, "objectives": ["batch_contrast"]},
    ],
    ids=["vit", "resnet"],
)
def test_an_export_gives_the_network_s_features(tmp_path: Path, config):
    import gristmill.ops.export as export

    student = Student(StudentConfig.model_validate({"drop_path": 0.0, "prototypes": 16, **config})).eval()
    about = {
        "gristmill.model": config["backbone"],
        "gristmill.arguments": json.dumps(export.timm_arguments(student.config, None, student.backbone)),
        "gristmill.mean": json.dumps(MEAN),
        "gristmill.std": json.dumps(STD),
    }
    file = export_timm(student, tmp_path / "net.safetensors", about)
    subject = open_subject(str(file), size=32)
    x = images(32)
    with torch.no_grad():
        wanted = student.backbone.norm(student.backbone(x))
    assert torch.equal(subject.features(x), wanted[:, 0])
    assert torch.equal(subject.patches(x).flatten(1, 2), wanted[:, 1:])


def test_weights_of_timm_come_from_the_cache_with_their_own_normalisation(tmp_path: Path, monkeypatch):
    name = "vit_tiny_patch16_224.augreg_in21k"
    with pytest.raises(SubjectError, match="nothing is fetched"):
        open_subject(f"timm:{name}", size=32)
    torch.manual_seed(5)
    net = timm.create_model("vit_tiny_patch16_224", num_classes=21843).eval()
    top = tmp_path / f"models--timm--{name}"
    (top / "snapshots" / "abc").mkdir(parents=True)
    (top / "refs").mkdir()
    (top / "refs" / "main").write_text("abc")
    save_file(net.state_dict(), top / "snapshots" / "abc" / "model.safetensors")  # pyright: ignore[reportArgumentType]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.file_download.HF_HUB_CACHE", str(tmp_path), raising=False)
    subject = open_subject(f"timm:{name}")
    values = torch.rand(2, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (subject.mean, subject.std))
    with torch.no_grad():
        wanted = net.forward_head(net.forward_features((values - 0.5) / 0.5), pre_logits=True)  # pyright: ignore[reportCallIssue]
    torch.testing.assert_close(subject.features((values - mean) / std), wanted, rtol=0, atol=1e-4)


def test_pixels_have_nothing_to_train():
    subject = open_subject("pixels", size=20)
    assert subject.patches(images(20)).shape == (3, 4, 4, 75)  # a patch that divides the image
    with pytest.raises(SubjectError, match="no weights to train"):
        subject.backbone()


@pytest.mark.parametrize(
    ("where", "size", "said"),
    [
        ("timm:vit_tinny_patch16_224", None, "vit_tiny_patch16_224"),
        (VIT, 50, "take 48"),
        ("nowhere", None, "name a run"),
        ("resnet18", None, "timm:resnet18"),
        ("net.safetensors", None, "no such file"),
    ],
)
def test_errors_name_the_remedy(where, size, said):
    with pytest.raises(SubjectError, match=said):
        open_subject(where, size=size)
