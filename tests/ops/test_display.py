"""What a person sees of a training: on a terminal, in a log file, as JSON lines; Ctrl-C, and a terminal that goes away."""

import json
import math
import os
import re
import time
from pathlib import Path

import pytest
from gristmill.ops.bench.endings import TINY, tiny_data
from gristmill.ops.checkpoint import newest
from gristmill.ops.display import Display, sentence
from gristmill.ops.pace import Pace, duration
from gristmill.ops.runlog import read_log
from gristmill.ops.stores import open_store
from gristmill.ops.wishes import IMPATIENT
from rich.console import Console

from ..command import Command
from ..workers import Workers
from .terminal import Terminal

LOSSES = ("loss", "instance", "local group", "group")
FACTS = ("images/s", "data wait", "gradient norm", "learning rate", "memory", "checkpoint", "left out")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def arguments(data: Path, tmp_path: Path) -> list[object]:
    small = ("probes.at=[0.5]", "probes.names=[knn]", "checkpoint.every=16")
    return ["train", "demo", "--out", tmp_path / "run", *TINY, f"data={data}", "images=64", *small]


@pytest.mark.parametrize("columns", [60, 110])
def test_on_a_terminal(workers: Workers, tmp_path: Path, arguments: list[object], columns: int):
    """Live until Ctrl-C, which is answered while the step still runs; the same command goes on."""
    terminal = Terminal(workers, tmp_path, columns, *arguments, hold=40)
    terminal.held()
    seen = terminal.sees("probe at image 32: teacher", "% of the time")
    assert "/64 images" in seen
    assert "━" in seen
    for word in LOSSES:
        assert re.search(rf"^ *{word} +\d+\.?\d* +\d+\.?\d*( |$)", seen, re.MULTILINE), (word, seen)
    for word in FACTS:
        assert word in seen, seen
    drawn = [row for row in seen.splitlines() if "━" in row or "images/s" in row]
    assert max(map(len, drawn)) <= columns, seen
    terminal.press(b"\x03")
    terminal.sees("stopping after this step, with a checkpoint; Ctrl-C again to end at once")
    assert terminal.process.poll() is None
    terminal.go()
    assert terminal.finish() == 130
    seen = str(terminal.screen)
    assert "stopped at image 48; the same command goes on from there" in seen
    assert "training: 48/64 images, loss" in seen
    assert "━" not in seen, "what was live is gone"
    assert seen.count("checkpoint of image 0 read back") == 1, "notes stand above what is live, once"
    saved, _ = newest(open_store(tmp_path / "run" / "checkpoints"))
    assert saved is not None
    assert saved.position == 48
    (again := tmp_path / "again").mkdir()
    code, out, err = Command(again, tuple(arguments), workers).finish()
    assert (code, out) == (0, "")
    assert "going on from image 48" in err
    assert "\x1b" not in err
    assert re.search(
        r"^training: 64/64 images, loss [\d.]+ \(instance [\d.]+, local group [\d.]+, group [\d.]+\), \d+ images/s, "
        r"data wait [\d.]+ %, 0 s left$",
        err,
        re.MULTILINE,
    ), err


def test_a_second_ctrl_c_ends_at_once(workers: Workers, tmp_path: Path, arguments: list[object]):
    terminal = Terminal(workers, tmp_path, 80, *arguments, hold=40)
    terminal.held()
    terminal.press(b"\x03")
    terminal.sees("Ctrl-C again to end at once")
    terminal.press(b"\x03")  # so soon it is the same wish, passed on by a launcher
    time.sleep(IMPATIENT)
    assert terminal.process.poll() is None
    terminal.press(b"\x03")
    assert terminal.finish() == 130
    assert "ended at once; the same command goes on from what is there" in str(terminal.screen)


def test_a_terminal_that_goes_away_costs_the_display_only(workers: Workers, tmp_path: Path, arguments: list[object]):
    terminal = Terminal(workers, tmp_path, 80, *arguments, hold=24)
    terminal.held()
    terminal.hang_up()
    terminal.go()
    assert terminal.process.join() == 0
    steps = [line for line in read_log(tmp_path / "run" / "metrics.jsonl") if line["kind"] == "step"]
    assert len(steps) == 8


def test_json_lines_and_nothing_else(workers: Workers, tmp_path: Path, arguments: list[object]):
    code, out, err = Command(tmp_path, (*arguments, "--json"), workers).finish()
    assert (code, err) == (0, "")
    lines = [json.loads(text, parse_constant=pytest.fail) for text in out.splitlines()]
    steps = [line for line in lines if line["kind"] == "step"]
    assert [line["position"] for line in steps] == list(range(0, 64, 8))
    kept = [line for line in read_log(tmp_path / "run" / "metrics.jsonl") if line["kind"] == "step"]
    for line, log in zip(steps, kept, strict=True):
        more = {name: line.pop(name) for name in ("end", "images_per_second", "data_wait_ratio", "left_seconds")}
        assert line == log
        assert more["end"] == 64
        assert more["images_per_second"] > 0
        assert 0 <= more["data_wait_ratio"] <= 1
    assert next(line["position"] for line in lines if line["kind"] == "checkpoint") == 0
    start = next(line for line in lines if line["kind"] == "start")
    assert start == {"kind": "start", "position": 0, "end": 64, "batch": 8, "world": 1}
    assert {"note", "state", "probe", "probe_cost", "crops"} <= {line["kind"] for line in lines}
    assert lines[-1] == {"kind": "end", "position": 64, "code": 0}


