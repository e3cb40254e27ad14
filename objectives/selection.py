"""Contrast with negatives that are dropped where they seem to belong to the query's own cluster (HCSC, sections 2.4, 2.5).

A negative stays with probability 1 - s, where s is the softmax that it belongs to the prototype of the query. The official
code multiplies a dropped negative's logit by zero, so that it still adds exp(0) to the denominator (`masked: zero`);
the paper removes it (`remove`). Negatives pass in blocks, under a running maximum that begins with the positive: no [N, K]
logits, and no [K, k] memberships, of which all that is kept is one log-sum-exp a negative. The gradient with respect to the
queries, [levels, views, N, D], is gathered on the same pass. The plain form is below it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..models.products import product
from ..models.prototypes import rows_in_block
from .bernoulli import uniform_block

Masked = Literal["zero", "remove"]
Keep = Callable[[slice], Tensor]  # part of the rows -> bool [levels, 1 or views, N, part]: stays


class Entropies(NamedTuple):
    """Cross-entropies [levels, views, N] and, detached, whether the positive beat every negative, the same shape."""

    loss: Tensor
    won: Tensor


class _Selective(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        queries: Tensor,
        positive: Tensor,
        rows: Tensor,
        scale: float,
        levels: int,
        keep: Keep | None,
        removed: Tensor | None,
        masked: Masked,
        block: int,
    ):  # type: ignore[override]
        views, images, dim = queries.shape
        scaled = queries * scale
        own = (scaled * positive).sum(-1)
        top = own.expand(levels, views, images).clone()
        mass = torch.ones_like(top)
        mean = positive.expand(levels, views, images, dim).clone() if ctx.needs_input_grad[0] else None
        for start in range(0, len(rows), block):
            part = slice(start, min(start + block, len(rows)))
            some = rows[part]
            logits = product(scaled.flatten(0, 1), some).view(views, images, -1)
            if removed is not None:
                logits.masked_fill_(removed[:, part], -torch.inf)
            stay = keep(part) if keep else None
            for level in range(levels):
                weight = logits
                if stay is not None:
                    weight = torch.where(stay[level], logits, 0.0 if masked == "zero" else -torch.inf)
                    if masked == "zero" and removed is not None:
                        weight.masked_fill_(removed[:, part], -torch.inf)
                higher = torch.maximum(top[level], weight.amax(-1))
                fade = (top[level] - higher).exp_()
                weight = (weight - higher.unsqueeze(-1)).exp_()
                mass[level] = mass[level] * fade + weight.sum(-1)
                top[level] = higher
                if mean is not None:
                    if stay is not None:
                        weight.mul_(stay[level])  # what was set to zero pulls at nothing
                    mean[level].mul_(fade.unsqueeze(-1))
                    mean[level].view(-1, dim).add_(product(weight.view(-1, len(some)), some.t()))
        if mean is not None:
            ctx.save_for_backward((mean / mass.unsqueeze(-1)).sub_(positive).mul_(scale))
        won = top <= own
        ctx.mark_non_differentiable(won)
        return mass.log() + (top - own), won

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor, _: Tensor):  # type: ignore[override]
        (slope,) = ctx.saved_tensors
        return (slope * grad.unsqueeze(-1)).sum(0), None, None, None, None, None, None, None, None


def selective_cross_entropy(
    queries: Tensor,
    positive: Tensor,
    rows: Tensor,
    scale: float,
    *,
    levels: int = 1,
    keep: Keep | None = None,
    removed: Tensor | None = None,
    masked: Masked = "zero",
    block: int | None = None,
) -> Entropies:
    """-log softmax of the positive among itself and the rows that stay, for each level of `keep`, each view, each image.

    queries [views, N, D], the only ones with a gradient; positive [N, D], shared by the views; rows [K, D], logits are
    `scale` times products. removed: bool [N or 1, K], never negatives. `block`: rows at a time, a multiple of 4.
    """
    if block is None:
        block = rows_in_block(levels * queries.shape[0] * queries.shape[1], queries.device.type)
    block = -(-block // 4) * 4
    return Entropies(
        *_Selective.apply(  # type: ignore[misc]
            queries, positive.detach(), rows.detach(), scale, levels, keep, removed, masked, block
        )
    )


def selective_cross_entropy_reference(
    queries: Tensor,
    positive: Tensor,
    rows: Tensor,
    scale: float,
    *,
    levels: int = 1,
    keep: Keep | None = None,
    removed: Tensor | None = None,
    masked: Masked = "zero",
) -> Tensor:
    """The same cross-entropies written from the formula, all logits at once."""
    logits = torch.einsum("vnd,kd->vnk", queries, rows.detach()).expand(levels, -1, -1, -1) * scale
    if keep is not None:
        stay = keep(slice(0, len(rows)))
        logits = logits * stay if masked == "zero" else logits.masked_fill(~stay, -torch.inf)
    if removed is not None:
        logits = logits.masked_fill(removed, -torch.inf)
    own = (queries * positive.detach()).sum(-1, keepdim=True).expand(levels, -1, -1, -1) * scale
    return -torch.log_softmax(torch.cat([own, logits], dim=-1), dim=-1)[..., 0]


class Selection:
    """Which rows stay negatives, by level: `keep` for `selective_cross_entropy`; counts what it drops in `dropped`.

    rows, marks, lse: one a level. marks [N, D]: the query's prototype over its concentration; rows [K, D]; lse [K]: the
    log-sum-exp of each row's products with all such prototypes. bounds: of the probability to stay, official
    (0, 0.999) for rows of the queue, (0.0001, 0.999) for prototypes. draws: key, positions [N] and for each view (one, or
    one shared by all) its streams, one a level.
    """

    def __init__(
        self,
        rows: list[Tensor],
        marks: list[Tensor],
        lse: list[Tensor],
        bounds: tuple[float, float],
        draws: tuple[int, Tensor, list[list[int]]],
    ) -> None:
        self.rows, self.marks, self.lse, self.bounds, self.draws = rows, marks, lse, bounds, draws
        self.dropped = rows[0].new_zeros((), dtype=torch.int64)

    def probability(self, level: int, part: slice) -> Tensor:
        """That row k stays a negative of image n, [N, part]."""
        member = (self.marks[level] @ self.rows[level][part].t()).sub_(self.lse[level][part]).exp_()
        return member.neg_().add_(1.0).clamp_(*self.bounds)

    def __call__(self, part: slice) -> Tensor:
        key, positions, streams = self.draws
        levels, views = len(self.rows), len(streams)
        order = [streams[view][level] for level in range(levels) for view in range(views)]
        drawn = uniform_block(key, positions, order, part.start, part.stop).unflatten(0, (levels, views))
        stay = drawn < torch.stack([self.probability(level, part) for level in range(levels)]).unsqueeze(1)
        self.dropped += stay.numel() - stay.sum()
        return stay


class Recorded:
    """Masks that were drawn elsewhere, bool [levels, 1 or views, N, K], in place of a selection."""

    def __init__(self, stay: Tensor) -> None:
        self.stay = stay
        self.dropped = (~stay).sum()

    def __call__(self, part: slice) -> Tensor:
        return self.stay[..., part]
