"""Attention in bf16 on a CPU: as close to float64 as the fused one, forward and backward, and only where it pays."""

from typing import Any

import pytest
import torch
from gristmill.models.block import MAP_CELLS, ScaledBlock, _by_products, _ByProducts, attend
from gristmill.models.host import off_host
from gristmill.models.vit import build_backbone
from torch import Tensor

HEADS = 3


def draw(samples: int, tokens: int, size: int = 16, sharp: float = 1.0) -> tuple[Tensor, Tensor]:
    """Queries, keys and values side by side, and a gradient of what is gathered. sharp: standard deviation of queries and keys."""
    generator, width = torch.Generator().manual_seed(tokens), HEADS * size
    joined = torch.randn(samples, tokens, 3 * width, generator=generator)
    joined[..., : 2 * width] *= sharp
    return joined.bfloat16(), torch.randn(samples, tokens, width, generator=generator).bfloat16()


def slopes(form, joined: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """What is gathered, and the gradient of queries, keys and values."""
    given = joined.detach().requires_grad_()
    found = form(given, HEADS)
    return found.detach(), torch.autograd.grad(found, given, grad)[0]


@pytest.mark.parametrize("sharp", [0.5, 1.0, 3.0])
@pytest.mark.parametrize(("samples", "tokens", "size"), [(3, 5, 16), (2, 37, 64), (1, 80, 20)])
def test_it_is_as_close_as_the_fused_form(samples: int, tokens: int, size: int, sharp: float) -> None:
    """Scores rounded to bf16 would be four times as far off where attention is sharp."""
    joined, grad = draw(samples, tokens, size, sharp)
    wanted, fused, mine = (
        [out, *slope.chunk(3, -1)]
        for out, slope in (
            slopes(attend, joined.double(), grad.double()),
            slopes(attend, joined, grad),
            slopes(_ByProducts.apply, joined, grad),
        )
    )
    assert {part.dtype for part in mine} == {torch.bfloat16}
    for part, (one, other, exact) in enumerate(zip(mine, fused, wanted, strict=True)):
        gaps = [float((slope.double() - exact).norm() / exact.norm()) for slope in (one, other)]
        assert gaps[0] <= 1.6 * gaps[1], (part, gaps)


def test_in_float64_it_is_the_gradient() -> None:
    """But for scores, which are float32."""
    joined, grad = (t.double() for t in draw(3, 7))
    wanted, found = (slopes(form, joined, grad)[1] for form in (attend, _ByProducts.apply))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("cells", [1, 2 * HEADS * 37**2, 1 << 30])
def test_a_few_samples_at_a_time_give_the_same(cells: int, monkeypatch: pytest.MonkeyPatch) -> None:
    joined, grad = draw(5, 37)
    whole = slopes(_ByProducts.apply, joined, grad)[1]
    monkeypatch.setattr("gristmill.models.block.MAP_CELLS", cells)
    shapes: list[int] = []
    bmm = torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda a, *more, **how: shapes.append(len(a)) or bmm(a, *more, **how))
    found = slopes(_ByProducts.apply, joined, grad)[1]
    assert float((found - whole).float().norm()) <= 1e-3 * float(whole.float().norm())
    parts = {1: [3] * 5, 1 << 30: [15]}.get(cells, [6, 6, 3])
    assert shapes == parts + [samples for samples in parts for _ in range(2)]


def test_what_memory_held_before_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    joined, grad = draw(2, 37)
    wanted = slopes(_ByProducts.apply, joined, grad)[1]
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, **how: empty(*shape, **how).fill_(torch.nan))
    assert torch.equal(slopes(_ByProducts.apply, joined, grad)[1], wanted)


def test_only_in_bf16_on_a_cpu_with_fast_products(monkeypatch: pytest.MonkeyPatch) -> None:
    joined = torch.zeros(2, 5, 12, dtype=torch.bfloat16)
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "AVX512")
    assert _by_products(joined, 2)
    assert not _by_products(joined.float(), 2)
    with off_host():
        assert not _by_products(joined, 2)
    most = int((MAP_CELLS // 2) ** 0.5)
    assert _by_products(joined.new_zeros(1, most, 3), 2)
    assert not _by_products(joined.new_zeros(1, most + 1, 3), 2)
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "AVX2")
    assert not _by_products(joined, 2)


def names(node: torch.autograd.graph.Node | None) -> set[str]:
    """Of all steps of a backward."""
    return set() if node is None else {node.name()}.union(*(names(before) for before, _ in node.next_functions))


@pytest.mark.parametrize("bf16", [False, True])
def test_a_block_takes_it_and_learns_the_same(bf16: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    small: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 1, "num_heads": 3}
    block = build_backbone("vit_tiny_patch16_224", **small, linear_std=0.2).blocks[0]
    assert isinstance(block, ScaledBlock)
    x, found = torch.randn(2, 17, 48, generator=torch.Generator().manual_seed(0)), []
    for capability in ("AVX512", "AVX2"):
        monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda name=capability: name)
        block.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            out = block(x)
        assert ("_ByProductsBackward" in names(out.grad_fn)) == (bf16 and capability == "AVX512")
        (out.float() ** 2).sum().backward()
        found.append([out.detach(), *(p.grad for p in block.parameters())])
    for one, other in zip(*found, strict=True):
        assert float((one - other).norm()) <= 1e-2 * bf16 * float(other.norm())
