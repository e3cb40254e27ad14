"""The watchdog: names the rank for which all others wait, shows where it stands, and ends the group so that it restarts.

A stopped or stuck rank is seen by nobody else: the timeout given to a group does not reach DeepSpeed's second group
(half an hour), and gloo waits on a living connection. So every rank puts a heartbeat with its main thread's stack into
the group's store, and watches two things: the next rank of a ring (constant cost at any size), and its own main thread.
Two daemon threads: one talks to the store, whose calls never time out once its host stands still; the other watches the
first. Ages are counted on the watcher's own clock and only while it runs itself: clock skew and a suspended job are harmless.
"""

from __future__ import annotations

import atexit
import math
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from typing import Any

from ..shards.errors import GristmillError
from .heart import UNSET, Heart, describe, render, stack_of, stand

STALLED = 76  # exit code of every rank of a group that stood still: start the same command again (train.REQUEUE is 75)
COLLECTIVES = (
    "/torch/distributed/",
    "/deepspeed/comm/",
    "/deepspeed/runtime/",
    "/ops/ranks.py",  # finish
)  # a stack that ends in one of these waits for other ranks


class WatchdogError(GristmillError):
    """Settings with which nothing could be watched."""


class Awake:
    """Seconds during which this thread really ran: a gap between two ticks counts as two intervals at most."""

    def __init__(self, interval: float):
        self.seconds = 0.0
        self._most, self._last = 2 * interval, time.monotonic()

    def tick(self) -> float:
        now = time.monotonic()
        self.seconds += min(now - self._last, self._most)
        self._last = now
        return self.seconds


