"""An ingest that is stopped or refused: what was done stays, the same command goes on, and another one is told why not."""

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gristmill.ops.ingest import run_ingest
from gristmill.shards.ingest import IngestConfig, IngestError, ingest

from ...workers import Workers
from .sets import SMALL, scenes, stored, tree

SLOW = """
import os, time

def look(offered):
    time.sleep(0.04 * len(offered))  # long enough for a signal that comes late
    return [None] * len(offered)
"""


def unfinished(sources: list[Path], out: Path, config: IngestConfig = SMALL, after: int = 8, **how: object) -> None:
    """Break an ingest off once so many inputs are decided."""

    def stop(stats: object) -> None:
        if stats.decided >= after:  # pyright: ignore
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ingest(sources, out, config, workers=1, progress=stop, **how)  # pyright: ignore


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_and_the_same_command_goes_on(tmp_path: Path, workers: Workers, number: int) -> None:
    scenes(tmp_path / "in", 40)
    (tmp_path / "slow_filter.py").write_text(SLOW)
    arguments = ["ingest", str(tmp_path / "in"), "--shard-samples", "7", "--workers", "2"]
    arguments += ["--filter", "slow_filter:look", "--json", "--out", str(tmp_path / "out")]
    calm = [*arguments[:-1], str(tmp_path / "calm")]
    assert workers.start("command(arguments, folder)", arguments=calm, folder=str(tmp_path)).join() == 0
    expected = tree(tmp_path / "calm")

    started = workers.start("command(arguments, folder)", arguments=arguments, folder=str(tmp_path))
    while not (tmp_path / "out" / ".ingest" / "000" / "inputs" / "plan.json").exists():
        assert started.poll() is None, started.output()
        time.sleep(0.001)
    os.kill(started.pid, number)
    assert started.join() == 75, started.output()
    assert "interrupted: give the same command again, it goes on where it was" in started.output()
    assert "Traceback" not in started.output()

    again = workers.start("command(arguments, folder)", arguments=arguments, folder=str(tmp_path))
    assert again.join() == 0, again.output()
    assert json.loads(again.output().splitlines()[-1])["outcomes"] == {"kept": 40}
    assert tree(tmp_path / "out") == expected
    assert [path.name for path in (tmp_path / "out").rglob("*.partial")] == []


def test_a_signal_that_comes_while_something_is_thrown_away_is_not_lost(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Python cannot pass on what is raised there, and would print it."""

    class Gone:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGINT)

    def ingests(*_: object, progress: Callable[[Any], None], **__: object) -> None:
        Gone()
        progress(None)

    monkeypatch.setattr("gristmill.ops.ingest.ingest", ingests)
    printed: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", before := printed.append)
    assert run_ingest([], "out", IngestConfig(), as_json=True, metrics_port=None) == 75
    assert "interrupted: give the same command again" in capsys.readouterr().err
    assert not printed
    assert sys.unraisablehook is before


def test_another_command_on_unfinished_work_is_told_what_differs(tmp_path: Path) -> None:
    scenes(tmp_path / "in", 16)
    scenes(tmp_path / "other", 16, 100)
    out = tmp_path / "out"
    unfinished([tmp_path / "in"], out)
    before = tree(out)
    others = [
        ([tmp_path / "in"], {"shard_samples": 8}, "shard_samples was 7 and is 8"),
        ([tmp_path / "in"], {"near": 3}, "near was None and is 3"),
        ([tmp_path / "in"], {"refine": SMALL.refine.model_copy(update={"min_side": 9})}, "min_side"),
        ([tmp_path / "other"], {}, "sources was .*in.* and is .*other"),
    ]
    for sources, update, message in others:
        with pytest.raises(IngestError, match=f"is not finished and was another one .*{message}.*--restart"):
            ingest(sources, out, SMALL.model_copy(update=update), workers=1)
        with pytest.raises(IngestError, match="not finished"):
            ingest(sources, out, SMALL.model_copy(update=update), workers=1, append=True)
        assert tree(out) == before
    # How urls are fetched, and by how many, is nobody's business but the network's.
    fetch = SMALL.fetch.model_copy(update={"tries": 9})
    assert ingest([tmp_path / "in"], out, SMALL.model_copy(update={"fetch": fetch}), workers=2).accepted == 16


@pytest.mark.parametrize("after", [4, 12])
def test_restart_throws_away_what_was_done(tmp_path: Path, after: int) -> None:
    scenes(tmp_path / "in", 16)
    scenes(tmp_path / "other", 9, 100)
    unfinished([tmp_path / "in"], tmp_path / "out", after=after)
    ingest([tmp_path / "other"], tmp_path / "out", SMALL, workers=1, restart=True)
    ingest([tmp_path / "other"], tmp_path / "calm", SMALL, workers=1)
    assert tree(tmp_path / "out") == tree(tmp_path / "calm")


def test_restart_of_an_append_leaves_the_published_data_set(tmp_path: Path) -> None:
    scenes(tmp_path / "in", 16)
    scenes(tmp_path / "more", 20, 200)
    out = tmp_path / "out"
    ingest([tmp_path / "in"], out, SMALL, workers=1)
    published = tree(out)
    unfinished([tmp_path / "more"], out, after=20, append=True)
    unfinished([tmp_path / "more"], out, after=4, append=True, restart=True)
    with pytest.raises(IngestError, match="not finished"):
        ingest([tmp_path / "more"], out, SMALL, workers=1)
    assert published.items() <= tree(out).items()
    assert len(stored(out / "train")) == 16, "readers see the old data set meanwhile"
    ingest([tmp_path / "more"], out, SMALL, workers=1, append=True, restart=True)
    assert len(stored(out / "train")) == 36


def test_inputs_are_frozen(tmp_path: Path) -> None:
    """What comes into a folder meanwhile is no input of this ingest, and what goes is counted."""
    scenes(tmp_path / "in", 16)
    unfinished([tmp_path / "in"], tmp_path / "out")
    scenes(tmp_path / "in", 4, 500)
    sorted((tmp_path / "in").rglob("*.*"))[-3].unlink()
    report = ingest([tmp_path / "in"], tmp_path / "out", SMALL, workers=1)
    assert report.inputs == 16
    assert report.earlier >= 8


def test_two_at_once(tmp_path: Path) -> None:
    scenes(tmp_path / "in", 12)
    refused: list[str] = []

    def meanwhile(stats: object) -> None:
        try:
            ingest([tmp_path / "in"], tmp_path / "out", SMALL, workers=1)
        except IngestError as error:
            refused.append(str(error))

    ingest([tmp_path / "in"], tmp_path / "out", SMALL, workers=1, progress=meanwhile)
    assert refused
    assert set(refused) == {f"another ingest is writing to {tmp_path / 'out'}: wait for it, or name another folder"}
    assert len(stored(tmp_path / "out" / "train")) == 12


def test_a_lost_ledger_is_not_taken_for_a_new_data_set(tmp_path: Path) -> None:
    scenes(tmp_path / "in", 8)
    out = tmp_path / "out"
    ingest([tmp_path / "in"], out, SMALL, workers=1)
    ledger = out / "ledger" / "000.json"
    kept = ledger.read_text()
    ledger.write_text(kept[:40])
    with pytest.raises(IngestError, match=r"000\.json cannot be read"):
        ingest([tmp_path / "in"], out, SMALL, workers=1, append=True)
    shutil.rmtree(out / "ledger")
    shutil.rmtree(out / ".ingest")
    with pytest.raises(IngestError, match="train is there already"):
        ingest([tmp_path / "in"], out, SMALL, workers=1)
