"""Products with prototypes, streamed: all that a cross-entropy wants of [N, K] logits, without the logits.

For soft targets T and logits x the cross-entropy is `lse(x) - T . x`, so each row needs a log-sum-exp and one dot product a
target. Both come of one pass over blocks of prototypes under a running maximum (Milakov & Gimelshein, arXiv 1805.02867);
backward makes each block's logits once more from the saved log-sum-exp. The weight norm (arXiv 1602.07868) is a factor of each
prototype's column of logits, so its [K, D] product is never made either. The plain form is `WeightNormLinear`
followed by `objectives/prototypes.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .host import on_host
from .products import product

# Logits in one block. On a CPU a block should stay in the last-level cache; a GPU wants few large launches.
BLOCK_LOGITS = {"cpu": 1 << 19}
BLOCK_LOGITS_ELSEWHERE = 1 << 25
# Rows in a block at least, and what they are a multiple of: products whose sides are not take up to 40 % longer.
SMALLEST = 64


def rows_in_block(count: int, device: str) -> int:
    """How many prototypes (or rows of a queue) `count` crops meet at a time."""
    size = BLOCK_LOGITS["cpu"] if on_host(device) else BLOCK_LOGITS_ELSEWHERE
    return max(SMALLEST, size // max(1, count) // SMALLEST * SMALLEST)


class _Streamed(torch.autograd.Function):
    """(x [C*B, D], v [K, D], g [K, 1], targets [G, B, K]) to (lse [C*B], agreement [B, C, G]).

    `dtype` is that of the products; sums are in the targets' precision.
    """

    @staticmethod
    def forward(
        ctx, x: Tensor, v: Tensor, g: Tensor, targets: Tensor, temperature: float, dtype: torch.dtype, block: int
    ):  # type: ignore[override]
        total, (views, batch, _), precise = len(v), targets.shape, targets.dtype
        count = len(x)
        low = x.to(dtype)
        norms = torch.empty(total, dtype=precise, device=x.device)
        top = torch.full((count, 1), -torch.inf, dtype=precise, device=x.device)
        mass = torch.zeros_like(top)
        agreement = torch.zeros(batch, count // batch, views, dtype=precise, device=x.device)
        room = _Room(count, min(block, total), dtype, precise, x.device)
        for start in range(0, total, block):
            part = slice(start, start + block)
            torch.linalg.vector_norm(v[part], dim=1, dtype=precise, out=norms[part])
            logits = room.product(low, v[part]).mul_(g[part, 0].to(precise) / norms[part] / temperature)
            agreement.baddbmm_(_by_image(logits, batch), targets[:, :, part].permute(1, 2, 0))
            higher = torch.maximum(top, logits.amax(1, keepdim=True))
            mass = mass * (top - higher).exp_() + logits.sub_(higher).exp_().sum(1, keepdim=True)
            top = higher
        lse = top + mass.log()
        ctx.save_for_backward(x, v, g, targets, norms, lse)
        ctx.temperature, ctx.dtype, ctx.block = temperature, dtype, block
        return lse.squeeze(1), agreement

    @staticmethod
    @once_differentiable
    def backward(ctx, of_lse: Tensor, of_agreement: Tensor):  # type: ignore[override]
        x, v, g, targets, norms, lse = ctx.saved_tensors
        batch, precise, low = targets.shape[1], targets.dtype, x.to(ctx.dtype)
        needs_x, needs_v, needs_g = ctx.needs_input_grad[:3]
        to_x = torch.zeros(x.shape, dtype=precise, device=x.device)
        to_v = torch.empty_like(v) if needs_v else None
        to_g = torch.empty_like(g) if needs_g else None
        count, total = len(x), len(v)
        room = _Room(count, min(ctx.block, total), ctx.dtype, precise, x.device)
        spare = torch.empty_like(room.logits)
        with torch.autocast(x.device.type, enabled=False):
            for start in range(0, total, ctx.block):
                part = slice(start, start + ctx.block)
                rows, length = v[part], norms[part]
                scale = g[part, 0].to(precise) / length / ctx.temperature
                lower_rows = rows.to(ctx.dtype)
                raw = room.product(low, lower_rows)
                slope = spare[: raw.numel()].view_as(raw)
                torch.mul(raw, scale, out=slope).sub_(lse).exp_().mul_(of_lse.unsqueeze(1))
                _by_image(slope, batch).baddbmm_(of_agreement, targets[:, :, part].permute(1, 0, 2))
                # What moves a prototype's scale, g / ||v||, moves g and the length of v.
                of_scale = raw.mul_(slope).sum(0) if needs_v or needs_g else None
                slope.mul_(scale)
                lower = slope.to(ctx.dtype)
                if needs_x:
                    if lower is slope and rows.dtype == ctx.dtype:
                        to_x += product(slope, rows.t())
                    else:
                        to_x += lower @ lower_rows
                if to_v is not None and of_scale is not None:
                    own = to_v[part]
                    if lower is slope and own.dtype == ctx.dtype:
                        torch.mm(lower.t(), low, out=own)
                    else:
                        own.copy_(lower.t() @ low)
                    own.addcmul_(rows, (of_scale * scale / length.square()).neg_().unsqueeze(1).to(own.dtype))
                if to_g is not None and of_scale is not None:
                    to_g[part, 0] = (of_scale / length / ctx.temperature).to(g.dtype)
        return to_x.to(x.dtype) if needs_x else None, to_v, to_g, None, None, None, None


class _Room:
    """Scratch for one block of logits, reused: on a CPU, fresh pages for each block would cost more than the exp."""

    def __init__(self, count: int, block: int, dtype: torch.dtype, precise: torch.dtype, device: torch.device):
        self.dtype = dtype
        self.logits = torch.empty(count * block, dtype=precise, device=device)
        self._low = self.logits if dtype == precise else torch.empty(count * block, dtype=dtype, device=device)

    def product(self, low: Tensor, rows: Tensor) -> Tensor:
        """`low @ rows.T` [N, b], in the sums' precision."""
        size = len(low) * len(rows)
        logits, out = (t[:size].view(len(low), len(rows)) for t in (self.logits, self._low))
        made = product(low, rows.to(self.dtype), out)
        return made if self._low is self.logits else logits.copy_(made)


