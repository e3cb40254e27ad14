"""What becomes of freed memory, in processes of their own: kept for the next step, or given back."""

import platform
import subprocess
import sys

import pytest
from gristmill.ops import heap

SCRIPT = """
import ctypes, resource, sys
import torch
from gristmill.ops import heap
from gristmill.ops.bench.meter import memory

for kept in map(int, sys.argv[1:]):
    assert heap.keep_heap(bool(kept))

def step():
    return torch.ones(100 << 18)  # 100 MiB

for _ in range(30):  # before 2.38, glibc first keeps what lies between aligned chunks for itself
    step()
before, faults = memory("VmRSS"), resource.getrusage(resource.RUSAGE_SELF).ru_minflt
held = step()
faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
print(memory("VmRSS") - before, faults)
"""


@pytest.mark.parametrize(("first", "kept"), [([], True), (["1"], False), (["0"], True)])
def test_freed_memory(first: list[str], kept: bool) -> None:
    """100 MiB are there already, or have to be found again page by page; whatever was asked for before."""
    command = [sys.executable, "-c", SCRIPT, *first, str(int(kept))]
    if platform.libc_ver()[0] != "glibc":  # torch's wheels for Linux are for no other
        assert not heap.keep_heap(kept)
        return
    answer = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    grown, faults = map(float, answer.stdout.split())
    assert grown < 10 if kept else grown > 90, answer
    assert faults < 2_000 if kept else faults > 60, answer  # of 25,600 pages; fewer where the system has larger ones


def test_an_older_glibc_refuses_the_threshold(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(
        heap, "_set", lambda what, value: asked.append((what, value)) or int((what, value) != (-3, heap.HUGE))
    )
    assert heap.keep_heap(True)
    assert asked == [(-3, heap.HUGE), (-4, 0), (-1, -1)]
    monkeypatch.setattr(heap, "_set", lambda *_: 0)
    assert not heap.keep_heap(True)
    assert not heap.keep_heap(False)
