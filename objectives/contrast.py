"""InfoNCE against a queue, streamed: the loss of MoCo and of Mugs' instance and local groups (section 1.2 of the notes).

With the logits of one positive and K negatives the cross-entropy is `softplus(lse - positive)`, where `lse` is the
log-sum-exp over the negatives alone. So each student crop meets the queue once, however many teacher views it is
compared with, and the queue passes in blocks under a running maximum (Milakov & Gimelshein, arXiv 1805.02867): no
[N, K + 1] logits exist. The gradient of `lse` is the mean of the queue rows under the softmax, [N, D], gathered on the same
pass, so that backward touches the queue no more and the queue may change in between.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..models.host import constant
from ..models.products import product
from ..models.prototypes import rows_in_block
from .protocol import images_of, pair_weights


class _StreamedLogSumExp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, queries: Tensor, queue: Tensor, scale: float, block: int):  # type: ignore[override]
        count, total = queries.shape[0], queue.shape[0]
        scaled = queries * scale
        top = scaled.new_full((count, 1), -torch.inf)
        mass = scaled.new_zeros((count, 1))
        mean = torch.zeros_like(scaled) if ctx.needs_input_grad[0] else None
        room = scaled.new_empty(
            count * min(block, total)
        )  # reused: fresh pages for each block would cost more than exp
        for start in range(0, total, block):
            rows = queue[start : start + block].to(scaled.dtype)  # no copy but of a memory kept in another type
            logits = product(scaled, rows, room[: count * rows.shape[0]].view(count, rows.shape[0]))
            higher = torch.maximum(top, logits.amax(1, keepdim=True))
            fade = (top - higher).exp_()
            logits.sub_(higher).exp_()
            mass = mass * fade + logits.sum(1, keepdim=True)
            if mean is not None:
                mean.mul_(fade).add_(product(logits, rows.t()))
            top = higher
        if mean is not None:
            ctx.save_for_backward(mean.mul_(scale / mass))
        lse, top = (top + mass.log()).squeeze(1), top.squeeze(1)
        ctx.mark_non_differentiable(top)
        return lse, top

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor, _: Tensor):  # type: ignore[override]
        (slope,) = ctx.saved_tensors
        return slope * grad.unsqueeze(1), None, None, None


def streamed_logsumexp(
    queries: Tensor, queue: Tensor, temperature: float, block: int | None = None
) -> tuple[Tensor, Tensor]:
    """`logsumexp(queries @ queue.T / temperature, 1)` and the row maxima, both [N], without the [N, K] product.

    queries [N, D] and queue [K, D]; sums are in the queries' type. Only the first result has a gradient, and only for the
    queries. `block`: queue rows at a time.
    """
    if block is None:
        block = rows_in_block(len(queries), queries.device.type)
    return _StreamedLogSumExp.apply(queries, queue.detach(), 1.0 / temperature, block)  # type: ignore[return-value]


class Contrast(NamedTuple):
    """Scalars of one comparison: the loss, and, detached, two signs of life under the loss' own weights."""

    loss: Tensor
    similarity: Tensor  # mean cosine of the positives
    accuracy: Tensor  # share of terms whose positive beats every negative


def contrast(
    student: Tensor,
    teacher: Tensor,
    queue: Tensor,
    *,
    student_crops: int,
    student_globals: int,
    teacher_crops: int,
    temperature: float,
    same: bool = True,
    block: int | None = None,
) -> Contrast:
    """InfoNCE of student [C*B, D] against teacher [G*B, D] (crop-major, unit rows), negatives queue [K, D].

    Terms and weights are `pair_weights`', which leaves out j = i if `same`. Gradient flows to the student only.
    ValueError when shapes disagree.
    """
    batch = images_of(student, teacher, student_crops, teacher_crops)
    weights = constant(pair_weights(teacher_crops, student_crops, student_globals, same=same), student)
    crops = student.view(student_crops, batch, -1)
    positive = torch.einsum("gbd,cbd->gcb", teacher.detach().view(teacher_crops, batch, -1), crops)
    lse, top = (t.view(student_crops, batch) for t in streamed_logsumexp(student, queue, temperature, block))
    # threshold: beyond it softplus is taken for the identity; its default of 20 would cost digits in float64.
    terms = F.softplus(lse - positive / temperature, threshold=40).mean(-1)  # [G, C]
    with torch.no_grad():
        similarity = (positive.mean(-1) * weights).sum()
        accuracy = ((positive / temperature > top).to(weights.dtype).mean(-1) * weights).sum()
    return Contrast((terms * weights).sum(), similarity, accuracy)


def info_nce(student: Tensor, teacher: Tensor, queue: Tensor, **how: Any) -> Tensor:
    """The loss of `contrast` alone; same arguments."""
    return contrast(student, teacher, queue, **how).loss


def info_nce_reference(
    student: Tensor,
    teacher: Tensor,
    queue: Tensor,
    *,
    student_crops: int,
    student_globals: int,
    teacher_crops: int,
    temperature: float,
    same: bool = True,
) -> Tensor:
    """The same number written from the formula, one [B, K + 1] cross-entropy for each pair of crops."""
    weights = pair_weights(teacher_crops, student_crops, student_globals, same=same)
    loss = student.new_zeros(())
    for i, t in enumerate(teacher.detach().chunk(teacher_crops)):
        for j, s in enumerate(student.chunk(student_crops)):
            if weights[i][j]:
                logits = torch.cat([(s * t).sum(1, keepdim=True), s @ queue.detach().T], dim=1) / temperature
                target = torch.zeros(len(s), dtype=torch.int64, device=s.device)
                loss = loss + weights[i][j] * F.cross_entropy(logits, target)
    return loss
