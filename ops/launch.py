"""Joining the group of processes, and leaving it cleanly.

One process on a laptop needs no launcher, port or compiler: it forms a group of one over an in-memory store. Otherwise
the environment names the group, in each launcher's own words (launch_place.py). DeepSpeed's shared-memory collective is
switched off before anything initialises: it is built just in time by a C++ compiler, and leaves 66 MiB in /dev/shm for
every run. Each group sees a corner of the store of its own: torchrun keeps one store over its restarts on one node, in
which gloo would find the dead's addresses.
"""

from __future__ import annotations

import gc
import itertools
import logging
import os
import socket
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store, _world, default_pg_timeout
from torch.distributed.rendezvous import rendezvous

from ..shards.errors import GristmillError
from .launch_place import LaunchError, Place, environment

__all__ = [
    "LaunchError",
    "Place",
    "card_of",
    "end_anyway",
    "environment",
    "flushing",
    "join",
    "leave",
    "let_the_watchdog_judge",
    "meet",
    "quiet_deepspeed",
    "seeing",
]

PATIENCE = 30.0  # seconds until a name that this host does not know is wrong
_groups = itertools.count()  # that this process has been in


@contextmanager
def flushing() -> Iterator[None]:
    """Numbers below 1e-38 are 0 in this thread, and in those that it starts.

    Sharp softmaxes are full of them, and CPUs are a hundred times slower on them than on zeros.
    """
    before = bool(torch.tensor(1e-40) * 1.0 == 0.0)
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)


