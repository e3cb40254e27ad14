"""The whole way, as a user walks it: `gristmill demo`, killed with -9 and started again, watched, and with mistakes.

Once by the console script alone, start to end, and once killed there; elsewhere the same command line runs in forks.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import urllib.request
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from gristmill.ops.checkpoint import Saved, newest
from gristmill.ops.runlog import read_log
from gristmill.ops.stores import open_store
from gristmill.shards.ingest import outcomes
from PIL import Image

from .command import Command, wait
from .disks import small_disk
from .workers import Workers

SHORT = ["images=640", "checkpoint.every=128", "probes.at=[0.0, 1.0]", "probes.images=256", "metrics.port=0"]
pytestmark = pytest.mark.slow


@pytest.fixture
def start(workers: Workers, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Command]:
    """start(*arguments, hold=None): the command in a fork."""
    return lambda *arguments, hold=None: Command(tmp_path_factory.mktemp("said"), arguments, workers, hold)


def begun(demo: tuple[Path, str, str], run: Path, *parts: str) -> Path:
    """A demo folder in which images are drawn already, and packed, if `parts` says so."""
    for name in parts or ("images", "data"):
        shutil.copytree(demo[0] / name, run / name)
    shutil.copy(demo[0] / "source.json", run)
    return run


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


def has_reached(folder: Path, position: int) -> bool:
    return any(line["kind"] == "step" and line["position"] >= position for line in read_log(folder / "metrics.jsonl"))


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """An uninterrupted run: its folder and what it printed."""
    folder = tmp_path_factory.mktemp("demo") / "run"
    code, out, err = Command(tmp_path_factory.mktemp("said"), ("demo", "--tiny", "--out", folder, *SHORT)).finish()
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


def test_a_finished_demo_started_again_ends_at_once_with_the_same_table(demo: tuple[Path, str, str], start):
    folder, out, _ = demo
    before = (folder / "metrics.jsonl").read_bytes()
    code, again, _ = start("demo", "--tiny", "--out", folder, *SHORT).finish()
    assert code == 0
    assert again == out
    assert (folder / "metrics.jsonl").read_bytes() == before


def test_killed_with_9_and_started_again_gives_the_same_trace(demo: tuple[Path, str, str], tmp_path: Path, start):
    """Between checkpoints, so that steps are taken again; once wherever the console script happens to be."""
    folder, _, _ = demo
    for attempt in range(5):  # a machine that held up this process only may let the run end first
        (said := tmp_path / f"said{attempt}").mkdir()
        run = tmp_path / f"run{attempt}"
        process = Command(said, ("demo", "--tiny", "--out", run, *SHORT))
        wait(process, lambda run=run: has_reached(run, 160))
        process.signal(signal.SIGKILL)
        if process.finish()[0] == -signal.SIGKILL and not has_reached(run, 416):
            break
    else:
        raise AssertionError("five times it ended before it was killed")
    start("demo", "--tiny", "--out", run, *SHORT, hold=448).kill()
    code, _, err = start("demo", "--tiny", "--out", run, *SHORT).finish()
    assert code == 0, err
    assert "going on from image 384" in err or "going on from image 256" in err  # written beside training
    assert trace(run) == trace(folder)
    ours, theirs = last_checkpoint(run), last_checkpoint(folder)
    assert {"student", "teacher", "exp_avg", "exp_avg_sq"} <= set(theirs.groups())
    assert {"objectives", "buffers", "steps"} <= set(theirs.wholes())
    assert ours.digests == theirs.digests
    assert ours.state["cursor"] == theirs.state["cursor"]


def test_killed_with_9_a_run_that_hides_patches_gives_the_same_bits(demo: tuple[Path, str, str], tmp_path: Path, start):
    """iBOT's way: a mask token among the weights, masks drawn from positions, two centres, patches shown at first."""
    own = ["objectives.instance=null", "objectives.local_group=null", "objectives.group={form: dino}", "batch=16"]
    own += ["objectives.patch={start: 0.2}", "objectives.add=sum", "student.drop_path=0.2", "student.depth=1"]
    own += ["images=480", "checkpoint.every=96", "probes.at=[]", "metrics.port=off", "student.prototypes=64"]

    def command(run: Path) -> list[object]:
        return ["train", "demo", "--tiny", "--out", run, f"data={demo[0] / 'data' / 'train'}", *own]

    straight, broken = tmp_path / "straight", tmp_path / "broken"
    code, _, err = start(*command(straight)).finish()
    assert code == 0, err
    start(*command(broken), hold=240).kill()  # between checkpoints, and after the first masks
    code, _, err = start(*command(broken)).finish()
    assert code == 0, err
    assert "going on from image 192" in err or "going on from image 96" in err  # written beside training

    steps = trace(straight)
    assert trace(broken) == steps
    assert {bool(line["patch/hidden_ratio"]) for line in steps if line["position"] < 96} == {False}
    assert len({line["patch/hidden_ratio"] for line in steps if line["position"] >= 96}) > 10
    ours, theirs = last_checkpoint(broken), last_checkpoint(straight)
    token = theirs.assembled("student")["backbone.mask_token"]
    assert token.abs().max() > 1e-5, "it was learned"
    assert theirs.assembled("exp_avg")["backbone.mask_token"].abs().max() > 0
    assert {"group.center", "patch.center"} <= set(theirs.whole("objectives"))
    assert ours.digests == theirs.digests
    assert ours.state["cursor"] == theirs.state["cursor"]


