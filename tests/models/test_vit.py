"""The backbone: equal to the official ViT, to timm's, and pure in its seed and its draws."""

import copy
import shutil
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from gristmill.models.block import ScaledBlock
from gristmill.models.vit import (
    Backbone,
    branch_scales,
    build_backbone,
    compile_blocks,
    resize_pos_embed,
    tokens,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

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
        ("vit_base_patch16_rpn_224", {"depth": 1}, "not a plain ViT"),
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
@settings(deadline=None)
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


def crops(scaled: bool) -> list[tuple[Tensor, Tensor | None]]:
    """Images of two sizes, each with factors for the branches of three blocks; the second image drops some."""
    generator = torch.Generator().manual_seed(3)
    sizes = [torch.randn(n, 3, side, side, generator=generator) for n, side in ((2, 32), (3, 16))]
    scale = torch.tensor([1.0, 1, 1, 1, 1, 1, 0, 1.5, 1.5, 0, 1, 2]).view(2, 6)
    return [(x, torch.cat([scale, scale])[: len(x)] if scaled else None) for x in sizes]


def learn(backbone: Backbone, scaled: bool, bf16: bool, sizes: int = 2) -> list[Tensor]:
    """Outputs and gradients of one step over so many sizes of crops."""
    backbone.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        out = [tokens(backbone, x, scale)[1] for x, scale in crops(scaled)[:sizes]]
        loss = torch.stack([(y.float() ** 3).mean() for y in out]).sum()
    loss.backward()
    return [y.detach() for y in out] + [p.grad for p in backbone.parameters() if p.grad is not None]


def counted(backbone: Backbone) -> list[int]:
    """Will hold the index of each block that runs."""
    seen: list[int] = []
    for index, block in enumerate(backbone.blocks):
        block.norm1.register_forward_hook(lambda *_, index=index: seen.append(index))
    return seen


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("factors", [None, [[0, 2], [2, 0], [2, 2]], [[1.5, 1], [0.5, 3], [0, 2]], [[0, 0]] * 3])
@pytest.mark.parametrize("read", ["class", "pair"])
def test_what_is_read_of_the_last_block_is_all_that_it_computes(
    read: Any, factors: list[list[float]] | None, recompute: bool
):
    """The class token alone, or with the mean of all: the numbers and gradients of a backbone that gives out all tokens."""
    backbone = build_backbone("vit_tiny_patch16_224", **SMALL, linear_std=0.2).double()
    backbone.recompute = recompute
    images, rows = torch.randn(3, 3, 32, 32, dtype=torch.float64), dict[str, int]()
    scale = None if factors is None else torch.tensor(factors, dtype=torch.float64).repeat(1, 3)

    def watch(name: str) -> None:
        part = backbone.blocks[-1].get_submodule(name)
        part.register_forward_pre_hook(lambda _, given: rows.update({name: given[0].shape[1]}))

    for name in ("attn.proj", "mlp.fc1", "mlp.fc2"):
        watch(name)
    found, wanted = [], []
    for into in (found, wanted):
        rows.clear()
        backbone.zero_grad()
        if into is found:
            out = backbone(images, scale, read=read)
            one = {"class": 1, "pair": 17}[read]
            assert rows == {"attn.proj": one, "mlp.fc1": one, "mlp.fc2": {"class": 1, "pair": 2}[read]}
        else:
            tokens = backbone(images, scale)
            assert set(rows.values()) == {17}
            out = tokens[:, :1] if read == "class" else torch.stack([tokens[:, 0], tokens.mean(1)], 1)
        out.sin().sum().backward()
        into += [out.detach(), *(p.grad for name, p in backbone.named_parameters() if not name.startswith("norm."))]
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
def test_recomputation_changes_no_bit(scaled: bool, bf16: bool):
    plain = build_backbone("vit_tiny_patch16_224", **SMALL)
    again = copy.deepcopy(plain)
    again.recompute = True
    seen = counted(again)
    wanted, found = learn(plain, scaled, bf16), learn(again, scaled, bf16)
    assert len(wanted) == 2 + len(list(plain.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert sorted(seen) == sorted([0, 1, 2] * 4), "each block twice a size: forward, and once more in the backward"


def reference(block: ScaledBlock, x: Tensor, scale: Tensor) -> Tensor:
    """A block as timm has it, each branch times its factor."""
    x = x + scale[:, 0, None, None] * block.attn(block.norm1(x))
    return x + scale[:, 1, None, None] * block.mlp(block.norm2(x))


@pytest.mark.parametrize(
    "factors", [[[0, 2], [2, 0], [2, 2]], [[1.5, 1], [0.5, 3], [0, 2]], [[0, 0]] * 3, [[2, 2]] * 3]
)
def test_a_block_computes_what_counts_and_equals_the_plain_one(factors: list[list[float]]):
    block = build_backbone("vit_tiny_patch16_224", **SMALL, linear_std=0.2).double().blocks[1]
    assert isinstance(block, ScaledBlock)
    scale, x = torch.tensor(factors, dtype=torch.float64), torch.randn(3, 7, 48, dtype=torch.float64)
    seen: list[int] = []
    block.attn.qkv.register_forward_hook(lambda module, args, out: seen.append(len(out)))
    found = []
    for form in (lambda x: block(x, scale=scale), lambda x: reference(block, x, scale)):
        given = x.clone().requires_grad_()
        block.zero_grad()
        (form(given) ** 2).sum().backward()
        found.append([form(given).detach(), given.grad, *(p.grad for p in block.parameters())])
        block.zero_grad()
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
    assert seen[0] == (2 if factors[0] == [0, 2] else 3)
    with pytest.raises(ValueError, match="all tokens"):
        block(x, is_causal=True)


@pytest.mark.parametrize(("bf16", "fast"), [(False, True), (True, False), (True, True)])
@pytest.mark.parametrize("scaled", [False, True])
def test_forgetting_changes_no_bit_and_keeps_less(
    scaled: bool, bf16: bool, fast: bool, monkeypatch: pytest.MonkeyPatch
):
    """But where bf16 is multiplied fast, all is kept."""
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "AVX512" if fast else "AVX2")
    backbone = build_backbone("vit_tiny_patch16_224", **SMALL)
    weights, kept = {p.untyped_storage().data_ptr() for p in backbone.parameters()}, {}

    def note(kept_by: Any) -> Any:
        if isinstance(kept_by, Tensor) and kept_by.untyped_storage().data_ptr() not in weights:
            storage = kept_by.untyped_storage()
            kept[storage.data_ptr()] = (storage.nbytes(), kept_by)  # alive, so that no address comes twice
        return kept_by

    hooks = torch.autograd.graph.saved_tensors_hooks
    monkeypatch.setattr(
        "gristmill.models.lean.saved_tensors_hooks", lambda pack, unpack: hooks(lambda t: note(pack(t)), unpack)
    )
    found, sizes = [], []
    for lean in (True, False):
        if not lean:
            monkeypatch.setattr("gristmill.models.block.forgetting", lambda *_: nullcontext())
        with hooks(note, lambda t: t):
            found.append(learn(backbone, scaled, bf16))
        sizes.append(sum(size for size, _ in kept.values()))
        kept.clear()
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    # bf16 copies of the weights count, too
    assert sizes[0] == sizes[1] if bf16 and fast else sizes[0] < (0.9 if bf16 else 0.75) * sizes[1]


def test_recomputation_keeps_less_and_only_for_a_backward(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("gristmill.models.block.forgetting", lambda *_: nullcontext())  # it keeps past these hooks
    backbone = build_backbone("vit_tiny_patch16_224", **SMALL)
    x = crops(False)[0][0]

    def kept() -> int:
        sizes: list[int] = []

        def note(tensor: Tensor) -> Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            backbone(x)
        return sum(sizes)

    whole = kept()
    backbone.recompute = True
    assert kept() < whole / 4
    backbone.eval()
    assert kept() == whole
    backbone.train()
    seen = counted(backbone)
    with torch.no_grad():
        backbone(x)
    assert seen == [0, 1, 2]


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A fresh compiler, whose files end with the test."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize(("scaled", "recompute", "sizes"), [(False, False, 1), (True, True, 2)])
def test_compiled_blocks_equal_the_plain_ones(scaled: bool, recompute: bool, sizes: int):
    plain = build_backbone("vit_tiny_patch16_224", **SMALL)
    compiled = copy.deepcopy(plain)
    compiled.recompute = recompute
    compile_blocks(compiled, "aot_eager")
    assert list(compiled.state_dict()) == list(plain.state_dict())
    torch._dynamo.utils.counters.clear()
    found = learn(compiled, scaled, False, sizes)
    for a, b in zip(found, learn(plain, scaled, False, sizes), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    counters = torch._dynamo.utils.counters
    assert not counters["graph_break"]
    # Shared by all blocks: a graph for the first size, and one more that serves any size.
    assert counters["stats"]["unique_graphs"] == sizes
    # Blocks one by one take part, with scales or without.
    assert all(block._compiled_call_impl is not None for block in compiled.blocks)
    assert all(block._compiled_call_impl is None for block in copy.deepcopy(compiled).blocks)


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("read", ["class", "pair"])
def test_a_compiled_last_block_computes_what_is_read(read: Any):
    plain = build_backbone("vit_tiny_patch16_224", **SMALL)
    compiled, found = copy.deepcopy(plain), []
    compile_blocks(compiled, "aot_eager")
    scale = torch.tensor([[0.0, 2.0, 1.0, 0.0, 1.5, 1.5]]).expand(2, -1)
    torch._dynamo.utils.counters.clear()
    for backbone in (compiled, plain):
        out = backbone(torch.ones(2, 3, 32, 32), scale, read=read)
        out.sin().sum().backward()
        found.append([out.detach(), *(p.grad for p in backbone.blocks.parameters())])
    assert not torch._dynamo.utils.counters["graph_break"]
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("compiler")
def test_inductor_equals_the_plain_blocks_or_says_what_it_lacks(monkeypatch: pytest.MonkeyPatch):
    plain = build_backbone("vit_tiny_patch16_224", **{**SMALL, "depth": 1})
    compiled = copy.deepcopy(plain)
    if shutil.which("g++"):
        # One process, no vectors, no backward: compiling is slow. Gradients are tied under the other backend.
        monkeypatch.setattr("torch._inductor.config.compile_threads", 1)
        monkeypatch.setattr("torch._inductor.config.cpp.simdlen", 1)
        monkeypatch.delenv("CXX", raising=False)
        compile_blocks(compiled)
        x, scale = torch.ones(2, 3, 32, 32), torch.tensor([[1.0, 1.5], [0.0, 2.0]])
        with torch.no_grad():
            torch.testing.assert_close(compiled(x, scale), plain(x, scale), rtol=1e-5, atol=1e-6)
        assert torch._dynamo.utils.counters["inductor"]
    monkeypatch.setenv("PATH", "")
    for name in ("", "clang++-99 -O2"):
        monkeypatch.setenv("CXX", name)
        with pytest.raises(
            RuntimeError, match=r"inductor needs a C\+\+ compiler \((g|clang)\+\+.*install it, or leave"
        ):
            compile_blocks(plain, "inductor")
    assert plain.blocks[0]._compiled_call_impl is None
    plain(crops(False)[0][0])


def test_a_backend_that_torch_lacks_is_refused():
    with pytest.raises(ValueError, match=r"no backend 'inductr'; choose of .*inductor"):
        compile_blocks(build_backbone("vit_tiny_patch16_224", **SMALL), "inductr")
