"""The dense head: a projector at each place, for a ResNet's map and a ViT's patches alike, pooled to a grid or not."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gristmill.models.dense import DenseHead, pool_places
from gristmill.models.student import init_weights
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

EXACT: dict[str, Any] = {"rtol": 1e-12, "atol": 1e-12}


def maps(n: int, height: int, width: int, dim: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, height * width, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    grid=st.none() | st.integers(1, 10),
    seed=st.integers(0, 100),
)
@settings(max_examples=60, deadline=None)
def test_pooling_is_adaptive_average_pooling(size: tuple[int, int], grid: int | None, seed: int) -> None:
    rows = maps(2, *size, 3, seed)
    pooled = pool_places(rows, size, grid)
    cells = (min(size[0], grid or size[0]), min(size[1], grid or size[1]))
    wanted = F.adaptive_avg_pool2d(rows.mT.unflatten(2, size), cells).flatten(2).mT
    torch.testing.assert_close(pooled, wanted, **EXACT)
    if grid is None or max(size) <= grid:
        assert pooled is rows


def test_it_is_a_1x1_convolution_at_each_place() -> None:
    head = DenseHead(5, 7, 4, grid=2).double()
    rows = maps(3, 6, 4, 5)
    one, two = (nn.Conv2d(*sizes, 1).double() for sizes in ((5, 7), (7, 4)))
    for conv, layer in ((one, head.projector[0]), (two, head.projector[2])):
        assert isinstance(layer, nn.Linear)
        conv.weight.data = layer.weight.data[:, :, None, None]
        assert conv.bias is not None
        conv.bias.data = layer.bias.data
    image = F.adaptive_avg_pool2d(rows.mT.unflatten(2, (6, 4)), 2)
    raw = two(one(image).relu())
    found = head(rows, (6, 4))
    torch.testing.assert_close(found.rows, F.normalize(raw, dim=1).flatten(2).mT, **EXACT)
    torch.testing.assert_close(found.features, F.normalize(image, dim=1).flatten(2).mT, **EXACT)
    # The mean first, its length afterwards.
    torch.testing.assert_close(found.pooled, F.normalize(raw.mean((2, 3)), dim=1), **EXACT)
    assert found.rows.requires_grad
    assert not found.features.requires_grad
    assert not found.pooled.requires_grad


def test_layers_and_initial_weights() -> None:
    """The official 1x1 convolutions keep PyTorch's default, unlike the Linear layers beside them (std .0128 and biases)."""
    head = DenseHead(2048)
    init_weights(head, 0, "dense", default_linear=True)
    first, last = head.projector[0], head.projector[2]
    assert isinstance(first, nn.Linear)
    assert isinstance(last, nn.Linear)
    assert (first.weight.shape, last.weight.shape) == ((2048, 2048), (128, 2048))
    for part in (first.weight, first.bias, last.weight, last.bias):
        assert float(part.detach().std()) == pytest.approx(1 / math.sqrt(3 * 2048), rel=0.1)
        assert float(part.detach().abs().max()) <= 1 / math.sqrt(2048)
    kinds = [type(part).__name__ for part in DenseHead(4, 6, 3, layers=3).projector]
    assert kinds == ["Linear", "ReLU", "Linear", "ReLU", "Linear"]
    assert [type(part).__name__ for part in DenseHead(4, 6, 3, layers=1).projector] == ["Linear"]


def test_half_precision_gives_unit_rows_all_the_same() -> None:
    head = DenseHead(8, 16, 4, grid=2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = head(maps(2, 4, 4, 8).float(), (4, 4))
    for rows in found:
        assert rows.dtype == torch.float32
        torch.testing.assert_close(rows.norm(dim=-1), torch.ones(rows.shape[:-1]), rtol=1e-6, atol=1e-6)


def test_the_mean_over_places_is_not_rounded_by_autocast() -> None:
    """It is the unit mean of the very rows that bf16 layers gave, in float32."""
    head, rows = DenseHead(8, 16, 32), maps(4, 7, 7, 8).float()
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        raw, found = head.projector(rows), head(rows, (7, 7)).pooled
    assert raw.dtype == torch.bfloat16
    torch.testing.assert_close(found, F.normalize(raw.float().mean(1), dim=1), rtol=1e-6, atol=1e-6)


def test_gradients_pass_the_pooling() -> None:
    head = DenseHead(3, 4, 2, grid=2).double()
    rows = maps(1, 3, 5, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: head(x, (3, 5)).rows, (rows,))


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\[2, 6, 3\] are not the 2 x 4 places"):
        DenseHead(3, 4, 2)(maps(2, 2, 3, 3).float(), (2, 4))
    with pytest.raises(ValueError, match="grid of one place"):
        DenseHead(3, 4, 2, grid=0)
    with pytest.raises(ValueError, match="needs a layer"):
        DenseHead(3, 4, 2, layers=0)
