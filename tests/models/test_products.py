"""Products by oneDNN: torch's own to rounding, forward and backward, and only for whom they are faster."""

import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from gristmill.models import products
from gristmill.models.heads import ProjectionHead
from gristmill.models.host import off_host
from gristmill.models.products import Linear, better_here, by_onednn, library, linear, product
from gristmill.models.vit import build_backbone
from torch import Tensor, nn

SIZES = [(7, 24, 40), (300, 24, 40), (300, 40, 24), (1, 16, 16)]


@pytest.fixture(autouse=True)
def everything(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any size goes to oneDNN, whatever processor this is."""
    monkeypatch.setattr(products, "LEAST", 0)
    monkeypatch.setattr(products, "better_here", lambda: True)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of what oneDNN was given."""
    seen: list[tuple[int, ...]] = []
    real = products._product
    monkeypatch.setattr(
        products, "_product", lambda x, *more, **how: seen.append(tuple(x.shape)) or real(x, *more, **how)
    )
    return seen


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def gap(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).detach().norm() / wanted.detach().norm())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("ahead", [(), (2, 3)])
@pytest.mark.parametrize(("rows", "inner", "outer"), SIZES)
def test_a_linear_layer_and_its_gradients(
    rows: int, inner: int, outer: int, ahead: tuple[int, ...], bias: bool, calls: list[tuple[int, ...]]
) -> None:
    """As close to float64 as torch's; gradients are laid out like what they belong to."""
    given = [draw(*ahead, rows, inner), draw(outer, inner), draw(outer)][: 2 + bias]
    grad, found = draw(*ahead, rows, outer, seed=1), []
    for form, dtype in (
        (linear, torch.float32),
        (nn.functional.linear, torch.float32),
        (nn.functional.linear, torch.float64),
    ):
        leaves = [tensor.to(dtype, copy=True).requires_grad_() for tensor in given]
        out = form(*leaves)
        found.append([out.detach(), *torch.autograd.grad(out, leaves, grad.to(dtype))])
        if form is linear:
            assert all(tensor.is_contiguous() for tensor in found[0])
            count = len(calls)
            assert count == (3 if rows * (6 if ahead else 1) >= products.LEAST_ROWS else 2)
    assert len(calls) == count
    for mine, torchs, exact in zip(*found, strict=True):
        assert mine.shape == exact.shape
        assert gap(mine, exact) <= max(3 * gap(torchs, exact), 5e-7)


@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, False), (False, False, True)])
def test_only_what_wants_a_gradient_gets_one(wanted: tuple[bool, ...], calls: list[tuple[int, ...]]) -> None:
    leaves = [
        tensor.requires_grad_(want)
        for tensor, want in zip((draw(300, 24), draw(40, 24), draw(40)), wanted, strict=True)
    ]
    linear(*leaves).sum().backward()
    assert tuple(leaf.grad is not None for leaf in leaves) == wanted
    assert len(calls) == (1 if wanted[2] else 2)


def test_layouts(calls: list[tuple[int, ...]]) -> None:
    """Rows of a memory, a transposed weight, every second row, no rows: the same product."""
    bank, x = draw(64, 24), draw(5, 24)
    for rows in (bank, bank[8:40], bank[::2], draw(24, 64).t(), draw(64, 48)[:, ::2]):
        torch.testing.assert_close(product(x, rows), x @ rows.T)
        torch.testing.assert_close(linear(x.expand(2, 5, 24), rows), x.expand(2, 5, 24) @ rows.T)
    torch.testing.assert_close(product(draw(24, 5).t(), bank), draw(24, 5).t() @ bank.T)
    assert len(calls) == 11


def test_scratch_may_hold_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    x, rows, room = draw(5, 24), draw(64, 24), torch.empty(5, 64)
    wanted = x @ rows.T
    torch.testing.assert_close(product(x, rows, room), wanted)
    monkeypatch.setattr(products, "better_here", lambda: False)
    assert product(x, rows, room).data_ptr() == room.data_ptr()
    torch.testing.assert_close(room, wanted)


def test_the_same_bits_every_time() -> None:
    x, weight, grad = draw(1576, 384).requires_grad_(), draw(1536, 384).requires_grad_(), draw(1576, 1536)
    first: list[Tensor] = []
    for _ in range(4):
        out = linear(x, weight)
        now = [out.detach(), *torch.autograd.grad(out, (x, weight), grad)]
        first = first or now
        assert all(torch.equal(one, other) for one, other in zip(now, first, strict=True))


