"""What a rank sends and receives: calls and bytes of each collective operation, DeepSpeed's and ours alike.

torch fires a hook in front of every operation that a process group dispatches (torch/csrc/distributed/c10d/Hooks.hpp),
whoever calls it and on whatever backend; so nothing has to be wrapped, and nothing changes in what is sent, when, or how
a stack looks while a rank waits. Bytes are those of the larger side, as nccl-tests counts them: the result of an
all-gather, the source of a reduce-scatter. What of them goes over a wire is the backend's choice of an algorithm; a ring
sends (n - 1) / n of them, and twice that for an all-reduce. How long it takes is not told: on a GPU an operation is
only queued by the call, and waiting for it shows in the step's phases.
"""

from __future__ import annotations

import threading
from typing import Any

from torch import Tensor
from torch._C._distributed_c10d import HookOpName  # pyright: ignore[reportAttributeAccessIssue]
from torch.distributed import ProcessGroup
from torch.distributed.distributed_c10d import _world

from .labels import OPERATIONS

NAMES = {
    HookOpName.ALLREDUCE: "all_reduce",
    HookOpName.ALLGATHER: "all_gather",
    HookOpName.REDUCE_SCATTER: "reduce_scatter",
    HookOpName.REDUCE: "reduce",
    HookOpName.BROADCAST: "broadcast",
    HookOpName.ALLTOALL: "all_to_all",
    HookOpName.BARRIER: "barrier",
}


class Communication:
    """Counts between `follow` and `end` what goes through all groups that this process shares with others."""

    def __init__(self) -> None:
        self.calls: dict[str, int] = dict.fromkeys(OPERATIONS, 0)
        self.bytes: dict[str, int] = dict.fromkeys(OPERATIONS, 0)
        self._groups: list[ProcessGroup] = []
        self._lock = threading.Lock()  # autograd's threads send gradients

    def follow(self) -> None:
        """Count, also in groups that were made since the last call."""
        for group in list(_world.pg_map):
            if group.size() > 1 and group not in self._groups:
                group.register_pre_hook(id(self), self._count)  # a name of its own among the group's hooks
                self._groups.append(group)

    def counts(self) -> dict[str, int]:
        """`calls/OPERATION` and `bytes/OPERATION` so far."""
        with self._lock:
            calls, size = dict(self.calls), dict(self.bytes)
        return {f"calls/{name}": calls[name] for name in calls} | {f"bytes/{name}": size[name] for name in size}

    def end(self) -> None:
        """Count no longer. Safe to call twice."""
        groups, self._groups = self._groups, []
        for group in groups:
            group.unregister_pre_hook(id(self))

    def _count(self, operation: Any) -> None:
        """In front of an operation, in the thread that asks for it; whatever it raised would end the step."""
        name = NAMES.get(operation.name, "other")
        size = max(_bytes(operation.input_tensors), _bytes(operation.output_tensors))
        with self._lock:
            self.calls[name] += 1
            self.bytes[name] += size


def _bytes(tensors: list[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
