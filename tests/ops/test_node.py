"""A node's page over real processes, one of which hangs or is killed; merging as a property; the private folder."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from gristmill.ops.monitor import client, node
from gristmill.ops.monitor.metrics import Metrics
from gristmill.ops.monitor.node import Gathering, merged
from gristmill.ops.monitor.ports import ExporterError
from gristmill.ops.monitor.serving import Serving, serve
from gristmill.ops.recipe import MetricsConfig
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

CONFIG = MetricsConfig(port=0)
RANK = """
import sys; from pathlib import Path; from types import SimpleNamespace
from gristmill.ops.monitor.metrics import Metrics; from gristmill.ops.monitor.serving import serve
config = SimpleNamespace(port=0, address="127.0.0.1", tls=None, targets=None, prometheus=None)
metrics = Metrics("run", {"world": 3}); rank = int(sys.argv[2]); metrics.observe_step({"loss": 10.0 + rank})
serving = serve(config, metrics.registry, rank=rank, world=3, folder=Path(sys.argv[1]), notes=print)
print("up", flush=True); sys.stdin.read(); serving.close(True)
"""


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where the ranks of these tests meet; nothing may be left there."""
    place = tmp_path_factory.mktemp("t")
    monkeypatch.setattr(node.tempfile, "tempdir", None)
    monkeypatch.setenv("TMPDIR", str(place))
    yield place
    node.tempfile.tempdir = None
    assert [path for path in place.rglob("*") if path.is_socket()] == []


@contextmanager
def rank(run: Path, number: int) -> Iterator[subprocess.Popen[str]]:
    """A process with rank `number` of three on this machine."""
    own = os.environ | {"LOCAL_RANK": str(number), "LOCAL_WORLD_SIZE": "3"}
    process = subprocess.Popen([sys.executable, "-c", RANK, run, str(number)], env=own, stdin=-1, stdout=-1, text=True)
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "up\n"
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGCONT)
        process.communicate("")


