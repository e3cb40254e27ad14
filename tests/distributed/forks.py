"""Ranks as forks of one process: what they all import is imported once, so that a launch costs tenths of a second.

For tests that need several launches in a row, where torchrun would spend ten seconds of each on imports. A fork is a
process of its own all the same, with its own runs, threads and group, and can be killed. The parent stands for
torchrun's agent: it keeps the store at which the ranks meet, and ends those that wait for one that died.
"""

import faulthandler
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable

import torch.distributed as dist

GRACE = 10.0  # seconds that the other ranks have once one has ended badly
PORT = 8  # bytes that tell a rank the store's port


def forked(world: int, work: Callable[[], None], timeout: float = 400.0) -> list[int]:
    """`work()` on `world` new processes that find each other as under torchrun; their exit codes, -9 for kill -9.

    A rank that is not done after `timeout` seconds prints where it stands and ends with code 1. This process must have no
    threads of its own, and be in no group.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    reading, writing = os.pipe()
    running: dict[int, int] = {}  # process -> rank
    for rank in range(world):
        child = os.fork()
        if not child:
            os.close(writing)
            _be(rank, world, reading, work, timeout)
        running[child] = rank
    os.close(reading)
    # Only now, since the store has a thread, and threads do not survive a fork.
    store = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)  # pyright: ignore[reportPrivateImportUsage]
    os.write(writing, f"{store.port:{PORT}}".encode() * world)
    os.close(writing)
    codes = [0] * world
    failed = 0.0
    while running:
        for child in list(running):
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                codes[running.pop(child)] = os.waitstatus_to_exitcode(status)
                failed = failed or time.monotonic() * any(codes)
            elif failed and time.monotonic() - failed > GRACE:
                os.kill(child, signal.SIGKILL)
        time.sleep(0.02)
    return codes


def _be(rank: int, world: int, reading: int, work: Callable[[], None], timeout: float) -> None:
    """A rank's whole life; does not return."""
    code = 1
    try:
        faulthandler.dump_traceback_later(timeout, exit=True)
        port = os.read(reading, PORT).decode().strip()
        os.environ |= {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world),
            "GROUP_WORLD_SIZE": "1", "TORCHELASTIC_RESTART_COUNT": "0", "TORCHELASTIC_USE_AGENT_STORE": "True",
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
        }  # fmt: skip
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # the parent's clean-up is not this process's
