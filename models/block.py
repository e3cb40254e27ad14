"""The block of a ViT: timm's, whose branches may be scaled or dropped by sample, and which keeps less for its backward.

Stochastic depth (arXiv 1603.09382) drops samples, so what is dropped need not be computed; norms and GELU are computed once
more in backward instead of being kept (lean.py); the rest is timm's, to rounding, with timm's parameter names.
In bf16 on a CPU products are so fast that what surrounds them counts: there attention is made of batched products, and its
maps, norms and GELU are kept, which takes about the memory of float32 without them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from timm.models.vision_transformer import Block
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import gelu, scaled_dot_product_attention

from .host import on_host
from .lean import forgetting, normed
from .products import batched, fuses, in_bf16_here

# Cells of attention maps that are made at a time: 4 MiB of float32, which stay in a CPU's cache.
MAP_CELLS = 1 << 20

# What is read of a block's output: all tokens, the class token, or that and the mean of all tokens (pair).
Read = Literal["all", "class", "pair"]


class ScaledBlock(Block):
    """timm's pre-norm block, whose branches may count for more or less of each sample.

    Equal to timm's to rounding, and cheaper: what a branch does not count for is not computed, gradients of queries, keys and
    values are joined in one pass, and outputs of norms and GELU are not kept for backward (`lean`) where a product counts
    for more than making them again.
    """

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        scale: Tensor | None = None,
        lean: bool = True,
        read: Read = "all",
    ) -> Tensor:
        """Tokens [n, t, d] to [n, t, d]. scale [n, 2]: factors of what attention and MLP add; None: 1.

        `lean` false: keep for backward what autograd would, for a caller who forgets all of it anyway. `read`: of the last
        block often no more is wanted than its class token, [n, 1, d], or that and the mean of all tokens, [n, 2, d]. Then
        no more is computed: ten of the block's twelve d^2 multiply-adds a token are left out, or its last four.
        """
        if attn_mask is not None or is_causal:
            raise ValueError("this block attends to all tokens")
        lean = lean and not in_bf16_here(x)
        first, second = (None, None) if scale is None else scale.unbind(1)
        onto = x[:, :1] if read == "class" else x
        x = self._add(onto, x, first, partial(self._attention, lean=lean, alone=read == "class"))
        onto = _pair(x) if read == "pair" else x
        return self._add(onto, x, second, partial(self._mlp, lean=lean, pair=read == "pair"))

    def _add(self, onto: Tensor, x: Tensor, scale: Tensor | None, branch: Callable[[Tensor], Tensor]) -> Tensor:
        """`onto + scale * branch(x)`, by sample."""
        if scale is None:
            return onto + branch(x)
        if torch.compiler.is_compiling() or not on_host(x.device.type):
            return onto + scale[:, None, None] * branch(x)
        # Elsewhere, asking which samples are dropped would make the host wait, and shapes would change from step to step.
        factors = scale.tolist()
        kept = [place for place, factor in enumerate(factors) if factor]
        equal = len({factors[place] for place in kept}) == 1
        if not kept or not equal:
            return onto + scale[:, None, None] * branch(x)
        factor = factors[kept[0]]
        if len(kept) == len(factors):
            return torch.add(onto, branch(x), alpha=factor)
        rows = torch.tensor(kept)
        added = branch(x.index_select(0, rows))  # the gradient of x[rows] would go back row by row, ten times slower
        return torch.index_add(onto, 0, rows, added.to(onto.dtype), alpha=factor)

    def _attention(self, x: Tensor, lean: bool, alone: bool) -> Tensor:
        """`alone`: of the class token, [n, 1, d]."""
        attention: Any = self.attn
        y, again = normed(self.norm1, x)
        if alone:
            query, joined = attention.qkv(y, apart=True)
            return attention.proj(_attend_first(query, joined, attention.num_heads))
        with forgetting(y, again, lean):
            joined = attention.qkv(y)
        form = _ByProducts.apply if _by_products(joined, attention.num_heads) else attend
        return attention.proj(form(joined, attention.num_heads))

    def _mlp(self, x: Tensor, lean: bool, pair: bool) -> Tensor:
        """`pair`: what it adds to the class token and to the mean of all, [n, 2, d]; its last layer is linear."""
        mlp: Any = self.mlp
        y, again = normed(self.norm2, x)
        if fuses(y):
            y = mlp.fc1(y, gelu=True)
            return mlp.fc2(_pair(y) if pair else y)
        with forgetting(y, again, lean):
            hidden = mlp.fc1(y)
        y = mlp.act(hidden)
        if pair:
            return mlp.fc2(_pair(y))
        kept = hidden.detach()
        with forgetting(y, lambda: gelu(kept), lean):
            return mlp.fc2(y)


class _Pair(torch.autograd.Function):
    """Tokens [n, t, d] to the first and the mean of all, [n, 2, d]; its gradient is written once, where autograd would
    fill, scatter, expand and add."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:  # type: ignore[override]
        ctx.count = x.shape[1]
        return torch.stack([x[:, 0], x.mean(1)], 1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        slope = (grad[:, 1:] / ctx.count).repeat(1, ctx.count, 1)
        slope[:, 0] += grad[:, 0]
        return slope


def _pair(x: Tensor) -> Tensor:
    return _Pair.apply(x)  # type: ignore[return-value]


def _attend_first(query: Tensor, joined: Tensor, heads: int) -> Tensor:
    """The first token's query [n, 1, d], keys and values side by side [n, t, 2d] to what its heads gather [n, 1, d]."""
    n, _, d = query.shape
    parts = query, *joined.split(d, -1)
    query, key, value = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in parts)
    return scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(n, 1, d)


