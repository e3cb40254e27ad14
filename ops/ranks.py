"""What ranks tell each other beyond the verdict: rows, texts, and whether copies are still equal. All collective."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor


def summed(values: list[float], device: torch.device) -> list[float]:
    """Sums over the ranks: read here, where the watchdog knows a rank that waits for others."""
    vector = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(vector)
    return vector.tolist()


def gather(rows: Tensor) -> Tensor:
    """[n, ...] of every rank, in the order of the ranks, which is the order of the positions: [world * n, ...]."""
    world = dist.get_world_size()
    if world == 1:
        return rows
    out = rows.new_empty((world * rows.shape[0], *rows.shape[1:]))
    dist.all_gather_single(out, rows.contiguous())
    return out


def finish(pending: Iterable[dist.Work | None]) -> None:
    """Wait for what was begun with `async_op`: here, where the watchdog knows a rank that waits for others."""
    for work in pending:
        assert work is not None
        work.wait()


def gather_texts(texts: list[str], total: Callable[[list[float]], list[float]], device: torch.device) -> list[str]:
    """Equally many texts of every rank, in the order of the ranks; `total` adds up over ranks."""
    rank, world = dist.get_rank(), dist.get_world_size()
    if world == 1:
        return texts
    mine = [text.encode() for text in texts]
    longest = [float(max(map(len, mine))) if each == rank else 0.0 for each in range(world)]
    width = max(1, int(max(total(longest))))
    padded = bytearray(b"".join(text.ljust(width, b"\0") for text in mine))
    rows = torch.frombuffer(padded, dtype=torch.uint8).view(-1, width).to(device)
    return [row.tobytes().rstrip(b"\0").decode() for row in gather(rows).cpu().numpy()]


def drifted(copies: Mapping[str, Tensor], device: torch.device) -> list[str]:
    """Names of tensors that should be equal on all ranks, bit for bit, and are not."""
    if dist.get_world_size() == 1 or not copies:
        return []
    # A memory's rows are on the device, its pointer and what was written when on the host.
    low = torch.stack([_checksum(tensor).to(device, non_blocking=True) for tensor in copies.values()])
    high = low.clone()
    dist.all_reduce(low, op=dist.ReduceOp.MIN)
    dist.all_reduce(high, op=dist.ReduceOp.MAX)
    return [name for name, differs in zip(copies, (low != high).tolist(), strict=True) if differs]


def _checksum(tensor: Tensor) -> Tensor:
    """A number that two tensors share if their bits do, and hardly otherwise: int64, on the tensor's device."""
    data = tensor.detach().contiguous().view(-1)
    words = data.view(torch.int32 if data.element_size() % 4 == 0 else torch.uint8)
    total = torch.zeros((), dtype=torch.int64, device=data.device)
    for first in range(0, len(words), 1 << 20):
        chunk = words[first : first + (1 << 20)].long()
        total += (chunk * (torch.arange(len(chunk), device=data.device) + first + 1)).sum()
    return total
