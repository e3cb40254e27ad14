"""`gristmill status` against real exporters: what it shows, where it looks, and what it says when nobody answers."""

import io
import json
import math
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from gristmill.ops.monitor.catalogue import MEMORIES, OBJECTIVES, PHASES
from gristmill.ops.monitor.exporter import Exporter
from gristmill.ops.monitor.metrics import Metrics
from gristmill.ops.monitor.screen import draw
from gristmill.ops.monitor.status import Reading, StatusError, fetch, locate, show_status, summarize, watch
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import generate_latest
from rich.console import Console


def step(metrics: Metrics, wait: float = 0.1) -> None:
    phases = {**dict.fromkeys(PHASES[1:7], 0.1), "data_wait": wait}
    losses = {f"loss/{objective}": 1.5 for objective in OBJECTIVES}
    metrics.observe_step({"position": 64, "batch": 32, "loss": 4.5, "lr": 1e-3, "phases": phases, **losses})


@pytest.fixture
def metrics() -> Metrics:
    metrics = Metrics("first", {"world": 1, "device": "cpu"})
    step(metrics)
    metrics.observe_step({"bad": ["group"], "group/teacher_entropy_ratio": 0.5, "progress": 0.25, "loss": math.nan})
    for memory in MEMORIES:
        metrics.observe_memory(memory, {"fill": 0.25, "age": 12.0, "norm": 1.0})
    metrics.observe_probe({"who": "chance", "coarse_knn": 0.1})
    metrics.observe_probe({"who": "teacher", "coarse_knn": 0.375})
    metrics.observe_checkpoint(ok=True, seconds=1.0, size=3 << 20)
    return metrics


@pytest.fixture
def run(metrics: Metrics, tmp_path: Path) -> Iterator[Path]:
    """A run folder with an exporter behind it."""
    folder = tmp_path / "first"
    folder.mkdir()
    with Exporter(metrics.registry, 0) as exporter:
        (folder / "metrics.url").write_text(exporter.url + "\n")
        yield folder


def reading(metrics: Metrics) -> Reading:
    return Reading(generate_latest(metrics.registry).decode())


def shown(summary: dict) -> str:
    page = io.StringIO()
    Console(file=page, width=160, highlight=False).print(draw(summary))
    return page.getvalue()


def test_one_look(run: Path, capsys: pytest.CaptureFixture[str]):
    assert show_status(str(run), once=True, as_json=False) == 0
    page = capsys.readouterr().out
    for text in ("first", "world=1", "25%", "coarse_knn", "chance 0.1", "teacher 0.375", "3.0 MiB", "ok 1"):
        assert text in page
    assert "all nan  instance 1.5" in page
    assert "1 steps left out" in page
    assert re.search(r"data_wait +█+░+ +\d+%", page)
    assert re.search(r"memory\s+instance.queue +█{6}░{18} +25%  age 12  norm 1", page)


def test_json_is_json(run: Path, capsys: pytest.CaptureFixture[str]):
    assert show_status(str(run), once=False, as_json=True) == 0

    def refuse(word: str) -> float:
        raise AssertionError(f"{word} is no JSON")

    answer = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert answer["run"] == {"run": "first", "world": "1", "device": "cpu"}
    assert answer["loss"] == {"all": None, "instance": 1.5, "local_group": 1.5, "group": 1.5, "patch": 1.5}
    assert answer["health"] == {"group": {"teacher_entropy_ratio": 0.5}}
    assert answer["probes"] == {"coarse_knn": {"chance": 0.1, "teacher": 0.375}}
    assert answer["memories"]["local_group.teacher"] == {"fill": 0.25, "age": 12.0, "norm": 1.0}
    assert answer["progress"]["ratio"] == 0.25
    assert answer["progress"]["bad_steps"] == 1
    assert answer["checkpoint"]["bytes"] == 3 << 20
    assert answer["checkpoint"]["ok"] == 1
    assert 0 <= answer["checkpoint"]["age_seconds"] < 600
    assert answer["warning"] is None


def test_without_a_terminal_it_looks_once(run: Path, capsys: pytest.CaptureFixture[str]):
    assert show_status(str(run), once=False, as_json=False) == 0
    assert "first" in capsys.readouterr().out


def test_rates_are_those_of_the_time_between_two_looks():
    metrics = Metrics("first", {})
    step(metrics, wait=0.0)
    before = reading(metrics)
    whole = summarize(before, None, "")
    assert whole["phases"]["data_wait"] == 0.0
    assert whole["progress"]["images_per_second"] == pytest.approx(32 / 0.6)
    step(metrics, wait=0.6)
    since = summarize(reading(metrics), before, "")
    assert since["phases"]["data_wait"] == pytest.approx(0.5)
    assert since["phases"]["probe"] == 0.0
    assert since["progress"]["images_per_second"] == pytest.approx(32 / 1.2)
    assert since["progress"]["step_seconds"] == pytest.approx(1.2)
    still = summarize(reading(metrics), reading(metrics), "")
    assert still["progress"]["images_per_second"] == pytest.approx(64 / 1.8)


def test_a_run_that_has_just_begun_can_be_shown():
    page = shown(summarize(reading(Metrics("new", {})), None, "http://127.0.0.1:1/metrics"))
    assert "none yet" in page


