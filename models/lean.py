"""Activations that are cheaper to make once more than to keep: outputs of a GELU, a LayerNorm, the widest of a ViT block.

Autograd keeps the input of every linear layer. Where that input is an elementwise function of something that is kept
anyway (GELU of the hidden layer; LayerNorm of the block's input), the function is applied again in backward: the same
kernel on the same numbers, so the same bits, at a hundredth of the block's arithmetic, and six of the sixteen
widths d that a block keeps a token are never stored. Unlike recomputing whole blocks (`Backbone.recompute`) no product is repeated.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.functional import layer_norm


def forgetting(value: Tensor, again: Callable[[], Tensor], wanted: bool = True) -> AbstractContextManager[Any]:
    """Inside, whatever saves `value` (or a view of all of it) for backward saves a note to call `again` instead.

    `again` must give the same numbers, and hold only what is kept anyway. Does nothing where no graph is made, while compiling,
    or where it is not `wanted`.
    """
    if not wanted or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return nullcontext()
    place, size = value.untyped_storage().data_ptr(), value.numel()

    def pack(tensor: Tensor) -> Any:
        same = tensor.untyped_storage().data_ptr() == place and tensor.numel() == size and tensor.is_contiguous()
        return tensor.shape if same else tensor

    def unpack(kept: Any) -> Tensor:
        return kept if isinstance(kept, Tensor) else again().view(kept)

    return saved_tensors_hooks(pack, unpack)


def normed(norm: nn.Module, x: Tensor) -> tuple[Tensor, Callable[[], Tensor]]:
    """`norm(x)`, in autocast's type where that is on, and how to have it again.

    ZeRO 3 takes weights away between forward and backward: there copies of these few numbers stay.
    """
    assert isinstance(norm, nn.LayerNorm)
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    y = norm(x)
    y = y if dtype is None else y.to(dtype)  # what a linear layer would do by itself, out of sight
    shape, eps, source = norm.normalized_shape, norm.eps, x.detach()
    weight, bias = norm.weight.detach(), norm.bias.detach()
    if hasattr(norm.weight, "ds_id"):
        weight, bias = weight.clone(), bias.clone()

    def again() -> Tensor:
        with torch.no_grad(), torch.autocast(device, enabled=dtype is not None, dtype=dtype):
            return layer_norm(source, shape, weight, bias, eps).to(y_dtype)

    y_dtype = y.dtype
    return y, again