def attend(joined: Tensor, heads: int) -> Tensor:
    """Queries, keys and values side by side [n, t, 3d] to what the heads gather [n, t, d]."""
    n, t, d = joined.shape[0], joined.shape[1], joined.shape[2] // 3
    # Split by width: backward joins the three gradients where they belong, instead of stacking and then turning them.
    query, key, value = (part.view(n, t, heads, -1).transpose(1, 2) for part in joined.split(d, -1))
    return scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(n, t, d)


def _by_products(joined: Tensor, heads: int) -> bool:
    """Whether attention is better made of batched products: where they are fast, of maps of common size."""
    return heads * joined.shape[1] ** 2 <= MAP_CELLS and in_bf16_here(joined)


class _ByProducts(torch.autograd.Function):
    """`attend` to rounding, of batched products around a softmax: two forward, and four backward of the maps that are kept.

    On a CPU torch's fused attention multiplies head by head, and in bf16 each product is a call of its own: forward takes
    twice the time of this; backward over 37 tokens seven times as long, over 197 twice. Scores are float32 here as they
    are there.
    """

    @staticmethod
    def forward(ctx, joined: Tensor, heads: int) -> Tensor:  # type: ignore[override]
        n, t, width = joined.shape
        turned = joined.view(n, t, 3, heads, -1).permute(2, 0, 3, 1, 4).contiguous()
        out = joined.new_empty(n, t, width // 3)
        kept = joined.new_empty(n, heads, t, t) if ctx.needs_input_grad[0] else None
        for start in range(0, n, at_once := _at_once(turned)):
            part = slice(start, start + at_once)
            query, key, value = turned[:, part].flatten(1, 2)
            scores = batched(query, key, value.shape[-1] ** -0.5)
            torch.softmax(scores, -1, out=scores)
            maps = scores.to(joined.dtype) if kept is None else kept[part].view_as(scores).copy_(scores)
            gathered = torch.bmm(maps, value).unflatten(0, (-1, heads)).transpose(1, 2)
            out[part].view_as(gathered).copy_(gathered)
        ctx.save_for_backward(turned, kept)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        turned, maps = ctx.saved_tensors
        _, n, heads, t, size = turned.shape
        slope = turned.new_empty(n, t, 3, heads, size)
        for start in range(0, n, at_once := _at_once(turned)):
            part = slice(start, start + at_once)
            _slope(turned[:, part], maps[part], grad[part], slope[part])
        return slope.view(n, t, -1), None


def _at_once(turned: Tensor) -> int:
    """Samples whose maps are made at a time."""
    _, _, heads, t, _ = turned.shape
    return max(1, MAP_CELLS // (heads * t**2))


def _slope(turned: Tensor, maps: Tensor, grad: Tensor, out: Tensor) -> None:
    """Gradient of `attend`: queries, keys, values [3, n, heads, t, size], maps [n, heads, t, t], of what was gathered
    [n, t, d], to `out` [n, t, 3, heads, size]."""
    query, key, value = turned.flatten(1, 2)
    maps, size = maps.flatten(0, 1), query.shape[-1]
    grad = grad.reshape(out[:, :, 0].shape).transpose(1, 2).reshape(query.shape)
    of_scores = torch.ops.aten._softmax_backward_data(torch.bmm(grad, value.mT), maps, -1, maps.dtype)
    parts = torch.empty_like(turned, memory_format=torch.contiguous_format)
    to_query, to_key, to_value = parts.flatten(1, 2)
    torch.baddbmm(to_query, of_scores, key, beta=0, alpha=size**-0.5, out=to_query)
    torch.baddbmm(to_key, of_scores.mT, query, beta=0, alpha=size**-0.5, out=to_key)
    torch.bmm(maps.mT, grad, out=to_value)
    out.copy_(parts.permute(1, 3, 0, 2, 4))
