"""A lost rank, said in one sentence: which one is gone, and what to do.

When a process is killed, the collectives of all others fail, with sixty lines of traceback that name an address and no
rank. So every rank leaves its host and process id in the group's store when it joins, and whoever sees a collective
fail looks which processes of its own host are gone. The first finding stays in the store, for ranks on other hosts.
"""

from __future__ import annotations

import json
import os
import re
import socket
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from ..shards.errors import GristmillError
from .watchdog import STALLED

PATIENCE = 2.0  # seconds in which the one that is gone is looked for; it may be ending just now
NOTHING, ENDED, LEFT = "-", "ended", "left"  # a rank's note: none; it ends by an error of its own; because of another
# What gloo and NCCL say when a peer or the way to it is gone; torch gives some of these a type of their own, not all.
FAILED = re.compile(r"gloo/|nccl|connection (was )?(closed|reset|refused)|broken pipe|timed out", re.IGNORECASE)


class LostRankError(GristmillError):
    """A collective failed: another process or the network is gone. `code`: the command's exit code."""

    def __init__(self, message: str, code: int = STALLED):
        super().__init__(message)
        self.code = code


class Crew:
    """Who is in the group: (host, process id) of each rank. Collective; in a group of one it does nothing."""

    def __init__(self, rank: int, world: int):
        self.rank, self.world = rank, world
        self.members: list[tuple[str, int]] = []
        if world == 1:
            return
        self._store = _get_default_store()
        self._store.set(_key("finding"), NOTHING)
        self._store.set(_key(f"note/{rank}"), NOTHING)
        self._store.set(_key(rank), json.dumps([socket.gethostname(), os.getpid()]))
        self.members = [tuple(json.loads(each)) for each in self._store.multi_get([_key(r) for r in range(world)])]

    def ends(self) -> None:
        """Tell the others that this rank ends by an error of its own, so that none of them calls it lost."""
        self._note(ENDED)

    def explain(self, error: RuntimeError, phase: str, position: int) -> LostRankError | None:
        """The error to raise in place of one that came out of a collective; None if `error` is of another kind."""
        if self.world == 1 or not (isinstance(error, dist.DistError) or FAILED.search(str(error))):
            return None
        self._note(LEFT)
        how, who = self._gone()
        where = f"during {phase} at image {max(position, 0)}"
        if how == ENDED:
            return LostRankError(
                f"{who} ended by an error of its own {where} of this one, and printed it. The last checkpoint is good; "
                "with that mended, start the same command again.",
                code=2,
            )
        if who:
            lost, why = f"{who} was lost {where}", "killed, or out of memory"
        else:
            lost, why = f"another rank was lost, or the network failed, {where}", _short(error)
        return LostRankError(f"{lost}: {why}. The last checkpoint is good; start the same command again.")

    def _note(self, what: str) -> None:
        with suppress(RuntimeError):  # the store went with rank 0 or the launcher
            if self.world > 1:
                self._store.set(_key(f"note/{self.rank}"), what)

    def _gone(self) -> tuple[str, str]:
        """How and which ranks went away, as messages name them; the latter is "" if that cannot be known."""
        until = time.monotonic() + PATIENCE
        notes, found = [NOTHING] * self.world, NOTHING
        host = self.members[self.rank][0]
        while found == NOTHING and time.monotonic() < until:
            with suppress(RuntimeError):
                self._store.set_timeout(timedelta(seconds=PATIENCE))
                notes = [
                    note.decode() for note in self._store.multi_get([_key(f"note/{r}") for r in range(self.world)])
                ]
            here = [r for r, (where, pid) in enumerate(self.members) if where == host and not _alive(pid)]
            ended, lost = [r for r, note in enumerate(notes) if note == ENDED], [r for r in here if notes[r] == NOTHING]
            if ended or lost:
                found = f"{ENDED if ended else LEFT}:{self._named(ended or lost)}"
            with suppress(RuntimeError):
                found = self._store.compare_set(_key("finding"), NOTHING, found).decode()
            time.sleep(0.1)
        how, _, who = found.partition(":")
        return how, who

    def _named(self, ranks: list[int]) -> str:
        return ", ".join(f"rank {r} (host {self.members[r][0]}, pid {self.members[r][1]})" for r in ranks)


def _key(of: int | str) -> str:
    return f"gristmill/crew/{of}"


def _alive(pid: int) -> bool:
    """Whether a process of this host runs; one that has ended but was not waited for yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return not Path("/proc/self").exists()  # where there is no /proc, nothing is known


def _short(error: RuntimeError) -> str:
    """The part of a backend's message that says something: without its source path and advice."""
    text = str(error)
    # NCCL says what it did first, and why that failed last.
    cause = text.partition("Last error:\n")[2].strip() or text.strip()
    first = cause.splitlines()[0] if cause else type(error).__name__
    return re.sub(r"^\[[^]]*\.cc:\d+\] ", "", first).split(". ")[0].rstrip(".")