def test_where_it_looks(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    url = (run / "metrics.url").read_text().strip()
    assert locate(str(run))[0] == url
    assert locate("http://127.0.0.1:9464") == ("http://127.0.0.1:9464/metrics", None)
    assert locate("http://127.0.0.1:9464/metrics") == ("http://127.0.0.1:9464/metrics", None)
    assert locate("localhost:9464") == ("http://localhost:9464/metrics", None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "newer").mkdir(parents=True)
    (tmp_path / "runs" / "newer" / "metrics.url").write_text("http://127.0.0.1:1/metrics\n")
    os.utime(run / "metrics.url", (1, 1))
    assert locate("")[0] == "http://127.0.0.1:1/metrics"
    monkeypatch.chdir(run)
    assert locate("")[0] == url


def test_what_it_says_when_there_is_nothing_to_see(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(StatusError, match=r"no run folder .*nowhere"):
        locate(str(tmp_path / "nowhere"))
    with pytest.raises(StatusError, match=r"no metrics\.url.*metrics\.port=off"):
        locate(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StatusError, match="gristmill status RUN"):
        locate("")
    for text in ("", "file:///etc/passwd\n", "\x1b[2J"):
        (tmp_path / "metrics.url").write_text(text)
        with pytest.raises(StatusError, match="holds no URL"):
            locate(str(tmp_path))


def test_a_run_that_was_killed_is_told(run: Path, metrics: Metrics):
    with Exporter(metrics.registry, 0) as gone:
        pass
    (run / "metrics.url").write_text(gone.url)
    with pytest.raises(StatusError, match=f"nothing answers at http://127.0.0.1:{gone.port}/metrics.*has ended"):
        show_status(str(run), once=True, as_json=False)


def test_another_run_on_the_same_port_is_told(run: Path, capsys: pytest.CaptureFixture[str]):
    os.utime(run / "metrics.url", (1, 1))
    assert show_status(str(run), once=True, as_json=False) == 0
    assert "another run" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("status", "body"),
    [(200, b"hello"), (200, b"\xff\xfe"), (200, b"go_goroutines 8\n"), (200, b"x" * (5 << 20)), (200, b"a{ 1\n")],
)
def test_what_is_no_gristmill_is_refused(status: int, body: bytes):
    with Stranger(status, body) as url, pytest.raises(StatusError, match="is no Gristmill run"):
        fetch(url)


def test_errors_and_silence_of_a_stranger(monkeypatch: pytest.MonkeyPatch):
    with Stranger(404, b"") as url, pytest.raises(StatusError, match=r"nothing answers.*404"):
        fetch(url)
    with pytest.raises(StatusError, match="nothing answers"):
        fetch("http://127.0.0.1:99999/metrics")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        thread = threading.Thread(target=lambda: server.accept()[0].sendall(b"220 mail ready\r\n"))
        thread.start()
        with pytest.raises(StatusError, match="nothing answers"):
            fetch(f"http://127.0.0.1:{port}/metrics")
        thread.join()
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    metrics = Metrics("first", {})
    with Exporter(metrics.registry, 0) as exporter:
        assert fetch(exporter.url).info() == {"run": "first"}


def test_what_a_stranger_sends_cannot_drive_the_terminal():
    page = 'gristmill_run_info{run="\x1b[2J[bold]"} 1\ngristmill_loss{objective="\x07[red]"} 1\n'
    page += 'gristmill_probe_ratio{probe="[/]"} 1\ngristmill_objective_health 1\ngristmill_memory_fill_ratio NaN\n'
    page += "gristmill_step Inf\ngristmill_progress_ratio -3\ngristmill_read_bytes_total NaN\n"
    out = shown(summarize(Reading(page), None, ""))
    assert "\x1b" not in out
    assert "\x07" not in out
    assert "?[2J[bold]" in out
    assert "?[red] 1" in out


def test_the_live_view_follows_and_ends_with_the_run(metrics: Metrics):
    page = io.StringIO()
    console = Console(file=page, width=160, force_terminal=True, highlight=False)
    codes = []
    exporter = Exporter(metrics.registry, 0)
    thread = threading.Thread(target=lambda: codes.append(watch(exporter.url, None, console, 0.05, 1.0)))
    thread.start()
    metrics.observe_step({"loss": 1.75})
    end = time.monotonic() + 60
    while "all 1.75" not in page.getvalue() and time.monotonic() < end:
        time.sleep(0.05)
    exporter.close()
    thread.join(timeout=60)
    assert codes == [1]
    assert "all 1.75" in page.getvalue()
    assert "no answer for" in page.getvalue()
    assert "no longer answers" in page.getvalue()


def test_the_live_view_on_a_terminal_ends_with_ctrl_c(run: Path):
    code = "import sys; from gristmill.ops.monitor.status import show_status; sys.exit(show_status(sys.argv[1], 0, 0))"
    ours, theirs = pty.openpty()
    # A suite that was started in the background ignores Ctrl-C, and so would its children.
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(run)], stdout=theirs, stderr=theirs, stdin=theirs,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    os.close(theirs)
    seen = b""
    while b"checkpoint" not in seen:
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


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet='abc{}[]=",\\ 1.eN#\n', max_size=80))
def test_garbage_is_refused_and_not_a_crash(text: str):
    try:
        summary = summarize(Reading(text), None, "")
    except (ValueError, LookupError):  # what fetch() takes for a stranger
        return
    assert shown(summary)


class Stranger:
    """A web server that is not ours, on loopback."""

    def __init__(self, status: int, body: bytes):
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(status)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                """Says nothing."""

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)

    def __enter__(self) -> str:
        self.thread.start()
        return f"http://127.0.0.1:{self.server.server_port}/metrics"

    def __exit__(self, *exception: object) -> None:
        self.server.shutdown()
        self.server.server_close()
