"""`gristmill status` against real exporters: what it shows of one rank and of many, and what it says when nobody answers."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from gristmill.ops.monitor.asking import Tls, fetch
from gristmill.ops.monitor.catalogue import CATALOGUE
from gristmill.ops.monitor.exporter import Exporter
from gristmill.ops.monitor.node import merged
from gristmill.ops.monitor.status import SilentError, StatusError, show_status
from gristmill.ops.monitor.tls import Secured

from .processes import NOW, Process
from .served import Stranger, Two, as_now, shown, target, two_ranks
from .test_tls import SERVER, Certificates

ROOT = Path(__file__).parents[2]
KEYS = {
    "": "schema state runs unchecked prometheus",
    "run": "run facts notes state window_seconds ranks progress bottleneck flow straggler phases loss weights signs "
    "schedules teacher guard memories probes data disks machine checkpoint goodput alerts verdict",
    "run.ranks": "expected answering list",
    "run.ranks.list": "rank node url answers why step last_step_age_seconds own_seconds data_wait_ratio limited_by",
    "run.progress": "ratio step position images images_per_second step_seconds eta_seconds last_step_age_seconds",
    "run.bottleneck": "stage rank words remedy data_wait_ratio",
    "run.straggler": "rank node ratio own_seconds median_seconds because slow",
    "run.guard": "bad_steps bad_in_a_row rollbacks clipped",
    "run.teacher": "updates distance_ratio",
    "run.data": "samples bytes substituted removed quarantined retries throttled_seconds cache",
    "run.data.cache": "hit_ratio evicted_bytes bytes limit_bytes",
    "run.machine": "resident_bytes cuda_bytes",
    "run.checkpoint": "age_seconds age_images every_images bytes ok failed",
    "run.goodput": "ratio seconds attempts interruptions",
}


@pytest.fixture
def two(tmp_path: Path) -> Iterator[Two]:
    with two_ranks(tmp_path / "first") as found:
        yield found


def said(capsys: pytest.CaptureFixture[str], *targets: object, **how: Any) -> tuple[int, Any]:
    """(exit code, the JSON)."""

    def refuse(word: str) -> float:
        raise AssertionError(f"{word} is no JSON")

    code = show_status([str(target) for target in targets], as_json=True, **{"over": 0.0, **how})
    return code, json.loads(capsys.readouterr().out, parse_constant=refuse)


def test_every_metric_that_is_read_exists():
    """A metric that is renamed must not leave a blank in the view."""
    known = {row.metric for row in CATALOGUE} | {"gristmill_run_info", "gristmill_step_seconds_sum"}
    files = [
        path for path in (ROOT / "ops" / "monitor").glob("*.py") if path.stem in ("summary", "flow", "view", "scene")
    ]
    files += (ROOT / "ops" / "monitor").glob("conditions*.py")
    read = {name for path in files for name in re.findall(r'"(gristmill_\w*[a-z])"', path.read_text())}
    assert len(read) > 30
    assert not read - known
    assert not {name for name, _ in (*Process().gauges, *Process().rates)} - known - {
        "process_start_time_seconds", "process_resident_memory_bytes",
    }  # fmt: skip


def test_two_ranks_of_a_run_folder(two: Two, capsys: pytest.CaptureFixture[str]):
    folder, *_ = two
    assert show_status([str(folder)], once=True, over=0.0) == 0
    page = capsys.readouterr().out
    for text in (
        *(
            "OK",
            "first",
            "training",
            "2 of 2 ranks",
            "recipe recipe",
            "50%",
            "image 500,000 of 1,000,000",
            "64 images/s",
        ),
        *("0.5 s/step", "2.2 h left", "limited by the step itself", "coarse_knn", "instance.queue", "age 8.5 of 8.5"),
        *(
            "disk of checkpoints",
            "372.5 GiB free",
            "goodput",
            "90%",
            "s old, 10,000 images ago (one every 40,000)",
            "80% hits",
        ),
    ):
        assert text in page, text
    order = [page.index(stage) for stage in ("▸ storage", "▸ reader", "encoded │", "▸ augment", "ready │", "▸ step")]
    assert order == sorted(order)
    assert "\x1b" not in page  # no terminal: no colours


def test_the_json_is_as_documented(two: Two, capsys: pytest.CaptureFixture[str]):
    folder, processes, _ = two
    processes[0].say("gristmill_loss", float("nan"), objective="group")
    code, answer = said(capsys, folder)
    assert code == 0
    (run,) = answer["runs"]
    for place, keys in KEYS.items():
        found: Any = {"run": run} if place else answer
        for part in filter(None, place.split(".")):
            found = found[part]
        found = found[0] if isinstance(found, list) else found
        assert " ".join(found) == keys, place
    assert [part["stage"] for part in run["flow"]] == ["storage", "reader", "encoded", "augment", "ready", "step"]
    assert (answer["schema"], answer["state"], run["verdict"], run["state"]) == (1, "ok", "ok", "training")
    assert run["loss"]["group"] is None
    assert run["loss"]["instance"] == 4.0
    assert run["progress"]["images_per_second"] == pytest.approx(64)
    assert run["progress"]["eta_seconds"] == pytest.approx(5e5 / 64)
    assert run["bottleneck"]["stage"] == "consumer"
    assert run["memories"]["instance.queue"]["expected_age"] == 8.5
    assert run["data"]["samples"] == pytest.approx(2 * 64 * NOW)
    assert run["goodput"]["ratio"] == pytest.approx(0.9)
    assert "GristmillLossSpike" in answer["unchecked"]


def test_one_rank_is_slow_and_one_is_dead(two: Two, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder, (first, slow), exporters = two
    dead = as_now(Process(2, world=3))
    with Exporter(dead.registry(), 0) as gone:
        target(folder / "targets", dead, gone.port)
    for process in (first, slow):
        process.say("gristmill_world_size", 3)
    slow.labels["node"] = "b"
    target(folder / "targets", slow, exporters[1].port)
    slow.grow("gristmill_rank_own_seconds_total", 1.3)
    slow.grow("gristmill_step_phase_seconds_total", 0.9, phase="data_wait")
    slow.grow("gristmill_step_phase_seconds_total", 0.1, phase="backward")
    slow.grow("gristmill_buffer_starved_seconds_total", 0.9, buffer="ready")
    slow.grow("gristmill_buffer_blocked_seconds_total", 0.0, buffer="ready")
    slow.grow("gristmill_buffer_starved_seconds_total", 0.9, buffer="encoded")
    slow.grow("gristmill_storage_seconds_total", 0.18)
    code, answer = said(capsys, folder)
    (run,) = answer["runs"]
    assert code == 0
    assert [(rank["rank"], rank["answers"]) for rank in run["ranks"]["list"]] == [
        ("0", True),
        ("1", True),
        ("2", False),
    ]
    assert "refused" in run["ranks"]["list"][2]["why"].lower()
    assert run["straggler"] | {"own_seconds": 0, "median_seconds": 0} == {
        "rank": "1", "node": "b", "ratio": pytest.approx(1.3 / 0.42), "own_seconds": 0, "median_seconds": 0,
        "because": "its data", "slow": True,
    }  # fmt: skip
    assert (run["bottleneck"]["stage"], run["bottleneck"]["rank"]) == ("storage", "1")
    held = {alert["name"]: alert["masked_by"] for alert in run["alerts"]}
    assert held == {"GristmillStarvedByStorage": None, "GristmillExporterDown": None}
    assert (run["verdict"], answer["state"]) == ("warn", "warn")
    page = shown(answer)
    assert "data path of rank 1, which waits longest" in page
    assert "slowest: rank 1 on b, 3.10 × the median, by its data" in page
    assert "rank 2 does not answer at http://127.0.0.1" in page
    assert "limited by the storage" in page
    assert "2 of 3 ranks" in page
    assert show_status([str(folder)], check=True, over=0.0) == 0  # nobody is woken for that
    first.say("gristmill_memory_nonfinite_rows", 2, memory="instance.queue")
    time.sleep(0.3)  # the exporter serves a page again for a while
    assert show_status([str(folder)], check=True, over=0.0) == 1
    assert "PAGE" in capsys.readouterr().out


def test_a_node_speaks_for_its_ranks(capsys: pytest.CaptureFixture[str]):
    pages: dict[int, bytes | None] = {rank: as_now(Process(rank)).text().encode() for rank in range(2)}
    with Stranger(200, merged({**pages, 2: None}, 3)) as url:
        code, answer = said(capsys, url.replace("/metrics", "/node"))
    assert code == 0
    found = {rank["rank"]: (rank["answers"], rank["why"]) for rank in answer["runs"][0]["ranks"]["list"]}
    assert found == {"0": (True, None), "1": (True, None), "2": (False, "its node says that it does not answer")}


def test_several_runs_and_all_ways_to_name_them(two: Two, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder, _, exporters = two
    other = as_now(Process(0, world=1, run="second"))
    other.gauges.pop(next(key for key in other.gauges if key[0] == "gristmill_run_info"))
    other.say("gristmill_run_info", 1, run="other")
    with Exporter(other.registry(), 0) as exporter:
        code, answer = said(capsys, folder, exporter.url)
        assert [run["run"] for run in answer["runs"]] == ["first", "other"]
        assert code == 0
        shared = tmp_path / "shared"
        shared.mkdir()
        target(shared, other, exporter.port)
        (shared / "first.json").write_text((folder / "targets" / "00001.json").read_text())
        _, answer = said(capsys, shared)
        assert sorted(run["run"] for run in answer["runs"]) == ["first", "second"]
        _, answer = said(capsys, shared / "first.json")
        assert [rank["rank"] for run in answer["runs"] for rank in run["ranks"]["list"]] == ["1"]
    urls = [f"127.0.0.1:{exporters[0].port}", exporters[1].url, f"127.0.0.1:{exporters[1].port}/metrics"]
    code, answer = said(capsys, *urls)
    (run,) = answer["runs"]
    assert len(run["ranks"]["list"]) == 2  # the same one twice is one
    code, answer = said(capsys, folder, exporter.url)  # the other one is gone now
    assert code == 1
    assert [run["verdict"] for run in answer["runs"]] == ["ok", "silent"]
    code, answer = said(capsys, *urls, exporter.url)
    assert (code, len(answer["runs"][0]["ranks"]["list"])) == (0, 3)  # it may be a rank of the only run


def test_the_newest_run_is_the_one_that_is_meant(
    two: Two, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    folder, *_ = two
    monkeypatch.chdir(folder.parent)
    old = folder.parent / "runs" / "old"
    old.mkdir(parents=True)
    (old / "metrics.url").write_text("http://127.0.0.1:1/metrics\n")
    os.utime(old / "metrics.url", (1, 1))
    assert said(capsys)[1]["runs"][0]["run"] == "first"
    monkeypatch.chdir(folder)
    assert said(capsys)[1]["runs"][0]["run"] == "first"


def test_mistakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refused(*targets: str) -> str:
        with pytest.raises(StatusError) as error:
            show_status(targets, once=True)
        assert getattr(error.value, "code", 2) == 2
        return str(error.value)

    assert "no run folder" in refused(str(tmp_path / "nowhere"))
    assert "metrics.port=off" in refused(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert "gristmill status RUN" in refused()
    (tmp_path / "list.json").write_text("[{")
    assert "lists no targets" in refused(str(tmp_path / "list.json"))
    for text in ("", "file:///etc/passwd\n", "\x1b[2J"):
        (tmp_path / "metrics.url").write_text(text)
        assert "holds no URL" in refused(str(tmp_path))


@pytest.mark.parametrize("body", [b"hello", b"\xff\xfe", b"go_goroutines 8\n", b"x" * (5 << 20), b"a{ 1\n"])
def test_what_is_no_gristmill_is_refused(body: bytes):
    with Stranger(200, body) as url, pytest.raises(StatusError, match="is no Gristmill run") as error:
        show_status([url], once=True)
    assert not isinstance(error.value, SilentError)
    with Stranger(200, body) as url, pytest.raises(StatusError, match="is no Gristmill run"):
        show_status([url], as_json=True)


def test_a_run_that_is_gone_is_told(two: Two, capsys: pytest.CaptureFixture[str]):
    folder, _, exporters = two
    for exporter in exporters:
        exporter.close()
    with pytest.raises(
        SilentError, match=r"nothing answers at http://127.0.0.1:\d+/metrics.*nor at 1 more.*has ended"
    ) as e:
        show_status([str(folder)], once=True)
    assert e.value.code == 1
    (folder / "attempts.jsonl").write_text('{"what": "ended", "why": "DataLossError: gone"}\n')
    with pytest.raises(SilentError, match=r"its last attempt ended \(DataLossError: gone\)"):
        show_status([str(folder)], once=True)
    code, answer = said(capsys, folder)
    assert (code, answer["state"]) == (1, "silent")
    assert answer["runs"][0]["alerts"][0]["name"] == "GristmillRanksMissing"
    for file in [*(folder / "targets").iterdir(), folder / "metrics.url"]:
        file.unlink()
    (folder / "attempts.jsonl").write_text(
        '{"what": "began", "position": 0}\n{"what": "ended", "why": "done\\u001b"}\n'
    )
    with pytest.raises(SilentError, match=r"does not run: its last attempt ended \(done\?\)"):
        show_status([str(folder)], once=True)


def test_errors_and_silence_of_a_stranger(monkeypatch: pytest.MonkeyPatch):
    with Stranger(404, b"") as url, pytest.raises(SilentError, match=r"nothing answers.*404"):
        fetch(url)
    with pytest.raises(SilentError, match="nothing answers"):
        fetch("http://127.0.0.1:99999/metrics")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        thread = threading.Thread(target=lambda: server.accept()[0].sendall(b"220 mail ready\r\n"))
        thread.start()
        with pytest.raises(SilentError, match="nothing answers"):
            fetch(f"http://127.0.0.1:{port}/metrics")
        thread.join()
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    with Exporter(Process().registry(), 0) as exporter:
        assert fetch(exporter.url).info()["run"] == "recipe"


def test_another_run_on_the_same_port_is_told(two: Two, capsys: pytest.CaptureFixture[str]):
    folder, processes, _ = two
    for process in processes:
        process.say("process_start_time_seconds", time.time() + 60)
    assert show_status([str(folder)], once=True, over=0.0) == 0
    assert "another run" in capsys.readouterr().out


def test_it_starts_without_torch(two: Two):
    """Within a second on a quiet machine; counted in modules, since the machine may be busy."""
    code = (
        "import sys; from gristmill.ops.cli import main\n"
        f"try: main(['status', {str(two[0])!r}, '--once', '--over', '0'])\n"
        "except SystemExit as ended: assert not ended.code\n"
        "print(sorted({'torch', 'nvidia', 'deepspeed', 'timm', 'pandas', 'matplotlib'} & set(sys.modules)))"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.splitlines()[-1] == "[]"


def alert(name: str, state: str, severity: str, run: str = "first") -> dict[str, Any]:
    labels = {"alertname": name, "severity": severity, "run": run, "node": "a\x1b"}
    return {"labels": labels, "annotations": {"summary": "It\x07 is so."}, "state": state, "activeAt": "2026-01-01"}


def prometheus(*alerts: dict[str, Any]) -> Stranger:
    return Stranger(200, json.dumps({"status": "success", "data": {"alerts": alerts}}).encode())


def test_alerts_that_prometheus_has(two: Two, capsys: pytest.CaptureFixture[str]):
    found = [alert("GristmillLossSpike", "firing", "page"), alert("GristmillStraggler", "pending", "warn")]
    with prometheus(*found, alert("SomebodyElses", "firing", "page")) as url:
        place = url.removesuffix("/metrics")
        code, answer = said(capsys, two[0], prometheus=place, check=True)
        assert show_status([str(two[0])], once=True, over=0.0, prometheus=place) == 0
    assert code == 1
    assert answer["state"] == "page"
    assert [(one["name"], one["state"]) for one in answer["prometheus"]] == [
        ("GristmillLossSpike", "firing"), ("GristmillStraggler", "pending"),
    ]  # fmt: skip
    page = capsys.readouterr().out
    assert "firing" in page
    assert "run first" in page
    assert "node a?" in page
    for body in (b"[]", b"no json", b'{"data": {"alerts": [{}]}}'):
        with Stranger(200, body) as url, pytest.raises(StatusError, match="is no Prometheus"):
            show_status([str(two[0])], once=True, over=0.0, prometheus=url)
    with pytest.raises(StatusError, match=r"no Prometheus answers.*--prometheus"):
        show_status([str(two[0])], once=True, over=0.0, prometheus="127.0.0.1:1")


def test_alerts_of_other_runs_do_not_count(two: Two, capsys: pytest.CaptureFixture[str]):
    folder, _, exporters = two
    with prometheus(alert("GristmillLossSpike", "firing", "page", run="other")) as url:
        place = url.removesuffix("/metrics")
        code, answer = said(capsys, folder, prometheus=place, check=True)
        assert (code, answer["state"]) == (0, "ok")
        assert [one["labels"]["run"] for one in answer["prometheus"]] == ["other"]  # shown all the same
        # A URL does not say what Prometheus calls its run: then all of them count.
        code, answer = said(capsys, exporters[0].url, prometheus=place, check=True)
        assert (code, answer["state"]) == (1, "page")


def test_over_https(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    if not shutil.which("openssl"):
        pytest.skip("needs openssl: `make system` installs it")
    made = Certificates(tmp_path)
    made.make("ca", None, "-nodes", "-addext", "basicConstraints=critical,CA:TRUE")
    made.make("server", "ca", *SERVER)
    made.make("client", "ca", "-nodes")
    process = as_now(Process(0, world=1))
    folder = tmp_path / "targets"
    folder.mkdir()
    with Exporter(process.registry(), 0, tls=Secured(made.config()).context) as exporter:
        target(folder, process, exporter.port, __scheme__="https")
        known = Tls(made["ca.pem"], made["client.pem"], made["client.key"])
        assert said(capsys, exporter.url, tls=known)[0] == 0
        assert said(capsys, folder, tls=known)[0] == 0
        for tls in (Tls(), Tls(made["ca.pem"])):
            code, answer = said(capsys, exporter.url, tls=tls)
            assert (code, answer["state"]) == (1, "silent")
        assert "certificate" in said(capsys, exporter.url)[1]["runs"][0]["ranks"]["list"][0]["why"].lower()
