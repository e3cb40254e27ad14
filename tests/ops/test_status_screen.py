"""How `gristmill status` looks: of one rank and of a thousand, in any terminal, live, and with whatever a stranger sends."""

import io
import os
import pty
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from gristmill.ops.monitor.live import watch
from gristmill.ops.monitor.reading import Rank, Reading
from gristmill.ops.monitor.summary import summarize
from gristmill.ops.monitor.view import View
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from .processes import BACK, NOW, Process
from .served import Two, shown, target, two_ranks


@pytest.fixture
def two(tmp_path: Path) -> Iterator[Two]:
    with two_ranks(tmp_path / "first") as found:
        yield found


def ranks(*processes: Process) -> list[Rank]:
    return [
        Rank(f"http://{p.rank}/", p.labels, Reading(p.text(), NOW), Reading(p.text(NOW - BACK), NOW - BACK))
        for p in processes
    ]


def screen_of(run: dict[str, Any], width: int = 100) -> str:
    return shown({"runs": [run | {"alerts": [], "verdict": "ok"}], "prometheus": None}, width)


def test_a_thousand_ranks_are_one_screen():
    many = [Process(rank, world=1000) for rank in range(30)]
    many[17].grow("gristmill_rank_own_seconds_total", 0.9)
    run = summarize(
        "first", ranks(*many) + [Rank(f"http://x:{n}/", {"rank": str(n)}, why="gone") for n in range(30, 60)]
    )
    page = screen_of(run)
    assert "22 more ranks answer and are faster" in page
    assert "nor do 22 more" in page
    assert "940 of 1000 ranks are not known here" in page
    assert "slowest: rank 17 on a, 2.14 × the median, by its computing" in page
    assert len(page.splitlines()) < 80


def test_rates_are_those_of_the_time_between_two_looks():
    process = Process(0, world=1)
    (rank,) = ranks(process)
    assert rank.before
    rank.before.values["gristmill_images_total"] = {(): (NOW - BACK) * 64.0 - 6400.0}
    run = summarize("first", [rank])
    assert run["window_seconds"] == pytest.approx(BACK)
    assert run["progress"]["images_per_second"] == pytest.approx(64 + 640)
    run = summarize("first", [rank.whole()])
    assert run["window_seconds"] is None
    assert run["progress"]["images_per_second"] == pytest.approx(64)
    assert "since its process began" in screen_of(run)
    standing = Rank(rank.url, rank.labels, rank.now, rank.now)
    assert summarize("first", [standing])["progress"]["images_per_second"] == pytest.approx(64)


def test_a_run_that_stands_still_says_so_and_not_how_fast_it_was():
    process = Process(0, world=1)
    process.say("gristmill_last_step_timestamp_seconds", NOW - 100)
    page = screen_of(summarize("first", ranks(process)))
    assert "no step for 100 s" in page
    assert "images/s" not in page


def test_a_run_that_has_just_begun_can_be_shown():
    page = 'gristmill_run_info{run="new"} 1\ngristmill_state{state="starting"} 1\n'
    out = screen_of(summarize("", [Rank("http://0/", {}, Reading(page))]))
    for text in ("new", "starting", "no step yet", "none yet", "nothing was read"):
        assert text in out
    assert screen_of(summarize("", [Rank("http://0/", {}, why="gone")]))


@pytest.mark.parametrize("width", [40, 60, 80, 200])
def test_it_fits_the_terminal(width: int):
    run = summarize("first", ranks(Process(0), Process(1)))
    page = screen_of(run, width)
    assert max(map(len, page.splitlines())) <= width
    words = " ".join(page.split())
    assert "64 images/s" in words
    assert ("learning" in page.splitlines()[3]) == (width == 200)  # two columns
    if width >= 60:
        assert "100%" in page
        assert "…" not in page


