"""A rank that stops or sleeps is named with its stack, and its group ends with STALLED; a slow or ended one is left alone."""

import gc
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from gristmill.ops.watchdog import STALLED, Awake, Watchdog, WatchdogError
from torch._C._distributed_c10d import HashStore, TCPStore

from ..servers import kept_ports
from ..workers import Worker, Workers
from .standstill import STOPS, WORLD

Groups = dict[str, list[Worker]]
SCRIPT = Path(__file__).with_name("standstill.py")
LIMIT = 240  # seconds after which a launch is given up; nothing here is meant to come near it


def until(true: Callable[[], object], what: str) -> None:
    end = time.monotonic() + LIMIT
    while not true():
        assert time.monotonic() < end, f"waited in vain until {what}"
        time.sleep(0.02)


def state(pid: int) -> str:
    """The kernel's letter for a process: T stopped, Z ended and not yet collected; empty once it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):  # the second where it is collected between opening and reading
        return ""


# Whole groups.


# What a fork of a process that has imported torch does to be a rank.
RANK = """
    faulthandler.dump_traceback_later(limit, exit=True)
    os.environ |= environment
    os.dup2(os.open(f"{folder}/{case}.{environment['RANK']}.err", os.O_WRONLY | os.O_CREAT), 2)
    run(Path(folder), case)
"""
IMPORTS = f"""
    import faulthandler, os, sys
    from pathlib import Path
    sys.path.insert(0, {str(SCRIPT.parent)!r})
    from standstill import run
"""


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, subprocess.Popen[str], Groups]]:
    """All at once, since most of their time is waiting: torchrun with two ranks, the second of which stops; and the ranks
    of all cases without torchrun, where rank 0 of each keeps its group's store. Yields their folder, too."""
    folder = tmp_path_factory.mktemp("launched")
    (folder / "torchrun").mkdir()
    under = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [sys.executable, *under, str(SCRIPT), str(folder / "torchrun"), "stopped"]
    with (folder / "torchrun.out").open("w") as out:
        launch = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, text=True)
    with Workers(IMPORTS) as workers, kept_ports(len(WORLD)) as ports:
        groups = {case: fork(workers, folder, case, port) for case, port in zip(WORLD, ports, strict=True)}
        yield folder, launch, groups
    launch.terminate()
    launch.wait()


def fork(workers: Workers, folder: Path, case: str, port: int) -> list[Worker]:
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(WORLD[case])}
    environments = [group | {"RANK": str(rank)} for rank in range(WORLD[case])]
    return [workers.start(RANK, folder=str(folder), case=case, environment=e, limit=LIMIT) for e in environments]


@pytest.fixture(scope="module")
def forked(launched: tuple[Path, subprocess.Popen[str], Groups]) -> tuple[Path, dict[str, list[int]]]:
    """The folder of the cases without torchrun, and the exit codes of each case's ranks; one that stopped itself is
    killed once the others have ended."""
    folder, _, groups = launched
    for case, ranks in groups.items():
        for rank, worker in enumerate(ranks):
            if STOPS.get(case) != rank:
                worker.join()
    for case, rank in STOPS.items():
        groups[case][rank].kill()
    return folder, {case: [worker.join() for worker in ranks] for case, ranks in groups.items()}


def names_the_stopped(text: str, rank: int, stopped: int, pid: int) -> None:
    sentence, table = text.split("\n   rank ")
    assert re.fullmatch(
        rf"watchdog on rank {rank}: rank {stopped} \(host \S+, pid {pid}\) has stopped: no heartbeat for \d+\.\d s; "
        r"last seen in phase data_wait at position 5",
        sentence,
    )
    waiting = "".join(rf"\n +{other} .* waits" for other in range(stopped))
    assert re.search(rf"\n +{stopped} .* stopped{waiting}\nrank {stopped} stood here:\n", table)
    assert "lingering_here" in table.split(f"rank {stopped} stood here:")[1].split("found by rank")[0]
    assert f"rank {rank} (host" in table
    assert "all_reduce" in table.rpartition("stands in")[2]


def test_a_stopped_rank_is_named_and_torchrun_fails(launched: tuple[Path, subprocess.Popen[str], Groups]):
    folder, launch, _ = launched
    ranks = folder / "torchrun"
    until(lambda: len(list(ranks.glob("*.pid"))) == 2 or launch.poll() is not None, "the ranks had come up")
    pids = [int((ranks / f"stopped.{rank}.pid").read_text()) for rank in range(2)]
    try:
        until(lambda: state(pids[0]) in ("", "Z"), "the rank that waits had ended")
        assert state(pids[1]) == "T"
    finally:
        if state(pids[1]):
            os.kill(pids[1], signal.SIGKILL)  # torchrun does it after half a minute
    assert launch.wait(LIMIT) != 0
    log = (folder / "torchrun.out").read_text()
    assert f"exitcode  : {STALLED} " in log[log.index("Root Cause") :], log
    names_the_stopped((ranks / "stopped.0.finding").read_text(), 0, 1, pids[1])
    assert not (ranks / "stopped.1.finding").exists()


