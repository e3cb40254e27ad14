"""Processes that die: kill -9 at random moments, and other numbers of ranks from one moment to the next."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from gristmill.shards.manifest import Manifest
from gristmill.shards.quarantine import Quarantine

from ..faulty_http import FaultyServer
from ..workers import Worker, Workers
from .life import consumed, position_of
from .served import publish
from .streams import SLOTS, N, Slot, booked, hold, load, offset_of, place_of, take, write_set

ROOT = Path(__file__).parents[2]
IMPORTS = f"""
    import sys
    sys.path.insert(0, {str(ROOT)!r})
    from tests.faults.life import live
"""
KILLS, UNTIL = 30, 1200


@pytest.fixture(scope="module")
def workers() -> Iterator[Workers]:
    with Workers(IMPORTS) as workers:
        yield workers


def longer(folder: Path, undisturbed, slots: int) -> list[Slot]:
    """A longer piece of the undisturbed stream."""
    with load(write_set(folder), Quarantine(folder / "none.jsonl")) as loader:
        whole = take(loader, slots)
    assert whole[:SLOTS] == undisturbed.plain.slots
    return whole


def spoil(manifest: Manifest, bad: list[int]) -> None:
    for index in bad:
        with manifest.path(place_of(index)[0]).open("r+b") as file:
            file.seek(offset_of(manifest, index) + 40)
            file.write(b"spoiled")


def begun(worker: Worker) -> None:
    while "begun" not in worker.output():
        assert worker.poll() is None, worker.output()
        time.sleep(0.002)


@pytest.mark.fault("kill -9 of the reading process", varies=True)
def test_kills(tmp_path, undisturbed, workers, fault):
    """Thirty lives behind HTTP with a cache that holds half of the shards, damage in some; state after every batch."""
    rng, bad, home = random.Random(30), [5, 40, 77], tmp_path / "run"
    manifest = write_set(tmp_path / "data")
    spoil(manifest, bad)
    home.mkdir()
    got: list[Slot] = []
    again: list[tuple[int, list[Slot]]] = []  # consumed, but the state was not written any more: given once more
    substituted = busy = 0
    with FaultyServer() as server:
        values = {"data": publish(server, manifest.root), "folder": str(home), "until": 10**9, "batch": 8}
        values |= {"cache": int(manifest.shard_bytes[:4].sum()) + 8192, "step": 0.01}
        server.hold = 0.003
        for number in range(KILLS + 1):
            if number < KILLS:
                worker = workers.start("live(**values)", values=values | {"number": number})
                if number % 3:  # every third one anywhere, in opening the data set too
                    begun(worker)
                time.sleep(rng.uniform(0.0, 0.25))
                busy += server.busy > 0
                worker.kill()
                assert worker.poll() == -9, worker.output()
                assert "Error" not in worker.output(), worker.output()
            else:
                server.hold = 0.0
                last = {"number": number, "step": 0.0, "until": max(UNTIL, len(got) + 2 * N)}
                worker = workers.start("live(**values)", values=values | last)
                assert worker.join() == 0, worker.output()
                assert worker.output().endswith("left\n"), worker.output()
            end = position_of(home)
            for position, slots, count in consumed(home, number):
                if position < end:
                    assert position == len(got)
                    got += slots
                    substituted += count
                else:
                    again.append((position, slots))
            assert len(got) == end
    places, whole = {place_of(index) for index in bad}, longer(tmp_path / "whole", undisturbed, len(got))
    found = hold(got, whole, undisturbed.plain.oracle, places)
    for position, slots in again:
        assert slots == got[position : position + len(slots)]
    assert substituted == found.damaged
    booked(Quarantine(home / "quarantine.jsonl"), manifest, places, "checksum")
    assert sum(path.stat().st_size for path in (home / "cache").iterdir() if path.is_file()) <= values["cache"]
    for path in (home / "cache").glob("*.partial"):  # of the last life's prefetch, to be continued by a next one
        path.unlink()
    fault.add(found, KILLS, **{"killed while the server was sending": busy, "batches given once more": len(again)})
    fault.became = "goes on behind the last state, in the same stream"


@pytest.mark.parametrize(
    "disturbed",
    [
        pytest.param(False, marks=pytest.mark.fault("world size 1 -> 2 -> 4 -> 3 in mid-epoch")),
        pytest.param(
            True, marks=pytest.mark.fault("world size 1 -> 2 -> 4 -> 3, with damage and a rank killed", varies=True)
        ),
    ],
    ids=["calm", "disturbed"],
)
def test_world_sizes(tmp_path, undisturbed, workers, fault, disturbed):
    """A process a rank. With faults: damaged samples, and at each change one rank is killed wherever it just is."""
    rng, bad, batch, home = random.Random(9), [8, 33, 64, 90] if disturbed else [], 12, tmp_path / "run"
    manifest = write_set(tmp_path / "data")
    spoil(manifest, bad)
    home.mkdir()
    got: list[Slot] = []
    substituted, state, kills = 0, "", 0
    for number, (world, batches) in enumerate([(1, 5), (2, 6), (4, 7), (3, 8)]):
        until, folder = len(got) + batches * batch, home / str(number)
        folder.mkdir()
        values = {"data": str(manifest.root), "folder": str(folder), "number": number, "batch": batch, "until": until}
        values |= {"world": world, "start": state, "quarantine": str(home / "quarantine.jsonl")}
        values["step"] = 0.02 if disturbed else 0.0
        doomed = rng.randrange(world) if disturbed and number < 3 else None
        # The doomed one would go on for ever, lest it be done before a busy machine comes to kill it.
        ends = [10**9 if rank == doomed else until for rank in range(world)]
        ranks = [
            workers.start("live(**values)", values=values | {"rank": rank, "until": ends[rank]})
            for rank in range(world)
        ]
        if doomed is not None:
            victim, wanted = ranks[doomed], until - rng.randrange(2, batches) * batch
            while position_of(folder, doomed) < wanted:
                assert victim.poll() is None, victim.output()
                time.sleep(0.001)
            time.sleep(rng.uniform(0, 0.02))
            victim.kill()
            assert victim.poll() == -9
            kills += 1
        assert all(rank.join() == 0 and rank.output().endswith("left\n") for rank in ranks if rank.poll() != -9)
        assert not any("Error" in rank.output() for rank in ranks)
        # Ranks of a run step together: it stands where the first of them stopped.
        end, last = min((position_of(folder, rank) or len(got), rank) for rank in range(world))
        assert end == until or (disturbed and number < 3)
        logs = [{at: (slots, count) for at, slots, count in consumed(folder, number, rank)} for rank in range(world)]
        for position in range(len(got), end, batch):
            for log in logs:
                got += log[position][0]
                substituted += log[position][1]
        assert len(got) == end
        state = (folder / f"state-{last}.json").read_text() if position_of(folder, last) else state
    places = {place_of(index) for index in bad}
    # A rank that was alone may have gone far before its kill.
    whole = longer(tmp_path / "whole", undisturbed, max(320, len(got)))
    found = hold(got, whole, undisturbed.plain.oracle, places)
    assert substituted == found.damaged
    booked(Quarantine(home / "quarantine.jsonl"), manifest, places, "checksum", once=False)
    fault.add(found, 3, "one stream, whatever the number of ranks")
    if disturbed:
        fault.add(
            hold([], [], undisturbed.plain.oracle), len(bad) + kills, damaged_samples=len(bad), ranks_killed=kills
        )
