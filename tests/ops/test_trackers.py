"""TensorBoard and Weights & Biases, read back by their own packages: all that was logged, nothing twice, and never a reason to end."""

import importlib
import json
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from gristmill.ops.bench.endings import TINY, tiny_data
from gristmill.ops.recipe import RecipeError, load_recipe
from gristmill.ops.runlog import read_log
from gristmill.ops.trackers import LogConfig, TrackerError, check_trackers

from ..command import Command
from ..disks import small_disk
from ..workers import Workers

BATCH, STEPS, EVERY = 8, 10, 2


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_data(tmp_path_factory.mktemp("data"))


def command(data: Path, folder: Path, *more: str) -> tuple[object, ...]:
    small = ("probes.at=[0.4]", "probes.names=[knn]", "checkpoint.every=32", f"log.every={EVERY}")
    return ("train", "demo", "--out", folder, *TINY, f"data={data}", f"images={BATCH * STEPS}", *small, *more)


@pytest.fixture(scope="module")
def killed(data: Path, workers: Workers, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with both, killed with -9 between two checkpoints, and finished by the same command."""
    root = tmp_path_factory.mktemp("killed")
    more = ("log.tensorboard=true", "log.wandb={project: mills, mode: offline}", "log.crops=true")
    more += ("checkpoint.asynchronous=false",)  # beside training, a slow disk may hold it up beyond the kill
    given = command(data, root / "run", *more)
    Command(root, given, workers, hold=56).kill()
    code, _, err = Command(root, given, workers).finish()
    assert code == 0, err
    assert "going on from image 32" in err
    assert "warning" not in err
    return root / "run"


def logged(folder: Path) -> dict[str, dict[int, float]]:
    """What the run's own log has of what is sent: curves by name."""
    found: dict[str, dict[int, float]] = {}
    for line in read_log(folder / "metrics.jsonl"):
        if line["kind"] == "step" and line["position"] // BATCH % EVERY == 0:
            for name in ("loss", "loss/instance", "lr", "grad_norm"):
                found.setdefault(name, {})[line["position"]] = line[name]
            found.setdefault("seconds/forward", {})[line["position"]] = line["seconds"]["forward"]
        elif line["kind"] == "probe":
            found.setdefault(f"probe/{line['who']}/coarse_knn", {})[line["position"]] = line["coarse_knn"]
    return found


def test_tensorboard_holds_the_log(killed: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert len(list((killed / "tensorboard").iterdir())) == 2
    events = EventAccumulator(str(killed / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    for name, curve in logged(killed).items():
        there = events.Scalars(name)
        assert [event.step for event in there] == list(curve), f"{name}: a step twice, or none"
        assert [event.value for event in there] == pytest.approx(list(curve.values()), rel=1e-6)
    assert "probe/teacher/coarse_knn" in events.Tags()["scalars"]
    assert sorted(events.Tags()["images"]) == ["crops/global", "crops/local"]
    assert [image.step for image in events.Images("crops/global")] == [0]


def sent(folder: Path) -> tuple[set[str], list[dict[str, Any]]]:
    """Ids of the runs, and rows of their histories, of all offline runs under a folder."""
    from wandb.proto.wandb_internal_pb2 import Record

    ids, rows = set(), []
    for file in sorted(folder.glob("wandb/offline-run-*/run-*.wandb")):
        for found in records(file.read_bytes()):
            record = Record.FromString(found)
            if record.WhichOneof("record_type") == "run":
                ids.add(record.run.run_id)
            elif record.WhichOneof("record_type") == "history":
                items = record.history.item
                rows.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
    return ids, rows


def records(data: bytes) -> Iterator[bytes]:
    """Of a file as wandb-core writes it: LevelDB's log format in blocks of 32 KiB behind a header of seven bytes."""
    assert data[:4] == b":W&B"
    at, whole = 7, b""
    while at + 7 <= len(data):
        if (left := -at % 32768) and left < 7:
            at += left  # padding
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        whole += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part of one
            yield whole
            whole = b""


def test_wandb_goes_on_in_the_same_run_and_holds_no_step_twice(data: Path, workers: Workers, tmp_path: Path):
    """Stopped at image 64, whose checkpoint is then lost: the steps since image 32 are taken, but not sent, again."""
    given = command(data, tmp_path / "run", "log.wandb={project: mills, mode: offline}", "log.crops=true")
    first = Command(tmp_path, given, workers, hold=56)
    first.until_held()
    first.signal(signal.SIGTERM)
    first.go()
    assert first.finish()[0] == 75
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "000000000064")
    (second := tmp_path / "second").mkdir()
    code, _, err = Command(second, given, workers).finish()
    assert code == 0, err
    assert "going on from image 32" in err
    ids, rows = sent(tmp_path / "run")
    assert ids == {json.loads((tmp_path / "run" / "wandb.json").read_text())["id"]}
    for name, curve in logged(tmp_path / "run").items():
        there = [(row["_step"], row[name]) for row in rows if name in row]
        assert [step for step, _ in there] == list(curve), f"{name}: a step twice, or none"
        if not name.startswith("seconds/"):  # steps that were taken again took another time
            assert dict(there) == pytest.approx(curve), name
    assert sum("crops/global/path" in row for row in rows) == 1


def test_wandb_after_a_kill(killed: Path):
    """A part may be missing, nothing is there twice."""
    ids, rows = sent(killed)
    assert ids == {json.loads((killed / "wandb.json").read_text())["id"]}
    for name, curve in logged(killed).items():
        there = [row["_step"] for row in rows if name in row]
        assert max(Counter(there).values(), default=1) == 1, name
        assert set(there) <= set(curve), name
        assert max(curve) in there or name.startswith("probe"), name


def test_a_finished_run_started_again_adds_nothing(killed: Path, data: Path, workers: Workers, tmp_path: Path):
    before = sorted(path for path in killed.rglob("*") if "wandb" in str(path) or "tensorboard" in str(path))
    more = ("log.tensorboard=true", "log.wandb={project: mills, mode: offline}")
    code, _, err = Command(tmp_path, command(data, killed, *more), workers).finish()
    assert code == 0, err
    assert sorted(path for path in killed.rglob("*") if "wandb" in str(path) or "tensorboard" in str(path)) == before


def test_a_full_disk_costs_tensorboard_with_one_warning(data: Path, workers: Workers, tmp_path: Path):
    run = tmp_path / "run"
    run.mkdir()
    with small_disk(tmp_path / "disk", "16k") as disk:
        (run / "tensorboard").symlink_to(disk)
        (disk / "filler").write_bytes(bytes(8192))
        code, _, err = Command(tmp_path, command(data, run, "log.tensorboard=true", "log.every=1"), workers).finish()
        assert code == 0, err
        assert err.count("warning: TensorBoard gets nothing any more (OSError: [Errno 28] No space left") == 1, err
        assert "Traceback" not in err
    assert sum(line["kind"] == "step" for line in read_log(run / "metrics.jsonl")) == STEPS


def test_wandb_without_a_key_is_a_warning(data: Path, workers: Workers, tmp_path: Path):
    """Nobody is asked for a key in the middle of the night."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(tmp_path))
        forks = workers.start(
            "os.environ.update(HOME=home, WANDB_BASE_URL='http://127.0.0.1:9'); main(arguments, prog_name='gristmill')",
            home=str(tmp_path),
            arguments=list(map(str, command(data, tmp_path / "run", "log.wandb={project: mills}"))),
        )
    assert forks.join() == 0, forks.output()
    assert forks.output().count("warning: Weights & Biases gets nothing any more (UsageError: No API key") == 1


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_one_that_is_not_installed_is_an_error_before_anything_begins(name: str, monkeypatch: pytest.MonkeyPatch):
    asked = LogConfig.model_validate({name: True if name == "tensorboard" else {"project": "mills"}})
    check_trackers(asked)
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError):
        importlib.import_module(name)
    with pytest.raises(TrackerError, match=rf"log.{name}: {name} is not installed; `pip install {name}`"):
        check_trackers(asked)
    check_trackers(LogConfig())


def test_a_mistake_in_the_recipe():
    with pytest.raises(RecipeError, match=r"log\.wandb\.project"):
        load_recipe("demo", ["log.wandb={entity: me}"])
    with pytest.raises(RecipeError, match=r"log\.wandb\.api_key: unknown key"):
        load_recipe("demo", ["log.wandb={project: mills, api_key: abc}"])
