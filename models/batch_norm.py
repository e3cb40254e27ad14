"""Batch norm whose statistics are outputs: a forward changes nothing, what it would remember travels out of it.

torch's own layer moves its running mean in the forward, so that one batch with a NaN spoils it before anybody could
decide to leave the step out. Here `collect_statistics` hands each batch's mean and variance to the caller, who brings
them back by `merge_statistics` once the step was applied. Arithmetic is in float32 at least. Over several ranks nothing
is exchanged: statistics are taken over virtual batches of a fixed number of rows (ghost batch norm, arXiv 1705.08741),
which are the same wherever they are computed. The plain form is torch.nn.BatchNorm1d (arXiv 1502.03167).
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import batch_norm

PREFIX = "batch_norm."  # of the statistics' names in the outputs of a forward


class BatchNorm(nn.Module):
    """Normalise features [n, d] or [n, d, ...]: in training by the batch's statistics, in evaluation by the running ones.

    virtual: rows of a virtual batch, taken in the order of the rows; None: all rows are one. State keys are those of
    torch.nn.BatchNorm1d. Running statistics are float32, also where the module is cast to another type.
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self, features: int, eps: float = 1e-5, momentum: float = 0.1, affine: bool = True, virtual: int | None = None
    ) -> None:
        super().__init__()
        if virtual is not None and virtual < 2:
            raise ValueError(f"a virtual batch of {virtual} row has no variance; take at least 2")
        self.features, self.eps, self.momentum, self.virtual = features, eps, momentum, virtual
        self.weight = nn.Parameter(torch.ones(features)) if affine else None
        self.bias = nn.Parameter(torch.zeros(features)) if affine else None
        # Not by `dtype=`: what builds modules in another type (DeepSpeed's zero.Init) overrules that, but not a cast.
        self.register_buffer("running_mean", torch.zeros(features).float())
        self.register_buffer("running_var", torch.ones(features).float())
        self.register_buffer("num_batches_tracked", torch.tensor(0, dtype=torch.long))
        # Where a forward leaves its statistics while somebody collects them: [v, 2, d] each.
        self.sink: list[Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """The same shape and type as x. Raises ValueError in training for rows that do not fill virtual batches."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        weight, bias = (None if p is None else p.to(wide.dtype) for p in (self.weight, self.bias))
        if not self.training:
            mean, var = self.running_mean.to(wide.dtype), self.running_var.to(wide.dtype)
            return batch_norm(wide, mean, var, weight, bias, False, 0.0, self.eps).to(x.dtype)
        rows = self.virtual or len(x)
        if len(x) < 2 or len(x) % rows:
            raise ValueError(
                f"batch norm over {len(x)} rows: "
                + (
                    "one row has no variance; take larger batches"
                    if len(x) < 2
                    else f"they do not fill virtual batches of {rows}; let the images of a rank be a multiple of that"
                )
            )
        v = len(x) // rows
        # Virtual batches become channels, [rows, v * d, ...], so that one kernel serves all of them.
        folded = wide.unflatten(0, (v, rows)).transpose(0, 1).flatten(1, 2)
        mean, var = wide.new_zeros(2, v * self.features).unbind()
        if weight is not None and bias is not None:
            weight, bias = weight.repeat(v), bias.repeat(v)
        # With momentum 1 the "running" statistics are this batch's own.
        y = batch_norm(folded, mean, var, weight, bias, True, 1.0, self.eps)
        if self.sink is not None:
            self.sink.append(torch.stack([mean.view(v, -1), var.view(v, -1)], dim=1).detach())
        return y.unflatten(1, (v, self.features)).transpose(0, 1).flatten(0, 1).to(x.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Follow a move to another device, but let no cast (`.bfloat16()`) reach the running statistics."""
        before = {"running_mean": self.running_mean, "running_var": self.running_var}
        super()._apply(fn, recurse)
        for name, kept in before.items():
            now = getattr(self, name)
            if now.dtype != torch.float32:
                setattr(self, name, kept.to(now.device))
        return self

    def extra_repr(self) -> str:
        return (
            f"{self.features}, eps={self.eps}, momentum={self.momentum}, "
            f"affine={self.weight is not None}, virtual={self.virtual}"
        )


@contextmanager
def collect_statistics(module: nn.Module) -> Iterator[dict[str, Tensor]]:
    """The statistics of every training forward of a `BatchNorm` in `module` meanwhile; the dictionary is full at the end.

    "batch_norm.<module name>" -> [v, 2, d], detached: mean and unbiased variance of each virtual batch, in the order of
    the rows, and of the calls. So those of several ranks or micro-batches may be joined along the first dimension.
    """
    norms = {name: part for name, part in module.named_modules() if isinstance(part, BatchNorm)}
    found: dict[str, Tensor] = {}
    for part in norms.values():
        part.sink = []
    try:
        yield found
        found |= {PREFIX + name: torch.cat(part.sink) for name, part in norms.items() if part.sink}
    finally:
        for part in norms.values():
            part.sink = None


def statistics_of(outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those outputs of a forward that `merge_statistics` takes."""
    return {key: value for key, value in outputs.items() if key.startswith(PREFIX)}


@torch.no_grad()
def merge_statistics(module: nn.Module, statistics: Mapping[str, Tensor]) -> None:
    """Move the running statistics of the layers named, once a step: running <- (1 - momentum) * running + momentum * mean.

    The mean is over the virtual batches: what evaluation should stand for is a typical virtual batch. torch would move
    once a forward instead, further the more virtual batches there are, and by an order that the ranks would have to
    agree on. Nothing is checked for NaN here: that is the verdict's, before. Raises ValueError, before anything is
    changed, for a name that is no `BatchNorm` of `module` and for another shape than [v, 2, d].
    """
    parts = dict(module.named_modules())
    todo: list[tuple[BatchNorm, Tensor]] = []
    for key, value in statistics.items():
        part = parts.get(key.removeprefix(PREFIX))
        if not isinstance(part, BatchNorm) or not key.startswith(PREFIX):
            raise ValueError(
                f"statistics {key!r} belong to no batch norm here; take them from this module's own forward"
            )
        if value.ndim != 3 or len(value) == 0 or value.shape[1:] != (2, part.features):
            raise ValueError(f"statistics {key!r} are {list(value.shape)}, not [virtual batches, 2, {part.features}]")
        todo.append((part, value))
    for part, value in todo:
        # In float64, so that the order of the virtual batches does not show.
        for running, seen in zip((part.running_mean, part.running_var), value.double().mean(0), strict=True):
            running.copy_(torch.lerp(running.double(), seen, part.momentum))
        part.num_batches_tracked += 1
