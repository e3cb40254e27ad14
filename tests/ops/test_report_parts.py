"""Parts of the report that need no run: attempts, goodput, stacked bars, data and quarantine, and where a run stands."""

import fcntl
import json
import os
import re
import time
from pathlib import Path

import numpy as np
import pytest
from gristmill.ops.report import write_report
from gristmill.ops.report.attempts import Attempts, read_attempts
from gristmill.ops.report.attention import heat
from gristmill.ops.report.bars import stacked_bars
from gristmill.ops.report.data import quarantined
from gristmill.ops.report.folder import Curve
from gristmill.shards.quarantine import Quarantine
from hypothesis import given
from hypothesis import strategies as st

from .test_report import HOSTILE, Page, write_log


def steps(count: int, seconds: float = 2.0) -> list[dict]:
    return [
        {
            "kind": "step",
            "position": 64 * n,
            "loss": 1 / (n + 1),
            "seconds": {"forward": 0.75 * seconds, "data_wait": seconds / 4},
        }
        for n in range(count)
    ]


def page_of(folder: Path, recipe: str = "name: r\nimages: 6400\nbatch: 64\n") -> Page:
    (folder / "recipe.yaml").write_text(recipe)
    page = Page(write_report(folder).read_text())
    page.assert_inert()
    return page


def aged(folder: Path) -> None:
    """As if nobody had written the log for a while."""
    then = time.time() - 1000
    os.utime(folder / "metrics.jsonl", (then, then))


def test_an_attempt_knows_what_the_one_before_it_lost(tmp_path: Path) -> None:
    first = Attempts(tmp_path)
    first.begin(0)
    write_log(tmp_path, steps(10))  # then it is killed, and its checkpoint is of image 384
    second = Attempts(tmp_path)
    second.begin(384)
    second.end(6400, "done")
    found = read_attempts(tmp_path)
    assert [(a.position, a.lost_images, a.lost_seconds, a.why) for a in found] == [
        (0, 256, 8.0, ""),
        (384, 0, 0.0, "done"),
    ]
    assert found[0].ended is not None
    assert found[0].ended <= found[1].began
    page = page_of(tmp_path)
    assert "1 restart; 256 images, 8 s of stepping, were taken again" in page.text
    assert "killed, or its machine was lost" in page.text


def test_goodput_is_the_share_of_steps_that_count(tmp_path: Path) -> None:
    write_log(tmp_path, steps(10))
    lines = [
        {"what": "began", "time": 100.0, "position": 0},
        {"what": "ended", "time": 110.0, "position": 320, "why": "asked to stop (SIGTERM)"},
        {"what": "began", "time": 500.0, "position": 320, "lost_images": 0, "lost_seconds": 0, "heard": 110.0},
        {"what": "ended", "time": 530.0, "position": 640, "why": HOSTILE},
    ]
    (tmp_path / "attempts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"what": "beg')
    page = page_of(tmp_path)
    assert "Goodput: 50.0 % of 40 s went into steps that count" in page.text
    assert "asked to stop (SIGTERM)" in page.text


@given(st.lists(st.text(max_size=30) | st.dictionaries(st.sampled_from(["what", "time", "position", "heard"]), st.just("began") | st.floats() | st.none()).map(json.dumps), max_size=6))  # fmt: skip
def test_any_attempts_are_read(tmp_path_factory: pytest.TempPathFactory, lines: list[str]) -> None:
    folder = tmp_path_factory.mktemp("run")
    (folder / "attempts.jsonl").write_text("\n".join(lines))
    assert all(attempt.seconds >= 0 for attempt in read_attempts(folder))


def test_bars_are_as_high_as_their_parts() -> None:
    x = np.arange(80.0)
    curves = {f"p{n}": Curve(x, np.full(80, float(n + 1))) for n in range(8)}
    chart = stacked_bars("Phases <b>", curves, unit="ms")
    page = Page(chart)
    assert "Phases <b>" in page.text
    assert "other: 6 ms" in page.text  # p0, p1 and p2
    heights = [float(h) for h in re.findall(r'class="part c\d".*?height="([\d.]+)"/>', chart)]
    assert len(heights) == 40 * 6
    one = dict(zip(("p7", "p6", "p5", "p4", "p3", "other"), heights[:6], strict=True))
    assert one["p7"] / one["p3"] == pytest.approx(2, rel=1e-3)
    assert sum(heights[:6]) == pytest.approx(164, abs=0.1)
    assert stacked_bars("nothing", {"a": Curve(x, np.full(80, np.nan))}) == ""
    assert stacked_bars("nothing", {}) == ""


def test_damage_is_counted_by_reason(tmp_path: Path) -> None:
    write_log(tmp_path, steps(2))
    found = Quarantine(tmp_path / "quarantine.jsonl")
    for row in range(3):
        found.add("a.tar", row, f"key{row}", f"truncated at byte {row}00")
    found.add("b.tar", 0, HOSTILE, "crc32 differs")
    with (tmp_path / "quarantine.jsonl").open("a") as file:
        file.write('{"shard": "c.t')  # a line that is being written
    before = (tmp_path / "quarantine.jsonl").read_bytes()
    assert len(quarantined(tmp_path)) == 4
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "dataset.json").write_text('{"samples": 1280, "shards": 2}')
    page = page_of(tmp_path, f"name: r\nimages: 128\nbatch: 64\ndata: {tmp_path / 'set'}\n")
    for words in ("4 damaged samples are in quarantine", "truncated at byte … 3", "crc32 differs", "1,280", "key2"):
        assert words in page.text, words
    assert (tmp_path / "quarantine.jsonl").read_bytes() == before


def test_mixed_data_has_shares(tmp_path: Path) -> None:
    recipe = "name: r\nimages: 128\nbatch: 64\ndata:\n- {path: a, weight: 3, where: width > 9}\n- {path: s3://b/c}\n"
    text = page_of(tmp_path, recipe).text
    assert "75.0 %" in text
    assert "25.0 %" in text
    assert "width > 9" in text


def test_where_a_run_stands(tmp_path: Path) -> None:
    write_log(tmp_path, steps(10))
    aged(tmp_path)
    with (tmp_path / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "under way, at image 640" in page_of(tmp_path).text
    assert "stopped at image 640; `gristmill train`" in page_of(tmp_path).text
    attempts = Attempts(tmp_path)
    attempts.begin(0)
    attempts.end(640, "DataLossError: 1 of 2 processes could not read their data")
    assert "stopped at image 640: DataLossError: 1 of 2 processes" in page_of(tmp_path).text
    assert "finished after 640 images" in page_of(tmp_path, "name: r\nimages: 640\nbatch: 64\n").text


def test_heat_gets_lighter() -> None:
    colours = heat(np.arange(256.0)[None])[0].astype(float)
    lightness = colours @ (0.2126, 0.7152, 0.0722)
    assert (np.diff(lightness) >= -0.8).all()  # rounding
    assert lightness[0] < 20
    assert lightness[-1] > 230
