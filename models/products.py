"""Matrix products in float32 on a CPU, by the library that uses all of it.

torch multiplies float32 by Intel's MKL, which takes another maker's processor for one with AVX2, however wide its registers
are: on an EPYC of the fifth generation it reaches 216 GFLOP/s where oneDNN, which torch has with it and takes for bf16,
reaches 490 (docs/objectives.md). So there, and only there, products of some size go to oneDNN: linear layers forward and
backward, crops against queues, memories and prototypes. It is float32 as before: sums are added up in another order. The plain
form of all this is torch's own `linear` and `mm`; tests tie them. What decides is the processor and the shapes, never a clock,
so that a run that goes on computes what it would have computed.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .host import on_host

# Multiply-adds from which oneDNN saves more than it takes to call it.
LEAST = 1 << 22
# Rows from which the gradient of a weight is worth turning its factors for; below, it is bound by memory, and MKL's is as good.
LEAST_ROWS = 256
# Held while torch's setting of products is another: of two threads, one would put back what the other had set.
_SETTING = Lock()


@cache
def better_here(cpuinfo: str = "/proc/cpuinfo") -> bool:
    """Whether this processor has AVX-512 and a maker for whom MKL leaves it unused."""
    if not torch.backends.mkldnn.is_available() or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    try:
        with Path(cpuinfo).open() as lines:
            makers = {line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")}
    except OSError:
        return False
    return bool(makers) and "GenuineIntel" not in makers


def in_bf16_here(x: Tensor) -> bool:
    """Whether what x meets is multiplied in bf16, by a CPU that has instructions for it, and not to be compiled."""
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    if dtype != torch.bfloat16 or torch.compiler.is_compiling() or not on_host(device):
        return False
    return torch.backends.cpu.get_cpu_capability() == "AVX512"


def library() -> str:
    """Who multiplies float32 on this host, and by which instructions: another one adds up in another order."""
    return f"{'oneDNN' if better_here() else 'torch'} {torch.backends.cpu.get_cpu_capability()}"


def _better(x: Tensor, weight: Tensor) -> bool:
    """Whether `x @ weight.T` is oneDNN's; x [..., k], weight [m, k]."""
    if torch.compiler.is_compiling() or not (x.dtype == weight.dtype == torch.float32):
        return False
    return x.numel() * weight.shape[0] >= LEAST and on_host(x.device.type) and better_here()


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None, gelu: bool = False) -> Tensor:
    """`x @ weight.T + bias` in the type of x, or its GELU; either layout of `weight` is read as it is."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "gelu" if gelu else "none", [], "none" if gelu else "")


def product(x: Tensor, rows: Tensor, out: Tensor | None = None) -> Tensor:
    """`x @ rows.T` of x [n, k] and rows [m, k], without gradient, in their own type whatever autocast says.

    `out` [n, m] is scratch that the result may be in.
    """
    if _better(x, rows):
        return _product(x, rows)
    out = x.new_empty(len(x), len(rows)) if out is None else out
    return torch.mm(x, rows.t(), out=out)


def batched(x: Tensor, y: Tensor, scale: float) -> Tensor:
    """`x @ y.mT * scale` in float32, without gradient, of batches x [b, n, k] and y [b, m, k] in bf16 on the host.

    Handed to MKL as float32, small products take three times as long; oneDNN takes float32 that may be read as bf16, which
    these numbers are, so that nothing is lost: sums are float32, and so is what comes out. The setting is the process':
    no other thread may multiply float32 numbers by torch meanwhile, and none of a run's does.
    """
    out, setting = torch.empty(len(x), x.shape[1], y.shape[1]), torch.backends.mkldnn.matmul
    with _SETTING:
        before = setting.fp32_precision
        setting.fp32_precision = "bf16"
        try:
            return torch.baddbmm(out, x.float(), y.float().mT, beta=0, alpha=scale, out=out)
        finally:
            setting.fp32_precision = before


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """torch's `linear`, equal to rounding, with its gradients: x [..., k], weight [m, k], bias [m] to [..., m]."""
    if fuses(x) and (torch.is_autocast_enabled(x.device.type) or x.dtype == weight.dtype):
        return _fused(x, weight, bias)
    if torch.is_autocast_enabled(x.device.type) or not _better(x, weight):
        return nn.functional.linear(x, weight, bias)
    if torch.is_grad_enabled() and (
        x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    ):
        return _Linear.apply(x, weight, bias)  # type: ignore[return-value]
    return _product(x, weight, bias)


def fuses(x: Tensor) -> bool:
    """Whether layer, bias and GELU in one spare passes over memory: in bf16 without a gradient, for which the hidden layer would be kept."""
    return not torch.is_grad_enabled() and in_bf16_here(x)


def _fused(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool = False) -> Tensor:
    """The layer, or its GELU with one rounding to bf16 less."""
    low = (None if given is None else given.to(torch.bfloat16) for given in (x, weight, bias))
    return _product(*low, gelu=gelu)  # type: ignore[arg-type]


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None):  # type: ignore[override]
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        slope = grad.reshape(-1, grad.shape[-1])
        to_x = _product(slope, weight.t()).view(x.shape) if needs_x else None
        to_weight = of_weight(slope, x.reshape(-1, x.shape[-1])) if needs_weight else None
        return to_x, to_weight, slope.sum(0) if needs_bias else None


def of_weight(slope: Tensor, x: Tensor) -> Tensor:
    """`slope.T @ x` of slope [n, m] and x [n, k], both float32 on the host: the gradient of a weight."""
    if len(x) < LEAST_ROWS or not _better(slope.t(), x.t()):
        return torch.mm(slope.t(), x)
    # oneDNN wants one of the two turned round in memory: the narrower.
    if slope.shape[1] <= x.shape[1]:
        return _product(slope.t().contiguous(), x.t())
    return _product(x.t().contiguous(), slope.t()).t().contiguous()


def _flops(x: Tensor, weight: Tensor, *_: Any, **__: Any) -> int:
    return 2 * x.numel() * weight.shape[0]


_flops._get_raw = True  # pyright: ignore[reportFunctionMemberAccess]  # it is given tensors, not their shapes
# For torch's FlopCounterMode (`custom_mapping`), which has no formula for them.
COUNTED: dict[Any, Any] = {torch.ops.mkldnn._linear_pointwise: _flops}


class Linear(nn.Linear):
    """A linear layer whose products are `linear`'s. Keys and initial weights are torch's."""

    def forward(self, input: Tensor, gelu: bool = False) -> Tensor:
        """`gelu`: what a GELU makes of it, where `fuses(input)`."""
        given = input, self.weight, self.bias
        return _fused(*given, gelu=True) if gelu else linear(*given)


class QueryKeyValue(Linear):
    """A ViT block's `qkv` layer, which can leave out the queries that nobody asks for.

    It splits its weight in its own forward, where ZeRO 3 has gathered it.
    """

    def forward(self, input: Tensor, apart: bool = False) -> Any:  # type: ignore[override]
        """[n, t, d] to [n, t, 3d]; `apart`: to the query of token 0 [n, 1, d] and keys and values of all [n, t, 2d]."""
        if not apart:
            return linear(input, self.weight, self.bias)
        d = self.in_features
        one, rest = (None, None) if self.bias is None else (self.bias[:d], self.bias[d:])
        return linear(input[:, :1], self.weight[:d], one), linear(input, self.weight[d:], rest)


def by_onednn(module: nn.Module) -> None:
    """Let the linear layers that a module has already be `Linear`; those of other classes stay."""
    for part in module.modules():
        if type(part) is nn.Linear:
            part.__class__ = Linear
