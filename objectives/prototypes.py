"""Cross-entropy between soft assignments to prototypes, teacher centred and sharpened (DINO, arXiv 2104.14294, eq. 1-2;
Mugs' official weighting, section 1.4 of the notes on it).

Summed over the teacher views i that a student crop j is compared with, `sum_i w_i CE(p_i, z_j)` is
`W lse(z_j / t) - (sum_i w_i p_i) . z_j / t` with W the sum of the weights: one log-sum-exp for each crop, one blended target
for each pattern of weights (all local crops share theirs). Crops are taken one at a time through one [B, K] scratch in
the centre's precision, so that half-precision logits are never copied whole. Where the student streams its prototypes
(models/prototypes.py) there are no logits at all, and the loss is made of `lse` and `p_i . z_j`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..models.host import constant
from .protocol import images_of, pair_weights


class Targets(NamedTuple):
    """Teacher assignments with their health, all detached."""

    probabilities: Tensor  # [G*B, K], rows sum to one
    entropy_ratio: Tensor  # mean entropy of a row over log K: 0 one prototype each, 1 no preference
    batch_entropy_ratio: Tensor  # entropy of the mean row over log K: towards 0 when all images share a prototype


@torch.no_grad()
def teacher_targets(logits: Tensor, centre: Tensor, temperature: float) -> Targets:
    """`softmax((logits - centre) / temperature)` of logits [G*B, K], centre [1, K], in the centre's dtype."""
    x = torch.sub(logits.to(centre.dtype), centre).div_(temperature)
    x.sub_(x.amax(1, keepdim=True))
    p = x.exp()
    mass = p.sum(1, keepdim=True)
    p.div_(mass)
    unit = math.log(max(2, logits.shape[1]))
    entropy = mass.log().squeeze(1) - torch.linalg.vecdot(p, x)
    batch_entropy = torch.special.entr(p.mean(0)).sum()
    return Targets(p, entropy.mean() / unit, batch_entropy / unit)


class _BlendedCrossEntropy(torch.autograd.Function):
    """sum over crops j of mean over images of `W_j lse(x_j) - f_j T_j . x_j`, x = logits / temperature, sum T_j f_j = W_j."""

    @staticmethod
    def forward(ctx, logits: Tensor, temperature: float, plan: list[tuple[int, float, float]], *targets: Tensor):  # type: ignore[override]
        dtype, crops = targets[0].dtype, logits.chunk(len(plan))
        batch = crops[0].shape[0]
        x = torch.empty(crops[0].shape, dtype=dtype, device=logits.device)
        lse = torch.empty(len(plan), batch, 1, dtype=dtype, device=logits.device)
        loss = torch.zeros((), dtype=dtype, device=logits.device)
        for j, (crop, (which, factor, weight)) in enumerate(zip(crops, plan, strict=True)):
            x.copy_(crop).div_(temperature)
            dot = torch.linalg.vecdot(targets[which], x).mean()
            top = x.amax(1, keepdim=True)
            lse[j] = x.sub_(top).exp_().sum(1, keepdim=True).log_().add_(top)
            loss += lse[j].mean() * weight - dot * factor
        ctx.save_for_backward(logits, lse, *targets)
        ctx.temperature, ctx.plan = temperature, plan
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        logits, lse, *targets = ctx.saved_tensors
        result = torch.empty_like(logits)
        out, crops = result.chunk(len(ctx.plan)), logits.chunk(len(ctx.plan))
        scale = grad / (ctx.temperature * crops[0].shape[0])
        same = logits.dtype == lse.dtype
        scratch = None if same else torch.empty(crops[0].shape, dtype=lse.dtype, device=logits.device)
        for j, (which, factor, weight) in enumerate(ctx.plan):
            g = out[j] if scratch is None else scratch
            if not weight:
                out[j].zero_()
                continue
            # weight * softmax - factor * target, the weight inside the exponent to save a pass
            torch.add(math.log(weight) - lse[j], crops[j], alpha=1 / ctx.temperature, out=g)
            g.exp_().sub_(targets[which], alpha=factor).mul_(scale)
            if scratch is not None:
                out[j].copy_(g)
        return result, None, None, *(None for _ in targets)