def test_a_stopped_rank_is_named_by_all_others_and_shown_by_one(forked: tuple[Path, dict[str, list[int]]]):
    folder, codes = forked
    assert codes["stopped"] == [STALLED, STALLED, -signal.SIGKILL]
    for rank in range(2):
        pid = int((folder / "stopped.2.pid").read_text())
        names_the_stopped((folder / f"stopped.{rank}.finding").read_text(), rank, 2, pid)
    shown = [(folder / f"stopped.{rank}.err").read_text() for rank in range(2)]
    assert all("rank 2 (host" in text for text in shown)
    assert sum("rank 2 stood here" in text for text in shown) == 1


def test_a_sleeping_rank_is_suspected(forked: tuple[Path, dict[str, list[int]]]):
    folder, codes = forked
    assert codes["asleep"] == [STALLED] * 3
    for rank in range(3):
        text = (folder / f"asleep.{rank}.finding").read_text()
        assert re.match(
            rf"watchdog on rank {rank}: rank 1 \(.*\) makes no progress: in phase data_wait at position 5 for \S+ s\n",
            text,
        )
        assert text.count("rank 1 stood here") == 1
        assert "dozing_here" in text.split("rank 1 stood here:")[1]
        assert f"rank {rank}" in (folder / f"asleep.{rank}.err").read_text()


def test_a_store_that_no_longer_answers_names_rank_0(forked: tuple[Path, dict[str, list[int]]]):
    """Here rank 0 keeps the store, so that its stop silences all hearts: calls of the store then never return."""
    folder, codes = forked
    assert codes["first"] == [-signal.SIGKILL, STALLED, STALLED]
    pid = (folder / "first.0.pid").read_text()
    for rank in (1, 2):
        text = (folder / f"first.{rank}.finding").read_text()
        assert re.search(
            rf"the group's store has not answered for .*rank 0 \(host \S+, pid {pid}\), last heard in ", text
        )
        assert "lingering_here" in text.split("rank 0 stood here:")[1]
        assert "all_reduce" in text.rpartition("stands in")[2]


def test_one_process_watches_itself(forked: tuple[Path, dict[str, list[int]]]):
    folder, codes = forked
    assert codes["alone"] == [STALLED]
    text = (folder / "alone.0.finding").read_text()
    assert "rank 0 (" in text
    assert "dozing_here" in text
    assert (folder / "alone.0.err").read_text() == text.removesuffix("\n"), (
        "the terminal and the run's log hold the same"
    )


def test_a_healthy_group_is_left_alone(forked: tuple[Path, dict[str, list[int]]]):
    folder, codes = forked
    assert codes["healthy"] == [0, 0]
    for rank in range(2):  # torch itself complains when the group goes before the watchdog, and the store with it
        assert "watchdog" not in (folder / f"healthy.{rank}.err").read_text()


# Watchdogs in this process, over a store in memory.


class Kennel:
    """Watchdogs of one group with `leave` recorded; the thread of the test is every rank's main thread."""

    def __init__(self, world: int, deadline: float, interval: float):
        self.store, self.world, self.deadline, self.interval = HashStore(), world, deadline, interval
        self.left: list[tuple[int, int]] = []
        self.told: list[str] = []
        self.dogs: dict[int, Watchdog] = {}

    def add(self, rank: int, **other) -> Watchdog:
        dog = Watchdog(
            rank,
            self.world,
            **{
                "store": self.store,
                "deadline": self.deadline,
                "interval": self.interval,
                "report": self.told.append,
                "leave": lambda code: self.left.append((rank, code)),
                **other,
            },
        )
        self.dogs[rank] = dog
        return dog

    def watch(self, seconds: float, *moving: Watchdog) -> None:
        """Let every watchdog that still runs watch for so long by its own clock, while those in `moving` progress."""
        ends = {dog: dog._clock.seconds + seconds for dog in self.dogs.values()}
        end = time.monotonic() + LIMIT
        while any(dog._clock.seconds < ends[dog] and dog._threads[-1].is_alive() for dog in self.dogs.values()):
            assert time.monotonic() < end
            for dog in moving:
                dog.at("moving")
            time.sleep(0.01)


