"""Fixtures that the tests of reader, loader and what is built on them share."""

import pytest
from gristmill.shards.quarantine import Quarantine

from .pictures import ours, write_data


@pytest.fixture(autouse=True)
def _no_leaked_threads(monkeypatch):
    monkeypatch.setattr("gristmill.pipeline.reader._PATIENCE", 60.0)  # a thread that is only slow is not left behind
    assert not ours()
    yield
    assert not ours()


@pytest.fixture(autouse=True)
def _compiled(monkeypatch):
    """Readers use the compiled loop from the first batch on; test_share.py holds the plain one to it."""
    monkeypatch.setattr("gristmill.pipeline.reader._PLAIN", 1)


@pytest.fixture
def manifest(tmp_path):
    return write_data(tmp_path / "data")


@pytest.fixture
def quarantine(tmp_path):
    return Quarantine(tmp_path / "run" / "quarantine.jsonl")
