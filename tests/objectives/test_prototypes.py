"""The group cross-entropy against its formula, finite differences and half-precision logits."""

import math

import pytest
import torch
from gristmill.objectives.prototypes import group_cross_entropy, group_cross_entropy_reference, teacher_targets
from hypothesis import given, settings
from hypothesis import strategies as st


def draw(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(
    batch=st.integers(1, 4),
    views=st.tuples(st.integers(1, 3), st.integers(0, 4), st.integers(0, 4)).filter(
        lambda v: v[1] + v[2] > 0 and (v[0] > 1 or v[1] + v[2] > 1)
    ),
    prototypes=st.integers(1, 20),
    seed=st.integers(0, 1000),
)
@settings(max_examples=80, deadline=None)
def test_blended_equals_plain(batch: int, views: tuple[int, int, int], prototypes: int, seed: int) -> None:
    teachers, globals_, locals_ = views
    crops = globals_ + locals_
    how = {"student_crops": crops, "student_globals": globals_, "teacher_crops": teachers, "temperature": 0.1}
    targets = torch.softmax(draw(batch * teachers, prototypes, seed=seed) * 5, 1)
    losses, gradients = [], []
    for form in (group_cross_entropy_reference, group_cross_entropy):
        logits = draw(batch * crops, prototypes, seed=seed + 1).requires_grad_()
        loss = form(logits, targets, **how)
        losses.append(loss.detach())
        gradients += torch.autograd.grad(loss * 3, logits)
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-11, atol=1e-12)


def test_gradcheck() -> None:
    targets = torch.softmax(draw(6, 7, seed=0), 1)
    assert torch.autograd.gradcheck(
        lambda z: group_cross_entropy(z, targets, student_crops=4, student_globals=2, teacher_crops=2, temperature=0.3),
        (draw(12, 7, seed=1).requires_grad_(),),
    )


def test_half_precision_logits_are_computed_in_full() -> None:
    targets = torch.softmax(draw(4, 50, seed=0).float(), 1)
    how = {"student_crops": 3, "student_globals": 2, "teacher_crops": 2, "temperature": 0.1}
    logits = draw(6, 50, seed=1).bfloat16().requires_grad_()
    full = logits.detach().float().requires_grad_()
    loss, expected = group_cross_entropy(logits, targets, **how), group_cross_entropy(full, targets, **how)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, expected)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert torch.equal(gradient, torch.autograd.grad(expected, full)[0].bfloat16())


def test_targets_and_their_entropies() -> None:
    logits, centre = draw(10, 6, seed=0), draw(1, 6, seed=1)
    targets = teacher_targets(logits, centre, 0.04)
    p = torch.softmax((logits - centre) / 0.04, 1)
    torch.testing.assert_close(targets.probabilities, p, rtol=1e-12, atol=1e-15)
    entropy = torch.special.entr(p).sum(1).mean() / math.log(6)
    assert float(targets.entropy_ratio) == pytest.approx(float(entropy), rel=1e-10)
    assert float(targets.batch_entropy_ratio) == pytest.approx(float(torch.special.entr(p.mean(0)).sum() / math.log(6)))


def test_collapse_shows_in_the_entropies() -> None:
    centre = torch.zeros(1, 8)
    even = teacher_targets(torch.zeros(8, 8), centre, 0.04)
    assert [float(even.entropy_ratio), float(even.batch_entropy_ratio)] == pytest.approx([1, 1], abs=1e-6)
    spread = teacher_targets(torch.eye(8) * 100, centre, 0.04)
    assert [float(spread.entropy_ratio), float(spread.batch_entropy_ratio)] == pytest.approx([0, 1], abs=1e-6)
    single = teacher_targets(torch.eye(8)[:1].expand(8, 8) * 100, centre, 0.04)
    assert [float(single.entropy_ratio), float(single.batch_entropy_ratio)] == pytest.approx([0, 0], abs=1e-6)


def test_nothing_full_sized_is_saved_twice() -> None:
    """Backward keeps the logits themselves, and targets the size of one crop each: no softmax of all crops."""
    saved: list[torch.Tensor] = []
    logits, targets = draw(60, 30, seed=0).requires_grad_(), torch.softmax(draw(12, 30, seed=1), 1)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        group_cross_entropy(logits, targets, student_crops=10, student_globals=2, teacher_crops=2, temperature=0.1)
    full = [t for t in saved if t.numel() == logits.numel()]
    assert [t.data_ptr() for t in full] == [logits.data_ptr()]
    assert sum(t.numel() == 6 * 30 for t in saved) == 3  # views 0 and 1 as they are, and their sum for local crops


def test_shapes_that_disagree_are_named() -> None:
    with pytest.raises(ValueError, match="one batch"):
        group_cross_entropy(
            torch.zeros(9, 4), torch.zeros(4, 4), student_crops=3, student_globals=2, teacher_crops=2, temperature=0.1
        )
