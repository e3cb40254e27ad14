"""Groups of ranks that stand still, for test_watchdog: one rank of a case under torchrun, or several cases forked at once.

    torchrun ... standstill.py FOLDER CASE       this process is one rank
    python standstill.py FOLDER CASE...          forks all ranks of all cases; rank 0 of each keeps its group's store

Each rank leaves CASE.RANK.pid, CASE.RANK.finding (what the run's log would get), forked ones CASE.RANK.err; the second
form prints every case's exit codes as JSON.
"""

import json
import os
import signal
import socket
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


def lingering_here() -> None:
    """Stand here long enough to be seen, then stop as a debugger or a scheduler stops a process."""
    time.sleep(4 * INTERVAL)
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
        lingering_here()
    elif case == "alone" or (case == "asleep" and rank == 1):
        dozing_here()
    step(dog, 5, world)
    raise AssertionError("the group stood still, and yet this rank went on")


def fork(folder: Path, cases: list[str]) -> dict[str, list[int]]:
    """Run the cases side by side; a rank that stopped itself is killed once the others have ended."""
    children: dict[tuple[str, int], int] = {}
    codes: dict[str, list[int]] = {case: [0] * WORLD[case] for case in cases}
    try:
        for case in cases:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = probe.getsockname()[1]
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(WORLD[case])}
            for rank in range(WORLD[case]):
                os.environ["RANK"] = str(rank)
                if not (pid := os.fork()):
                    children.clear()
                    with (folder / f"{case}.{rank}.err").open("w") as err:
                        os.dup2(err.fileno(), 2)
                    run(folder, case)
                    sys.exit(0)
                children[case, rank] = pid
        for (case, rank), pid in sorted(children.items(), key=lambda child: STOPS.get(child[0][0]) == child[0][1]):
            if STOPS.get(case) == rank:
                os.kill(pid, signal.SIGKILL)
            codes[case][rank] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            del children[case, rank]
        return codes
    finally:
        for pid in children.values():
            os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    target, names = Path(sys.argv[1]), sys.argv[2:]
    if "RANK" in os.environ:
        run(target, names[0])
    else:
        for number in (signal.SIGALRM, signal.SIGTERM):
            signal.signal(number, lambda *_: sys.exit("a case did not end"))
        signal.alarm(60)
        print(json.dumps(fork(target, names)))