def quiet_deepspeed():
    """Import DeepSpeed without its greeting, its compiler checks and its just-in-time collective."""
    # Whatever was inherited: a process that is shown no GPU may be a child of one that has one.
    os.environ["DS_ACCELERATOR"] = "cuda" if torch.cuda.is_available() else "cpu"
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import deepspeed
        import deepspeed.ops
        import deepspeed.runtime.bf16_optimizer
        from deepspeed.runtime import compiler

        # Every ZeRO optimizer imports Muon, whose kernels ask for torch.compile, which takes seconds to load; nobody
        # here steps by Muon.
        compiled, compiler.compile = compiler.compile, lambda *_, **__: lambda function: function
        import deepspeed.runtime.zero.muon.muon_optimizer

        compiler.compile = compiled

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # It collects garbage and reads /proc twice a parameter group, whatever the log level: seconds at every start.
    deepspeed.runtime.bf16_optimizer.see_memory_usage = lambda *_, **__: None
    warnings.filterwarnings("ignore", message=r".*torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    return deepspeed


def join() -> tuple[int, int, torch.device]:
    """Enter the group; returns (rank, world size, device). Safe to call again in the same process.

    What the launcher said is in the environment afterwards as torchrun would have put it: RANK, WORLD_SIZE, LOCAL_RANK,
    LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT; of one process alone, LOCAL_RANK. Raises LaunchError where the
    environment names a group that cannot be formed.
    """
    place = environment(os.environ)
    place.export(os.environ)
    deepspeed = quiet_deepspeed()
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", card_of(place.local_rank, torch.cuda.device_count())) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
        # Sums made inside of a switch come out otherwise from call to call (NVIDIA, NCCL issue 1497): no run that goes
        # on would have the bits of one that never stopped. Who wants them says so.
        os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    if not dist.is_initialized():
        backend = "nccl" if cuda else "gloo"
        if place.address:
            until_known(place.address)
            try:
                store, rank, world = meet(str(next(_groups)))
                dist.init_process_group(backend, store=store, rank=rank, world_size=world)
            except (RuntimeError, ValueError) as error:
                raise LaunchError(
                    f"the group of {place.world} processes ({place.launcher}) could not be formed at {place.address}:"
                    f"{place.port}: {str(error).splitlines()[0]}. Look whether all of them were started and reach each other "
                    "(GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME names the network), and start the same command again; "
                    f"{_advice(place)}."
                ) from error
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # pyright: ignore[reportPrivateImportUsage]
    deepspeed.init_distributed(dist.get_backend(), auto_mpi_discovery=False, verbose=False)
    return dist.get_rank(), dist.get_world_size(), device


def until_known(address: str, patience: float | None = None) -> None:
    """Wait until this host knows the name at which all meet: torch would only warn of it, for half an hour.

    Some seconds are for a name server that stumbles. In Kubernetes a pod's name appears with the pod, which may be as
    late as a group may be altogether. Raises LaunchError.
    """
    began = time.monotonic()
    if patience is None:
        patience = default_pg_timeout.total_seconds() if "KUBERNETES_SERVICE_HOST" in os.environ else PATIENCE
    told = False
    while True:
        try:
            socket.getaddrinfo(address, None)
            return
        except (OSError, UnicodeError) as error:
            waited, why = time.monotonic() - began, getattr(error, "strerror", None) or error
            if waited >= patience:
                raise LaunchError(
                    f"MASTER_ADDR {address} is no name that this host knows ({why}): set it to the name or address of "
                    "rank 0's host"
                ) from error
            if waited >= PATIENCE and not told:
                logging.getLogger(__name__).warning(
                    f"MASTER_ADDR {address} is no name that this host knows yet ({why}); "
                    f"waiting for it up to {patience:.0f} s"
                )
                told = True
        time.sleep(min(1.0, patience))


def card_of(local_rank: int, count: int) -> int:
    """Which of the `count` GPUs that a process sees is its own: its local rank's, or the only one.

    A scheduler may show each process nothing but its own. Raises LaunchError where there are fewer than processes.
    """
    if 1 < count <= local_rank:
        raise LaunchError(
            f"local rank {local_rank} has no GPU: {count} are there; start {count} processes on this host at most"
        )
    return local_rank if count > 1 else 0


@contextmanager
def seeing(device: torch.device) -> Iterator[None]:
    """Inside, LOCAL_RANK is the number of this process's GPU, for which DeepSpeed takes it; OpenMPI's says the same.

    They differ where a scheduler shows each process its own GPU alone. Outside, LOCAL_RANK is the place on the host,
    by which metrics find their ports. On a CPU nothing is changed.
    """
    names = [name for name in ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK") if name in os.environ]
    before = {name: os.environ[name] for name in names} if device.type == "cuda" else {}
    os.environ.update(dict.fromkeys(before, str(device.index)))
    try:
        yield
    finally:
        os.environ.update(before)


def _advice(place: Place) -> str:
    """What else to look at, by the launcher."""
    shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and os.environ.get("GROUP_WORLD_SIZE", "1") != "1"
    if shared and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
        return "after a restart over several nodes, torchrun itself needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in its environment"
    if place.launcher in ("slurm", "openmpi", "kubernetes"):
        return "MASTER_ADDR and MASTER_PORT name another place to meet"
    return "without torchrun, unset WORLD_SIZE"


def meet(corner: str, timeout: timedelta = default_pg_timeout) -> tuple[Store, int, int]:
    """This attempt's corner of the store at which the environment says to meet; rank, world size.

    Over several nodes agents count restarts apart, so that no corner can be agreed on: there torchrun itself has to make
    a new store for every attempt, by TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1.
    """
    store, rank, world = next(rendezvous("env://", timeout=timeout))
    one_node = os.environ.get("GROUP_WORLD_SIZE") == "1"
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if one_node else "0"
    return PrefixStore(f"gristmill/{attempt}/{corner}", store), rank, world


def let_the_watchdog_judge() -> None:
    """Collectives of all groups wait longer than it is ever told to be patient.

    torch's own ten minutes (NCCL; gloo: thirty) would end ranks that rightly wait, while rank 0 probes or all restore, and
    would be over before the watchdog has found out who stands still.
    """
    for group in list(_world.pg_map):
        dist.set_timeout(timedelta(hours=25), group)


def end_anyway(error: BaseException, seconds: float = 300.0) -> None:
    """See to it that this process ends after an error: what it asked of NCCL and others never answer keeps a GPU waiting."""
    code = getattr(error, "code", 2 if isinstance(error, GristmillError) else 1)
    timer = threading.Timer(seconds, os._exit, [code if isinstance(code, int) else 1])
    timer.daemon = True
    timer.start()


def leave() -> None:
    """Leave the group so that the interpreter can end; together with the others, unless an exception is on its way.

    The caller has dropped its engine first. A gloo thread that still holds the last collective's tensors while
    Python finalises aborts the process (exit -6), hence: collect, destroy, and a moment for the threads to end.
    """
    if dist.is_initialized():
        gc.collect()
        # Where something went wrong, nobody may be left to meet; and who is alone need not make a communicator to leave.
        if sys.exc_info()[0] is None and dist.get_world_size() > 1:
            gpu = [torch.cuda.current_device()] if dist.get_backend() == "nccl" else None
            dist.barrier(device_ids=gpu, timeout=timedelta(hours=1))  # rank 0 may have a last probe to finish
        quiet_deepspeed().comm.destroy_process_group()  # torch's own would leave DeepSpeed with groups that are gone
        time.sleep(0.1)
