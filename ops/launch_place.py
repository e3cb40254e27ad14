"""Where this process stands in its group, worked out from what a launcher left in the environment.

torchrun and PyTorch's operators say everything in variables of their own; DeepSpeed's launcher, Slurm, OpenMPI and
Kubernetes say the same under other names, or leave a part to be worked out: who is first, and at which port to meet. The
innermost launcher counts: torchrun inside a Slurm step, OpenMPI's daemons inside one. A batch script and an interactive
shell of Slurm are no step: what is started there by hand is one process. What is half said, or said twice and not
the same, is an error at once: left to itself, a group that counts wrongly waits for half an hour.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

from ..shards.errors import GristmillError

PORT = 29500  # torch's own choice
SPECIAL = 0xFFFFFFF0  # from here on Slurm's step ids are no steps of srun: batch, interactive, extern
BY_HAND = "or unset it to train in one process; `torchrun --nproc-per-node N -m gristmill.ops.cli ...` sets all of them"


class LaunchError(GristmillError):
    """The group of processes could not be formed."""


@dataclass(frozen=True)
class Place:
    """Rank of `world` processes, local rank of `local_world` on this host; where all meet ("" and 0: nowhere, alone)."""

    rank: int
    world: int
    local_rank: int
    local_world: int
    address: str
    port: int
    launcher: str

    def export(self, environ: MutableMapping[str, str]) -> None:
        """Say the same the way torchrun says it, which is what everything else reads."""
        environ["LOCAL_RANK"] = str(self.local_rank)
        if self.address:
            environ.update({
                "RANK": str(self.rank), "WORLD_SIZE": str(self.world), "LOCAL_WORLD_SIZE": str(self.local_world),
                "MASTER_ADDR": self.address, "MASTER_PORT": str(self.port),
            })  # fmt: skip


def environment(environ: Mapping[str, str]) -> Place:
    """The place that the environment gives this process; a group of one where it names no group.

    Raises LaunchError, which names the variables, where half of them are set, contradict each other or are no numbers.
    """
    variables = Variables(environ)
    if "RANK" in variables and "WORLD_SIZE" in variables:
        place = _named(variables)
        if place.launcher == "environment":
            _agree(place, [other for other in (_openmpi(variables), _slurm(variables)) if other])
    elif place := _openmpi(variables) or _slurm(variables):  # what an outer launcher left is nobody's business
        for name, value in (("WORLD_SIZE", place.world), ("RANK", place.rank)):
            if name in variables and variables.number(name) != value:
                raise LaunchError(
                    f"{name} is {variables[name]}, but {place.launcher} says {value}: unset {name}, the launcher knows best"
                )
    elif "RANK" in variables or "WORLD_SIZE" in variables:
        here, missing = ("RANK", "WORLD_SIZE") if "RANK" in variables else ("WORLD_SIZE", "RANK")
        raise LaunchError(f"{here} is set and {missing} is not: set both, {BY_HAND}")
    else:
        place = _indexed_job(variables) or _trainjob(variables)
    if place is None or (place.world == 1 and not place.address):
        if variables.number("LOCAL_RANK", 0) and place is None:
            raise LaunchError(
                f"LOCAL_RANK is {variables['LOCAL_RANK']}, but RANK and WORLD_SIZE are not set: set both, {BY_HAND}"
            )
        return Place(0, 1, 0, 1, "", 0, place.launcher if place else "python")
    return _sound(place)


class Variables(dict[str, str]):
    """The environment without variables that are set to nothing, and their values as numbers."""

    def __init__(self, environ: Mapping[str, str]):
        super().__init__({name: value.strip() for name, value in environ.items() if value.strip()})

    def number(self, name: str, otherwise: int | None = None) -> int:
        if name not in self:
            if otherwise is None:
                raise LaunchError(
                    f"{name} is not set, although its launcher sets it: start the processes by that launcher"
                )
            return otherwise
        if not re.fullmatch(r"\d+", self[name]):
            raise LaunchError(f"{name} is {self[name]!r}, which is no number from 0 on")
        return int(self[name])


def _named(variables: Variables) -> Place:
    """torchrun, DeepSpeed's launcher, PyTorch's operators, or somebody's own: RANK and WORLD_SIZE."""
    rank, world = variables.number("RANK"), variables.number("WORLD_SIZE")
    launcher = "environment"
    if "TORCHELASTIC_RUN_ID" in variables:
        launcher = "torchrun"
    elif (
        "CROSS_RANK" in variables and "LOCAL_SIZE" in variables
    ):  # DeepSpeed's name for what torchrun calls LOCAL_WORLD_SIZE
        launcher = "deepspeed"
        variables.setdefault("LOCAL_WORLD_SIZE", variables["LOCAL_SIZE"])
    if "LOCAL_RANK" in variables and "LOCAL_WORLD_SIZE" not in variables and world > 1:
        raise LaunchError(
            "LOCAL_RANK is set and LOCAL_WORLD_SIZE is not: it is the number of processes on this host, which share its "
            "cores and caches"
        )
    address, port = variables.get("MASTER_ADDR", ""), variables.number("MASTER_PORT", 0)
    if bool(address) != bool(port) or (world > 1 and not address):
        missing = "MASTER_PORT" if address else "MASTER_ADDR"
        raise LaunchError(
            f"RANK and WORLD_SIZE are set and {missing} is not: MASTER_ADDR and MASTER_PORT are rank 0's host and a free port "
            "there, the same for all processes"
        )
    local = variables.number("LOCAL_RANK", 0), variables.number("LOCAL_WORLD_SIZE", 1)
    return Place(rank, world, *local, address, port, launcher)


