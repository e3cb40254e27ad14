"""Candidates with urls in, the same candidates with bytes or with what went wrong out, in the same order.

A window of them is on its way at a time: bounded in number, so that one slow url holds up no more than the window, and
in bytes (room.py), so that memory stays flat. Requests run in an event loop on a thread of its own; the caller's thread
draws from the input and waits for the oldest. How hard a host is asked is decided in hosts.py, what may be connected to
in vetting.py, what an answer means in exchange.py; here is the life of one url: tries, pauses, redirects.
"""

from __future__ import annotations

import asyncio
import threading
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import CancelledError, Future
from pathlib import Path

from .. import forks
from ..retry import RetryPolicy, next_pause
from .candidate import Candidate, Outcome
from .errors import IngestError
from .exchange import Exchange, Failed
from .fetch_config import FetchConfig
from .hosts import Host, Hosts, Slots
from .looping import LoopThread
from .room import Hold, NoRoom, Room
from .tally import FetchStats
from .target import BadUrl, Target, parse
from .vetting import Vetting

__all__ = ["FetchConfig", "FetchStats", "Fetcher"]

Result = tuple[bytes | None, tuple[Outcome, str] | None]  # data or problem


class _Run:
    """What one call of `fetch` has in hand. Belongs to the loop's thread, but for reading `room.taken`."""

    def __init__(self, config: FetchConfig) -> None:
        self.room = Room(config.window_bytes)
        self.hosts: Counter[str] = Counter()  # urls on their way, by host
        self.tasks: set[asyncio.Task[Result]] = set()

    async def end(self) -> None:
        """Call off what is left, and wait until it is gone."""
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)


