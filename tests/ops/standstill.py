"""One rank of a group that stands still, for test_watchdog: `standstill.py FOLDER CASE` under torchrun, or `run` in a fork.

Each rank leaves CASE.RANK.pid and CASE.RANK.finding (what the run's log would get).
"""

import os
import signal
import sys
import time
from contextlib import closing
from pathlib import Path

import torch
import torch.distributed as dist
from gristmill.ops.watchdog import Watchdog

DEADLINE, INTERVAL = 2.0, 0.2
WORLD = {"stopped": 3, "asleep": 3, "first": 3, "healthy": 2, "alone": 1}
STOPS = {"stopped": 2, "first": 0}  # the rank that stops itself; under torchrun the last


def lingering_here(dog: Watchdog) -> None:
    """Stand here until seen, then stop as a debugger or a scheduler stops a process."""
    heard = dog._answers
    while dog._answers < heard + 4:  # two rounds leave this place in the store, two more give others time to read it
        time.sleep(INTERVAL / 10)
    os.kill(os.getpid(), signal.SIGSTOP)


def dozing_here() -> None:
    time.sleep(600)


def step(dog: Watchdog, position: int, world: int) -> None:
    dog.at("data_wait", position)
    dog.at("verdict")
    if world > 1:
        dist.all_reduce(torch.ones(8))


def healthy(rank: int, world: int) -> None:
    """Short deadlines kept; one rank that takes its time by leave; two watchdogs in a row; the group gone before one."""
    with closing(Watchdog(rank, world, deadline=DEADLINE, interval=INTERVAL)) as dog:
        for position in range(2000):
            step(dog, position, world)
        if rank == 1:
            with dog.patience(10 * DEADLINE):
                time.sleep(2 * DEADLINE)  # the others wait in the collective for longer than their own deadline
        step(dog, 2000, world)
    dog = Watchdog(rank, world, deadline=DEADLINE, interval=INTERVAL)
    step(dog, 2001, world)
    dist.barrier()
    dist.destroy_process_group()
    time.sleep(0.3)
    dog.close()
    dog.close()


def run(folder: Path, case: str) -> None:
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    (folder / f"{case}.{rank}.writing").write_text(str(os.getpid()))
    (folder / f"{case}.{rank}.writing").rename(folder / f"{case}.{rank}.pid")
    if world > 1:
        dist.init_process_group("gloo")
    if case == "healthy":
        return healthy(rank, world)
    dog = Watchdog(
        rank,
        world,
        deadline=DEADLINE,
        interval=INTERVAL,
        report=lambda text: print(text, file=(folder / f"{case}.{rank}.finding").open("w"), flush=True),
    )
    for position in range(5):
        step(dog, position, world)
    dog.at("data_wait", 5)
    if rank == (world - 1 if case == "stopped" else STOPS.get(case)):
        lingering_here(dog)
    elif case == "alone" or (case == "asleep" and rank == 1):
        dozing_here()
    step(dog, 5, world)
    raise AssertionError("the group stood still, and yet this rank went on")


if __name__ == "__main__":
    run(Path(sys.argv[1]), sys.argv[2])
