"""`gristmill status` against real training: two ranks that stand at a known step, and then one of them alone."""

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gristmill.ops.monitor.status import SilentError, show_status
from gristmill.shards.demo import make_demo_images
from gristmill.shards.ingest import ingest_folder

from ..command import FORK, MINUTES
from ..servers import kept_ports
from ..workers import Worker, Workers

HELD = 160  # the image before which both stand


def start(workers: Workers, folder: Path, data: Path, rank: int, port: int) -> Worker:
    environment = {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GROUP_WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    settings = ["images=960", "probes.at=[]", "metrics.port=0", "checkpoint.every=64"]
    arguments = ["train", "demo", "--tiny", "--out", folder, f"data={data}", *settings]
    hold = [HELD, str(folder.with_suffix(f".there{rank}")), str(folder.with_suffix(".go")), MINUTES]
    code = "os.environ.update(environment)\n" + FORK
    files = [str(folder.with_suffix(f".{name}{rank}")) for name in ("out", "err")]
    given = list(map(str, arguments))
    return workers.start(code, environment=environment, arguments=given, files=files, hold=hold)


def until(happened: Callable[[], Any], *ranks: Worker) -> None:
    end = time.monotonic() + MINUTES
    while not happened():
        assert time.monotonic() < end
        assert all(rank.poll() is None for rank in ranks)
        time.sleep(0.05)


def answer(capsys: pytest.CaptureFixture[str], folder: Path) -> tuple[int, dict[str, Any]]:
    code = show_status([str(folder)], as_json=True, over=0.0)
    (run,) = json.loads(capsys.readouterr().out)["runs"]
    return code, run


def test_two_ranks_that_train_and_one_that_hangs(workers: Workers, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    make_demo_images(tmp_path / "images", images=96, size=32, instances=3)
    ingest_folder(tmp_path / "images", tmp_path / "data", shard_samples=25)
    folder = tmp_path / "run"
    with kept_ports(1) as [port]:
        ranks = [start(workers, folder, tmp_path / "data" / "train", rank, port) for rank in range(2)]
        until(lambda: all(folder.with_suffix(f".there{rank}").exists() for rank in range(2)), *ranks)

    code, run = answer(capsys, folder)
    assert (code, run["run"], run["facts"]["recipe"], run["state"]) == (0, "run", "demo", "training")
    assert [(one["rank"], one["answers"], one["step"]) for one in run["ranks"]["list"]] == [
        ("0", True, HELD / 32),
        ("1", True, HELD / 32),
    ]
    assert run["ranks"]["expected"] == 2
    assert (run["progress"]["position"], run["progress"]["images"]) == (HELD, 960)
    assert run["progress"]["images_per_second"] > 0
    assert {"instance", "local_group", "group"} <= set(run["loss"])
    assert run["memories"]["instance.queue"]["fill"] > 0
    assert run["checkpoint"]["every_images"] == 64
    assert run["checkpoint"]["ok"] >= 1
    assert run["disks"]["run"]["size_bytes"] > run["disks"]["run"]["free_bytes"] > 0
    assert run["data"]["samples"] > HELD / 2
    assert all(part.get("capacity", 1) for part in run["flow"])
    assert run["straggler"]["rank"] in ("0", "1")
    assert not [alert for alert in run["alerts"] if alert["severity"] == "page"]
    assert show_status([str(folder)], once=True, over=0.0) == 0
    assert "2 of 2 ranks" in capsys.readouterr().out

    os.kill(ranks[1].pid, signal.SIGSTOP)
    code, run = answer(capsys, folder)
    assert code == 0
    assert [one["answers"] for one in run["ranks"]["list"]] == [True, False]
    assert "timed out" in run["ranks"]["list"][1]["why"]
    assert "GristmillExporterDown" in {alert["name"] for alert in run["alerts"]}
    for rank in ranks:
        rank.kill()
    with pytest.raises(SilentError, match="nothing answers"):
        show_status([str(folder)], once=True)