class Fetcher:
    """Fetches for one process. `hosts` is a folder shared by all that fetch on this machine, and holds their locks.

    `stats` may be read at any time. To be closed, or used as a context manager; starts its thread at the first url.
    `vetting` is for tests. Raises IngestError where `hosts` cannot be used.
    """

    def __init__(
        self, config: FetchConfig | None = None, hosts: Path | None = None, *, vetting: Vetting | None = None
    ) -> None:
        self.config = config or FetchConfig()
        self.stats = FetchStats()
        self._vetting = vetting or Vetting(allow_private=self.config.allow_private)
        self._folder = hosts
        self._pauses = RetryPolicy(first_pause=self.config.first_pause, longest_pause=self.config.longest_pause)
        self._slots = Slots(hosts, self.config.per_host) if hosts is not None else None
        self._lock = threading.Lock()
        self._loop: LoopThread | None = None
        self._closed = False
        forks.tell(self)

    def fetch(self, candidates: Iterable[Candidate]) -> Iterator[Candidate]:
        """Each of `candidates`, in order: with `data`, or with a `problem`. What has either already is handed through.

        What iterating over `candidates` raises is raised here, after all that came before it. Raises IngestError if the
        fetcher is closed meanwhile.
        """
        config, run, loop = self.config, _Run(self.config), None
        source, drawn, raised = iter(candidates), False, None
        line: deque[tuple[Candidate, Future[Result] | None, int]] = deque()
        place = 0
        try:
            while True:
                while not drawn and (not line or (len(line) < config.window and run.room.taken < run.room.most)):
                    try:
                        candidate = next(source)
                    except StopIteration:
                        drawn = True
                        break
                    except Exception as error:
                        drawn, raised = True, error
                        break
                    if candidate.url is None or candidate.data is not None or candidate.problem is not None:
                        if not line:
                            yield candidate
                            continue
                        size = len(candidate.data or b"")
                        if loop is not None:
                            loop.call(run.room.give, -size)
                        line.append((candidate, None, size))
                    else:
                        loop = loop or self._begin()
                        line.append((candidate, loop.start(self._one(run, place, candidate.url)), 0))
                    place += 1
                if not line:
                    break
                candidate, future, size = line[0]
                if future is not None:
                    try:
                        candidate.data, candidate.problem = future.result()
                    except CancelledError:
                        raise IngestError(
                            "the fetcher was closed while it fetched: close it after the last one"
                        ) from None
                    size = len(candidate.data or b"")
                line.popleft()
                if loop is not None:
                    loop.call(run.room.advance, place - len(line), size)
                yield candidate
            if raised is not None:
                raise raised
        finally:
            if loop is not None and line:
                loop.finish(run.end())

    def _begin(self) -> LoopThread:
        with self._lock:
            if self._closed:
                raise IngestError("the fetcher is closed: make another one")
            if self._loop is None:
                self._loop = LoopThread("gristmill-fetch", self._odd)
                self._loop.start(self._open()).result()
            return self._loop

    def _odd(self, name: str) -> None:
        self.stats.odd[name] += 1

    async def _open(self) -> None:
        self._exchange = Exchange(self.config, self._vetting, self.stats)
        self._hosts = Hosts(self.config.per_host, self._slots)
        self._flights = asyncio.Semaphore(self.config.in_flight)

    async def _one(self, run: _Run, place: int, url: str) -> Result:
        """The life of one url."""
        task = asyncio.current_task()
        assert task is not None
        run.tasks.add(task)
        task.add_done_callback(run.tasks.discard)
        hold = Hold(run.room, place)
        try:
            target = parse(url)
        except BadUrl as error:
            return self._ended(Outcome.BAD_URL, str(error), "")
        run.hosts[target.host] += 1
        try:
            data = await self._tries(run, target, hold)
            hold.settle(len(data))  # given back when it leaves the window
            run.room.learn(len(data))
            self.stats.outcomes["fetched"] += 1
            return data, None
        except Failed as failed:
            hold.settle(0)
            return self._ended(failed.outcome, failed.detail, target.host)
        finally:
            run.hosts[target.host] -= 1
            if not run.hosts[target.host]:
                del run.hosts[target.host]

    def _ended(self, outcome: Outcome, detail: str, host: str) -> Result:
        self.stats.outcomes[outcome.value] += 1
        if host and outcome not in (Outcome.OPTED_OUT, Outcome.TOO_LARGE):
            self.stats.hosts.add(host)
        return None, (outcome, detail)

    async def _tries(self, run: _Run, target: Target, hold: Hold) -> bytes:
        pause, tried = 0.0, 0
        while True:
            try:
                return await self._follow(run, target, hold)
            except NoRoom as none:
                await hold.wait(none.size)
                continue
            except Failed as failed:
                tried += 1
                if not failed.again or tried >= self.config.tries:
                    if tried > 1:
                        failed.detail += f" ({tried} tries)"
                    raise
                self.stats.retries[failed.outcome.value] += 1
                pause = next_pause(self._pauses, pause)
                # All who were sent away are told the same moment: come back a little later, each at his own.
                wait = pause if failed.retry_after is None else failed.retry_after + min(pause, 1.0)
            await asyncio.sleep(wait)

    async def _follow(self, run: _Run, target: Target, hold: Hold) -> bytes:
        keep, seen = target.host, {target.url}
        for hop in range(self.config.redirects + 1):
            try:
                answer = await self._hop(target, hold, keep=run.hosts[keep] > 1)
            except Failed as failed:
                if hop:
                    failed.detail += f", after {hop} redirect{'s' * (hop > 1)}"
                raise
            if isinstance(answer, bytes):
                return answer
            target = answer
            if target.url in seen:
                raise Failed(Outcome.REDIRECTS, f"in a circle of {hop + 1}")
            seen.add(target.url)
        raise Failed(Outcome.REDIRECTS, f"more than {self.config.redirects}")

    async def _hop(self, target: Target, hold: Hold, *, keep: bool) -> bytes | Target:
        host = self._hosts[target.host]
        self._heed(host, target.port)
        async with host.turn() as turn, self._flights:
            self._heed(host, target.port)  # it may have been given up in the meantime
            if not hold.size:
                hold.begin()
            return await self._exchange.ask(target, host, turn, hold, keep=keep)

    @staticmethod
    def _heed(host: Host, port: int) -> None:
        streak = host.given_up(port)
        if streak is not None:
            raise Failed(streak.why, streak.detail)

    def close(self) -> None:
        """Call off what is on its way, and close connections and locks. Waits for lookups of names that have begun."""
        with self._lock:
            loop, self._loop, self._closed = self._loop, None, True
        if loop is not None:
            loop.close(self._exchange.close())
        if self._slots is not None:
            self._slots.close()

    def __enter__(self) -> Fetcher:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def after_fork(self) -> None:
        """The thread is not in the child, and the parent's connections are not the child's."""
        self._lock, self._loop, self._closed = threading.Lock(), None, True
