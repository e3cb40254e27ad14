"""Streamed InfoNCE against the plain form, against itself in other blocks, and against finite differences."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gristmill.objectives.contrast import contrast, info_nce, info_nce_reference, streamed_logsumexp
from gristmill.objectives.protocol import pair_weights
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode


def unit(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype), dim=1)


@given(
    batch=st.integers(1, 5),
    views=st.tuples(st.integers(1, 3), st.integers(0, 3), st.integers(0, 4)).filter(
        lambda v: v[1] + v[2] > 0 and (v[0] > 1 or v[1] + v[2] > 1)
    ),
    capacity=st.integers(1, 40),
    block=st.integers(1, 45),
    temperature=st.sampled_from([0.01, 0.2, 1.0]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=80, deadline=None)
def test_streamed_equals_plain(
    batch: int, views: tuple[int, int, int], capacity: int, block: int, temperature: float, seed: int
) -> None:
    teachers, globals_, locals_ = views
    crops = globals_ + locals_
    how = {
        "student_crops": crops,
        "student_globals": globals_,
        "teacher_crops": teachers,
        "temperature": temperature,
    }
    teacher, queue = unit(batch * teachers, 4, seed=seed), unit(capacity, 4, seed=seed + 1)
    losses, gradients = [], []
    forms: list[tuple[Any, dict[str, Any]]] = [(info_nce_reference, {}), (info_nce, {"block": block})]
    for form, extra in forms:
        student = unit(batch * crops, 4, seed=seed + 2).requires_grad_()
        loss = form(student, teacher, queue, **how, **extra)
        losses.append(loss.detach())
        gradients += torch.autograd.grad(loss, student)
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-11, atol=1e-11)


def test_float32_stays_within_rounding() -> None:
    how = {"student_crops": 5, "student_globals": 2, "teacher_crops": 2, "temperature": 0.2}
    exact, single = [], []
    for dtype, results in ((torch.float64, exact), (torch.float32, single)):
        student = unit(5 * 8, 16, seed=0).to(dtype).requires_grad_()
        loss = info_nce(student, unit(16, 16, seed=1).to(dtype), unit(1000, 16, seed=2).to(dtype), **how, block=96)
        results += [loss.detach(), *torch.autograd.grad(loss, student)]
    torch.testing.assert_close(single[0].double(), exact[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(single[1].double(), exact[1], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("block", [3, 11, None])
def test_gradcheck(block: int | None) -> None:
    student, teacher, queue = unit(9, 5, seed=0).requires_grad_(), unit(6, 5, seed=1), unit(11, 5, seed=2)

    def loss(x: torch.Tensor) -> torch.Tensor:
        return info_nce(
            x, teacher, queue, student_crops=3, student_globals=2, teacher_crops=2, temperature=0.2, block=block
        )

    assert torch.autograd.gradcheck(loss, (student,))
    assert torch.autograd.gradcheck(lambda x: streamed_logsumexp(x, queue, 0.5, block)[0], (student,))


def test_large_logits_do_not_overflow() -> None:
    student = (unit(6, 4, seed=0, dtype=torch.float32) * 100).requires_grad_()
    queue = unit(50, 4, seed=1, dtype=torch.float32) * 100
    lse, top = streamed_logsumexp(student, queue, 0.01, 7)
    expected = torch.logsumexp(student @ queue.T / 0.01, 1)
    torch.testing.assert_close(lse, expected)
    torch.testing.assert_close(top, (student @ queue.T / 0.01).amax(1))
    (gradient,) = torch.autograd.grad(lse.sum(), student)
    assert torch.isfinite(gradient).all()


def test_queue_may_change_before_backward() -> None:
    """Commit comes after the step, but nothing should depend on it."""
    student, queue = unit(4, 5, seed=0).requires_grad_(), unit(20, 5, seed=1)
    (expected,) = torch.autograd.grad(streamed_logsumexp(student, queue, 0.2, 6)[0].sum(), student)
    lse, _ = streamed_logsumexp(student, queue, 0.2, 6)
    queue.zero_()
    (gradient,) = torch.autograd.grad(lse.sum(), student)
    assert torch.equal(gradient, expected)


class Watch(TorchDispatchMode):
    """Notes the largest tensor that any kernel makes, in the forward and the backward pass."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        return result


def test_no_matrix_of_all_logits() -> None:
    student, teacher, queue = unit(40, 4, seed=0), unit(16, 4, seed=1), unit(4000, 4, seed=2)
    how = {"student_crops": 5, "student_globals": 2, "teacher_crops": 2, "temperature": 0.2}
    largest = {}
    forms: list[tuple[Any, dict[str, Any]]] = [(info_nce, {"block": 100}), (info_nce_reference, {})]
    for form, extra in forms:
        with Watch() as watch:
            form(student.requires_grad_(), teacher, queue, **how, **extra).backward()
        largest[form] = watch.largest
    assert largest[info_nce_reference] >= 8 * 4001  # the watch sees the plain form's logits of one pair
    assert largest[info_nce] <= queue.numel()


def test_backward_keeps_no_more_than_a_row_each() -> None:
    saved: list[int] = []
    student, queue = unit(40, 4, seed=0).requires_grad_(), unit(4000, 4, seed=2)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        streamed_logsumexp(student, queue, 0.2, 100)
    assert saved == [student.numel()]


def test_signs_of_life() -> None:
    how = {"student_crops": 3, "student_globals": 2, "teacher_crops": 2, "temperature": 0.2}
    student, teacher, queue = unit(12, 6, seed=0), unit(8, 6, seed=1), unit(30, 6, seed=2)
    result = contrast(student.requires_grad_(), teacher, queue, **how, block=7)
    weights, similarity, accuracy = pair_weights(2, 3, 2), 0.0, 0.0
    for i, t in enumerate(teacher.chunk(2)):
        for j, s in enumerate(student.detach().chunk(3)):
            positive = (s * t).sum(1)
            similarity += weights[i][j] * float(positive.mean())
            accuracy += weights[i][j] * float((positive > (s @ queue.T).amax(1)).double().mean())
    assert float(result.similarity) == pytest.approx(similarity)
    assert float(result.accuracy) == pytest.approx(accuracy)
    assert not result.similarity.requires_grad
    assert not result.accuracy.requires_grad
    perfect = contrast(teacher[:4].repeat(3, 1), teacher[:4].repeat(2, 1), queue, **how)
    assert float(perfect.similarity) == pytest.approx(1.0)
    assert float(perfect.accuracy) == 1.0


def test_shapes_that_disagree_are_named() -> None:
    with pytest.raises(ValueError, match="one batch"):
        info_nce(
            unit(9, 4, seed=0), unit(4, 4, seed=1), unit(5, 4, seed=2), student_crops=3, student_globals=2,
            teacher_crops=2, temperature=0.2,
        )  # fmt: skip
