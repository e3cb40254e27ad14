"""What a training serves and leaves behind: ports that are taken, targets of Prometheus, and a flood that changes nothing."""

import itertools
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.client import HTTPException
from pathlib import Path
from typing import Any

import pytest
from gristmill.ops.bench.endings import tiny_data
from gristmill.ops.monitor import client, serving
from gristmill.ops.monitor.metrics import Metrics
from gristmill.ops.monitor.serving import Serving, serve
from gristmill.ops.monitor.targets import Target
from gristmill.ops.recipe import MetricsConfig
from gristmill.ops.runlog import read_log
from hypothesis import given
from hypothesis import strategies as st

from ..command import Command
from ..servers import kept_ports
from ..workers import Workers

SMALL = [
    "batch=8", "images=160", "threads=1", "probes.at=[]", "probes.size=16", "watchdog=0", "checkpoint.every=1000",
    "student.image_size=16", "student.patch_size=8", "student.embed_dim=32", "student.depth=1", "student.heads=2",
    "student.head_out=16", "views.global.size=16", "views.local.size=8",
]  # fmt: skip


@pytest.fixture
def metrics() -> Metrics:
    metrics = Metrics("run", {"world": 1})
    metrics.observe_step({"loss": 2.5})
    return metrics


@contextmanager
def served(
    metrics: Metrics, folder: Path, *, rank: int = 0, world: int = 1, **config: Any
) -> Iterator[tuple[Serving, str]]:
    """(what serves, what it told)."""
    told: list[str] = []
    made = serve(
        MetricsConfig(**{"port": 0, **config}),
        metrics.registry,
        rank=rank,
        world=world,
        folder=folder,
        notes=told.append,
    )
    assert made is not None
    try:
        yield made, "\n".join(told)
    finally:
        made.close(clean=True)


@pytest.fixture
def kept() -> Iterator[int]:
    """A port that is free."""
    with kept_ports(1) as [port]:
        yield port


@pytest.fixture
def taken(kept: int) -> Iterator[socket.socket]:
    """A port at which somebody listens; once that one has left, nobody else is given it."""
    with socket.create_server(("127.0.0.1", kept)) as taken:
        yield taken


def loss_at(url: str) -> bool:
    return b"gristmill_mixture_loss 2.5\n" in client.get(url, timeout=30)


def test_a_free_port_is_taken_as_asked_and_told(metrics: Metrics, tmp_path: Path, kept: int):
    with served(metrics, tmp_path, port=kept) as (made, told):
        assert made.url == f"http://127.0.0.1:{kept}/metrics"
        assert told == f"metrics: {made.url}"
        assert (tmp_path / "metrics.url").read_text() == f"{made.url}\n"
        assert loss_at(made.url)
        assert client.get(made.url.replace("metrics", "")).startswith(b"<!doctype html>")
    assert list(tmp_path.iterdir()) == []


def test_a_taken_port_is_replaced_told_and_taken_when_it_is_left(
    metrics: Metrics, tmp_path: Path, taken: socket.socket, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(serving, "LOOK", 0.05)
    port = taken.getsockname()[1]
    with served(metrics, tmp_path, port=port, targets=tmp_path / "shared") as (made, told):
        assert f"port {port}, where metrics would be served, is taken by process" in told
        assert told.startswith("WARNING: ")  # of a port that the user chose
        assert f"served at {made.url} instead" in told
        assert str(port) not in made.url
        assert loss_at(made.url)
        [target] = json.loads(next((tmp_path / "shared").iterdir()).read_text())
        assert target["targets"] == [f"127.0.0.1:{made.exporter.port}"]
        assert (tmp_path / "metrics.url").read_text() == f"{made.url}\n"
        taken.close()  # the predecessor has left
        until = time.monotonic() + 60
        while time.monotonic() < until:
            with suppress(OSError, HTTPException):
                assert loss_at(f"http://127.0.0.1:{port}/metrics")
                break
            time.sleep(0.05)
        else:
            raise AssertionError("never taken")
        assert loss_at(made.url)
        assert made.exporter.failures["tick"] == 0
    socket.create_server(("127.0.0.1", port)).close()  # free again


def test_the_usual_port_is_replaced_without_alarm(
    metrics: Metrics, tmp_path: Path, taken: socket.socket, monkeypatch: pytest.MonkeyPatch
):
    port = taken.getsockname()[1]
    monkeypatch.setattr(serving, "PORT", port)  # the real one may be taken and left by anybody meanwhile
    with served(metrics, tmp_path, port=port) as (made, told):
        assert told.startswith(f"port {port}, ")
        assert loss_at(made.url)


def test_each_rank_of_a_node_has_its_own_port(
    metrics: Metrics, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], kept: int
):
    monkeypatch.setenv("LOCAL_RANK", "3")
    with served(metrics, tmp_path, rank=11, world=16, port=kept - 3) as (made, _):
        assert made.exporter.port == kept
        assert not (tmp_path / "metrics.url").exists()  # rank 0's
        [file] = (tmp_path / "targets").iterdir()
        assert json.loads(file.read_text())[0]["labels"]["__local_rank__"] == "3"
    with served(metrics, tmp_path, rank=11, world=16, port=65535) as (made, told):
        assert loss_at(made.url)
        assert told == ""  # ranks but the first are not listened to: they say it themselves
        assert "rank 11: WARNING: metrics.port=65538 is no port" in capfd.readouterr().err


