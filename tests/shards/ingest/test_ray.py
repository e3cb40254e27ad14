"""The real Ray, as a cluster of two workers on this machine: the same bytes as local processes, and nothing left behind."""

import importlib.util
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from gristmill.shards.ingest import ingest

from ...workers import Workers
from .life import CONFIG
from .sets import scenes, tree

if importlib.util.find_spec("ray") is None:
    pytest.skip("needs ray: `pip install 'gristmill[ray]'` brings it", allow_module_level=True)


@pytest.fixture
def temporary() -> Iterator[Path]:
    """A folder with a short name: sockets of Ray's lie far down in it, and may have 107 characters."""
    folder = Path(tempfile.mkdtemp(prefix="r-"))
    yield folder
    shutil.rmtree(folder)


def rays(folder: Path) -> list[str]:
    """Command lines of processes that Ray started for this test, known by its temporary folder."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue
            if str(folder) in line and "ray" in line and int(entry.name) != os.getpid():
                found.append(line)
    return found


def gone(folder: Path) -> None:
    until = time.monotonic() + 30
    while left := rays(folder):
        assert time.monotonic() < until, left
        time.sleep(0.05)


DRIVER = """
import tempfile
tempfile.tempdir = temporary

import os
from pathlib import Path

from gristmill.shards.ingest import IngestError, ingest
from gristmill.shards.ingest.hook import Offered, ask
from gristmill.shards.ingest.pool import RayPool
from tests.shards.ingest.life import CONFIG

os.chdir(folder)
pool = RayPool(2, Path("lock"))
for call, arguments in ((ask, ("own_filter:few", [Offered(b"", "jpg", 1, 1, "here")] * 3)), (os.listdir, ("nowhere",))):
    try:
        pool.result(pool.submit(call, *arguments))
    except (IngestError, FileNotFoundError) as error:
        print(type(error).__name__, error.args, flush=True)
ingest(["in"], "whole", CONFIG, engine="ray")
print("whole", flush=True)
live("in", "killed", engine="ray", dies_at=11)
"""


def test_the_same_bytes_by_ray_and_after_its_driver_was_killed(
    tmp_path: Path, temporary: Path, workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One start of Ray, which takes its time: a worker's errors, an ingest, and one in whose middle the driver is killed."""
    monkeypatch.chdir(tmp_path)
    scenes(tmp_path / "in", 70)
    (tmp_path / "own_filter.py").write_text("def few(offered):\n    return [True]\n")
    driver = workers.start(DRIVER, folder=str(tmp_path), temporary=str(temporary))
    assert driver.join() == -9, driver.output()
    gone(temporary)
    said = driver.output().splitlines()
    assert said[0].startswith("IngestError ('filter own_filter:few gave 1 verdicts on 3 images")
    assert said[1] == "FileNotFoundError (2, 'No such file or directory')"
    assert said[2:] == ["whole", "begun"], "and Ray says nothing of its own"

    ingest(["in"], tmp_path / "calm", CONFIG, workers=1)
    assert tree(tmp_path / "whole") == tree(tmp_path / "calm")
    assert list((tmp_path / "killed" / ".ingest" / "000").glob("spool/*.ledger")), "units were done by Ray"
    assert not (tmp_path / "killed" / "ledger" / "000.json").exists()
    ingest(["in"], tmp_path / "killed", CONFIG, workers=1)  # by whom is no part of the request
    assert tree(tmp_path / "killed") == tree(tmp_path / "calm")
