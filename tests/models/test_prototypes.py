"""Streamed prototypes against the plain head and the plain cross-entropy: losses, every gradient, any block, any type."""

from typing import Any

import pytest
import torch
from gristmill.models.heads import PrototypeHead, WeightNormLinear
from gristmill.models.prototypes import streamed_assignment
from gristmill.objectives.prototypes import group_cross_entropy_reference, streamed_cross_entropy
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def layer_of(rows: int, dim: int, train_norms: bool = True) -> WeightNormLinear:
    layer = WeightNormLinear(dim, rows, train_norms=train_norms).double()
    with torch.no_grad():
        layer.weight_g.copy_(draw(rows, 1, seed=3).abs() + 0.5)
    return layer


def both(
    layer: WeightNormLinear, x: Tensor, targets: Tensor, views: tuple[int, int, int], temperature: float = 0.1
) -> list[tuple[Tensor, list[Tensor]]]:
    """Loss and gradients of x and the layer, the plain way and streamed. targets [G, B, K]; views: G, globals, locals."""
    teachers, globals_, locals_ = views
    how: Any = {"student_crops": globals_ + locals_, "student_globals": globals_, "teacher_crops": teachers}
    found = []
    for streamed in (False, True):
        given = x.detach().requires_grad_()
        if streamed:
            loss = streamed_cross_entropy(*layer(given, targets, temperature), **how)
        else:
            loss = group_cross_entropy_reference(layer(given), targets.flatten(0, 1), temperature=temperature, **how)
        gradients = torch.autograd.grad(loss * 3, [given, *layer.parameters()])
        found.append((loss.detach(), list(gradients)))
    return found


@given(
    batch=st.integers(1, 4),
    views=st.tuples(st.integers(1, 3), st.integers(0, 3), st.integers(0, 4)).filter(
        lambda v: v[1] + v[2] > 0 and (v[0] > 1 or v[1] + v[2] > 1)
    ),
    prototypes=st.integers(1, 20),
    block=st.integers(1, 24),
    train_norms=st.booleans(),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_streamed_equals_plain(
    batch: int, views: tuple[int, int, int], prototypes: int, block: int, train_norms: bool, seed: int
) -> None:
    layer = layer_of(prototypes, 5, train_norms)
    targets = torch.softmax(draw(views[0], batch, prototypes, seed=seed) * 5, -1)
    x = draw(batch * (views[1] + views[2]), 5, seed=seed + 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gristmill.models.prototypes.BLOCK_LOGITS", {"cpu": 1})
        patch.setattr("gristmill.models.prototypes.SMALLEST", block)
        (wanted, slopes), (loss, found) = both(layer, x, targets, views)
    torch.testing.assert_close(loss, wanted, rtol=1e-12, atol=1e-12)
    assert len(found) == (3 if train_norms else 2)
    for gradient, slope in zip(found, slopes, strict=True):
        torch.testing.assert_close(gradient, slope, rtol=1e-10, atol=1e-12)


def test_gradcheck() -> None:
    targets = torch.softmax(draw(2, 3, 7, seed=0), -1)
    inputs = [t.requires_grad_() for t in (draw(12, 4, seed=1), draw(7, 4, seed=2), draw(7, 1, seed=3).abs())]
    assert torch.autograd.gradcheck(lambda x, v, g: streamed_assignment(x, v, g, targets, 0.3, block=3), inputs)


@pytest.mark.parametrize("precision", ["fp32", "autocast", "bf16"])
def test_in_the_precision_of_the_products(precision: str) -> None:
    """As close to float64 as the plain way is in the same precision, up to a factor for luck."""
    layer, views = layer_of(200, 16), (2, 2, 3)
    targets = torch.softmax(draw(2, 4, 200, seed=0) * 5, -1)
    x = nn.functional.normalize(draw(20, 16, seed=1))
    wanted = both(layer, x, targets, views)[0]
    low = layer.to(torch.bfloat16 if precision == "bf16" else torch.float32)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision != "fp32"):
        plain, streamed = both(low, x.float(), targets.float(), views)
    assert streamed[0].dtype == torch.float32
    for place, (slope, usual, mine) in enumerate(zip(wanted[1], plain[1], streamed[1], strict=True)):
        assert mine.dtype == usual.dtype
        gaps = [float((g.double() - slope).norm() / slope.norm()) for g in (usual, mine)]
        assert gaps[1] <= 3 * gaps[0] + 1e-6, (place, gaps)
    assert (
        abs(float(streamed[0]) - float(wanted[0]))
        <= 3 * abs(float(plain[0]) - float(wanted[0])) + 2e-2 * (precision != "fp32") + 1e-6
    )


def test_no_logits_are_kept() -> None:
    """Neither saved for backward nor made in it: no tensor has as many numbers as the logits or the normed weight."""
    layer, saved = layer_of(4096, 8), []
    x, targets = draw(24, 8, seed=1).requires_grad_(), torch.softmax(draw(2, 4, 4096, seed=0), -1)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(x, targets, 0.1)
    own = {layer.weight_v.data_ptr(), targets.data_ptr()}
    assert max(t.numel() for t in saved if t.data_ptr() not in own) == 4096  # lengths


def test_the_teachers_logits_are_those_of_the_plain_layer() -> None:
    layer, x = layer_of(30, 6), draw(4, 6, seed=0)
    with torch.no_grad():
        factored = layer(x)
    torch.testing.assert_close(factored, layer(x).detach(), rtol=1e-12, atol=1e-14)


def test_the_head_streams_where_it_has_targets() -> None:
    head = PrototypeHead(6, 8, 4, 11, norm_last_layer=False).double()
    targets, x = torch.softmax(draw(2, 3, 11, seed=0), -1), draw(12, 6, seed=1)
    lse, agreement = head(x, targets=targets, temperature=0.1)
    logits = head(x).detach() / 0.1
    torch.testing.assert_close(lse.detach(), logits.logsumexp(1))
    wanted = torch.einsum("gbk,cbk->bcg", targets, logits.view(4, 3, 11))
    torch.testing.assert_close(agreement.detach(), wanted)


def test_shapes_that_disagree_are_named() -> None:
    layer = layer_of(5, 3)
    for rows, targets in ((7, (2, 3, 5)), (6, (2, 3, 4)), (6, (2, 0, 5))):
        with pytest.raises(ValueError, match="same batch"):
            layer(draw(rows, 3, seed=0), torch.zeros(targets, dtype=torch.float64), 0.1)
    with pytest.raises(ValueError, match="one batch"):
        streamed_cross_entropy(
            torch.zeros(6), torch.zeros(3, 2, 1), student_crops=2, student_globals=2, teacher_crops=2
        )
