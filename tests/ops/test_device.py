"""What is looked at about once a second: the teacher's sample, room on disks, a rank's GPU."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from gristmill.ops.monitor.device import PEAKS, Device, peak_of
from gristmill.ops.monitor.disks import Disks, room
from gristmill.ops.monitor.sample import Sample, fingerprint_of
from gristmill.ops.planning.hardware import GPUS


class Teacher:
    """As much of an EmaTeacher as a sample looks at, with real tensors."""

    def __init__(self, *sizes: int) -> None:
        generator = torch.Generator().manual_seed(1)
        flats = [torch.randn(size, generator=generator) for size in sizes]
        self.shadows: list[Any] = [flat.clone() for flat in flats]
        shards = [type("Shard", (), {"flat": flat}) for flat in flats]
        self.layout: Any = type("Layout", (), {"segments": type("Segments", (), {"shards": shards})})


def test_a_teacher_that_moves_in_one_bit_is_seen():
    teacher = Teacher(500, 300)
    sample = Sample(teacher)  # pyright: ignore[reportArgumentType]
    first = sample.look()
    assert first["distance"] == 0.0
    assert sample.look() == first
    joined = torch.cat(teacher.shadows)
    assert first["fingerprint"] == fingerprint_of(joined, sample._factors)
    seen = {first["fingerprint"]}
    for place in range(0, 300, 7):
        teacher.shadows[1][place] = torch.nextafter(teacher.shadows[1][place], torch.tensor(9.0))
        seen.add(sample.look()["fingerprint"])
    assert len(seen) == 1 + len(range(0, 300, 7))
    teacher.shadows[0].mul_(0.5)
    assert 0.1 < sample.look()["distance"] < 0.9


def test_a_large_teacher_is_sampled():
    teacher = Teacher(300_000, 10)
    sample = Sample(teacher)  # pyright: ignore[reportArgumentType]
    assert len(sample._factors) <= 1 << 16
    teacher.shadows[0].lerp_(teacher.layout.segments.shards[0].flat + 1.0, 0.25)
    assert sample.look()["distance"] == pytest.approx(0.25, rel=0.1)
    empty = Teacher(5)
    empty.shadows = [None]
    assert Sample(empty).look() == {}  # pyright: ignore[reportArgumentType]


def test_room_on_disks(tmp_path: Path):
    found = room({"run": tmp_path / "not" / "yet", "cache": tmp_path})
    assert found["run/size"] == found["cache/size"] > found["run/free"] > 0
    told: list[dict[str, float]] = []
    disks = Disks({"run": tmp_path}, told.append, every=0.01)
    until = time.monotonic() + 30
    while len(told) < 3 and time.monotonic() < until:
        time.sleep(0.01)
    disks.close()
    assert len(told) >= 3
    assert told[0].keys() == {"run/free", "run/size"}


def test_peaks_are_of_known_devices_only():
    assert peak_of("NVIDIA H100 80GB HBM3", "bf16", False) == 989.4e12
    assert peak_of("NVIDIA H100 PCIe", "autocast", False) == 756e12
    assert peak_of("NVIDIA A100-SXM4-80GB", "fp32", True) == 156e12
    assert peak_of("NVIDIA A100-SXM4-80GB", "fp32", False) is None
    assert peak_of("NVIDIA GeForce GTX 970", "bf16", False) is None
    assert peak_of("NVIDIA L40S", "bf16", False) == 362e12
    assert peak_of("NVIDIA H200 NVL", "bf16", False) == 835.5e12
    assert peak_of("NVIDIA GH200 480GB", "bf16", False) == 989.4e12
    assert peak_of("NVIDIA A10", "bf16", False) == 125e12
    for other in (
        "NVIDIA A10G",
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
        "NVIDIA H100 80GB HBM3 MIG 3g.40gb",
        "NVIDIA L400",
    ):
        assert peak_of(other, "bf16", False) is None, other
    names = [name for name, _ in PEAKS]
    assert not [(a, b) for i, a in enumerate(names) for b in names[i + 1 :] if a in b], "the longer name comes first"


@pytest.mark.parametrize(
    ("name", "planned"),
    [
        ("NVIDIA H100 80GB HBM3", "h100-80"), ("NVIDIA A100-SXM4-80GB", "a100-80"), ("NVIDIA H200", "h200"),
        ("NVIDIA B200", "b200"), ("NVIDIA L40S", "l40s"),
    ],
)  # fmt: skip
def test_peaks_are_those_that_runs_are_planned_with(name: str, planned: str):
    assert peak_of(name, "bf16", False) == pytest.approx(GPUS[planned].flops, rel=1e-3)


def test_without_a_gpu_the_hosts_clock_counts():
    device = Device(torch.device("cpu"))
    with device.timed():
        time.sleep(0.01)
    assert device.seconds() >= 0.01
    assert device.seconds() == 0.0
    assert device.memory() == {}
    assert device.peak_flops("bf16") is None


@pytest.mark.gpu
def test_a_gpus_own_clock():
    device = Device(torch.device("cuda"))
    x = torch.randn(4096, 4096, device="cuda")
    with device.timed():
        for _ in range(50):
            x = (x @ x).tanh()
    launched = time.perf_counter()
    torch.cuda.synchronize()
    waited = time.perf_counter() - launched
    assert device.seconds() >= 0.5 * waited > 0.0  # what the host did not wait for is counted
    memory = device.memory()
    assert 0 < memory["allocated"] <= memory["peak"] <= memory["reserved"]
    name = torch.cuda.get_device_name()
    assert device.peak_flops("bf16") == peak_of(name, "bf16", False)
