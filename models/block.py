"""The block of a ViT: timm's, whose branches may be scaled or dropped by sample, and which keeps less for its backward.

Stochastic depth (arXiv 1603.09382) drops samples, so what is dropped need not be computed; norms and GELU are computed once
more in backward instead of being kept (lean.py); in bf16 on a CPU attention is made of batched products;
the rest is timm's, to rounding, with timm's parameter names.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from timm.models.vision_transformer import Block
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import gelu, scaled_dot_product_attention

from .host import on_host
from .lean import forgetting, normed

# Cells of attention maps that are made at a time: 4 MiB of float32, which stay in a CPU's cache.
MAP_CELLS = 1 << 20


class ScaledBlock(Block):
    """timm's pre-norm block, whose branches may count for more or less of each sample.

    Equal to timm's to rounding, and cheaper: what a branch does not count for is not computed, gradients of queries, keys and
    values are joined in one pass, and outputs of norms and GELU are not kept for backward (`lean`).
    """

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        scale: Tensor | None = None,
        lean: bool = True,
    ) -> Tensor:
        """Tokens [n, t, d] to [n, t, d]. scale [n, 2]: factors of what attention and MLP add; None: 1.

        `lean` false: keep for backward what autograd would, for a caller who forgets all of it anyway.
        """
        if attn_mask is not None or is_causal:
            raise ValueError("this block attends to all tokens")
        x = self._add(x, None if scale is None else scale[:, 0], partial(self._attention, lean=lean))
        return self._add(x, None if scale is None else scale[:, 1], partial(self._mlp, lean=lean))

    def _add(self, x: Tensor, scale: Tensor | None, branch: Callable[[Tensor], Tensor]) -> Tensor:
        if scale is None:
            return x + branch(x)
        if torch.compiler.is_compiling() or not on_host(x.device.type):
            return x + scale[:, None, None] * branch(x)
        # Elsewhere, asking which samples are dropped would make the host wait, and shapes would change from step to step.
        factors = scale.tolist()
        kept = [place for place, factor in enumerate(factors) if factor]
        equal = len({factors[place] for place in kept}) == 1
        if not kept or not equal:
            return x + scale[:, None, None] * branch(x)
        factor = factors[kept[0]]
        if len(kept) == len(factors):
            return torch.add(x, branch(x), alpha=factor)
        rows = torch.tensor(kept)
        added = branch(x.index_select(0, rows))  # the gradient of x[rows] would go back row by row, ten times slower
        return torch.index_add(x, 0, rows, added.to(x.dtype), alpha=factor)

    def _attention(self, x: Tensor, lean: bool) -> Tensor:
        attention: Any = self.attn
        y, again = normed(self.norm1, x)
        with forgetting(y, again, lean):
            joined = attention.qkv(y)
        form = _ByProducts.apply if _by_products(joined, attention.num_heads) else attend
        return attention.proj(form(joined, attention.num_heads))

    def _mlp(self, x: Tensor, lean: bool) -> Tensor:
        mlp: Any = self.mlp
        y, again = normed(self.norm2, x)
        with forgetting(y, again, lean):
            hidden = mlp.fc1(y)
        y = mlp.act(hidden)
        kept = hidden.detach()
        with forgetting(y, lambda: gelu(kept), lean):
            return mlp.fc2(y)


def attend(joined: Tensor, heads: int) -> Tensor:
    """Queries, keys and values side by side [n, t, 3d] to what the heads gather [n, t, d]."""
    n, t, d = joined.shape[0], joined.shape[1], joined.shape[2] // 3
    # Split by width: backward joins the three gradients where they belong, instead of stacking and then turning them.
    query, key, value = (part.view(n, t, heads, -1).transpose(1, 2) for part in joined.split(d, -1))
    return scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(n, t, d)


def _by_products(joined: Tensor, heads: int) -> bool:
    """Whether attention is better made of batched products: in bf16, on a CPU that has fast ones, of maps of common size."""
    if joined.dtype != torch.bfloat16 or torch.compiler.is_compiling() or not on_host(joined.device.type):
        return False
    fits = heads * joined.shape[1] ** 2 <= MAP_CELLS
    return fits and torch.backends.cpu.get_cpu_capability() == "AVX512"


class _ByProducts(torch.autograd.Function):
    """`attend` to rounding, of batched products around a softmax: two forward, and five backward that make the maps again.

    On a CPU torch's fused attention multiplies head by head, and in bf16 each product is a call of its own: forward takes
    4/3 of the time of this; backward over 37 tokens seven times as long, over 197 twice. Scores are float32 here as they
    are there.
    """

    @staticmethod
    def forward(ctx, joined: Tensor, heads: int) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(joined)
        ctx.heads = heads
        return _attend_by_products(joined, heads)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        (joined,) = ctx.saved_tensors
        slope = torch.empty_like(joined)
        at_once = _at_once(joined, ctx.heads)
        for parts in zip(joined.split(at_once), grad.split(at_once), slope.split(at_once), strict=True):
            _slope(*parts, ctx.heads)
        return slope, None


def _attend_by_products(joined: Tensor, heads: int) -> Tensor:
    n, t, width = joined.shape
    out = joined.new_empty(n, t, width // 3)
    at_once = _at_once(joined, heads)
    for part, into in zip(joined.split(at_once), out.split(at_once), strict=True):
        _, _, value, maps = _maps(part, heads)
        into.view(-1, t, heads, value.shape[-1]).copy_(torch.bmm(maps, value).unflatten(0, (-1, heads)).transpose(1, 2))
    return out


def _at_once(joined: Tensor, heads: int) -> int:
    """Samples whose maps are made at a time."""
    return max(1, MAP_CELLS // (heads * joined.shape[1] ** 2))


def _maps(joined: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries, keys and values [n * heads, t, size] of joined [n, t, 3d], and the attention's maps [n * heads, t, t]."""
    n, t, width = joined.shape
    size = width // 3 // heads
    query, key, value = joined.view(n, t, 3, heads, size).permute(2, 0, 3, 1, 4).reshape(3, n * heads, t, size).unbind()
    scores = torch.empty(n * heads, t, t, device=joined.device)
    torch.baddbmm(scores, query.float(), key.float().mT, beta=0, alpha=size**-0.5, out=scores)
    return query, key, value, scores.softmax(-1).to(joined.dtype)


def _slope(joined: Tensor, grad: Tensor, out: Tensor, heads: int) -> None:
    """Gradient of `attend`: joined [n, t, 3d] and the gradient of what was gathered [n, t, d] to `out` [n, t, 3d]."""
    query, key, value, maps = _maps(joined, heads)
    n, t, size = len(joined), *query.shape[1:]
    grad = grad.reshape(n, t, heads, size).transpose(1, 2).reshape(n * heads, t, size)
    of_scores = torch.ops.aten._softmax_backward_data(torch.bmm(grad, value.mT), maps, -1, maps.dtype)
    parts = torch.empty(3, n * heads, t, size, dtype=joined.dtype, device=joined.device)
    torch.baddbmm(parts[0], of_scores, key, beta=0, alpha=size**-0.5, out=parts[0])
    torch.baddbmm(parts[1], of_scores.mT, query, beta=0, alpha=size**-0.5, out=parts[1])
    torch.bmm(maps.mT, grad, out=parts[2])
    out.view(n, t, 3, heads, size).copy_(parts.view(3, n, heads, t, size).permute(1, 3, 0, 2, 4))