def group_cross_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    student_crops: int,
    student_globals: int,
    teacher_crops: int,
    temperature: float,
    equal: bool = False,
) -> Tensor:
    """Scalar cross-entropy of student logits [C*B, K] against assignments [G*B, K] (`teacher_targets`), crop-major.

    Terms and weights are `pair_weights`' (`equal`: DINO's). Gradient flows to the logits only. ValueError when shapes disagree.
    """
    batch = images_of(logits, targets, student_crops, teacher_crops)
    views = targets.detach().view(teacher_crops, batch, -1)
    blends: dict[tuple[float, ...], int] = {}  # weights over the teacher views, up to a factor -> index of the blend
    blended: list[Tensor] = []
    plan: list[tuple[int, float, float]] = []  # for each crop: blend, factor, sum of weights
    for column in zip(*pair_weights(teacher_crops, student_crops, student_globals, equal), strict=True):
        factor = max(column) or 1.0
        pattern = tuple(weight / factor for weight in column)
        if pattern not in blends:
            blends[pattern] = len(blended)
            blended.append(_blend(views, pattern))
        plan.append((blends[pattern], max(column), sum(column)))
    return _BlendedCrossEntropy.apply(logits, temperature, plan, *blended)  # type: ignore[return-value]


def _blend(views: Tensor, pattern: tuple[float, ...]) -> Tensor:
    """Weighted sum of the views [G, B, K] under weights of maximum one; a single view is passed on without a copy."""
    used = [(view, weight) for view, weight in zip(views, pattern, strict=True) if weight]
    if len(used) <= 1:
        return used[0][0] if used else views[0]
    total = used[0][0] * used[0][1]
    for view, weight in used[1:]:
        total.add_(view, alpha=weight)
    return total


def streamed_cross_entropy(
    lse: Tensor, agreement: Tensor, *, student_crops: int, student_globals: int, teacher_crops: int, equal: bool = False
) -> Tensor:
    """The same number from what a student that streams its prototypes gives out: lse [C*B], agreement [B, C, G].

    That is all of the logits that the loss asks for: `W_j lse_j - sum_i w_ij T_i . x_j`, mean over the images. ValueError
    when shapes disagree.
    """
    batch = len(agreement)
    if agreement.shape != (batch, student_crops, teacher_crops) or lse.shape != (student_crops * batch,):
        raise ValueError(
            f"log-sum-exps {tuple(lse.shape)} and agreements {tuple(agreement.shape)} of {student_crops} student and "
            f"{teacher_crops} teacher crops do not come from one batch"
        )
    weights = constant(pair_weights(teacher_crops, student_crops, student_globals, equal), lse)  # [G, C]
    return weights.sum(0) @ lse.view(student_crops, batch).mean(1) - (weights * agreement.mean(0).mT).sum()


def group_cross_entropy_reference(
    logits: Tensor,
    targets: Tensor,
    *,
    student_crops: int,
    student_globals: int,
    teacher_crops: int,
    temperature: float,
    equal: bool = False,
) -> Tensor:
    """The same number from the formula, one cross-entropy for each pair of crops."""
    weights = pair_weights(teacher_crops, student_crops, student_globals, equal)
    loss = logits.new_zeros((), dtype=targets.dtype)
    for i, p in enumerate(targets.detach().chunk(teacher_crops)):
        for j, z in enumerate(logits.to(targets.dtype).chunk(student_crops)):
            if weights[i][j]:
                loss = loss - weights[i][j] * (p * torch.log_softmax(z / temperature, dim=1)).sum(1).mean()
    return loss
