"""Communication on one host, where no launcher started a group: two processes over gloo, one for each GPU over NCCL.

They are forks of a process that has imported torch and no more, and meet in a file: no port, no name, no network.
"""

from __future__ import annotations

import json
import os
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

from .finding import Asked, Finding, said, size

WHY = "several processes train together by it: gloo between CPUs, NCCL between GPUs"
SLOW = {"gloo": 30e6, "nccl": 2e9}  # bytes/s


def check_communication(asked: Asked) -> list[Finding]:
    """Sums and exchanges over gloo; and over NCCL between this host's GPUs, if there are any."""
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # looking for GPUs must not start CUDA, which no fork survives
    import torch

    cards = torch.cuda.device_count() if torch.cuda.is_available() else 0
    seconds = asked.seconds * (0.4 if cards else 0.8)
    found = [_judged("gloo", 2, *together("gloo", 2, seconds))]
    if cards:
        world = min(cards, 8)
        found.append(_judged("nccl", world, *together("nccl", world, seconds)))
    return found


def together(backend: str, world: int, seconds: float) -> tuple[list[dict[str, Any]], str]:
    """What each of `world` forks measured, and what went wrong ("" if nothing). Seconds after which all are ended."""
    with tempfile.TemporaryDirectory(prefix="gristmill-doctor-") as folder:
        ranks = {}
        for rank in range(world):
            child = os.fork()
            if child == 0:
                _rank(backend, rank, world, Path(folder), seconds)
            ranks[child] = rank
        until, ended = time.monotonic() + seconds + 5, dict[int, int]()
        while len(ended) < world and time.monotonic() < until:
            for child, rank in ranks.items():
                if rank not in ended and os.waitpid(child, os.WNOHANG)[0]:
                    ended[rank] = child
            time.sleep(0.01)
        for child, rank in ranks.items():
            if rank not in ended:
                os.kill(child, 9)
                os.waitpid(child, 0)
        told = []
        for rank in range(world):
            path = Path(folder) / f"rank-{rank}"
            told.append(json.loads(path.read_text()) if path.exists() else {"error": "it ended without a word"})
    if len(ended) < world:
        return told, f"no answer within {seconds:.0f} s"
    return told, next((tree["error"] for tree in told if "error" in tree), "")


def _rank(backend: str, rank: int, world: int, folder: Path, seconds: float) -> None:
    """A fork's whole life; never returns."""
    try:
        signal.alarm(int(seconds) + 5)
        told = _talk(backend, rank, world, folder, seconds)
    except BaseException as error:
        told = {"error": said(error)}
    try:
        draft = folder / f"draft-{rank}"
        draft.write_text(json.dumps(told))
        draft.rename(folder / f"rank-{rank}")
    finally:
        os._exit(0)


def _talk(backend: str, rank: int, world: int, folder: Path, seconds: float) -> dict[str, Any]:
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    from .talk import pair_rates, sum_rate

    torch.set_num_threads(1)
    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    if backend == "nccl":
        torch.cuda.set_device(device)
    store = dist.FileStore(str(folder / "store"), world)  # pyright: ignore[reportPrivateImportUsage]
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timedelta(seconds=seconds))
    told = {"sum": sum_rate(device), "pairs": pair_rates(rank, world, device)}
    dist.barrier()
    return told


def _judged(backend: str, world: int, told: list[dict[str, Any]], trouble: str) -> Finding:
    name = "communication"
    what = f"{backend} between {world} processes of this host" if world > 1 else f"{backend} of one process"
    if trouble:
        remedy = "set GLOO_SOCKET_IFNAME=lo, and look at the finding on the host name"
        if backend == "nccl":
            remedy = (
                "give the command again with NCCL_DEBUG=INFO; look at the findings on GPUs, driver and shared memory"
            )
        return Finding(name, "bad", f"{what}: {trouble}", WHY, remedy, {"backend": backend, "world": world})
    total = min(tree["sum"] for tree in told)
    rates = {
        f"{rank}-{other}": rate
        for rank, tree in enumerate(told)
        for other, rate in tree["pairs"].items()
        if rank < int(other)
    }
    found = f"{what}: sums at {size(total)}/s" + (f", pairs at {size(min(rates.values()))}/s or more" if rates else "")
    figures = {"backend": backend, "world": world, "sum_bytes_per_s": total, "pair_bytes_per_s": rates}
    if world > 1 and total < SLOW[backend]:
        remedy = "see whether others compute here (`top`), and set OMP_NUM_THREADS=1"
        if backend == "nccl":
            remedy = "see `nvidia-smi topo -m`; unset NCCL_P2P_DISABLE and NCCL_SHM_DISABLE"
        return Finding(name, "warn", found, WHY, remedy, figures)
    return Finding(name, "ok", found, WHY, "", figures)
