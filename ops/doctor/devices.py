"""GPUs and their driver, by NVIDIA's management library and by torch; without one, what computes in their place.

The management library (NVML, https://docs.nvidia.com/deploy/nvml-api) knows a card that CUDA cannot use, and so why not.
"""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from pathlib import Path

from .finding import Asked, Finding, size
from .tested import CUDA, DRIVER

OLDEST, HALF = (7, 5), (8, 0)  # compute capability: what CUDA 13 still serves, and what multiplies in bf16
NVIDIA = "0x10de"  # of PCI


@dataclass(frozen=True)
class Card:
    """One GPU. errors: uncorrected errors of its memory since the last boot; None where it has no ECC."""

    name: str
    total: int
    free: int
    capability: tuple[int, int]
    errors: int | None = None
    broken: bool = False  # rows of memory that could not be replaced


def check_devices(asked: Asked) -> list[Finding]:
    """The GPUs, and whether driver, torch, NCCL and DALI are of one CUDA."""
    from importlib.metadata import PackageNotFoundError, version

    import torch

    driver, serves, cards, trouble = managed()
    built = int((torch.version.cuda or "0").split(".")[0])
    try:
        version("nvidia-dali-cuda130")
        dali = CUDA
    except PackageNotFoundError:
        dali = 0
    usable = torch.cuda.is_available()
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if usable else ""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    seen = torch.cuda.device_count() if usable else 0
    threads = torch.get_num_threads()
    about = f"torch {torch.__version__}, {threads} thread{'s' * (threads > 1)}"
    return judge(
        cards, driver, serves, built, dali, usable=usable, seen=seen, hidden=hidden, trouble=trouble, about=about, nccl=nccl,
        bus=on_bus(), processes=asked.local_world,
    )  # fmt: skip


def judge(
    cards: list[Card], driver: str, serves: int, built: int, dali: int, *, usable: bool, seen: int = 0,
    hidden: str | None = None, trouble: str = "", about: str = "", nccl: str = "", bus: int = 0, processes: int = 1,
) -> list[Finding]:  # fmt: skip
    """Findings "gpu" and "driver". serves: CUDA of the driver, as 1000 * major + 10 * minor; built, dali: CUDA's major."""
    why = "a ViT trains some hundred times faster on a GPU"
    figures = {
        "cards": [vars(card) for card in cards], "driver": driver, "driver_cuda": serves, "torch_cuda": built,
        "dali_cuda": dali, "nccl": nccl, "usable": seen,
    }  # fmt: skip
    newer = f"install NVIDIA's driver {DRIVER} or newer (or the package cuda-compat-{CUDA}-0 on data centre cards)"
    if not cards and not usable:
        if bus:
            found = f"{bus} NVIDIA GPU{'s' * (bus > 1)} in this machine, but no driver answers" + (
                f" ({trouble})" * bool(trouble)
            )
            remedy = newer + "; in a container, start it with --gpus all (Kubernetes: limits nvidia.com/gpu)"
            return [Finding("gpu", "bad", found, why, remedy, figures)]
        found = f"none; the CPU computes ({about}; gloo between processes, our own loops for the crops)"
        return [Finding("gpu", "ok", found, why + "; a CPU is for trying things out", "", figures)]
    found = (
        f"driver {driver or 'unknown'}, CUDA {serves // 1000}.{serves % 1000 // 10}; torch for CUDA {built}, DALI for "
    )
    found += f"{dali or 'none'}" + (f", NCCL {nccl}" if nccl else "")
    together = "a driver serves its own CUDA and older ones"
    if serves and serves // 1000 < built:
        return [
            _of_cards(cards, why, figures, seen, hidden, processes),
            Finding("driver", "bad", found, together, newer, figures),
        ]
    if not usable:
        hides = f"; CUDA_VISIBLE_DEVICES={hidden!r}" if hidden is not None else ""
        remedy = "unset CUDA_VISIBLE_DEVICES" if hidden is not None else "run `nvidia-smi`; reload the driver or reboot"
        if not built:
            hides, remedy = "; this torch is built for CPUs", 'pip install "torch==2.14.1" of a build with CUDA'
        return [Finding("gpu", "bad", f"{len(cards)} there, and torch can use none{hides}", why, remedy, figures)]
    findings = [_of_cards(cards, why, figures, seen, hidden, processes)]
    if dali and dali != built:
        remedy = f'pip install "nvidia-dali-cuda{built}0" in place of the other DALI'
        findings.append(Finding("driver", "bad", found, together, remedy, figures))
    else:
        findings.append(Finding("driver", "ok", found, together, "", figures))
    return findings