class Watchdog:
    """Watches this rank's main thread (the one that makes it) and, in a group, the next rank.

    deadline: seconds without progress or heartbeat after which the group ends; 0 switches everything off. interval:
    seconds between heartbeats (default: an eighth of the deadline, 5 at most). store: a client of the group's store that
    nobody else uses; default: a clone of the default group's. report: gets the finding as text, on every rank, from
    another thread. meeting: phases in which a rank only waits for others. leave: gets STALLED.

    Close it before the group is left. A call that keeps the interpreter's lock for a deadline looks like a stopped rank.
    """

    def __init__(
        self,
        rank: int,
        world: int,
        *,
        store: Any = None,
        deadline: float,
        interval: float | None = None,
        grace: float | None = None,
        report: Callable[[str], None] | None = None,
        leave: Callable[[int], object] = os._exit,
        meeting: Collection[str] = ("verdict", "barrier"),
    ):
        interval = min(5.0, deadline / 8) if interval is None else interval
        if deadline and not 0 < interval <= deadline / 4:
            raise WatchdogError(
                f"a watchdog with a deadline of {deadline:g} s and a heartbeat every {interval:g} s sees nothing: "
                f"give a deadline of 0 (off) or more, and an interval of a quarter of it at most"
            )
        self.rank, self.world, self.deadline, self.interval = rank, world, deadline, interval
        self.grace = 2 * interval if grace is None else grace
        self._report, self._leave, self._meeting = report, leave, frozenset(meeting)
        self._main, self._host, self._pid = threading.get_ident(), socket.gethostname(), os.getpid()
        self._mark: tuple[int, str, int, float] = (0, "start", -1, 0.0)  # count, phase, position, allow
        self._patience = 0.0
        self._clock, self._beat, self._answers = Awake(interval), 0, 0
        self._seen, self._moved, self._excused, self._heard = self._mark, 0.0, -math.inf, 0.0
        self._next, self._first, self._asked = UNSET, UNSET, UNSET  # as last read: two hearts, who asked for patience
        self._next_left = False
        self._finding, self._mine, self._lost = "", False, False
        self._closing, self._ending = threading.Event(), threading.Lock()
        self._store: Any = None
        self._threads: list[threading.Thread] = []
        if not deadline:
            return
        if world > 1:
            from torch.distributed.distributed_c10d import _get_default_store  # torch takes seconds: only for a group

            self._store = _get_default_store().clone() if store is None else store
            self._store.set_timeout(timedelta(seconds=deadline))
            self._read = [self._key(key) for key in ((rank + 1) % world, 0, "patience", "finding")]
            for key in self._read:
                self._store.compare_set(key, "", UNSET)
            self._threads.append(threading.Thread(target=self._watch_store, name="watchdog-store", daemon=True))
        self._threads.append(threading.Thread(target=self._pulse, name="watchdog", daemon=True))
        for thread in self._threads:
            thread.start()
        # A thread that comes back from the store into an ending interpreter aborts the process.
        atexit.register(self.close)

    def at(self, phase: str, position: int = -1, *, allow: float = 0.0) -> None:
        """Say that the main thread got as far as `phase`. position: images decided so far; -1: as before.

        allow: seconds that this phase may take, where that is more than the deadline. Costs no more than a tuple.
        """
        count, _, before, _ = self._mark
        if position < 0 or position == before:
            self._mark = (count + 1, phase, before, allow)
        else:
            self._mark = (0, phase, position, allow)

    def here(self) -> tuple[str, int]:
        """Phase and position of the last `at`."""
        return self._mark[1], self._mark[2]

    @contextmanager
    def patience(self, seconds: float) -> Iterator[None]:
        """Allow `seconds` between two calls of `at` inside: a first compilation, a probe, a slow disk.

        The ranks that wait for this one meanwhile are excused, too. A heart that no longer beats is not.
        """
        before, self._patience = self._patience, max(self._patience, seconds)
        self.at(self._mark[1])
        try:
            yield
        finally:
            self.at(self._mark[1])
            self._patience = before

    def close(self) -> None:
        """Say goodbye and end the threads; again does nothing. Does not take back a finding that stands."""
        self._closing.set()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(self.grace + 5.0)  # not for ever: a store that stands still must not hold up the end
        atexit.unregister(self.close)
        if not any(thread.is_alive() for thread in self._threads):
            self._store = None

    # The thread that talks to the store.

    def _pulse(self) -> None:
        self._tick()
        while not self._closing.wait(self.interval):
            self._tick()
            if not self._finding and self._trouble():
                self._inquire()
            if self._finding:
                return self._end(self._finding, self._mine)
        self._talk(lambda: self._store.set(self._key(self.rank), self._heart(left=True).to_json()))

    def _tick(self) -> None:
        now = self._clock.tick()
        self._beat += 1
        if self._seen is not self._mark:
            self._seen, self._moved = self._mark, now
        self._talk(self._exchange)

    def _exchange(self) -> None:
        """One round with the store: own heart out; the next rank's, rank 0's and the notes to everybody in."""
        now, store = self._clock.seconds, self._store
        if self.deadline < self._limit() and now - self._moved <= self._limit():
            store.set(self._key("patience"), f"{self.rank} {self._beat}")
        store.set(self._key(self.rank), self._heart().to_json())
        following, first, patience, finding = (raw.decode() for raw in store.multi_get(self._read))
        if following != self._next:
            self._next, self._heard = following, now
            self._next_left = getattr(Heart.from_json(following), "left", False)
        if patience != self._asked:
            self._asked, self._excused = patience, now
        self._first = first
        if finding != UNSET:
            self._finding = finding
        self._answers += 1

    def _trouble(self) -> bool:
        """Whether the next rank is silent, or this one's main thread stands still and nobody has asked for patience."""
        if self._lost and not self._ended_well():
            return False  # the other thread tells what this comes from
        now = self._clock.seconds
        stuck = now - self._moved > self._limit() and now - self._excused > self.deadline
        return stuck or self._silence() > self.deadline

    def _inquire(self) -> None:
        """Look at all hearts twice, and write down who is to blame, unless somebody has or the trouble went away."""
        before = self._talk(self._gather) or {self.rank: self._heart()}  # alone, or the store is gone: only this one
        for _ in range(max(3, math.ceil(self.deadline / 4 / self.interval))):
            if self._closing.wait(self.interval):
                return
            self._tick()
            if self._finding:
                return
        after = self._talk(self._gather) or {self.rank: self._heart()}
        if not self._trouble():
            return
        text = describe(before, after) + f"\nfound by rank {self.rank}"
        stored = self._talk(lambda: self._store.compare_set(self._key("finding"), UNSET, text))
        self._finding = stored.decode() if stored else text
        self._mine = self._finding == text

    def _gather(self) -> dict[int, Heart | None]:
        keys, store = [self._key(rank) for rank in range(self.world)], self._store
        there = keys if store.check(keys) else [key for key in keys if store.check([key])]
        raw = dict(zip(there, store.multi_get(there), strict=True))
        hearts = {rank: Heart.from_json(raw[key].decode()) if key in raw else None for rank, key in enumerate(keys)}
        return hearts | {self.rank: self._heart()}

    def _talk(self, what: Callable[[], Any]) -> Any:
        """Do something with the store; None without one, or once its host has hung up (it never comes back)."""
        if self._store is None or self._lost:
            return None
        try:
            return what()
        except RuntimeError:  # torch.distributed.DistError is one
            self._lost = True
            return None

    # The thread that watches the first.

    def _watch_store(self) -> None:
        clock, answers, last = Awake(self.interval), -1, 0.0
        while not self._closing.wait(self.interval) and not self._ending.locked():
            now = clock.tick()
            if answers != self._answers:
                answers, last = self._answers, now
            elif self._ended_well():
                return
            elif now - last > self.deadline:
                first = Heart.from_json(self._first)
                how = "was cut off" if self._lost else "has not answered"
                who = f"{first.who()}, last heard in {first.where()}" if first else "rank 0, which was never heard"
                text = (
                    f"the group's store {how} for {now - last:.1f} s. It is kept by {who}, or by the "
                    f"launcher on the same host: that process or host has stopped"
                )
                text += f"\nrank 0 stood here:\n{render(first.stack)}" if first else ""
                return self._end(text, mine=True, unseen=now - last)

    def _end(self, finding: str, mine: bool, unseen: float = 0.0) -> None:
        """Tell everybody who listens, then leave. A disk or a terminal that does not answer cannot hold this up."""
        if not self._ending.acquire(blocking=False):
            return
        heart = self._heart()
        own = stand(replace(heart, idle=heart.idle + unseen))  # unseen: seconds since the first thread last looked
        if mine and render(heart.stack) in finding:
            own = own.splitlines()[0]
        full = f"watchdog on rank {self.rank}: {finding}\n{own}\nEnding with code {STALLED}.\n"
        brief = f"watchdog on rank {self.rank}: {finding.splitlines()[0]}\n{own}\n"  # the finder prints the rest
        sinks: list[tuple[Any, str]] = [(sys.stderr.write, full if mine else brief), (self._report, full)]
        for sink, text in sinks[: 1 + bool(self._report)]:
            threading.Thread(target=sink, args=(text,), daemon=True).start()
        time.sleep(self.grace)  # meanwhile the other ranks read the finding
        self._leave(STALLED)

    # What both know.

    def _key(self, of: int | str) -> str:
        return f"gristmill/heart/{of}"

    def _limit(self) -> float:
        return max(self.deadline, self._seen[3], self._patience)

    def _ended_well(self) -> bool:
        """Whether the store hung up because rank 0 came to its end."""
        return self._lost and getattr(Heart.from_json(self._first), "left", False)

    def _silence(self) -> float:
        """Seconds for which the next rank was not heard; 0 after its goodbye, or where nobody can be heard."""
        deaf = self._store is None or self._lost or self._next_left
        return 0.0 if deaf else self._clock.seconds - self._heard

    def _heart(self, left: bool = False) -> Heart:
        mark = self._mark
        count, phase, position, _ = mark
        stack = stack_of(self._main)
        waits = phase in self._meeting or (bool(stack) and any(part in stack[-1][0] for part in COLLECTIVES))
        idle = self._clock.seconds - self._moved if mark is self._seen else 0.0
        known = (self.rank, self._host, self._pid, self._beat, phase, position, count)
        return Heart(*known, idle, self._silence(), waits, left, stack)
