"""Places in a group, by launcher: what each leaves in the environment, copied from real ones, and what is half or wrong."""

import base64
import json
import os
from pathlib import Path
from typing import Any

import pytest
from gristmill.ops.launch_place import LaunchError, Place, environment, first_host, tasks_per_node
from hypothesis import given
from hypothesis import strategies as st

from ..workers import Workers

TORCHRUN = {
    "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "GROUP_RANK": "1", "GROUP_WORLD_SIZE": "2",
    "MASTER_ADDR": "gpu003", "MASTER_PORT": "29500", "TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_USE_AGENT_STORE": "True",
}  # fmt: skip
DEEPSPEED = {
    "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_SIZE": "4", "CROSS_RANK": "1", "CROSS_SIZE": "2",
    "MASTER_ADDR": "198.51.100.1", "MASTER_PORT": "29500",
}  # fmt: skip
# Slurm 22.05: of a batch script, and of a task of its step.
BATCH = {
    "SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "gpu[003-004]", "SLURM_NTASKS": "8", "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_TASKS_PER_NODE": "4(x2)", "SLURM_NPROCS": "8",
}  # fmt: skip
STEP = BATCH | {
    "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NODEID": "1", "SLURM_STEP_ID": "0", "SLURM_STEPID": "0",
    "SLURM_STEP_NODELIST": "gpu[003-004]", "SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
}  # fmt: skip
OPENMPI = {
    "OMPI_COMM_WORLD_RANK": "5", "OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4", "MASTER_ADDR": "gpu003", "PMIX_NAMESPACE": "prterun-gpu003-4711@1",
}  # fmt: skip
INDEXED = {
    "JOB_COMPLETION_INDEX": "2", "HOSTNAME": "first-node-0-2", "GRISTMILL_NODES": "4", "GRISTMILL_SERVICE": "first",
}  # fmt: skip
TRAINJOB = {
    "PET_NNODES": "4", "PET_NPROC_PER_NODE": "1", "PET_NODE_RANK": "2", "PET_MASTER_ADDR": "first-node-0-0.first",
    "PET_MASTER_PORT": "29400",
}  # fmt: skip
MPI_AT_HOME = OPENMPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "8", "OMPI_COMM_WORLD_LOCAL_RANK": "5", "MASTER_ADDR": ""}
UNEVEN = {"SLURM_STEP_NUM_TASKS": "7", "SLURM_STEP_TASKS_PER_NODE": "4,3"}
LAUNCH = """
import os, runpy, sys
os.environ.update(environment)
sys.argv[1:] = command[1:]
runpy.run_module(command[0], run_name="__main__", alter_sys=True)
"""  # as `python -m` does; what the launcher imports is there already
ALONE = (0, 1, 0, 1, "", 0)
SLURMS_PORT = 12000 + 4711 * 7 % 20000