def _by_image(logits: Tensor, batch: int) -> Tensor:
    """[C*B, b] as [B, C, b], a view."""
    return logits.view(-1, batch, logits.shape[1]).transpose(0, 1)


def streamed_assignment(
    x: Tensor, v: Tensor, g: Tensor, targets: Tensor, temperature: float, block: int | None = None
) -> tuple[Tensor, Tensor]:
    """Log-sum-exp of each row of logits [C*B], and each crop's agreement with its image's targets [B, C, G].

    Logits are `x @ w.T / temperature` with rows `w = g * v / ||v||`: x [C*B, D] crop-major, v [K, D], g [K, 1]; the agreement
    is `targets . logits` with targets [G, B, K]. Gradients go to x, v and g. `block`: prototypes at a time. Under autocast
    products are in its type, as they are elsewhere; all sums are in the targets' precision. Raises ValueError when shapes
    disagree.
    """
    _, batch, prototypes = targets.shape
    if prototypes != len(v) or not batch or len(x) % batch:
        raise ValueError(
            f"targets {tuple(targets.shape)} do not belong to {len(x)} crops and {len(v)} prototypes; take the teacher's "
            f"outputs of the same batch and of a head of the same size"
        )
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else v.dtype
    if block is None:
        block = rows_in_block(len(x), device)
    with torch.autocast(device, enabled=False):
        return _Streamed.apply(x, v, g, targets.detach(), temperature, dtype, block)  # type: ignore[return-value]
