"""Checkpoints: complete or absent, damage seen, the last good one survives a full disk and a kill."""

import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gristmill.ops.checkpoint import Checkpoint, CheckpointError, complete, damage, load_newest, save


def example(value: float = 1.0, size: int = 1000) -> Checkpoint:
    return Checkpoint({"student": {"w": torch.full((size,), value)}, "empty": {}}, {"cursor": "{}", "note": [1, 2]})


def test_round_trip_and_keep(tmp_path: Path):
    for position in (64, 128, 192):
        save(tmp_path, position, example(position), keep=2)
    assert [path.name for path in complete(tmp_path)] == ["000000000192", "000000000128"]
    checkpoint, told = load_newest(tmp_path)
    assert checkpoint is not None
    assert told == []
    assert torch.equal(checkpoint.tensors["student"]["w"], torch.full((1000,), 192.0))
    assert checkpoint.tensors["empty"] == {}
    assert checkpoint.state["note"] == [1, 2]


def test_nothing_there(tmp_path: Path):
    assert load_newest(tmp_path / "absent") == (None, [])


@pytest.mark.parametrize("fault", ["zeroed bytes", "cut", "missing file", "cursor edited", "no state"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path, fault: str):
    save(tmp_path, 64, example(1), keep=3)
    newest = save(tmp_path, 128, example(2), keep=3)
    file = newest / "student.safetensors"
    if fault == "zeroed bytes":
        with file.open("r+b") as handle:
            handle.seek(file.stat().st_size - 512)
            handle.write(bytes(64))
    elif fault == "cut":
        os.truncate(file, file.stat().st_size - 7)
    elif fault == "missing file":
        file.unlink()
    elif fault == "cursor edited":
        state = newest / "state.json"
        state.write_text(state.read_text().replace('"note"', '"nope"'))
    else:
        (newest / "state.digest").unlink()
    assert list(damage(newest))
    checkpoint, told = load_newest(tmp_path)
    assert checkpoint is not None
    assert checkpoint.state["position"] == 64
    assert "passed over" in told[0]


def test_all_damaged_is_an_error_with_a_remedy(tmp_path: Path):
    path = save(tmp_path, 64, example(), keep=1)
    (path / "student.safetensors").unlink()
    with pytest.raises(CheckpointError, match="Remove"):
        load_newest(tmp_path)


def test_no_pickle_is_executed(tmp_path: Path):
    path = save(tmp_path, 64, example(), keep=1)
    marker = tmp_path / "executed"

    class Bomb:
        def __reduce__(self):
            return os.system, (f"touch {marker}",)

    (path / "student.safetensors").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(CheckpointError):
        load_newest(tmp_path)
    assert not marker.exists()


def limited(code: str, bytes_at_most: int) -> subprocess.CompletedProcess[str]:
    """Run code in a process whose files cannot grow beyond a limit: a full disk for everyone, root or not."""
    prelude = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({bytes_at_most}, {bytes_at_most}))\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
    )
    return subprocess.run([sys.executable, "-c", prelude + code], capture_output=True, text=True)


def test_a_full_disk_leaves_the_last_good_one(tmp_path: Path):
    save(tmp_path, 64, example(1), keep=1)
    answer = limited(
        "from test_checkpoint import example, save, CheckpointError\nfrom pathlib import Path\n"
        f"try: save(Path({str(tmp_path)!r}), 128, example(2, size=1_000_000), keep=1)\n"
        "except CheckpointError as error: print(error)",
        100_000,
    )
    assert "could not write the checkpoint" in answer.stdout, answer.stderr
    assert "make room" in answer.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000000000064"]
    checkpoint, _ = load_newest(tmp_path)
    assert checkpoint is not None


def test_killed_while_writing(tmp_path: Path):
    save(tmp_path, 64, example(1), keep=1)
    code = (
        "import os, signal\nfrom pathlib import Path\nimport gristmill.ops.checkpoint as c\n"
        "import torch\n"
        "def die(path): os.kill(os.getpid(), signal.SIGKILL)\n"
        "c._sync = die\n"  # after the files, before the rename
        f"c.save(Path({str(tmp_path)!r}), 128, c.Checkpoint({{'s': {{'w': torch.ones(9)}}}}, {{}}), 1)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL
    assert any(path.name.startswith(".writing") for path in tmp_path.iterdir())
    checkpoint, told = load_newest(tmp_path)
    assert checkpoint is not None
    assert (checkpoint.state["position"], told) == (64, [])
    save(tmp_path, 192, example(3), keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["000000000192"]
