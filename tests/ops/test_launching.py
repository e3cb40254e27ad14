"""Where a process stands among others, and on which GPU, where launchers and schedulers say it in two ways at once.

Places by launcher, copied from real ones: tests/distributed/test_launch.py.
"""

import os
import subprocess
import sys
import threading
from datetime import timedelta

import pytest
import torch
from gristmill.ops import launch
from gristmill.ops.launch import card_of, join, leave, let_the_watchdog_judge, meet, seeing, until_known
from gristmill.ops.launch_place import LaunchError, environment
from gristmill.ops.lost import _short
from torch.distributed.distributed_c10d import _world

from ..servers import kept_ports
from ..waiting import wait_for

TORCHRUN = {
    "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "gpu003",
    "MASTER_PORT": "29500", "TORCHELASTIC_RUN_ID": "none",
}  # fmt: skip
OPENMPI = {
    "OMPI_COMM_WORLD_RANK": "5", "OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4", "MASTER_ADDR": "gpu003",
}  # fmt: skip
BROKEN = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "two"}
POD = {"JOB_COMPLETION_INDEX": "2", "HOSTNAME": "somebody-elses-name", "GRISTMILL_NODES": "4", "GRISTMILL_SERVICE": "s"}


@pytest.mark.parametrize(("inner", "launcher"), [(TORCHRUN, "torchrun"), (OPENMPI, "openmpi")])
def test_what_an_outer_launcher_left_hurts_nobody(inner: dict[str, str], launcher: str):
    place = environment(inner | BROKEN)
    assert (place.rank, place.world, place.launcher) == (5, 8, launcher)
    with pytest.raises(LaunchError, match="SLURM_STEP_NUM_TASKS is 'two'"):
        environment(BROKEN)


def test_the_remedy_for_a_pod_of_another_name_is_one():
    with pytest.raises(LaunchError, match="set MASTER_ADDR to the name or address of the pod with index 0"):
        environment(POD)
    place = environment(POD | {"MASTER_ADDR": "10.0.0.7"})
    assert (place.rank, place.world, place.address, place.launcher) == (2, 4, "10.0.0.7", "kubernetes")


def test_a_processs_gpu():
    assert [card_of(rank, 8) for rank in (0, 3, 7)] == [0, 3, 7]
    assert [card_of(rank, 1) for rank in (0, 3, 7)] == [0, 0, 0]  # the scheduler shows each its own
    with pytest.raises(LaunchError, match="local rank 2 has no GPU: 2 are there"):
        card_of(2, 2)


def test_what_deepspeed_is_told_of_it(monkeypatch: pytest.MonkeyPatch):
    names = "LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"
    monkeypatch.setenv(names[0], "3")
    monkeypatch.delenv(names[1], raising=False)

    @seeing(torch.device("cuda", 0))
    def inside() -> list[str | None]:
        told.append([os.environ.get(name) for name in names])
        raise ZeroDivisionError

    told: list[list[str | None]] = []
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            inside()
    assert told == [["0", None]] * 2
    assert [os.environ.get(name) for name in names] == ["3", None]
    with seeing(torch.device("cpu")):
        assert os.environ["LOCAL_RANK"] == "3"


NOBODY = "no-such-host.invalid"  # RFC 2606: never a name


def test_a_name_that_nobody_knows_is_said(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    for address in ("127.0.0.1", "::1", "localhost"):
        until_known(address, 0.0)
    for address in (NOBODY, "a" * 70 + ".example", "two words"):
        with pytest.raises(LaunchError) as error:
            until_known(address, 0.0)
        assert f"MASTER_ADDR {address} is no name that this host knows (" in str(error.value)
    monkeypatch.setattr(launch, "PATIENCE", 0.0)
    with pytest.raises(LaunchError, match=f"MASTER_ADDR {NOBODY} is no name that this host knows"):
        until_known(NOBODY)


def test_a_pods_name_may_come_late(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    """In Kubernetes it is waited for, beyond what is the end elsewhere, and that is said once."""
    monkeypatch.setattr(launch, "PATIENCE", 0.0)
    with pytest.raises(LaunchError, match="is no name"):
        until_known(NOBODY, 2.5)
    (line,) = caplog.messages
    assert line.startswith(f"MASTER_ADDR {NOBODY} is no name that this host knows yet (")
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    waiting = threading.Thread(target=until_known, args=(NOBODY,), daemon=True)
    waiting.start()
    wait_for(lambda: len(caplog.messages) == 2, 60.0)
    assert waiting.is_alive()


def test_every_attempt_has_a_corner_of_its_own(monkeypatch: pytest.MonkeyPatch):
    """torchrun keeps one store over its restarts on one node; over several nodes their counts are not the same."""

    def there(nodes: int, attempt: int, corner: str) -> bool:
        monkeypatch.setenv("GROUP_WORLD_SIZE", str(nodes))
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(attempt))
        store, rank, world = meet(corner)
        assert (rank, world) == (0, 1)
        found = store.check(["left"])
        store.set("left", "by an earlier one")
        stores.append(store)
        return found

    stores = []
    with kept_ports(1) as [port]:
        about = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        for name, value in about.items():
            monkeypatch.setenv(name, value)
        assert [there(1, 0, "a"), there(1, 0, "a"), there(1, 1, "a"), there(1, 0, "b")] == [False, True, False, False]
        assert [there(2, 5, "c"), there(2, 7, "c")] == [False, True]


def test_collectives_wait_as_long_as_the_watchdog_lets_them():
    join()
    try:
        (group,) = list(_world.pg_map)
        backend = group._get_backend(torch.device("cpu"))
        assert backend.options._timeout < timedelta(hours=1)
        let_the_watchdog_judge()
        assert backend.options._timeout > timedelta(hours=24)  # a pass over all data may take a day
    finally:
        leave()


@pytest.mark.parametrize(
    ("error", "code"),
    [("ValueError()", 1), ("LaunchError('no')", 2), ("LostRankError('gone')", 76), ("SystemExit('said')", 1)],
)
def test_who_cannot_leave_after_an_error_ends_all_the_same(error: str, code: int):
    """With the code that it would have had."""
    program = (
        "import time\nfrom gristmill.ops.launch import LaunchError, end_anyway\nfrom gristmill.ops.lost import LostRankError\n"
        f"end_anyway({error}, 0.1)\ntime.sleep(60)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False, timeout=120).returncode == code


def test_a_reason_is_the_last_thing_that_nccl_says():
    told = (
        "NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.cpp:93, invalid usage (run with NCCL_DEBUG=WARN for details), "
        "NCCL version 2.30.7\nncclInvalidUsage: This usually reflects invalid usage of NCCL library.\nLast error:\n"
        "Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 65000"
    )
    assert _short(RuntimeError(told)) == "Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 65000"
    assert _short(RuntimeError("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer. Try again")) == (
        "Connection closed by peer"
    )
    assert _short(RuntimeError()) == "RuntimeError"