@contextmanager
def kennel(world: int, deadline: float = 0.4) -> Iterator[Kennel]:
    group = Kennel(world, deadline, deadline / 8)
    try:
        yield group
    finally:
        for dog in group.dogs.values():
            dog.close()
            for thread in dog._threads:
                thread.join(LIMIT)  # `close` gives up after seconds
            assert not any(thread.is_alive() for thread in dog._threads)


def test_patience_of_one_rank_excuses_all_and_ends():
    with kennel(2) as group:
        slow, waiting = group.add(0), group.add(1)
        waiting.at("verdict", 8)
        slow.at("save", 8, allow=2.0)
        group.watch(1.6)
        assert not group.left
        until(lambda: len(group.left) == 2, "the allowance was used up")
        assert sorted(group.left) == [(0, STALLED), (1, STALLED)]
        assert "rank 0 (" in group.told[0].splitlines()[0]
        assert "makes no progress: in phase save at position 8" in group.told[0].splitlines()[0]


def test_patience_for_a_block_lasts_as_long_as_the_block():
    with kennel(1) as group:
        dog = group.add(0)
        with dog.patience(30.0):
            group.watch(1.2)
        assert not group.left
        group.watch(30.0)  # cut short by the end of its thread
        assert group.left == [(0, STALLED)]


def test_ranks_hear_each_other_though_their_nodes_restarted_unequally_often(monkeypatch: pytest.MonkeyPatch):
    """torchrun counts restarts by node; what an earlier attempt left is kept apart by the store that `launch` makes."""
    with kennel(2) as group:
        for rank in range(2):
            monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(rank))
            group.add(rank)
        group.watch(1.2, *group.dogs.values())
        assert not group.left


def test_a_neighbour_that_never_comes_is_named():
    with kennel(3) as group:
        group.add(0)
        dog = group.add(2)
        group.watch(30.0, *group.dogs.values())
        assert sorted(group.left) == [(0, STALLED), (2, STALLED)]
        assert "rank 1 was never heard" in group.told[0]
        assert dog._finding in group.told[0], "both tell the same"


def test_a_rank_that_said_goodbye_is_not_missed_but_blamed_by_those_who_wait_for_it():
    with kennel(2) as group:
        stays = group.add(1)
        group.add(0).close()
        group.watch(1.2, stays)
        assert not group.left
        stays.at("verdict", 3)
        group.watch(30.0)
        assert group.left == [(1, STALLED)]
        assert re.match(r"watchdog on rank 1: rank 0 \(.*\) has left, and the others wait for it\n", group.told[0])


@pytest.mark.parametrize("goodbye", [False, True])
def test_a_store_that_hangs_up_is_a_finding_unless_rank_0_had_ended(goodbye: bool):
    master = TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    with kennel(2, 0.4 if goodbye else 2.0) as group:
        clients = [TCPStore("127.0.0.1", master.port, None, False, wait_for_workers=False) for _ in range(2)]
        dog, first = group.add(1, store=clients[1]), group.add(0, store=clients[0])
        until(lambda: dog._first != "-" and first._next != "-", "they had heard each other")
        if goodbye:
            first.close()
            group.watch(0.2, dog)
        else:
            group.watch(1.0)  # the main thread stands still for longer than the store, and is not to blame
        del master
        gc.collect()
        until(lambda: dog._lost, "the store was gone")
        if goodbye:
            group.watch(1.2, dog)
            assert not group.left
        else:
            until(lambda: len(group.left) == 2, "the silence was found")
            assert "the group's store was cut off for" in group.told[0]
            assert "rank 0 stood here" in group.told[0]


def test_a_log_that_hangs_does_not_keep_the_rank():
    with kennel(1) as group:
        never = threading.Event()
        group.add(0, report=lambda _: never.wait(LIMIT))
        group.watch(30.0)
        assert group.left == [(0, STALLED)]
        never.set()


def test_a_watchdog_that_is_off_does_nothing():
    before = set(threading.enumerate())
    with kennel(2) as group:
        dog = group.add(0, deadline=0.0, interval=None)
        dog.at("data_wait", 1)
        with dog.patience(1.0):
            dog.at("verdict")
        assert not set(threading.enumerate()) - before
        assert group.store.num_keys() == 0


@pytest.mark.parametrize(
    "settings", [{"deadline": -1.0}, {"deadline": 1.0, "interval": 0.5}, {"deadline": 1.0, "interval": 0.0}]
)
def test_settings_that_see_nothing_are_refused(settings: dict[str, Any]):
    with pytest.raises(WatchdogError, match="deadline of 0"):
        Watchdog(0, 1, **settings)


def test_time_in_which_the_watcher_was_stopped_does_not_count():
    clock = Awake(0.01)
    time.sleep(0.3)
    assert clock.tick() <= 0.02
    assert clock.tick() <= 0.04
