"""Whether code goes the way that it has for a CPU: smaller blocks, a look at values, for which a GPU's host would wait.

Everybody who decides by the kind of device asks here. A context variable turns the answer around where a GPU's way is
to be looked at without one: `gristmill plan` follows a step on tensors that are a CPU's in name only. And `constant`,
for numbers that the host knows and a GPU is to have.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

_elsewhere: ContextVar[bool] = ContextVar("_elsewhere", default=False)


def on_host(device: str) -> bool:
    """Whether tensors of this type of device go a CPU's way."""
    return device == "cpu" and not _elsewhere.get()


@contextmanager
def off_host() -> Iterator[None]:
    """Inside, in this thread, code goes on as on a GPU, whatever device it runs on."""
    token = _elsewhere.set(True)
    try:
        yield
    finally:
        _elsewhere.reset(token)


def constant(numbers: Any, like: Tensor) -> Tensor:
    """Numbers (nested lists of them) as a tensor of the type and on the device of `like`, without a wait.

    `like.new_tensor` would wait until a GPU has done all that it was asked for. Here the copy is only queued: the driver
    has taken the numbers before the call returns.
    """
    return torch.tensor(numbers, dtype=like.dtype).to(like.device, non_blocking=True)