def test_what_a_stranger_sends_cannot_drive_the_terminal():
    page = 'gristmill_run_info{run="\x1b[2J[bold]"} 1\ngristmill_loss{objective="\x07[red]"} 1\n'
    page += 'gristmill_probe_ratio{probe="[/]"} 1\ngristmill_objective_health 1\ngristmill_memory_fill_ratio NaN\n'
    page += (
        "gristmill_step Inf\ngristmill_progress_ratio -3\ngristmill_read_bytes_total NaN\ngristmill_world_size NaN\n"
    )
    page += 'gristmill_disk_free_bytes{place="\x9b"} -Inf\ngristmill_wall_seconds_total{state="x"} NaN\n'
    page += 'gristmill_loss{objective="' + "w" * 5000 + '"} 1\ngristmill_steps_total NaN\n'
    run = summarize("", [Rank("http://0/", {}, Reading(page))])
    out = screen_of(run)
    assert not set("\x1b\x07\x9b") & set(out)
    assert "?[2J[bold]" in out
    assert "?[red]" in out
    assert max(map(len, out.splitlines())) <= 100


def test_an_ascii_terminal_is_shown_ascii(two: Two):
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "COLUMNS": "80"}
    code = "import sys; from gristmill.ops.monitor.status import show_status; show_status(sys.argv[1:], once=True, over=0.0)"
    answer = subprocess.run([sys.executable, "-c", code, two[0]], env=environment, capture_output=True)
    assert answer.returncode == 0, answer.stderr
    assert b"####" in answer.stdout
    assert b"?" not in answer.stdout


def test_the_live_view_follows_and_ends_with_the_run(two: Two):
    folder, processes, exporters = two
    page = io.StringIO()
    console = Console(file=page, width=160, height=100, force_terminal=True, highlight=False)
    codes: list[int] = []
    view = View([str(folder)])
    # Its patience is longer than a look that is given up.
    thread = threading.Thread(target=lambda: codes.append(watch(view, console, 0.05, 5.0)))
    thread.start()
    processes[0].say("gristmill_mixture_loss", 1.75)
    until(lambda: "1.75" in page.getvalue())
    target(folder / "targets", processes[1], exporters[1].port, rank="7")  # it has started again
    until(lambda: re.search(r"\n7 +a ", re.sub(r"\x1b\[[\d;]*m", "", page.getvalue())))
    for exporter in exporters:
        exporter.close()
    thread.join(timeout=60)
    assert codes == [1]
    assert "no answer for" in page.getvalue()
    assert "no longer answers" in page.getvalue()


def test_the_live_view_on_a_terminal_ends_with_ctrl_c(two: Two):
    code = "import sys; from gristmill.ops.monitor.status import show_status; sys.exit(show_status(sys.argv[1:]))"
    ours, theirs = pty.openpty()
    # A suite that was started in the background ignores Ctrl-C, and so would its children.
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(two[0])], stdout=theirs, stderr=theirs, stdin=theirs,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        env=os.environ | {"COLUMNS": "100", "LINES": "80", "TERM": "xterm"},
    )  # fmt: skip
    os.close(theirs)
    seen = b""
    while b"Ctrl-C ends this view" not in seen:
        seen += os.read(ours, 65536)
    process.send_signal(signal.SIGINT)
    try:
        while more := os.read(ours, 65536):
            seen += more
    except OSError:
        pass  # the other side of the terminal is closed
    os.close(ours)
    assert process.wait(timeout=30) == 0, seen.decode()
    assert b"Traceback" not in seen
    assert b"\x1b[" in seen  # colours


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet='abc{}[]=",\\ 1.eN#\n', max_size=80))
def test_garbage_is_refused_and_not_a_crash(text: str):
    try:
        run = summarize("", [Rank("http://0/", {}, Reading(text))])
    except (ValueError, LookupError):  # what fetch() takes for a stranger
        return
    assert screen_of(run)


def until(happened: Callable[[], Any]) -> None:
    end = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.05)