def _of_cards(
    cards: list[Card], why: str, figures: dict[str, object], seen: int, hidden: str | None, processes: int
) -> Finding:
    if not cards:
        return Finding("gpu", "ok", f"{seen} usable (no management library to ask more)", why, "", figures)
    kinds = sorted({(card.name, card.total) for card in cards})
    found = f"{len(cards)} x " + " and ".join(f"{name} ({size(total)})" for name, total in kinds)
    found += f", {size(min(card.free for card in cards))} free at least"
    if hidden is not None:
        found += f"; CUDA_VISIBLE_DEVICES={hidden} leaves {seen}"
    for number, card in enumerate(cards):
        if card.broken or card.errors:
            what = (
                "memory that cannot be repaired" if card.broken else f"{card.errors} uncorrected errors of its memory"
            )
            remedy = f"take card {number} out of use (CUDA_VISIBLE_DEVICES), reset it or reboot, and have it replaced if it stays"
            return Finding("gpu", "bad", f"{found}; card {number} has {what}", why, remedy, figures)
        if card.capability < OLDEST:
            shown = ".".join(map(str, card.capability))
            remedy = "train on cards of Turing (7.5) or newer: CUDA 13 does not serve older ones"
            return Finding("gpu", "bad", f"{found}; card {number} has compute capability {shown}", why, remedy, figures)
    own = seen == 1 and hidden is not None  # schedulers show each process one of its own
    if processes > seen > 0 and not own:
        remedy = f"start {seen} processes on this host (--nproc-per-node)"
        return Finding("gpu", "bad", f"{found}; {processes} processes for {seen} GPUs", why, remedy, figures)
    if any(card.capability < HALF for card in cards):
        remedy = "set precision=fp32: these cards have no units for bf16"
        return Finding("gpu", "warn", found, why, remedy, figures)
    busy = [str(number) for number, card in enumerate(cards) if card.free < 0.8 * card.total]
    if busy:
        remedy = "end what computes there (`nvidia-smi` names it), or leave the card out (CUDA_VISIBLE_DEVICES)"
        return Finding("gpu", "warn", f"{found}; others use card {', '.join(busy)}", why, remedy, figures)
    if len(kinds) > 1:
        remedy = "train on equal cards: every step waits for the slowest"
        return Finding("gpu", "warn", found, why, remedy, figures)
    return Finding("gpu", "ok", found, why, "", figures)


def on_bus(devices: Path = Path("/sys/bus/pci/devices")) -> int:
    """NVIDIA's display and compute cards that the PCI bus knows, driver or none."""
    found = 0
    for device in devices.glob("*"):
        try:
            vendor, kind = (device / "vendor").read_text().strip(), (device / "class").read_text().strip()
        except OSError:
            continue
        found += vendor == NVIDIA and kind.startswith("0x03")
    return found


def managed() -> tuple[str, int, list[Card], str]:
    """(driver's version, its CUDA, cards, why there are none) by the management library."""
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return "", 0, [], "no management library"
    if code := library.nvmlInit_v2():
        return "", 0, [], f"the management library gives error {code}"
    text = ctypes.create_string_buffer(96)
    serves, count = ctypes.c_int(), ctypes.c_uint()
    driver = "" if library.nvmlSystemGetDriverVersion(text, 96) else text.value.decode()
    library.nvmlSystemGetCudaDriverVersion_v2(ctypes.byref(serves))
    library.nvmlDeviceGetCount_v2(ctypes.byref(count))
    cards = []
    for number in range(count.value):
        handle = ctypes.c_void_p()
        if library.nvmlDeviceGetHandleByIndex_v2(number, ctypes.byref(handle)):
            continue
        memory, errors = (ctypes.c_ulonglong * 3)(), ctypes.c_ulonglong()
        major, minor, on, later = ctypes.c_int(), ctypes.c_int(), ctypes.c_uint(), ctypes.c_uint()
        rows = [ctypes.c_uint() for _ in range(4)]
        library.nvmlDeviceGetName(handle, text, 96)
        library.nvmlDeviceGetMemoryInfo(handle, memory)
        library.nvmlDeviceGetCudaComputeCapability(handle, ctypes.byref(major), ctypes.byref(minor))
        guarded = not library.nvmlDeviceGetEccMode(handle, ctypes.byref(on), ctypes.byref(later)) and on.value
        counted = guarded and not library.nvmlDeviceGetTotalEccErrors(handle, 1, 0, ctypes.byref(errors))
        remapped = not library.nvmlDeviceGetRemappedRows(handle, *(ctypes.byref(row) for row in rows))
        cards.append(
            Card(
                text.value.decode(), memory[0], memory[1], (major.value, minor.value),
                errors.value if counted else None, bool(remapped and rows[3].value),
            )
        )  # fmt: skip
    library.nvmlShutdown()
    return driver, serves.value, cards, ""