def _openmpi(variables: Variables) -> Place | None:
    if "OMPI_COMM_WORLD_SIZE" not in variables:
        return None
    world, local_world = variables.number("OMPI_COMM_WORLD_SIZE"), variables.number("OMPI_COMM_WORLD_LOCAL_SIZE")
    address = variables.get("MASTER_ADDR", "127.0.0.1" if world == local_world and world > 1 else "")
    if world > 1 and not address:
        raise LaunchError("mpirun starts processes on several hosts: name rank 0's by `mpirun -x MASTER_ADDR=HOST ...`")
    job = variables.get("PMIX_NAMESPACE", variables.get("OMPI_MCA_ess_base_jobid", ""))
    return Place(
        variables.number("OMPI_COMM_WORLD_RANK"), world, variables.number("OMPI_COMM_WORLD_LOCAL_RANK"), local_world,
        address, variables.number("MASTER_PORT", _port(zlib.crc32(job.encode()))), "openmpi",
    )  # fmt: skip


def _slurm(variables: Variables) -> Place | None:
    """A task of a step that srun started. The first of the step's nodes has task 0, and the job's number gives the port."""
    step = variables.get("SLURM_STEP_ID", "")
    if not step.isdecimal() or int(step) >= SPECIAL:
        return None
    world = variables.number("SLURM_STEP_NUM_TASKS", variables.number("SLURM_NTASKS", 1))
    if world == 1:
        return Place(0, 1, 0, 1, "", 0, "slurm")
    nodes = variables.get("SLURM_STEP_NODELIST") or variables.get("SLURM_JOB_NODELIST", "")
    address = variables.get("MASTER_ADDR") or first_host(nodes)
    if not address:
        raise LaunchError("SLURM_STEP_NODELIST is not set, so that nobody knows the first node: set MASTER_ADDR to it")
    tasks = tasks_per_node(variables.get("SLURM_STEP_TASKS_PER_NODE") or variables.get("SLURM_TASKS_PER_NODE", ""))
    node = variables.number("SLURM_NODEID", 0)
    if node >= len(tasks):
        raise LaunchError(
            f"SLURM_NODEID is {node}, but SLURM_STEP_TASKS_PER_NODE counts the tasks of {len(tasks)} nodes"
        )
    port = variables.number("MASTER_PORT", _port(variables.number("SLURM_JOB_ID") * 7 + int(step)))
    local = variables.number("SLURM_LOCALID"), tasks[node]
    return Place(variables.number("SLURM_PROCID"), world, *local, address, port, "slurm")


