"""The backbone: equal to the official ViT, to timm's, and pure in its seed and its draws."""

from pathlib import Path
from typing import Any

import pytest
import torch
from gristmill.models.vit import branch_scales, build_backbone, resize_pos_embed, tokens
from hypothesis import given
from hypothesis import strategies as st
from timm.models.vision_transformer import VisionTransformer

VECTORS = Path(__file__).parent.parent / "vectors"
SMALL: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3}


@pytest.fixture(scope="module")
def official() -> dict:
    """Slim form of the recorded ViT: its first block only, whose output after the last LayerNorm was recorded too."""
    return torch.load(VECTORS / "mugs_vit_slim.pt", weights_only=True)


def test_class_token_equals_the_official_one(official: dict):
    backbone = build_backbone("vit_small_patch16_224", embed_dim=48, depth=1, num_heads=3)
    backbone.load_state_dict(official["state"], strict=True)
    with torch.no_grad():
        _, after = tokens(backbone, official["x"].float())
    torch.testing.assert_close(after[:, 0], official["cls_block0"], rtol=0, atol=1e-5)


def test_position_embeddings_equal_the_official_ones_at_every_size(official: dict):
    for case in official["pos_embed"]:
        height, width = (side // 16 for side in case["hw"])
        found = resize_pos_embed(official["state"]["pos_embed"], height, width)
        assert found.shape == (1, 1 + height * width, 48)
        torch.testing.assert_close(found[:, :: case["every"]], case["rows"], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("pos_interp", "size"), [("official", 32), ("timm", 32), ("timm", 16)])
def test_equals_timms_vit(pos_interp, size: int):
    backbone = build_backbone("vit_tiny_patch16_224", **SMALL, pos_interp=pos_interp)
    plain = VisionTransformer(**SMALL, num_classes=0, dynamic_img_size=True)
    plain.load_state_dict(backbone.state_dict(), strict=True)
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        _, after = tokens(backbone, x)
        torch.testing.assert_close(after, plain.forward_features(x), rtol=0, atol=1e-5)
        torch.testing.assert_close(after, backbone.forward_features(x), rtol=0, atol=1e-5)


def test_names_decide_what_is_not_overridden():
    backbone = build_backbone("vit_small_patch16_224", depth=1)
    assert (backbone.embed_dim, backbone.heads, backbone.patch_embed.patch_size) == (384, 6, (16, 16))
    assert backbone.norm.eps == 1e-6


@pytest.mark.parametrize(
    ("name", "more", "said"),
    [
        ("vit_smal", {}, "not a ViT that timm knows"),
        ("resnet50", {}, "not a ViT that timm knows"),
        ("vit_small_patch16_dinov3", {}, "not a ViT that timm knows"),
        ("vit_base_patch16_clip_quickgelu_224", {"depth": 1}, "not a plain ViT"),
        ("vit_small_patch14_reg4_dinov2", {"depth": 1, "img_size": 28}, "not a plain ViT"),
        ("vit_small_patch16_224", {"depth": 1, "num_heads": 5}, "cannot be built"),
        ("vit_small_patch16_224", {"depth": 1, "img_size": 100}, "not a multiple of the patch size"),
    ],
)
def test_other_backbones_are_refused(name: str, more: dict, said: str):
    with pytest.raises(ValueError, match=said):
        build_backbone(name, **more)


def test_weights_come_from_the_seed_alone():
    before = torch.get_rng_state()
    first, again, other = (build_backbone("vit_small_patch16_224", **SMALL, seed=seed) for seed in (7, 7, 8))
    assert torch.equal(torch.get_rng_state(), before)
    for key, value in first.state_dict().items():
        assert torch.equal(value, again.state_dict()[key])
        drawn = value.std() > 0
        assert torch.equal(value, other.state_dict()[key]) != bool(drawn), key
    deeper = build_backbone("vit_small_patch16_224", **{**SMALL, "depth": 4}, seed=7).state_dict()
    assert all(torch.equal(value, deeper[key]) for key, value in first.state_dict().items())


def test_initial_weights_are_mugs():
    state = build_backbone("vit_small_patch16_224", depth=2).state_dict()
    for key in ("pos_embed", "blocks.0.attn.qkv.weight", "blocks.1.mlp.fc2.weight"):
        assert abs(state[key].std().item() - 0.02) < 5e-4, key
    assert not state["blocks.0.mlp.fc1.bias"].any()
    assert (state["norm.weight"] == 1).all()
    bound = (3 * 16 * 16) ** -0.5
    for key in ("patch_embed.proj.weight", "patch_embed.proj.bias"):
        assert 0.9 * bound < state[key].abs().max() <= bound, key


@given(st.floats(0, 0.9), st.integers(1, 6), st.integers(0, 2**32))
def test_branch_scales(rate: float, depth: int, seed: int):
    draws = torch.rand(200, 2 * depth, generator=torch.Generator().manual_seed(seed))
    scales = branch_scales(draws, rate)
    p = torch.linspace(0, rate, depth).repeat_interleave(2)
    assert scales.shape == draws.shape
    assert (scales[:, :2] == 1).all(), "the first block is never dropped"
    torch.testing.assert_close(scales, torch.where(draws < p, 0.0, 1 / (1 - p)))


def test_a_branch_at_zero_is_as_if_it_were_not_there():
    backbone = build_backbone("vit_tiny_patch16_224", **SMALL)
    x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    scale = torch.ones(4, 6)
    scale[2, 2:4] = 0
    with torch.no_grad():
        found, whole = backbone(x, scale), backbone(x)
        backbone.blocks[1] = torch.nn.Identity()
        torch.testing.assert_close(found[[0, 1, 3]], whole[[0, 1, 3]], rtol=0, atol=1e-6)
        torch.testing.assert_close(found[2], backbone(x)[2], rtol=0, atol=1e-6)
