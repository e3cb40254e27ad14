"""Each test here fills a row of the table of faults, and leaves nothing behind.

    pytest tests/faults --fault-table FILE     writes the table

Without that option a row must be the one in docs/faults.md, as far as chance and times have no part in it.
"""

from __future__ import annotations

import fcntl
import gc
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from gristmill.pipeline import loader as loader_module
from gristmill.shards.quarantine import Quarantine
from gristmill.shards.remote import client_for
from gristmill.shards.retry import RetryPolicy

from ..pipeline.pictures import open_files, ours
from .streams import SLOTS, Oracle, Slot, dali, load, plain, take, write_set
from .table import Row, documented, render

_rows: list[tuple[int, Row]] = []
QUICK = {"first_pause": 0.005, "longest_pause": 0.05, "connect_timeout": 1.0, "stall_timeout": 5.0}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fault-table", metavar="FILE", help="write the table of faults as Markdown")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "fault(name, varies=False): the row of the table of faults that this test fills")
    if config.getoption("--fault-table", default=None) and config.getoption("numprocesses", default=None):
        raise pytest.UsageError("--fault-table: a table is filled by one process; leave out -n")


def pytest_sessionfinish(session: pytest.Session) -> None:
    target = session.config.getoption("--fault-table", default=None)
    if target and _rows:
        Path(target).write_text(render([row for _, row in sorted(_rows, key=lambda pair: pair[0])]))


@pytest.fixture
def fault(request: pytest.FixtureRequest) -> Iterator[Row]:
    """This test's row."""
    mark = request.node.get_closest_marker("fault")
    row = Row(mark.args[0], **mark.kwargs)
    yield row
    assert row.total.slots, "nothing was counted"
    assert row.injected, "nothing was injected"
    _rows.append((request.session.items.index(request.node), row))
    if not row.varies and not request.config.getoption("--fault-table", default=None):
        assert documented().get(row.fault) == row.markdown(), "make docs/faults.md again, as it says there"


class Undisturbed:
    """The stream of the healthy data set by one executor, two epochs of it, and the oracle with the same executor."""

    def __init__(self, folder: Path, make) -> None:
        self.oracle = Oracle(make())
        with load(write_set(folder / "healthy"), Quarantine(folder / "none.jsonl"), make()) as loader:
            self.slots: list[Slot] = take(loader, SLOTS)
        assert not (folder / "none.jsonl").exists()


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    make = {"plain": plain, "dali": dali}
    return SimpleNamespace(**{name: Undisturbed(tmp_path_factory.mktemp(name), of) for name, of in make.items()})


@pytest.fixture
def quarantine(tmp_path: Path) -> Quarantine:
    return Quarantine(tmp_path / "run" / "quarantine.jsonl")


@pytest.fixture(autouse=True)
def _nothing_left(
    request: pytest.FixtureRequest, undisturbed: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """No thread, descriptor, lock or temporary file stays. Pauses between tries are set short here, else as always."""
    monkeypatch.setattr(loader_module, "RetryPolicy", partial(RetryPolicy, **QUICK))
    monkeypatch.setattr("gristmill.pipeline.reader._PATIENCE", 60.0)  # a thread that is only slow is not left behind
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    before = Counter(open_files())
    assert not ours()
    yield
    assert not ours()
    client_for.cache_clear()  # and with the clients their idle connections
    request.node.funcargs.clear()  # what pytest itself still holds, such as a manifest with its file of rows
    gc.collect()
    until = time.monotonic() + 20
    while (more := Counter(open_files()) - before) and time.monotonic() < until:  # a server's threads end by themselves
        time.sleep(0.02)
    assert not more
    assert not list((tmp_path / "temporary").iterdir())
    for path in tmp_path.rglob("*"):
        assert path.suffix != ".partial"
        if path.is_file():
            with path.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
