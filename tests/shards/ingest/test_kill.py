"""Killed at any moment, it goes on: in the end every byte is as if nothing had happened, and nobody is left behind."""

from __future__ import annotations

import itertools
import os
import random
import re
import shutil
import signal
import time
from contextlib import suppress
from glob import iglob
from pathlib import Path

import pytest
from gristmill.shards.ingest import ingest

from ...workers import Worker, Workers
from .life import CONFIG
from .sets import scenes, tree

KILLS, IMAGES = 20, 200


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes]]:
    """Sources with doubles and damage among them, and what becomes of them undisturbed, in one process."""
    folder = tmp_path_factory.mktemp("made")
    source = folder / "source"
    scenes(source, IMAGES - 20)
    found = sorted(source.rglob("*.*"))
    for number in range(10):
        shutil.copy(found[7 * number], source / f"again-{number}{found[7 * number].suffix}")
        (source / "b" / f"cut-{number}.jpg").write_bytes(found[11 * number].read_bytes()[:200] + bytes([number]))
    ingest([source], folder / "out", CONFIG, workers=1)
    return source, tree(folder / "out")


def busy(lock: Path) -> set[int]:
    """Processes that hold this file open."""
    found = set()
    for link in iglob("/proc/[0-9]*/fd/*"):
        with suppress(OSError):  # it was closed, or its process has ended, since it was listed
            if os.readlink(link) == str(lock):
                found.add(int(link.split("/")[2]))
    return found


def none_left(out: Path) -> None:
    """Workers end by themselves once their coordinator is gone."""
    until = time.monotonic() + 20
    while left := busy(out / ".ingest" / "lock"):
        assert time.monotonic() < until, f"{left} work on"
        time.sleep(0.01)


def through(worker: Worker) -> int:
    """The renamings in a life that came to its end."""
    assert worker.join() == 0, worker.output()
    found = re.search(r"^through (\d+)$", worker.output(), re.MULTILINE)
    assert found, worker.output()
    return int(found[1])


def test_twenty_kills_at_any_moment(tmp_path: Path, workers: Workers, made: tuple[Path, dict[str, bytes]]) -> None:
    """Two worker processes; moments are told by the coordinator's progress, so that a busy machine has no say in them."""
    source, expected = made
    rng = random.Random(7)
    steps = through(workers.start("live(source, out)", source=str(source), out=str(tmp_path / "calm")))
    assert tree(tmp_path / "calm") == expected
    kills, number, with_workers, left_of = 0, 0, 0, []
    while kills < KILLS:
        out = tmp_path / f"killed-{number}"
        number += 1
        for life in itertools.count():
            values = {"source": str(source), "out": str(out), "after": rng.choice([0.0, rng.uniform(0, 0.05)])}
            # Later lives have less to do; the fourth is left alone, for publishing would be all that the next ones meet.
            values["dies_at"] = 0 if life == 3 or kills == KILLS else rng.randint(1, steps - 12 * life)
            complete = (out / "train" / "dataset.json").exists() and not (out / ".ingest" / "000" / "spool").exists()
            worker = workers.start("live(**values)", values=values)
            if worker.join() != -9:
                # Killed in the moment between its last act and its end: there is nothing left to do, and it says so.
                assert not complete or "holds a data set already" in worker.output(), worker.output()
                complete or through(worker)
                break
            kills, with_workers = kills + 1, with_workers + (len(busy(out / ".ingest" / "lock")) > 0)
            work = out / ".ingest" / "000"
            counts = (
                len(list(work.glob(pattern))) for pattern in ("inputs/plan.json", "spool/*.ledger", "rows/*.rows")
            )
            left_of.append((*counts, (out / "train" / "dataset.json").exists()))
            # What has a file's final name is that file, whole, even while the workers of the dead one are still there.
            found = {name: data for name, data in tree(out).items() if name.endswith(".tar")}
            assert found.items() <= expected.items()
            if kills % 4 == 0:
                none_left(out)  # else the next one meets them
        assert tree(out) == expected
        none_left(out)
    assert number >= 4
    assert with_workers >= 3, "killed while there were workers"
    assert len(set(left_of)) >= 8, f"killed at different moments: {left_of}"
    assert any(published for *_, published in left_of), f"and while publishing: {left_of}"


def test_killed_at_every_renaming_of_a_second_ingest(
    tmp_path: Path, workers: Workers, made: tuple[Path, dict[str, bytes]]
) -> None:
    """Before each file gets its name, the manifests among them; then gone on with, or thrown away and begun anew."""
    source, _ = made
    first, second = tmp_path / "first", tmp_path / "second"
    for folder, names in ((first, sorted(source.rglob("*.*"))[::3]), (second, sorted(source.rglob("*.*"))[::9])):
        for path in names:
            (folder / path.parent.name).mkdir(parents=True, exist_ok=True)
            shutil.copy(path, folder / path.parent.name / path.name)
    scenes(second, 20, 1000)
    ingest([first], tmp_path / "base", CONFIG, workers=1)
    before = tree(tmp_path / "base")
    shutil.copytree(tmp_path / "base", tmp_path / "calm")
    ingest([second], tmp_path / "calm", CONFIG, append=True, workers=1)
    expected = tree(tmp_path / "calm")

    shutil.copytree(tmp_path / "base", tmp_path / "warm")
    values = {"source": str(second), "workers": 1, "append": True}
    steps = through(workers.start("live(**values)", values={**values, "out": str(tmp_path / "warm")}))
    assert steps > 25
    for at in [*range(1, steps - 14, 3), *range(steps - 14, steps + 1)]:
        out = tmp_path / f"at-{at}"
        shutil.copytree(tmp_path / "base", out)
        values["out"] = str(out)
        worker = workers.start("live(**values)", values={**values, "dies_at": at})
        assert worker.join() == -9, worker.output()
        if at % 3 == 0:  # thrown away instead, and killed while that goes on
            worker = workers.start("live(**values)", values={**values, "restart": True, "dies_at": 1 + at % 5})
            assert worker.join() == -9, worker.output()
            worker = workers.start("live(**values)", values={**values, "source": str(first), "restart": True})
            through(worker)
            found = tree(out)
            assert {
                name: data for name, data in before.items() if name[:5] in ("train", "probe")
            }.items() <= found.items()
            assert tars(found) == tars(before), "all of the second request is in the first one's shards"
        else:
            through(workers.start("live(**values)", values=values))
            assert tree(out) == expected
        shutil.rmtree(out)


def tars(files: dict[str, bytes]) -> int:
    return len([name for name in files if name.endswith(".tar")])


def test_a_worker_that_is_killed(tmp_path: Path, workers: Workers, made: tuple[Path, dict[str, bytes]]) -> None:
    source, expected = made
    out = tmp_path / "out"
    worker = workers.start("live(source, out)", source=str(source), out=str(out))
    lock = out / ".ingest" / "lock"
    while not (found := busy(lock) - {worker.pid}) or not list(out.glob(".ingest/000/spool/*.parquet")):
        assert worker.poll() is None, worker.output()
    os.kill(found.pop(), signal.SIGKILL)
    assert worker.join() == 1
    assert "IngestError: a worker process was killed" in worker.output()
    assert "start the same command again" in worker.output()
    none_left(out)
    through(workers.start("live(source, out)", source=str(source), out=str(out)))
    assert tree(out) == expected