def test_stopped_by_sigterm_it_saves_and_goes_on(demo: tuple[Path, str, str], tmp_path: Path, start):
    run = begun(demo, tmp_path / "run")
    process = start("demo", "--tiny", "--out", run, *SHORT, hold=160)
    process.until_held()
    process.signal(signal.SIGTERM)
    process.go()
    code, _, err = process.finish()
    assert code == 75
    assert "the same command goes on from there" in err
    assert last_checkpoint(run).position == 192
    code, _, err = start("demo", "--tiny", "--out", run, *SHORT).finish()
    assert code == 0
    assert "going on from image 192" in err
    assert trace(run) == trace(demo[0])


def test_metrics_while_it_runs(demo: tuple[Path, str, str], tmp_path: Path, start):
    run = begun(demo, tmp_path / "run")
    process = start("demo", "--tiny", "--out", run, *SHORT, hold=96)
    process.until_held()
    page = urllib.request.urlopen((run / "metrics.url").read_text().strip(), timeout=60).read().decode()
    code, status, err = start("status", run, "--json").finish()
    process.kill()
    for name in ("gristmill_position_samples", "gristmill_loss", "gristmill_memory_fill_ratio", "gristmill_run_info"):
        assert f"\n{name}" in page
    assert 'objective="local_group"' in page
    assert code == 0, err
    assert json.loads(status)


def test_own_images_with_damage_among_them(demo: tuple[Path, str, str], tmp_path: Path, start):
    """Every tenth file is broken: left out, counted, in the ledger; labels come from the subfolders."""
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
    command = ["demo", "--tiny", "--images", images, "--out", tmp_path / "run", *SHORT, "images=64"]
    code, out, err = start(*command).finish()
    assert code == 0, err
    broken = -(-len(source) // 10)
    assert f"{broken} left out: broken" in err
    assert outcomes(tmp_path / "run" / "data") == {"kept": len(source) - broken + 2, "broken": broken}
    assert f"{len(source) - broken + 2} images taken" in err
    assert "class knn" in out


def test_a_truncated_shard_stops_the_run_and_says_why(demo: tuple[Path, str, str], tmp_path: Path, start):
    data = tmp_path / "data"
    shutil.copytree(demo[0] / "data", data)
    shard = next((data / "train").rglob("*.tar"))
    os.truncate(shard, shard.stat().st_size // 2)
    arguments = ["train", "demo", "--tiny", "--out", tmp_path / "run", f"data={data / 'train'}", *SHORT[:2]]
    code, _, err = start(*arguments, "probes.at=[]", "metrics.port=off").finish()
    assert code == 2
    for word in ("samples", "damaged", shard.name, "truncated", "gristmill verify"):
        assert word in err
    assert "Traceback" not in err
    code, out, _ = start("verify", data / "train").finish()
    assert code == 1
    assert shard.name in out


def test_another_recipe_does_not_go_on_with_a_checkpoint(demo: tuple[Path, str, str], start):
    before = sorted((path, path.stat().st_mtime_ns) for path in demo[0].rglob("*") if path.is_file())
    code, _, err = start("demo", "--tiny", "--out", demo[0], *SHORT, "optimizer.lr=0.5", "seed=0").finish()
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
def test_a_mistake_is_one_clear_error(arguments: list[str], words: list[str], tmp_path: Path, workers: Workers):
    places = {name: tmp_path / name for name in ("empty", "texts", "out")}
    places["empty"].mkdir()
    places["texts"].mkdir()
    (places["texts"] / "notes.txt").write_text("no picture")
    given = [argument.format(**places) for argument in arguments]
    process = workers.start("main(arguments, prog_name='gristmill')", arguments=given)
    code, said = process.join(), process.output()
    assert code in (1, 2), said
    for word in words:
        assert word in said
    assert "Traceback" not in said


@pytest.mark.parametrize("megabytes", [1, 6])
def test_a_full_disk_is_one_clear_error(demo: tuple[Path, str, str], tmp_path: Path, start, megabytes: int):
    """1 MB is full while drawing, 6 MB while packing; with room made, the same command ends well.

    While training: test_a_full_disk_costs_checkpoints_but_not_the_run in distributed/test_faults.py.
    """
    disk = tmp_path / "disk"
    with small_disk(disk, f"{megabytes}m"):
        command = ["demo", "--tiny", "--out", disk / "run", *SHORT, "images=64"]
        if megabytes == 6:
            begun(demo, disk / "run", "images")
        code, _, err = start(*command).finish()
        assert code == 2, err
        assert re.search(rf"no space (left on the disk|in) .*{disk / 'run'}", err)
        assert "make room" in err
        assert "Traceback" not in err
        assert not list(disk.rglob(".writing-*"))
        subprocess.run(["mount", "-o", "remount,size=200m", disk], check=True)
        code, out, err = start(*command).finish()
        assert code == 0, err
        assert "teacher after 64 images" in out


def test_a_taken_port_is_named_and_another_one_taken(demo: tuple[Path, str, str], tmp_path: Path, start):
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        data = f"data={demo[0] / 'data' / 'train'}"
        short = [data, "images=32", "probes.at=[]", f"metrics.port={port}"]
        code, _, err = start("train", "demo", "--tiny", "--out", tmp_path / "run", *short).finish()
    assert code == 0, err
    assert f"port {port}, where metrics would be served, is taken by" in err
    assert "instead" in err