def _indexed_job(variables: Variables) -> Place | None:
    """One process a pod of a Kubernetes Job (a JobSet's, too) with `completionMode: Indexed` and a headless service.

    Such pods are called JOB-INDEX; the variables that our manifests set name their number and the service.
    """
    ours = [name for name in ("GRISTMILL_NODES", "GRISTMILL_SERVICE") if name in variables]
    if not ours:
        return None
    needed = ["GRISTMILL_NODES", "JOB_COMPLETION_INDEX"]
    if "MASTER_ADDR" not in variables:  # which is worked out of these, then
        needed += ["GRISTMILL_SERVICE", "HOSTNAME"]
    for name in needed:
        if name not in variables:
            raise LaunchError(
                f"{name} is not set, but {' or '.join(ours)} is: a Job with completionMode Indexed sets "
                "JOB_COMPLETION_INDEX, and its manifest GRISTMILL_NODES and GRISTMILL_SERVICE (ops/deploy/kubernetes)"
            )
    rank, world = variables.number("JOB_COMPLETION_INDEX"), variables.number("GRISTMILL_NODES")
    address = variables.get("MASTER_ADDR") or _first_pod(variables["HOSTNAME"], rank, variables["GRISTMILL_SERVICE"])
    return Place(rank, world, 0, 1, address if world > 1 else "", variables.number("MASTER_PORT", PORT), "kubernetes")


def _first_pod(host: str, rank: int, service: str) -> str:
    name, _, index = host.partition(".")[0].rpartition("-")
    if index != str(rank):
        raise LaunchError(
            f"HOSTNAME is {host}, which does not end in -{rank} as JOB_COMPLETION_INDEX says: set MASTER_ADDR to the "
            "name or address of the pod with index 0"
        )
    return f"{name}-0.{service}"


def _trainjob(variables: Variables) -> Place | None:
    """One process a pod of a Kubeflow TrainJob, which speaks to torchrun by PET_*; with more a pod, torchrun is needed."""
    nodes, processes = variables.get("PET_NNODES", "1"), variables.get("PET_NPROC_PER_NODE", "1")
    if nodes == "1" or "PET_MASTER_ADDR" not in variables:
        return None
    if processes != "1" or not nodes.isdecimal():
        raise LaunchError(
            f"PET_NNODES is {nodes} and PET_NPROC_PER_NODE {processes}: start `torchrun -m gristmill.ops.cli ...`, which reads them"
        )
    where = variables["PET_MASTER_ADDR"], variables.number("PET_MASTER_PORT", PORT)
    return Place(variables.number("PET_NODE_RANK"), int(nodes), 0, 1, *where, "trainjob")


def _agree(place: Place, others: list[Place]) -> None:
    """RANK and WORLD_SIZE by hand against what mpirun or srun says: exported for all tasks alike, they are wrong in most."""
    for other in others:
        if place.world < other.world or (place.world == other.world and place.rank != other.rank):
            raise LaunchError(
                f"RANK and WORLD_SIZE say {place.rank} of {place.world}, {other.launcher} says {other.rank} of {other.world}: "
                "unset RANK and WORLD_SIZE, the launcher knows best"
            )


def _sound(place: Place) -> Place:
    who = "RANK and WORLD_SIZE have" if place.launcher == "environment" else f"{place.launcher} has"
    for what, value, of, most in (
        ("rank", place.rank, "world size", place.world),
        ("local rank", place.local_rank, "number of processes on this host", place.local_world),
    ):
        if value >= most:
            raise LaunchError(f"the {what} {value} is not below the {of} {most}, as {who} them")
    if place.local_world > place.world:
        raise LaunchError(
            f"{place.local_world} processes on this host are more than the {place.world} of all, as {who} it"
        )
    if not 0 < place.port < 2**16:
        raise LaunchError(
            f"the port {place.port} is none from 1 to 65535: set MASTER_PORT to one that is free on {place.address}"
        )
    return place


def _port(number: int) -> int:
    """Below the ports that systems give out by themselves, and another one for the next job on the same host."""
    return 12000 + number % 20000


def first_host(nodes: str) -> str:
    """The first of Slurm's list of hosts: gpu[003-007,9],cpu1 -> gpu003."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes)
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first.group()) if first else ""


def tasks_per_node(tasks: str) -> list[int]:
    """Slurm's numbers of tasks by node: 4(x2),1 -> [4, 4, 1]."""
    found: list[int] = []
    for part in filter(None, tasks.split(",")):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if not match:
            raise LaunchError(f"SLURM_STEP_TASKS_PER_NODE is {tasks!r}, which cannot be read")
        found += [int(match[1])] * int(match[2] or 1)
    return found
