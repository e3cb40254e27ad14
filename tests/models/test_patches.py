"""A patch projection as a product is the convolution that it stands for."""

import pytest
import torch
from gristmill.models.host import off_host
from gristmill.models.patches import as_product
from torch import nn


@pytest.mark.parametrize("shape", [(3, 3, 32, 48), (1, 3, 16, 16)])
def test_the_product_equals_the_convolution(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    convolution = nn.Conv2d(3, 24, 16, stride=16).double()
    images = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    found = []
    for product in (False, True):
        if product:
            as_product(convolution)
        with off_host():
            out = convolution(images)
        weights = [convolution.weight, convolution.bias, images]
        found.append([out, *torch.autograd.grad(out.sin().sum(), weights)])
    for plain, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)


def test_under_autocast_it_gives_out_what_the_convolution_does() -> None:
    convolution, images = nn.Conv2d(3, 8, 16, stride=16), torch.randn(2, 3, 32, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16), off_host():
        plain = convolution(images)
        as_product(convolution)
        ours = convolution(images)
    assert ours.dtype == plain.dtype == torch.bfloat16
    torch.testing.assert_close(ours, plain, rtol=0.02, atol=0.02)


@pytest.mark.parametrize(("bf16", "avx512", "oned", "wanted"), [
    (False, True, True, True), (False, True, False, False), (True, True, False, True), (True, False, False, False),
])  # fmt: skip
def test_a_cpu_takes_the_faster_one(
    bf16: bool, avx512: bool, oned: bool, wanted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The product where it is oneDNN's."""
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "AVX512" if avx512 else "AVX2")
    monkeypatch.setattr("gristmill.models.patches.better_here", lambda: oned)
    seen: list[int] = []
    real = torch.conv2d
    monkeypatch.setattr("torch.nn.modules.conv.F.conv2d", lambda *given, **how: seen.append(1) or real(*given, **how))
    convolution, images = nn.Conv2d(3, 8, 16, stride=16), torch.randn(2, 3, 32, 32)
    plain = convolution(images)
    as_product(convolution)
    seen.clear()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        ours = convolution(images)
    assert bool(seen) is not wanted
    torch.testing.assert_close(ours.float(), plain, rtol=0.02 * bf16 + 1e-5, atol=0.02 * bf16 + 1e-5)


def test_weights_keep_their_names_and_numbers() -> None:
    convolution = nn.Conv2d(3, 8, 16, stride=16)
    before = {name: value.clone() for name, value in convolution.state_dict().items()}
    as_product(convolution)
    after = convolution.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_product_needs_patches_side_by_side() -> None:
    with pytest.raises(ValueError, match="not cut side by side"):
        as_product(nn.Conv2d(3, 8, 16, stride=8))
