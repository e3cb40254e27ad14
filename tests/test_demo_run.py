"""The whole way, as a user walks it: `gristmill demo`, killed with -9 and started again, watched, and with mistakes."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from gristmill.ops.checkpoint import Saved, newest
from gristmill.ops.runlog import read_log
from gristmill.ops.stores import open_store
from PIL import Image

from .disks import small_disk

GRISTMILL = Path(sys.executable).parent / "gristmill"
SHORT = ["images=640", "checkpoint.every=128", "probes.at=[0.0, 1.0]", "probes.images=256", "metrics.port=0"]
pytestmark = pytest.mark.slow


def start(*arguments: object) -> subprocess.Popen[str]:
    environment = {key: value for key, value in os.environ.items() if key not in ("OMP_NUM_THREADS", "PATH")}
    return subprocess.Popen(
        [GRISTMILL, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # No activated environment, no compiler, no ninja: the console script alone has to do.
        env=environment | {"PATH": "/nonexistent"},
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def trace(folder: Path) -> list[dict]:
    """The steps of a run without their times."""
    return [
        {key: value for key, value in line.items() if key != "seconds"}
        for line in read_log(folder / "metrics.jsonl")
        if line["kind"] in ("step", "probe")
    ]


def last_checkpoint(folder: Path) -> Saved:
    """The newest one; all of its digests hold, and none was passed over."""
    saved, told = newest(open_store(folder / "checkpoints"))
    assert saved
    assert told == []
    return saved


def wait_for_position(folder: Path, position: int, process: subprocess.Popen[str]) -> None:
    for _ in range(1200):
        lines = read_log(folder / "metrics.jsonl")
        if any(line["kind"] == "step" and line["position"] >= position for line in lines):
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    raise AssertionError(f"no step at {position}")


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """An uninterrupted run: its folder and what it printed."""
    folder = tmp_path_factory.mktemp("demo") / "run"
    code, out, err = finish(start("demo", "--tiny", "--out", folder, *SHORT))
    assert code == 0, err
    return folder, out, err


def test_leaves_what_it_promises(demo: tuple[Path, str, str]):
    folder, out, err = demo
    assert {"recipe.yaml", "metrics.jsonl", "checkpoints", "report.html", "crops.npz", "neighbours.npz", "data"} <= {
        path.name for path in folder.iterdir()
    }
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["000000000512", "000000000640"]
    assert last_checkpoint(folder).position == 640
    steps = [line for line in trace(folder) if line["kind"] == "step"]
    assert [line["position"] for line in steps] == list(range(0, 640, 32))
    assert all(
        {"loss", "loss/instance", "loss/local_group", "loss/group", "lr", "momentum"} <= line.keys() for line in steps
    )
    assert [line["who"] for line in trace(folder) if line["kind"] == "probe"] == [
        "chance",
        "pixels",
        "random",
        "teacher",
    ]
    for word in ("coarse knn", "fine knn", "instance retrieval", "chance", "pixels", "random", "teacher after 640"):
        assert word in out
    assert "report:" in err
    page = (folder / "report.html").read_text()
    assert "<svg" in page
    assert "data:image" in page
    assert "http://" not in page.replace("http://www.w3.org", "")


def test_a_finished_demo_started_again_ends_at_once_with_the_same_table(demo: tuple[Path, str, str]):
    folder, out, _ = demo
    before = (folder / "metrics.jsonl").read_bytes()
    code, again, _ = finish(start("demo", "--tiny", "--out", folder, *SHORT))
    assert code == 0
    assert again == out
    assert (folder / "metrics.jsonl").read_bytes() == before


def test_killed_with_9_and_started_again_gives_the_same_trace(demo: tuple[Path, str, str], tmp_path: Path):
    folder, _, _ = demo
    run = tmp_path / "run"
    for position in (160, 384):  # between checkpoints, so that steps are taken again
        process = start("demo", "--tiny", "--out", run, *SHORT)
        wait_for_position(run, position, process)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    code, _, err = finish(start("demo", "--tiny", "--out", run, *SHORT))
    assert code == 0, err
    assert "going on from image" in err
    assert trace(run) == trace(folder)
    ours, theirs = last_checkpoint(run), last_checkpoint(folder)
    assert {"student", "teacher", "exp_avg", "exp_avg_sq"} <= set(theirs.groups())
    assert {"objectives", "buffers", "steps"} <= set(theirs.wholes())
    assert ours.digests == theirs.digests
    assert ours.state["cursor"] == theirs.state["cursor"]


def test_stopped_by_sigterm_it_saves_and_goes_on(demo: tuple[Path, str, str], tmp_path: Path):
    run = tmp_path / "run"
    process = start("demo", "--tiny", "--out", run, *SHORT)
    wait_for_position(run, 160, process)
    process.terminate()
    code, _, err = finish(process)
    assert code == 75
    assert "the same command goes on from there" in err
    position = last_checkpoint(run).position
    assert 160 < position < 640
    code, _, err = finish(start("demo", "--tiny", "--out", run, *SHORT))
    assert code == 0
    assert f"going on from image {position}" in err
    assert trace(run) == trace(demo[0])


def test_metrics_while_it_runs(tmp_path: Path):
    run = tmp_path / "run"
    process = start("demo", "--tiny", "--out", run, *SHORT)
    wait_for_position(run, 64, process)
    page = urllib.request.urlopen((run / "metrics.url").read_text().strip(), timeout=10).read().decode()
    status = subprocess.run([GRISTMILL, "status", run, "--json"], capture_output=True, text=True)
    process.kill()
    process.communicate()
    for name in ("gristmill_position_samples", "gristmill_loss", "gristmill_memory_fill_ratio", "gristmill_run_info"):
        assert f"\n{name}" in page
    assert 'objective="local_group"' in page
    assert status.returncode == 0, status.stderr
    assert json.loads(status.stdout)


def test_own_images_with_damage_among_them(demo: tuple[Path, str, str], tmp_path: Path):
    """Every tenth file is broken: skipped, counted, listed; labels come from the subfolders."""
    images = tmp_path / "images"
    source = sorted((demo[0] / "images").rglob("*.jpg"))[::4]
    for number, path in enumerate(source):
        target = images / path.parts[-4] / path.name.replace(".jpg", f"-{number}.jpg")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
        if number % 10 == 0:
            target.write_bytes(target.read_bytes()[:300])
    for number, kind in enumerate(("png", "webp")):
        pixels = np.random.Generator(np.random.Philox(number)).integers(0, 255, (70, 90, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(next(images.iterdir()) / f"own.{kind}")
    code, out, err = finish(start("demo", "--tiny", "--images", images, "--out", tmp_path / "run", *SHORT))
    assert code == 0, err
    broken = -(-len(source) // 10)
    assert f"{broken} files skipped" in err
    assert len((tmp_path / "run" / "data" / "skipped.tsv").read_text().splitlines()) >= broken
    assert f"{len(source) - broken + 2} images taken" in err
    assert "class knn" in out


def test_a_truncated_shard_stops_the_run_and_says_why(demo: tuple[Path, str, str], tmp_path: Path):
    data = tmp_path / "data"
    shutil.copytree(demo[0] / "data", data)
    shard = next((data / "train").rglob("*.tar"))
    os.truncate(shard, shard.stat().st_size // 2)
    arguments = ["train", "demo", "--tiny", "--out", tmp_path / "run", f"data={data / 'train'}", *SHORT[:2]]
    code, _, err = finish(start(*arguments, "probes.at=[]", "metrics.port=off"))
    assert code == 2
    for word in ("samples", "damaged", shard.name, "truncated", "gristmill verify"):
        assert word in err
    assert "Traceback" not in err
    verify = subprocess.run([GRISTMILL, "verify", data / "train"], capture_output=True, text=True)
    assert verify.returncode == 1
    assert shard.name in verify.stdout


def test_another_recipe_does_not_go_on_with_a_checkpoint(demo: tuple[Path, str, str]):
    before = sorted((path, path.stat().st_mtime_ns) for path in demo[0].rglob("*") if path.is_file())
    code, _, err = finish(start("demo", "--tiny", "--out", demo[0], *SHORT, "optimizer.lr=0.5", "seed=0"))
    assert code == 2
    assert "optimizer.lr" in err
    assert "0.5 now" in err
    assert "--out" in err
    after = sorted((path, path.stat().st_mtime_ns) for path in demo[0].rglob("*") if path.is_file())
    assert [path for path, _ in before] == [path for path, _ in after]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["demo", "--images", "{empty}", "--out", "{out}"], ["empty", ".jpg"]),
        (["demo", "--images", "{texts}", "--out", "{out}"], ["texts", ".jpg"]),
        (["demo", "--images", "{empty}/absent", "--out", "{out}"], ["absent"]),
        (["demo", "--out", "{texts}"], ["not empty", "--out"]),
        (["demo", "--out", "{out}", "optimizer.larning=1"], ["optimizer.larning", "unknown key"]),
        (["train", "demo", "--out", "{out}"], ["data", "gristmill ingest"]),
        (["train", "demo", "--out", "{out}", "data={empty}"], ["empty"]),
        (["eval", "{empty}"], ["empty", "recipe.yaml"]),
        (["status", "{empty}", "--once"], ["empty"]),
        (["verify", "{empty}"], ["empty"]),
    ],
)
def test_a_mistake_is_one_clear_error(arguments: list[str], words: list[str], tmp_path: Path):
    places = {name: tmp_path / name for name in ("empty", "texts", "out")}
    places["empty"].mkdir()
    places["texts"].mkdir()
    (places["texts"] / "notes.txt").write_text("no picture")
    code, out, err = finish(start(*(argument.format(**places) for argument in arguments)))
    assert code in (1, 2)
    for word in words:
        assert word in out + err
    assert "Traceback" not in err


@pytest.mark.parametrize("megabytes", [1, 6])
def test_a_full_disk_is_one_clear_error(tmp_path: Path, megabytes: int):
    """1 MB is full while drawing, 6 MB while training; with room made, the same command ends well."""
    disk = tmp_path / "disk"
    with small_disk(disk, f"{megabytes}m"):
        command = ["demo", "--tiny", "--out", disk / "run", *SHORT]
        code, _, err = finish(start(*command))
        assert code == 2, err
        assert "space" in err
        assert "make room" in err
        assert "Traceback" not in err
        assert not list(disk.rglob(".writing-*"))
        subprocess.run(["mount", "-o", "remount,size=200m", disk], check=True)
        code, out, err = finish(start(*command))
        assert code == 0, err
        assert "teacher after 640" in out


def test_a_taken_port_is_named_with_the_remedy(demo: tuple[Path, str, str], tmp_path: Path):
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        data = f"data={demo[0] / 'data' / 'train'}"
        code, _, err = finish(start("train", "demo", "--tiny", "--out", tmp_path / "run", data, f"metrics.port={port}"))
    assert code == 2
    assert str(port) in err
    assert "metrics.port=" in err