def test_json_lines_of_a_run_that_fails(workers: Workers, tmp_path: Path, arguments: list[object]):
    code, out, err = Command(tmp_path, (*arguments, "--json", f"data={tmp_path / 'nowhere'}"), workers).finish()
    assert code == 2
    last = json.loads(out.splitlines()[-1])
    assert last["kind"] == "end"
    assert "nowhere" in last["error"]
    assert err.startswith("error: ")


def test_a_reader_that_has_seen_enough(workers: Workers, tmp_path: Path, arguments: list[object]):
    """`... --json | head -1`: the run goes on to its end."""
    os.mkfifo(tmp_path / "out")
    reader = os.open(tmp_path / "out", os.O_RDONLY | os.O_NONBLOCK)
    command = Command(tmp_path, (*arguments, "--json"), workers, hold=16)
    command.until_held()
    os.close(reader)
    command.go()
    while command.poll() is None:
        pass
    assert command.poll() == 0
    assert (tmp_path / "err").read_text().count("nobody reads the JSON lines any more") == 1


def test_quiet(workers: Workers, tmp_path: Path, arguments: list[object]):
    assert Command(tmp_path, (*arguments, "--quiet"), workers).finish() == (0, "", "")


def step(position: int, loss: float, *, wait: float = 0.1, bad: bool = False) -> dict:
    losses = {"loss": loss, "loss/instance": loss / 2, "loss/group": loss / 2}
    return {"kind": "step", "position": position, **losses, "bad": bad, "seconds": {"data_wait": wait, "forward": 0.9}}


@pytest.fixture
def clock() -> list[float]:
    return [100.0]


def test_pace(clock: list[float]):
    pace = Pace(end=1000, batch=10, world=2, clock=lambda: clock[0])
    assert pace.rate == pace.wait == 0.0
    assert math.isnan(pace.left)
    pace.begin(100, trained=80)
    assert pace.skipped == 2
    for number, loss in enumerate((4.0, 2.0, math.nan, 3.0)):
        clock[0] += 1.0
        pace.take(step(100 + 10 * number, loss, bad=math.isnan(loss)))
    assert pace.position == 140
    assert pace.rate == pytest.approx(10.0)
    assert pace.left == pytest.approx(86.0)
    assert pace.wait == pytest.approx(0.1)
    assert pace.mean("loss") == pytest.approx(3.0), "bad steps are left out"
    assert pace.mean("group") == pytest.approx(1.5)
    assert pace.skipped == 3
    assert pace.age is None
    pace.take({"kind": "checkpoint", "position": 140})
    clock[0] += 42.0
    assert pace.age == pytest.approx(42.0)
    clock[0] += 958.0  # a probe of a quarter of an hour counts in the rate: whoever waits waits for it, too
    pace.take(step(140, 1.0))
    assert pace.rate == pytest.approx(50 / 1004.0)
    said = sentence(pace)
    assert (
        said
        == "150/1000 images, loss 1 (instance 0.5, group 0.5), 0 images/s on 2 processes, data wait 10.0 %, 4 h 44 min left"
    )


def test_an_old_pace_is_forgotten(clock: list[float]):
    pace = Pace(end=10**9, batch=10, world=1, clock=lambda: clock[0])
    for number in range(700):
        clock[0] += 10.0 if number < 250 else 1.0
        pace.take(step(10 * number, 1.0, wait=0.9 if number < 250 else 0.0))
    assert pace.rate == pytest.approx(10.0)
    assert pace.wait == 0.0


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (99.4, "99 s"), (101, "2 min"), (5940, "99 min"), (12_000, "3 h 20 min"), (187_200, "2 d 4 h"), (math.nan, "?")],
)  # fmt: skip
def test_duration(seconds: float, text: str):
    assert duration(seconds) == text


@pytest.mark.parametrize("columns", [40, 60, 79, 80, 120, 200])
@pytest.mark.parametrize("world", [1, 4096])
def test_a_picture_fits_its_columns(columns: int, world: int):
    """Whatever the numbers are: a run of a billion images on thousands of processes, at its start and in a bad step."""
    display = Display("training", 1_281_167_000, 8192, world)
    display.begin(640_000_000, trained=630_000_000)
    console = Console(width=columns, height=50, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    for lines in ([], [step(640_000_000, math.nan, bad=True)], [step(640_008_192, 1.23456e-12)]):
        for line in lines:
            display.pace.take(line)
        with console.capture() as captured:
            console.print(display.picture(columns))
        rows = captured.get().splitlines()
        assert max(map(len, rows)) <= columns
        assert "/1281167000 images" in captured.get()
    assert "(of 4096)" in captured.get() or world == 1 or columns < 60
    assert "1220 steps" in captured.get() or "1221 steps" in captured.get() or columns < 60