def test_others_are_torchs(calls: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Other types, autocast, what only looks like a CPU's, few numbers, other processors."""
    layer = Linear(24, 40)
    x = draw(300, 24)
    wanted = layer(x)
    assert calls
    calls.clear()
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    layer.double()(x.double())
    layer.bfloat16()(x.bfloat16())
    layer.float()
    with off_host():
        layer(x)
    monkeypatch.setattr(products, "LEAST", 300 * 24 * 40 + 1)
    layer(x)
    monkeypatch.setattr(products, "LEAST", 0)
    monkeypatch.setattr(products, "better_here", lambda: False)
    torch.testing.assert_close(layer(x), wanted, rtol=2e-2, atol=2e-2)  # its weights were bf16 once
    assert not calls


def test_under_autocast_memories_are_compared_in_float32(calls: list[tuple[int, ...]]) -> None:
    x, rows = draw(5, 24), draw(64, 24)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(product(x, rows), (x.double() @ rows.double().T).float())
    assert calls == [(5, 24)]


def test_layers_of_other_classes_stay() -> None:
    class Own(nn.Linear):
        pass

    head = nn.Sequential(nn.Linear(4, 4), Own(4, 4), ProjectionHead(4, 8, 4, 8))
    keys = list(head.state_dict())
    by_onednn(head)
    assert [type(part) for part in (head[0], head[1])] == [Linear, Own]
    assert not [part for part in head.modules() if type(part) is nn.Linear]
    assert list(head.state_dict()) == keys


@pytest.mark.parametrize(
    ("capability", "maker", "wanted"),
    [
        ("AVX512", "AuthenticAMD", True),
        ("AVX512", "GenuineIntel", False),
        ("AVX2", "AuthenticAMD", False),
        ("AVX512", None, False),
        ("AVX512", "", False),
    ],
)
def test_who_is_served(
    capability: str, maker: str | None, wanted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the processor's maker and registers; where that is not known, torch's own."""
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: capability)
    file = tmp_path / "cpuinfo"
    if maker is not None:
        file.write_text(f"processor\t: 0\nvendor_id\t: {maker}\nflags\t\t: fpu\n" if maker else "CPU architecture: 8\n")
    assert better_here.__wrapped__(str(file)) is wanted
    monkeypatch.setattr(products, "better_here", lambda: wanted)
    assert library() == f"{'oneDNN' if wanted else 'torch'} {capability}"


@pytest.mark.parametrize("before", ["none", "ieee"])
@pytest.mark.parametrize(("n", "m", "k"), [(37, 37, 64), (5, 19, 24)])
def test_batches_of_bf16_are_multiplied_exactly(n: int, m: int, k: int, before: str) -> None:
    """But for float32's sums; and what others set for their products stays."""
    setting = torch.backends.mkldnn.matmul
    x, y, own = draw(6, n, k).bfloat16(), draw(6, m, k, seed=1).bfloat16(), setting.fp32_precision
    setting.fp32_precision = before
    try:
        found = products.batched(x, y, 0.125)
        with pytest.raises(RuntimeError):
            products.batched(x, y[:, :, 1:], 0.125)
        assert setting.fp32_precision == before
    finally:
        setting.fp32_precision = own
    assert found.dtype == torch.float32
    assert gap(found, x.double() @ y.double().mT / 8) < 2e-7


def test_threads_leave_the_setting_as_it_was() -> None:
    setting, x = torch.backends.mkldnn.matmul, draw(6, 37, 64).bfloat16()
    own = setting.fp32_precision
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: products.batched(x, x, 1.0), range(200)))
    assert setting.fp32_precision == own
    assert all(torch.equal(each, found[0]) for each in found)


def test_without_a_gradient_bf16_is_one_pass_a_layer(
    monkeypatch: pytest.MonkeyPatch, calls: list[tuple[int, ...]]
) -> None:
    """As close to float64 as layer and GELU apart; with a gradient the hidden layer is kept, and it is torch's."""
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "AVX512")
    layer, x = Linear(24, 40), draw(2, 17, 24)
    with torch.autocast("cpu", torch.bfloat16):
        assert not products.fuses(x)
        plain = layer(x)
        assert not calls
        with torch.no_grad():
            assert products.fuses(x)
            found, fused = layer(x), layer(x, gelu=True)
    assert len(calls) == 2
    exact = nn.functional.linear(x.double(), layer.weight.double(), layer.bias.double())
    for mine, torchs, wanted in ((found, plain, exact), (fused, nn.functional.gelu(plain), nn.functional.gelu(exact))):
        assert mine.dtype == torch.bfloat16
        assert gap(mine, wanted) <= 1.1 * gap(torchs, wanted)
    with torch.no_grad():
        assert not products.fuses(x)
        assert products.fuses(x.bfloat16())
        with pytest.raises(RuntimeError, match="dtype"):  # torch's own word on mixed types
            layer(x.bfloat16())
        monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "AVX2")
        assert not products.fuses(x.bfloat16())


@pytest.mark.parametrize("bias", [False, True])
def test_queries_that_nobody_asks_for_are_left_out(bias: bool) -> None:
    layer, x, found = products.QueryKeyValue(16, 48, bias=bias), draw(2, 5, 16), []
    for apart in (False, True):
        layer.zero_grad()
        query, rest = layer(x, apart=True) if apart else layer(x).split([16, 32], -1)
        assert query.shape == (2, 1 if apart else 5, 16)
        (query[:, :1].sin().sum() + rest.cos().sum()).backward()
        found.append([query[:, :1].detach(), rest.detach(), *(p.grad for p in layer.parameters())])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_what_a_block_forgets_stays_forgotten(calls: list[tuple[int, ...]]) -> None:
    """Outputs of norms and of GELU are not kept for backward, and it is the same backward."""
    small: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 1, "num_heads": 3}
    block: Any = build_backbone("vit_tiny_patch16_224", **small, linear_std=0.2).blocks[0]
    gone: list[str] = []
    for name in ("norm1", "norm2", "mlp.act"):
        watch = lambda _, __, out, name=name: weakref.finalize(out.untyped_storage(), gone.append, name) and None  # noqa: E731
        block.get_submodule(name).register_forward_hook(watch)
    x, found = draw(2, 17, 48), []
    for lean in (True, False):
        gone.clear()
        calls.clear()
        block.zero_grad()
        out = block(x, lean=lean)
        assert sorted(gone) == (["mlp.act", "norm1", "norm2"] if lean else [])
        assert len(calls) == 4
        out.square().sum().backward()
        found.append([out.detach(), *(p.grad for p in block.parameters())])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
