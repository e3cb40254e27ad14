"""What a step allocates, found without allocating it: torch's fake tensors, and a ledger of the storages that live.

A fake tensor has a shape, a type and a history, but no memory. The step runs on such tensors as it is, autograd
included, so what is kept for backward is what this code keeps: blocks that forget norms and GELUs, streamed prototypes,
recomputed blocks. Only what belongs to the device is fake: what is small, or made of host tensors alone, is computed.
The ledger sees each storage come and go, and so knows the most that lived at once; FLOPs are counted by torch's own
formulas (torch.utils.flop_counter), to which the products that work in place are added, which it leaves out.
"""

from __future__ import annotations

import math
import weakref
from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

from ...models.products import COUNTED

SMALL = 1 << 12  # numbers; a new tensor of so many or fewer is made for real: the host may want to read it
_aten: Any = torch.ops.aten
# Operators without a formula of their own: which one fits. On a CPU, flash attention goes by another name.
ALIKE = {
    _aten._scaled_dot_product_flash_attention_for_cpu: _aten._scaled_dot_product_flash_attention,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _aten._scaled_dot_product_flash_attention_backward,
    _aten.addmm_: _aten.addmm,
    _aten.baddbmm_: _aten.baddbmm,
}
# They move nothing, and launch nothing.
IDLE = {
    _aten._unsafe_view,
    _aten.empty,
    _aten.empty_like,
    _aten.empty_strided,
    _aten.new_empty,
    _aten.new_empty_strided,
}


class Ledger(TorchDispatchMode):
    """While entered: operators on fake tensors run on shapes alone, and their storages are counted, in bytes.

    `live`: now, without what `hollow` made. `peak`: the most at once. Gradients that `gradient` takes away are counted
    apart: `peak_with` is the most of all else and gradients together, if gradients stayed until the step's end.
    `flops`: multiply-adds times two, by `phase`. `traffic`: bytes that operators without any read and write; `kernels`:
    how many operators there were, of either kind.
    """

    def __init__(self) -> None:
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.live = self.peak = self.peak_with = self.gradients = 0
        self.flops: Counter[str] = Counter()
        self.traffic = self.kernels = 0
        self.phase = ""
        self._known: dict[int, int] = {}

    def hollow(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """A tensor without memory, which is not counted: what was there before."""
        with self.fake:
            made = torch.empty(shape, dtype=dtype)
        self._note(made, 0)
        return made

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [value for value in tree_iter((args, kwargs)) if isinstance(value, Tensor)]
        if not any(isinstance(value, FakeTensor) for value in tensors) and (tensors or _count(args) <= SMALL):
            return func(*args, **kwargs)
        with self.fake:
            out = func(*args, **kwargs)
        for value in tree_iter(out):
            if isinstance(value, FakeTensor):
                self._note(value)
        if func.namespace not in ("aten", "mkldnn") or func.is_view or func._overloadpacket in IDLE:
            return out
        self.kernels += 1
        packet = ALIKE.get(func._overloadpacket, func._overloadpacket)
        if (formula := COUNTED.get(packet, flop_registry.get(packet))) is not None:
            self.flops[self.phase] += formula(*args, **kwargs, out_val=out)
        else:
            moved = [*tensors, *(value for value in tree_iter(out) if isinstance(value, Tensor))]
            self.traffic += sum(value.numel() * value.element_size() for value in moved)
        return out

    def _note(self, tensor: Tensor, size: int | None = None) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        self._known[key] = size = storage.nbytes() if size is None else size
        weakref.finalize(storage, self._gone, key)
        self.live += size
        self.peak = max(self.peak, self.live)
        self.peak_with = max(self.peak_with, self.live + self.gradients)

    def _gone(self, key: int) -> None:
        self.live -= self._known.pop(key, 0)

    def gradient(self, parameter: Tensor) -> None:
        """Take a parameter's gradient away, as ZeRO does; from now on it is counted in `gradients`."""
        assert parameter.grad is not None
        self.gradients += parameter.grad.numel() * parameter.grad.element_size()
        parameter.grad = None


def _count(args: tuple[Any, ...]) -> int:
    """How many numbers a factory makes that takes a shape first; 0 of others."""
    shape = args[0] if args else None
    if isinstance(shape, list | tuple) and all(isinstance(n, int) for n in shape):
        return math.prod(shape)
    return 0
