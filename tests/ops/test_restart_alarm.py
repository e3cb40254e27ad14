"""Who is called when a restart fails before its first step: somebody, if there is work that nobody goes on with."""

import shutil
from pathlib import Path

import pytest
from gristmill.ops.bench.endings import TINY, tiny_data

from ..command import Command
from ..workers import Workers


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_data(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize("done", [False, True])
def test_a_restart_that_cannot_read_its_checkpoints_keeps_its_target(
    data: Path, workers: Workers, tmp_path: Path, done: bool
):
    """Prometheus finds nobody at the target that stays, and says so; where all was done there is nothing to say."""
    run = tmp_path / "run"
    small = ("images=32", "checkpoint.every=16", "metrics.port=0")
    given = ("train", "demo", "--out", run, *TINY, f"data={data}", *small)
    if done:
        assert Command(tmp_path, given, workers).finish()[0] == 0
    else:
        Command(tmp_path, given, workers, hold=16).kill()
    for file in run.glob("checkpoints/*/state.json"):
        file.write_text("{}")
    code, _, err = Command(tmp_path, given, workers).finish()
    assert code == 2
    assert "no checkpoint is readable" in err
    assert err.index("metrics: http://") < err.index("no checkpoint is readable"), "told before the restore began"
    assert bool(list((run / "targets").glob("*.json"))) == (not done)


def test_a_mistake_at_the_first_start_calls_nobody(data: Path, workers: Workers, tmp_path: Path):
    run = tmp_path / "run"
    given = ("train", "demo", "--out", run, *TINY, f"data={data}", "images=32", "metrics.port=0")
    (run / "checkpoints" / "000000000008").mkdir(parents=True)  # what somebody copied there, in part
    assert Command(tmp_path, given, workers).finish()[0] == 2
    assert not list((run / "targets").glob("*.json"))
    shutil.rmtree(run)
    code, _, err = Command(tmp_path, given, workers).finish()
    assert code == 0, err
    assert not list((run / "targets").glob("*.json"))