@pytest.mark.parametrize(
    ("environ", "place"),
    [
        ({}, (*ALONE, "python")),
        ({"LOCAL_RANK": "0", "HOME": "/root", "MASTER_ADDR": "left-over"}, (*ALONE, "python")),
        (TORCHRUN, (5, 8, 1, 4, "gpu003", 29500, "torchrun")),
        (TORCHRUN | {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"},
         (0, 1, 0, 1, "gpu003", 29500, "torchrun")),
        (DEEPSPEED, (5, 8, 1, 4, "198.51.100.1", 29500, "deepspeed")),
        # One process a pod, as PyTorchJob has it; and by hand.
        ({"RANK": "2", "WORLD_SIZE": "3", "MASTER_ADDR": "job-master-0", "MASTER_PORT": "23456", "PET_NNODES": "3"},
         (2, 3, 0, 1, "job-master-0", 23456, "environment")),
        ({"RANK": "0", "WORLD_SIZE": "1"}, (*ALONE, "environment")),
        (STEP, (5, 8, 1, 4, "gpu003", SLURMS_PORT, "slurm")),
        (STEP | {"SLURM_STEP_ID": "1"}, (5, 8, 1, 4, "gpu003", SLURMS_PORT + 1, "slurm")),  # two steps at once
        (STEP | {"MASTER_ADDR": "10.0.0.3", "MASTER_PORT": "4000"}, (5, 8, 1, 4, "10.0.0.3", 4000, "slurm")),
        (STEP | UNEVEN, (5, 7, 1, 3, "gpu003", SLURMS_PORT, "slurm")),
        (STEP | {"WORLD_SIZE": "8"}, (5, 8, 1, 4, "gpu003", SLURMS_PORT, "slurm")),  # many batch scripts export it
        (STEP | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_TASKS_PER_NODE": "1"}, (*ALONE, "slurm")),
        # By hand inside a batch script, and in a shell that salloc opened as a step.
        (BATCH, (*ALONE, "python")),
        (BATCH | {"SLURM_STEP_ID": str(0xFFFFFFFA)}, (*ALONE, "python")),
        (OPENMPI, (5, 8, 1, 4, "gpu003", 13357, "openmpi")),
        (MPI_AT_HOME, (5, 8, 5, 8, "127.0.0.1", 13357, "openmpi")),
        (INDEXED, (2, 4, 0, 1, "first-node-0-0.first", 29500, "kubernetes")),
        (INDEXED | {"GRISTMILL_NODES": "1", "HOSTNAME": "first-node-0-0", "JOB_COMPLETION_INDEX": "0"},
         (*ALONE, "kubernetes")),
        ({"JOB_COMPLETION_INDEX": "2", "HOSTNAME": "sweep-2"}, (*ALONE, "python")),  # each index a run of its own
        (TRAINJOB, (2, 4, 0, 1, "first-node-0-0.first", 29400, "trainjob")),
        (TRAINJOB | {"PET_NNODES": "1"}, (*ALONE, "python")),
        # The innermost launcher counts.
        (STEP | {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"} | TORCHRUN,
         (5, 8, 1, 4, "gpu003", 29500, "torchrun")),
        (STEP | {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"} | DEEPSPEED,
         (5, 8, 1, 4, "198.51.100.1", 29500, "deepspeed")),
        (STEP | {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"} | OPENMPI,
         (5, 8, 1, 4, "gpu003", 13357, "openmpi")),
        (INDEXED | TRAINJOB | TORCHRUN, (5, 8, 1, 4, "gpu003", 29500, "torchrun")),
    ],
)  # fmt: skip
def test_the_place_that_a_launcher_gives(environ: dict[str, str], place: tuple[Any, ...]):
    found = environment(environ)
    assert found == Place(*place)
    again = dict(environ)
    found.export(again)
    second = environment(again)  # as a second `join` in the same process sees it
    assert (second.rank, second.world, second.local_rank, second.local_world) == place[:4]
    assert (second.address, second.port) == place[4:6]
    once = dict(again)
    second.export(again)
    assert again == once  # and a third


@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun"])
def test_the_place_that_a_real_launcher_gives(launcher: str, workers: Workers, tmp_path: Path):
    """Two processes, which leave the environment that they were given; Slurm's own are in test_slurm.py."""
    script = tmp_path / "place.py"
    script.write_text(
        "import json, os\n"
        f"with open(os.path.join({str(tmp_path)!r}, f'rank-{{os.environ[\"RANK\"]}}'), 'w') as file:\n"
        "    json.dump(dict(os.environ), file)\n"
    )
    hosts = base64.urlsafe_b64encode(json.dumps({"localhost": [0, 1]}).encode()).decode()
    alone = ["--master_addr=127.0.0.1", "--master_port=29999", "--no_local_rank"]
    command = {
        "deepspeed": ["deepspeed.launcher.launch", f"--world_info={hosts}", *alone],
        "torchrun": ["torch.distributed.run", "--standalone", "--nproc-per-node=2"],
    }[launcher]
    started = workers.start(LAUNCH, environment=dict(os.environ), command=[*command, str(script)])
    assert started.join() == 0, started.output()
    for rank in (0, 1):
        place = environment(json.loads((tmp_path / f"rank-{rank}").read_text()))
        assert (place.rank, place.world, place.local_rank, place.local_world) == (rank, 2, rank, 2)
        assert place.launcher == launcher


def without(environ: dict[str, str], *names: str) -> dict[str, str]:
    return {name: value for name, value in environ.items() if name not in names}


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        ({"WORLD_SIZE": "8"}, ("WORLD_SIZE is set and RANK is not", "unset it", "torchrun")),
        ({"RANK": "0"}, ("RANK is set and WORLD_SIZE is not", "unset it")),
        ({"LOCAL_RANK": "3"},
         ("LOCAL_RANK is 3, but RANK and WORLD_SIZE are not set: set both, or unset it to train in one process",)),
        (without(TORCHRUN, "MASTER_ADDR"), ("MASTER_ADDR is not", "rank 0's host")),
        (without(TORCHRUN, "MASTER_PORT"), ("MASTER_PORT is not",)),
        (without(TORCHRUN, "LOCAL_WORLD_SIZE"), ("LOCAL_WORLD_SIZE is not", "processes on this host")),
        (TORCHRUN | {"RANK": "8"}, ("rank 8 is not below the world size 8, as torchrun has them",)),
        ({"RANK": "3", "WORLD_SIZE": "2", "MASTER_ADDR": "gpu003", "MASTER_PORT": "4000"},
         ("the rank 3 is not below the world size 2, as RANK and WORLD_SIZE have them",)),
        (TORCHRUN | {"RANK": "-1"}, ("RANK is '-1', which is no number",)),
        (TORCHRUN | {"WORLD_SIZE": "eight"}, ("WORLD_SIZE is 'eight'",)),
        (TORCHRUN | {"LOCAL_RANK": "4"}, ("local rank 4 is not below",)),
        (TORCHRUN | {"RANK": "1", "WORLD_SIZE": "2"}, ("4 processes on this host are more than the 2",)),
        (TORCHRUN | {"MASTER_PORT": "70000"}, ("the port 70000", "gpu003")),
        # Exported by a batch script for all of its tasks alike.
        (STEP | {"RANK": "0", "WORLD_SIZE": "8", "MASTER_ADDR": "gpu003", "MASTER_PORT": "4000"},
         ("say 0 of 8, slurm says 5 of 8", "unset RANK and WORLD_SIZE")),
        (STEP | {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "gpu003", "MASTER_PORT": "4000"},
         ("say 0 of 2, slurm says 5 of 8",)),
        (STEP | {"WORLD_SIZE": "16"}, ("WORLD_SIZE is 16, but slurm says 8", "unset WORLD_SIZE")),
        (STEP | {"RANK": "0"}, ("RANK is 0, but slurm says 5",)),
        (without(STEP, "SLURM_PROCID"), ("SLURM_PROCID is not set", "its launcher sets it")),
        (without(STEP, "SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST"), ("SLURM_STEP_NODELIST", "set MASTER_ADDR")),
        (STEP | {"SLURM_NODEID": "2"}, ("SLURM_NODEID is 2", "2 nodes")),
        (STEP | {"SLURM_STEP_TASKS_PER_NODE": "4x2"}, ("'4x2', which cannot be read",)),
        (without(OPENMPI, "MASTER_ADDR"), ("mpirun -x MASTER_ADDR=HOST",)),
        (without(OPENMPI, "OMPI_COMM_WORLD_LOCAL_RANK"), ("OMPI_COMM_WORLD_LOCAL_RANK is not set",)),
        (without(INDEXED, "GRISTMILL_SERVICE"), ("GRISTMILL_SERVICE is not set, but GRISTMILL_NODES is",)),
        (without(INDEXED, "GRISTMILL_NODES"), ("GRISTMILL_NODES is not set, but GRISTMILL_SERVICE is",)),
        (without(INDEXED, "JOB_COMPLETION_INDEX"), ("JOB_COMPLETION_INDEX is not set", "Indexed")),
        (INDEXED | {"HOSTNAME": "first-node-0-3"}, ("does not end in -2",)),
        (INDEXED | {"GRISTMILL_NODES": "2"}, ("rank 2 is not below the world size 2",)),
        (TRAINJOB | {"PET_NPROC_PER_NODE": "8"}, ("PET_NPROC_PER_NODE 8", "start `torchrun")),
        (TRAINJOB | {"PET_NNODES": "1:4"}, ("PET_NNODES is 1:4", "start `torchrun")),
    ],
)  # fmt: skip
def test_what_is_half_or_wrong_is_said_with_its_remedy(environ: dict[str, str], words: tuple[str, ...]):
    with pytest.raises(LaunchError) as error:
        environment(environ)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu003", "gpu003"), ("gpu003,gpu004", "gpu003"), ("gpu[003-007,9],cpu1", "gpu003"), ("n[7,1-3]", "n7"),
        ("rack[1-2]node[04-08]", "rack1node04"), ("a-b[1-2].example.org", "a-b1.example.org"), ("", ""),
    ],
)  # fmt: skip
def test_the_first_of_slurms_hosts(nodes: str, first: str):
    assert first_host(nodes) == first


@given(st.lists(st.tuples(st.integers(1, 128), st.integers(1, 5)), min_size=1))
def test_slurms_numbers_of_tasks(runs: list[tuple[int, int]]):
    text = ",".join(f"{tasks}(x{nodes})" if nodes > 1 else str(tasks) for tasks, nodes in runs)
    assert tasks_per_node(text) == [tasks for tasks, nodes in runs for _ in range(nodes)]
    assert tasks_per_node("") == []


@given(st.integers(1, 2**32), st.integers(0, 50), st.integers(0, 7))
def test_slurms_ports_can_be_had_and_are_everybodys(job: int, step: int, node: int):
    """The same for all tasks, below the ports that systems hand out, another one for the next job and the next step."""
    ports = set()
    for number, part in ((job, step), (job + 1, step), (job, step + 1)):
        tasks = {"SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_TASKS_PER_NODE": "1(x8)", "SLURM_LOCALID": "0"}
        of = {"SLURM_JOB_ID": str(number), "SLURM_STEP_ID": str(part)} | tasks
        places = [environment(STEP | of | {"SLURM_PROCID": str(n), "SLURM_NODEID": str(n)}) for n in (0, node)]
        assert places[0].port == places[1].port
        assert 12000 <= places[0].port < 32000
        ports.add(places[0].port)
    assert len(ports) == 3
