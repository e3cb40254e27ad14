"""What a call costs on a CPU or a GPU: seconds until that is done with it, and the memory that it takes at its peak.

On a CPU memory is the kernel's own account of the process: its peak (VmHWM) less what it held (VmRSS) before. On a GPU
it is that of torch's allocator (what tensors take, not what is reserved for them).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch


def memory(what: str) -> float:
    """VmRSS or VmHWM of this process, in MB; nan where there is no /proc."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return float("nan")
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(what + ":")), float("nan"))


def held(device: str) -> float:
    """MB that are held now; the peak is counted from here on where the device can begin anew."""
    if device != "cuda":
        return memory("VmRSS")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated() / 2**20


def peak(device: str) -> float:
    """The most MB that were held."""
    return torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else memory("VmHWM")


def lasted(run: Callable[[], object], device: str) -> tuple[float, float]:
    """Wall seconds of a call, to the end of what it asked of the device, and CPU seconds of all threads."""
    if device == "cuda":
        torch.cuda.synchronize()
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - wall, time.process_time() - cpu


def timed(run: Callable[[], object], steps: int, device: str = "cpu", bound: float = 90.0) -> dict[str, float]:
    """The least seconds of `steps` calls (of fewer past `bound` seconds) after one to warm up, two on a GPU."""
    begin, found = time.perf_counter(), []
    for _ in range(2 if device == "cuda" else 1):
        run()
    while len(found) < steps and (not found or time.perf_counter() - begin < bound):
        found.append(lasted(run, device))
    walls, cpus = zip(*found, strict=True)
    return {"seconds": min(walls), "cpu_seconds": min(cpus), "slowest_seconds": max(walls)}
