"""The block of a ViT: timm's, whose branches may be scaled or dropped by sample, and which keeps less for its backward.

Stochastic depth (arXiv 1603.09382) drops samples, so what is dropped need not be computed; norms and GELU are computed once
more in backward instead of being kept (lean.py); the rest is timm's, to rounding, with timm's parameter names.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from timm.models.vision_transformer import Block
from torch import Tensor
from torch.nn.functional import gelu, scaled_dot_product_attention

from .host import on_host
from .lean import forgetting, normed


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
        added = branch(x[rows])
        return torch.index_add(x, 0, rows, added.to(x.dtype), alpha=factor)

    def _attention(self, x: Tensor, lean: bool) -> Tensor:
        attention: Any = self.attn
        n, t, d = x.shape
        y, again = normed(self.norm1, x)
        with forgetting(y, again, lean):
            joined = attention.qkv(y)
        # Split by width: backward joins the three gradients where they belong, instead of stacking and then turning them.
        query, key, value = (part.view(n, t, -1, attention.head_dim).transpose(1, 2) for part in joined.split(d, -1))
        mixed = scaled_dot_product_attention(query, key, value)
        return attention.proj(mixed.transpose(1, 2).reshape(n, t, d))

    def _mlp(self, x: Tensor, lean: bool) -> Tensor:
        mlp: Any = self.mlp
        y, again = normed(self.norm2, x)
        with forgetting(y, again, lean):
            hidden = mlp.fc1(y)
        y = mlp.act(hidden)
        kept = hidden.detach()
        with forgetting(y, lambda: gelu(kept), lean):
            return mlp.fc2(y)
