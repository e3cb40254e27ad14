"""What ranks say to each other, timed: sums over all, bytes between pairs, and each other's clocks. All collective.

Rates of sums are "bus" rates, size * 2 * (n - 1) / n / time, which do not depend on how many ranks there are
(https://github.com/NVIDIA/nccl-tests/blob/master/doc/PERFORMANCE.md).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

BYTES = 16 << 20
TIMES = 3
ALL_PAIRS = 16  # ranks up to which every pair is timed; beyond, pairs at distances 1, 2, 4, ...
PINGS = 5


def sum_rate(device: torch.device, group: Any = None) -> float:
    """Bytes/s of an all-reduce, as a bus rate; of one rank alone, of a copy. Raises RuntimeError for a wrong sum."""
    world = dist.get_world_size(group)
    numbers = torch.ones(BYTES // 4, device=device)
    spent = []
    for _ in range(1 + TIMES):
        numbers.fill_(1.0)
        spent.append(_timed(lambda: dist.all_reduce(numbers, group=group), device))
    if not bool((numbers == world).all()):
        raise RuntimeError(f"the sum of ones over {world} ranks is {numbers.min().item()} to {numbers.max().item()}")
    return BYTES * (2 * (world - 1) / world if world > 1 else 1.0) / min(spent[1:])


def pair_rates(rank: int, world: int, device: torch.device, group: Any = None) -> dict[int, float]:
    """Bytes/s of exchanges with other ranks, both ways at once, by rank; all pairs of a round exchange at the same time."""
    found: dict[int, float] = {}
    distance, most = 1, 1 << (world - 1).bit_length()
    while distance < most:
        other = rank ^ distance
        if other < world:
            found[other] = _exchange(rank, other, device, group)
        distance = distance + 1 if world <= ALL_PAIRS else distance * 2
    return found


def _exchange(rank: int, other: int, device: torch.device, group: Any) -> float:
    mine, theirs = torch.full((BYTES // 4,), float(rank), device=device), torch.empty(BYTES // 4, device=device)

    def both() -> None:
        ops = [dist.P2POp(dist.isend, mine, other, group), dist.P2POp(dist.irecv, theirs, other, group)]
        for work in dist.batch_isend_irecv(ops if rank < other else ops[::-1]):
            work.wait()

    spent = [_timed(both, device) for _ in range(1 + TIMES)]
    if not bool((theirs == other).all()):
        raise RuntimeError(f"what rank {other} sent arrived changed")
    return 2 * BYTES / min(spent[1:])


def offset(rank: int, world: int) -> tuple[float, float]:
    """(seconds that this rank's clock is ahead of rank 0's, within so many seconds); over gloo, a rank after the other."""
    best = (0.0, 0.0)
    for other in range(1, world):
        if rank not in (0, other):
            continue
        answers = []
        for _ in range(PINGS):
            stamp = torch.zeros(1, dtype=torch.float64)
            if rank == 0:
                dist.recv(stamp, other)
                stamp[0] = time.time()
                dist.send(stamp, other)
            else:
                sent = time.time()
                dist.send(stamp, 0)
                dist.recv(stamp, 0)
                back = time.time()
                answers.append(((back - sent) / 2, (sent + back) / 2 - stamp.item()))
        if answers:
            half, ahead = min(answers)
            best = (ahead, half)
    return best


def _timed(work: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begin = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin
