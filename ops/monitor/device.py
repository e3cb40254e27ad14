"""A rank's GPU as its metrics show it: memory, what it could compute at most, and how long a forward took on its own clock.

Nothing here waits for the device: memory is the allocator's own count, and a forward's two events are read only after the
step's verdict, when both are long past. Without a GPU there is nothing to show, and a forward took what the host spent.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

# Dense FLOPs a second of the tensor cores in bf16, from the makers' data sheets; the first name that fits counts.
PEAKS = (
    ("GB200", 2500e12), ("B200", 2250e12), ("GH200", 989.4e12), ("H200 NVL", 835.5e12), ("H200", 989.4e12),
    ("H100 NVL", 835.5e12), ("H100 PCIe", 756e12), ("H100", 989.4e12), ("H800", 989.4e12), ("A100", 312e12), ("A800", 312e12), ("L40S", 362e12),
    ("L40", 181e12), ("L4", 121e12), ("A40", 149.7e12), ("A10", 125e12),
)  # fmt: skip


class Device:
    """Of one rank."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._host = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Around what is to be counted in `seconds`."""
        if self.device.type != "cuda":
            begin = time.perf_counter()
            yield
            self._host += time.perf_counter() - begin
            return
        begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begun.record()
        yield
        ended.record()
        self._events.append((begun, ended))

    def seconds(self) -> float:
        """What was timed since the last call took; on a GPU what is not through yet is left out."""
        spent, self._host = self._host, 0.0
        events, self._events = self._events, []
        return spent + sum(begun.elapsed_time(ended) for begun, ended in events if ended.query()) / 1000.0

    def memory(self) -> dict[str, float]:
        """Bytes by labels.CUDA; {} without a GPU."""
        if self.device.type != "cuda":
            return {}
        told = torch.cuda.memory_stats(self.device)
        return {
            "allocated": told["allocated_bytes.all.current"],
            "reserved": told["reserved_bytes.all.current"],
            "peak": told["allocated_bytes.all.peak"],
        }

    def peak_flops(self, precision: str) -> float | None:
        """FLOPs a second at a recipe's precision; None where that is not known."""
        if self.device.type != "cuda":
            return None
        return peak_of(torch.cuda.get_device_name(self.device), precision, bool(torch.backends.cuda.matmul.allow_tf32))


def peak_of(name: str, precision: str, tf32: bool) -> float | None:
    """FLOPs a second of a device by its name. fp32 is known where it runs on tensor cores (tf32), at half of bf16's rate.

    None for a slice of a GPU (MIG), which bears the whole one's name.
    """
    if re.search(r"\bMIG\b", name):
        return None
    found = next((peak for known, peak in PEAKS if re.search(rf"\b{re.escape(known)}\b", name)), None)
    if found is None or precision in ("autocast", "bf16"):
        return found
    return found / 2 if tf32 else None
