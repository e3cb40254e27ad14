"""Joining the group of processes, and leaving it cleanly.

One process on a laptop needs no launcher, port or compiler: it forms a group of one over an in-memory store. Under
torchrun the environment names the group. DeepSpeed's shared-memory collective is switched off before anything
initialises: it is built just in time by a C++ compiler, and leaves 66 MiB in /dev/shm for every run.
"""

from __future__ import annotations

import gc
import logging
import os
import time
import warnings

import torch
import torch.distributed as dist


def quiet_deepspeed():
    """Import DeepSpeed without its greeting, its compiler checks and its just-in-time collective."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import deepspeed
        import deepspeed.ops

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def join() -> tuple[int, int, torch.device]:
    """Enter the group; returns (rank, world size, device). Safe to call again in the same process."""
    deepspeed = quiet_deepspeed()
    cuda = torch.cuda.is_available()
    local_rank = int(os.environ.setdefault("LOCAL_RANK", "0"))
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        backend = "nccl" if cuda else "gloo"
        if "WORLD_SIZE" in os.environ:
            dist.init_process_group(backend)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # pyright: ignore[reportPrivateImportUsage]
    deepspeed.init_distributed(dist.get_backend(), auto_mpi_discovery=False, verbose=False)
    return dist.get_rank(), dist.get_world_size(), device


def leave() -> None:
    """Leave the group so that the interpreter can end.

    The caller has dropped its engine first. A gloo thread that still holds the last collective's tensors while
    Python finalises aborts the process (exit -6), hence: collect, destroy, and a moment for the threads to end.
    """
    if dist.is_initialized():
        gc.collect()
        dist.barrier()
        dist.destroy_process_group()
        time.sleep(0.1)
