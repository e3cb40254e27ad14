"""How hard one host is asked: turns within a process, slots over all processes of a node, and when to leave it alone.

Turns follow throttle.py (additive increase, multiplicative decrease; Chiu and Jain, 1989), for coroutines of one event
loop. Slots are locks on single bytes of one file: as many bytes a host as it may have requests at once. The locks
belong to the open file (`F_OFD_SETLK`), so that the kernel drops them with the process, however it ends, two fetchers
of one process count as two, and no number of hosts needs a second file.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import struct
import time
from collections import OrderedDict, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

from .. import forks
from ..retry import chance
from .candidate import Outcome
from .errors import IngestError
from .fetch_config import MOST_SLOTS

_REMEMBERED = 4096  # hosts of which a process knows how they cope; those that it is at are beyond that
_POLL = (0.01, 0.5)  # seconds between two looks for a free slot: at first, at most
_FLOCK = "hhqqi4x"  # struct flock of 64-bit Linux


class Slots:
    """`per_host` slots for each host, shared with every process that opens the same folder."""

    def __init__(self, folder: Path, per_host: int) -> None:
        """Raises IngestError where the folder cannot hold such a file."""
        self.per_host = min(per_host, MOST_SLOTS)
        self._file = -1
        self._ours: set[tuple[str, int]] = set()  # the kernel would give us our own once more
        try:
            folder.mkdir(parents=True, exist_ok=True)
            place = folder / "hosts.lock"
            self._file = os.open(place, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            slot = self.take("")
            if slot is not None:
                self.give("", slot)
        except OSError as error:
            self.close()
            raise IngestError(
                f"{folder} cannot hold the locks that limit requests to one host ({error.strerror}): "
                "give a folder on a local disk of this machine"
            ) from error
        forks.tell(self)

    def take(self, host: str) -> int | None:
        """A slot of this host, or None if all are taken. Never waits."""
        first = int(chance() * self.per_host)
        for turn in range(self.per_host):
            slot = (first + turn) % self.per_host
            if (host, slot) in self._ours:
                continue
            try:
                self._lock(fcntl.F_WRLCK, host, slot)
            except (BlockingIOError, PermissionError):
                continue
            self._ours.add((host, slot))
            return slot
        return None

    def give(self, host: str, slot: int) -> None:
        self._ours.discard((host, slot))
        self._lock(fcntl.F_UNLCK, host, slot)

    def _lock(self, kind: int, host: str, slot: int) -> None:
        base = int.from_bytes(blake2b(host.encode(), digest_size=5).digest(), "big") * MOST_SLOTS
        fcntl.fcntl(self._file, fcntl.F_OFD_SETLK, struct.pack(_FLOCK, kind, os.SEEK_SET, base + slot, 1, 0))

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def after_fork(self) -> None:
        """A child that kept the file open would keep the parent's locks after the parent's death."""
        self.close()


@dataclass
class Turn:
    """One request's leave to go out; what is noted on it changes how the host is asked from then on."""

    began: float
    ok: bool = False  # answered well: the limit rises
    throttled: bool = False  # 429 or 503: it falls
    retry_after: float | None = None  # seconds for which the host wants nobody


@dataclass
class Streak:
    """Failures to reach one port of a host, in a row, and until when it is left alone for that."""

    count: int = 0
    why: Outcome = Outcome.NO_CONNECTION
    detail: str = ""
    until: float = 0.0