def test_an_address_of_another_machine_becomes_loopback(metrics: Metrics, tmp_path: Path):
    with served(metrics, tmp_path, address="192.0.2.1") as (made, told):
        assert made.url.startswith("http://127.0.0.1:")
        assert told.startswith("WARNING: metrics cannot be served at '192.0.2.1'")
        assert loss_at(made.url)


def test_places_that_cannot_be_written_cost_only_themselves(metrics: Metrics, tmp_path: Path):
    (tmp_path / "file").touch()
    (tmp_path / "metrics.url").mkdir()
    (tmp_path / "targets").touch()
    with served(metrics, tmp_path, targets=tmp_path / "file" / "below") as (made, told):
        assert loss_at(made.url)
        assert told.count("WARNING: ") == 3


def test_no_threads_left_is_no_end_of_training(metrics: Metrics, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def none(*_: object, **__: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", none)
    told: list[str] = []
    assert serve(MetricsConfig(port=0), metrics.registry, rank=0, world=1, folder=tmp_path, notes=told.append) is None
    assert told == ["WARNING: metrics are not served: can't start new thread"]
    assert (
        serve(MetricsConfig(port="off"), metrics.registry, rank=0, world=1, folder=tmp_path, notes=told.append) is None
    )
    assert len(told) == 1


def test_a_failed_run_leaves_its_target_and_its_next_attempt_replaces_it(metrics: Metrics, tmp_path: Path):
    run, shared = tmp_path / "run", tmp_path / "shared"
    run.mkdir()
    how: dict[str, Any] = {"folder": run, "notes": print, "world": 2}
    config = MetricsConfig(port=0, targets=shared)
    failed = serve(config, metrics.registry, rank=1, **how)
    other = serve(config, metrics.registry, rank=0, **{**how, "folder": tmp_path / "other" / "run"})
    assert failed is not None
    assert other is not None
    failed.close(clean=False)
    before = {path.name for path in shared.iterdir()}
    assert len(before) == 2  # of two runs that are called the same
    assert [path.name for path in (run / "targets").iterdir()] == [path.name for path in shared.glob("*rank00001.json")]
    again = serve(config, metrics.registry, rank=1, **how)
    assert again is not None
    assert {path.name for path in shared.iterdir()} == before
    failed.close(clean=True)  # late: what another attempt wrote is left to it
    assert {path.name for path in shared.iterdir()} == before
    alone = serve(config, metrics.registry, rank=0, **{**how, "world": 1})  # goes on with one rank
    assert alone is not None
    assert len(list(shared.glob("*rank00001.json"))) == 0
    assert len(list(shared.glob("*rank00000.json"))) == 2
    for made in (again, alone, other):
        made.close(clean=True)
    assert list(shared.iterdir()) == []
    assert not (run / "targets").exists()


def test_a_next_attempt_that_is_not_served_takes_the_targets_of_the_one_before_away(metrics: Metrics, tmp_path: Path):
    run, shared = tmp_path / "run", tmp_path / "shared"
    config = MetricsConfig(port=0, targets=shared)
    how: dict[str, Any] = {"world": 2, "notes": print}
    killed = [serve(config, metrics.registry, rank=rank, folder=run, **how) for rank in range(2)]
    other = serve(config, metrics.registry, rank=0, folder=tmp_path / "other" / "run", **how)
    assert other is not None
    for each in killed:
        assert each is not None
        each.exporter.close()  # and nothing of what a clean end would do
    assert len(list(shared.iterdir())) == 3
    off = MetricsConfig(port="off", targets=shared)
    assert serve(off, metrics.registry, rank=1, folder=run, **how) is None
    assert len(list(shared.iterdir())) == 3  # rank 0's to do, which others may still be waiting for
    assert serve(off, metrics.registry, rank=0, folder=run, **how) is None
    assert list(shared.iterdir()) == [other.targets[1].path]
    assert list(run.iterdir()) == []
    other.close(clean=True)


@given(
    st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=60).filter(
        lambda name: len(name.encode()) < 200 and name not in (".", "..")
    )
)
def test_any_name_of_a_run_gives_a_plain_file_and_printable_labels(tmp_path_factory: pytest.TempPathFactory, name: str):
    folder = tmp_path_factory.getbasetemp() / "names"
    target = Target(folder, Path("/runs") / name, 7)
    target.write("[::1]", 9464, node="n\n1", https=True)
    assert target.path.name.isascii()
    assert target.path.name.endswith("-rank00007.json")
    [entry] = json.loads(target.path.read_text())
    assert entry["targets"] == ["[::1]:9464"]
    labels = entry["labels"]
    assert all(value.isprintable() for value in labels.values())
    assert labels["node"] == "n?1"
    assert labels["__scheme__"] == "https"
    assert labels["job"] == "gristmill"
    if name.isprintable():
        assert labels["run"] == name
    target.remove()
    assert list(folder.iterdir()) == []


def rough(url: str, over: threading.Event, done: list[int]) -> None:
    """Scrapes, and between them what bad clients do."""
    port = int(url.rpartition(":")[2].partition("/")[0])
    hanging: list[socket.socket] = []
    rubbish = (b"GET /metr", b"\x16\x03\x01\0\r\n\r\n", b"HEAD / HTTP/1.1\r\n\r\n", b"GET /node HTTP/1.1\r\n\r\n")
    for number in itertools.count():
        if over.is_set():
            break
        with suppress(OSError, HTTPException):
            done.append(len(client.get(url, timeout=30)))
        if number % 2 == 0:
            with suppress(OSError):
                hanging.append(socket.create_connection(("127.0.0.1", port), timeout=30))
                hanging[-1].sendall(rubbish[number // 2 % 4])
        if len(hanging) == 100:
            hanging.pop(0).close()
    for one in hanging:
        one.close()


def trace(run: Path) -> list[dict[str, Any]]:
    """The steps of a run without their times."""
    steps = (line for line in read_log(run / "metrics.jsonl") if line["kind"] == "step")
    return [{key: value for key, value in line.items() if key != "seconds"} for line in steps]


@pytest.mark.slow
def test_hundreds_of_scrapes_and_bad_clients_leave_the_trace_as_it_is(workers: Workers, tmp_path: Path):
    """Half of its steps are taken before the flood, and half of them in it."""
    data = tiny_data(tmp_path / "data")

    def start(name: str, port: object, hold: int | None) -> Command:
        (said := tmp_path / f"{name}-said").mkdir()
        arguments = (
            "train",
            "demo",
            "--tiny",
            "--out",
            tmp_path / name,
            f"data={data}",
            *SMALL,
            f"metrics.port={port}",
        )
        return Command(said, arguments, workers, hold)

    code, _, err = start("quiet", "off", None).finish()
    assert code == 0, err
    flooded, over = start("flooded", 0, 80), threading.Event()
    done: list[int] = []
    flooded.until_held()
    url = (tmp_path / "flooded" / "metrics.url").read_text().strip()
    threads = [threading.Thread(target=rough, args=(url, over, done)) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        while len(done) < 400:
            time.sleep(0.05)
            assert flooded.poll() is None
        before = len(done)
        flooded.go()
        code, _, err = flooded.finish()
    finally:
        over.set()
        for thread in threads:
            thread.join()
    assert code == 0, err
    assert len(done) > before
    assert not (tmp_path / "flooded" / "metrics.url").exists()
    assert not (tmp_path / "flooded" / "targets").exists()
    assert len(trace(tmp_path / "quiet")) == 20
    assert trace(tmp_path / "flooded") == trace(tmp_path / "quiet")