@contextmanager
def first(run: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Serving]:
    """Rank 0, in this process."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    metrics = Metrics("run", {"world": 3})
    metrics.observe_step({"loss": 10.0})
    told: list[str] = []
    serving = serve(CONFIG, metrics.registry, rank=0, world=3, folder=run, notes=told.append)
    assert serving is not None
    assert told == [f"metrics: {serving.url}"]
    try:
        yield serving
    finally:
        serving.close(True)


def ask(serving: Serving) -> dict[str, dict[str | None, float]]:
    """A fresh /node: values by metric and rank."""
    time.sleep(node.FRESH)
    page = client.get(serving.url.replace("/metrics", "/node"), timeout=30).decode()
    found: dict[str, dict[str | None, float]] = {}
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            found.setdefault(sample.name, {})[sample.labels.get("rank")] = sample.value
    return found


def until(serving: Serving, up: dict[int, int]) -> dict[str, dict[str | None, float]]:
    """The first /node on which so many ranks answer: a machine that is busy elsewhere may let one miss its deadline."""
    end = time.monotonic() + 120
    wanted = {str(number): float(answers) for number, answers in up.items()}
    while (found := ask(serving))["gristmill_node_rank_up"] != wanted:
        assert time.monotonic() < end, found["gristmill_node_rank_up"]
    return found


def test_any_rank_speaks_for_its_node_and_a_hanging_one_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with first(tmp_path, monkeypatch) as serving:
        found = until(serving, {0: 1})  # the others have not come yet, and are known to be missing
        assert found["gristmill_node_ranks"] == {None: 3.0}
        with rank(tmp_path, 1) as one, rank(tmp_path, 2) as two:
            found = until(serving, {0: 1, 1: 1, 2: 1})
            assert found["gristmill_mixture_loss"] == {"0": 10.0, "1": 11.0, "2": 12.0}
            one.send_signal(signal.SIGSTOP)
            found = until(serving, {0: 1, 1: 0, 2: 1})
            assert found["gristmill_mixture_loss"] == {"0": 10.0, "2": 12.0}
            one.send_signal(signal.SIGCONT)
            until(serving, {0: 1, 1: 1, 2: 1})
            two.kill()
            two.wait()
            until(serving, {0: 1, 1: 1, 2: 0})
            [target] = json.loads(next((tmp_path / "targets").glob("*rank00001.json")).read_text())
            other = client.get(f"http://{target['targets'][0]}/node", timeout=30)  # any of them speaks for the node
            assert b'gristmill_node_rank_up{rank="2"} 0.0\n' in other
        with rank(tmp_path, 2):  # its next attempt
            until(serving, {0: 1, 2: 1})
    assert not (tmp_path / "metrics.url").exists()


def test_a_rank_alone_speaks_for_itself(tmp_path: Path, short: Path):
    metrics = Metrics("run", {})
    metrics.observe_step({"loss": 1.5})
    serving = serve(CONFIG, metrics.registry, rank=0, world=1, folder=tmp_path, notes=print)
    assert serving is not None
    assert ask(serving)["gristmill_mixture_loss"] == {"0": 1.5}
    assert ask(serving)["gristmill_node_ranks"] == {None: 1.0}
    serving.close(True)
    assert list(short.iterdir()) == []


def test_what_a_killed_attempt_left_is_buried_and_the_folder_goes_with_the_last(tmp_path: Path):
    code = "import os, sys; from pathlib import Path; from gristmill.ops.monitor.node import Gathering\n"
    code += "[Gathering(Path(sys.argv[1]), number) for number in (1, 5)]; os.kill(os.getpid(), 9)"
    assert subprocess.run([sys.executable, "-c", code, tmp_path]).returncode == -9
    one, two = Gathering(tmp_path, 0), Gathering(tmp_path, 1)
    assert sorted(path.name for path in one.folder.iterdir()) == ["0.sock", "1.sock"]
    again = Gathering(tmp_path, 1)  # while the old one still listens
    two.leave()  # not the newer one's
    assert sorted(path.name for path in one.folder.iterdir()) == ["0.sock", "1.sock"]
    for gathering in (one, two, again):
        gathering.socket.close()
        gathering.leave()
    assert not one.folder.exists()


def test_what_other_runs_left_is_swept_unless_one_of_theirs_still_listens(tmp_path: Path):
    code = "import os, sys; from pathlib import Path; from gristmill.ops.monitor.node import Gathering\n"
    code += "[Gathering(Path(run), 0) for run in sys.argv[1:]]; os.kill(os.getpid(), 9)"
    dead, half, alone = (tmp_path / name for name in ("dead", "half", "alone"))
    assert subprocess.run([sys.executable, "-c", code, dead, half]).returncode == -9
    lives = Gathering(half, 1)  # takes away its dead neighbour, and the dead run
    assert [path.name for path in lives.folder.parent.iterdir()] == [lives.folder.name]
    again = subprocess.run([sys.executable, "-c", code.replace("run), 0", "run), 2"), half])
    assert again.returncode == -9
    other = Gathering(alone, 0)
    assert sorted(path.name for path in lives.folder.iterdir()) == ["1.sock", "2.sock"]  # of a run that still runs
    for gathering in (lives, other):
        gathering.socket.close()
        gathering.leave()
    (lives.folder / "2.sock").unlink()


def _open_to_all(folder: Path) -> None:
    folder.mkdir()
    folder.chmod(0o755)


@pytest.mark.parametrize("spoil", [_open_to_all, lambda folder: folder.symlink_to("/"), lambda folder: folder.touch()])
def test_a_folder_that_others_may_enter_is_refused(tmp_path: Path, short: Path, spoil: Callable[[Path], None]):
    gathering = Gathering(tmp_path, 0)
    gathering.socket.close()
    gathering.leave()
    spoil(gathering.folder)
    with pytest.raises(ExporterError):
        Gathering(tmp_path, 0)
    assert not (gathering.folder / "0.sock").is_socket()


def test_too_long_a_path_is_said_and_costs_only_the_node_page(
    tmp_path: Path, short: Path, monkeypatch: pytest.MonkeyPatch
):
    deep = short / ("d" * 90)
    deep.mkdir()
    monkeypatch.setenv("TMPDIR", str(deep))
    node.tempfile.tempdir = None
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    told: list[str] = []
    serving = serve(CONFIG, Metrics("run", {}).registry, rank=0, world=2, folder=tmp_path, notes=told.append)
    assert serving is not None
    assert "TMPDIR=/tmp" in told[0]
    assert ask(serving)["gristmill_node_rank_up"] == {"0": 1.0}
    serving.close(True)


def registry(value: str, number: float) -> CollectorRegistry:
    made = CollectorRegistry()
    Gauge("gristmill_a", "With 'rank=\"7\"' and a \\ in it.", ["name", "rank", "run"], registry=made).labels(
        value, "9", value
    ).set(number)
    Counter("gristmill_b", "Plain.", registry=made).inc(abs(number))
    Histogram("gristmill_c", "Buckets.", ["name"], registry=made, buckets=(1, 2)).labels(value).observe(number)
    return made


def samples(page: str) -> list[Sample]:
    return [sample for family in text_string_to_metric_families(page) for sample in family.samples]


@settings(max_examples=40)
@given(
    st.lists(
        st.tuples(st.text(st.characters(exclude_categories=["Cs"])), st.floats(-1e9, 1e9)), min_size=1, max_size=4
    ),
)
def test_merging_keeps_every_sample_and_names_its_rank(ranks: list[tuple[str, float]]):
    pages = {3 * i: generate_latest(registry(*of)) for i, of in enumerate(ranks)}
    together = merged({**pages, 99: None}, 5).decode()
    families = list(text_string_to_metric_families(together))
    assert len({family.name for family in families}) == len(families)  # each in one piece
    got: list[Any] = [
        (one.name, sorted(one.labels.items()), one.value) for one in samples(together) if "node" not in one.name
    ]
    wanted: list[Any] = []
    for number, page in pages.items():
        for sample in samples(page.decode()):
            own = {f"exported_{k}" if k in ("rank", "run") else k: v for k, v in sample.labels.items()}
            wanted.append((sample.name, sorted({**own, "rank": str(number)}.items()), sample.value))
    assert sorted(got) == sorted(wanted)
    assert 'gristmill_node_rank_up{rank="99"} 0.0\n' in together


@pytest.mark.system
@pytest.mark.program("promtool")
def test_a_nodes_page_is_what_prometheus_wants():
    metrics = Metrics("run", {"world": 2})
    metrics.observe_step({"loss": 1.0, "batch": 8, "phases": {"student": 0.1}})
    page = merged({0: generate_latest(metrics.registry), 1: generate_latest(metrics.registry), 2: None}, 3)
    said = subprocess.run(["promtool", "check", "metrics"], input=page, capture_output=True)
    assert (said.returncode, said.stdout + said.stderr) == (0, b"")
    assert re.search(rb'gristmill_run_info{rank="0",.*exported_run="run"', page)