class Host:
    """One host as one process sees it. Requests get their turn in the order in which they asked for it."""

    def __init__(self, name: str, most: int, slots: Slots | None) -> None:
        self.name, self.most, self._slots = name, most, slots
        self.limit = float(most)
        self.active = 0
        self.not_before = 0.0
        self.streaks: dict[int, Streak] = {}
        self._line: deque[asyncio.Future[None]] = deque()
        self._door = asyncio.Lock()  # one at a time looks for a slot
        self._cut = 0.0
        self._alarm: asyncio.TimerHandle | None = None

    @property
    def idle(self) -> bool:
        return not self.active and not self._line

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[Turn]:
        """Wait for a turn and for a slot, and hold them while the body runs."""
        await self._enter()
        turn, slot = Turn(time.monotonic()), None
        try:
            if self._slots is not None:
                slot = await self._find(self._slots)
            turn.began = time.monotonic()
            yield turn
        finally:
            if self._slots is not None and slot is not None:
                self._slots.give(self.name, slot)
            self._leave(turn)

    def _free(self) -> bool:
        return self.active < int(self.limit) and time.monotonic() >= self.not_before

    async def _enter(self) -> None:
        if not self._line and self._free():
            self.active += 1
            return
        place = asyncio.get_running_loop().create_future()
        self._line.append(place)
        self._grant()  # sets the alarm, if it is the time that has to come
        try:
            await place
        except asyncio.CancelledError:
            if place.done() and not place.cancelled():
                self.active -= 1
                self._grant()
            raise

    def _grant(self) -> None:
        while self._line and self._free():
            place = self._line.popleft()
            if not place.done():
                self.active += 1
                place.set_result(None)
        wait = self.not_before - time.monotonic()
        if self._line and wait > 0 and self._alarm is None:
            self._alarm = asyncio.get_running_loop().call_later(wait, self._wake)

    def _wake(self) -> None:
        self._alarm = None
        self._grant()

    async def _find(self, slots: Slots) -> int:
        pause = _POLL[0]
        async with self._door:
            while (slot := slots.take(self.name)) is None:
                await asyncio.sleep(pause * (0.5 + chance()))
                pause = min(2 * pause, _POLL[1])
        return slot

    def _leave(self, turn: Turn) -> None:
        now = time.monotonic()
        self.active -= 1
        if turn.throttled:
            if turn.began >= self._cut:  # else it was sent before the last cut, which has answered it already
                self.limit = max(1.0, self.limit / 2)
                self._cut = now
            self.not_before = max(self.not_before, now + (turn.retry_after or 0.0))
        elif turn.ok:
            self.limit = min(float(self.most), self.limit + 1 / self.limit)
        self._grant()

    def reached(self, port: int) -> None:
        """The host answered on this port."""
        self.streaks.pop(port, None)

    def missed(self, port: int, why: Outcome, after: int, seconds: float) -> None:
        """It could not be reached; `after` times in a row, and it is left alone for so many seconds."""
        streak = self.streaks.setdefault(port, Streak())
        streak.count, streak.why = streak.count + 1, why
        if streak.count >= after:
            streak.detail = f"host left alone after {streak.count} failures in a row"
            streak.until = time.monotonic() + seconds

    def sent_away(self, port: int, why: Outcome, seconds: float) -> None:
        """It does not want to be asked for so long that nobody waits for it."""
        self.streaks[port] = Streak(0, why, "host wants to be left alone", time.monotonic() + seconds)

    def given_up(self, port: int) -> Streak | None:
        """Why it is left alone now, if it is. When the time is over, a single failure is enough for the next one."""
        streak = self.streaks.get(port)
        return streak if streak is not None and time.monotonic() < streak.until else None


class Hosts:
    """The hosts that a process asks, or asked lately: memory is bounded however many there are."""

    def __init__(self, per_host: int, slots: Slots | None = None) -> None:
        self.per_host, self._slots = per_host, slots
        self._known: OrderedDict[str, Host] = OrderedDict()

    def __getitem__(self, name: str) -> Host:
        host = self._known.get(name)
        if host is None:
            host = self._known[name] = Host(name, self.per_host, self._slots)
            for _ in range(min(4, len(self._known) - _REMEMBERED)):
                old = next(iter(self._known))
                self._known.move_to_end(old)
                if self._known[old].idle and old != name:
                    del self._known[old]
        self._known.move_to_end(name)
        return host

    def __len__(self) -> int:
        return len(self._known)
