"""What all tests share: marks that skip with a reason, and the rule that an unknown reason fails the run."""

import os
import re
import shutil

# One thread: small operations shared between cores stall whenever another process has one of them.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

# Every reason for which a test may be skipped. A skip with any other reason fails the run.
KNOWN_REASONS = [
    r"needs a GPU",
    r"needs [\w-]+: `make system` installs it",
    r"a small disk cannot be mounted here: .*",  # tmpfs wants root; the limit on file sizes is tested anyway
]
PROGRAMS = {"prometheus", "promtool", "chromium", "ip"}

_unknown: list[str] = []


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "program(name): needs this program of the system; `make system` installs it")


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


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.skipped:
        reason = str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr)
        reason = reason.removeprefix("Skipped: ")
        if not any(re.fullmatch(known, reason) for known in KNOWN_REASONS):
            _unknown.append(f"{report.nodeid}: {reason}")


def pytest_sessionfinish(session: pytest.Session) -> None:
    if _unknown and session.exitstatus == 0:
        session.exitstatus = 1


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for line in _unknown:
        terminalreporter.write_line(f"skipped for a reason that tests/conftest.py does not know: {line}", red=True)
