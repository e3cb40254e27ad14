"""How hard one host is asked: slots between processes that die with them, turns that follow what the host says."""

import asyncio
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest
from gristmill.shards.ingest.candidate import Outcome
from gristmill.shards.ingest.errors import IngestError
from gristmill.shards.ingest.fetch import FetchConfig, Fetcher
from gristmill.shards.ingest.hosts import Host, Hosts, Slots
from gristmill.shards.ingest.tally import SpaceSaving
from gristmill.shards.ingest.vetting import Vetting

from .web import Page, Web, candidates, meanwhile


def test_slots_are_shared_by_all_that_open_the_folder(tmp_path: Path):
    one, two = Slots(tmp_path / "hosts", 3), Slots(tmp_path / "hosts", 3)
    taken = [one.take("a"), two.take("a"), one.take("a")]
    assert sorted(slot for slot in taken if slot is not None) == [0, 1, 2]
    assert one.take("a") is None
    assert two.take("a") is None
    assert two.take("b") is not None
    assert taken[1] is not None
    two.give("a", taken[1])
    assert one.take("a") == taken[1]
    for number in range(1000):
        one.take(f"host{number}")
    assert os.listdir(tmp_path / "hosts") == ["hosts.lock"]
    assert (tmp_path / "hosts" / "hosts.lock").stat().st_size == 0
    one.close()
    assert len({two.take("a") for _ in range(3)}) == 3
    two.close()


@contextmanager
def child(work: Callable[[], object]) -> Iterator[tuple[int, int]]:
    """Another process that does `work` and ends; its id, and a pipe that `work`'s `repr` can be read from."""
    out, into = os.pipe()
    process = os.fork()
    if not process:
        try:
            os.write(into, repr(work()).encode())
        finally:
            os._exit(0)
    os.close(into)
    try:
        yield process, out
    finally:
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        os.close(out)


def test_slots_do_not_outlive_their_process(tmp_path: Path):
    slots, (told, tell) = Slots(tmp_path, 2), os.pipe()

    def hold() -> None:
        mine = Slots(tmp_path, 2)
        os.write(tell, repr(sorted([mine.take("a"), mine.take("a")], key=str)).encode())
        time.sleep(600)

    with child(hold) as (process, _):
        held = os.read(told, 100)
        free = slots.take("a")
        os.kill(process, signal.SIGKILL)
    assert (held, free) == (b"[0, 1]", None)
    assert sorted(slot for slot in (slots.take("a"), slots.take("a")) if slot is not None) == [0, 1]
    slots.close()
    os.close(told)
    os.close(tell)


def test_a_forked_child_keeps_no_slot(tmp_path: Path):
    slots, other = Slots(tmp_path, 1), Slots(tmp_path, 1)
    assert slots.take("a") == 0
    ready, done = os.pipe(), os.pipe()
    child = os.fork()
    if not child:
        os.write(ready[1], b"x")
        os.read(done[0], 1)
        os._exit(0)
    os.read(ready[0], 1)
    slots.close()
    assert other.take("a") == 0
    os.write(done[1], b"x")
    os.waitpid(child, 0)
    other.close()
    for end in (*ready, *done):
        os.close(end)


def test_a_folder_that_cannot_be_used_is_named(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(IngestError, match=r"file.* cannot hold the locks .*local disk"):
        Fetcher(hosts=tmp_path / "file")
    (tmp_path / "hosts.lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(IngestError, match="cannot hold the locks"):
        Fetcher(hosts=tmp_path)
    assert not (tmp_path / "elsewhere").exists()


def test_all_processes_together_keep_to_the_limit(tmp_path: Path):
    def work() -> int:
        with Fetcher(FetchConfig(per_host=3, allow_private=True), tmp_path) as fetcher:
            return sum(one.data is not None for one in fetcher.fetch(candidates(*[web.url("/a")] * 40)))

    with Web({"/a": Page()}, "127.0.0.2") as web, ExitStack() as stack:
        web.hold = 0.005
        found = [stack.enter_context(child(work))[1] for _ in range(3)]
        assert [os.read(out, 100) for out in found] == [b"40"] * 3
    assert web.peak <= 3
    assert len(web.seen) == 120


def test_one_process_keeps_to_its_limits():
    with (
        Web({"/a": Page()}, "127.0.0.2") as web,
        Web({"/a": Page()}, "127.0.0.3") as other,
        Fetcher(FetchConfig(per_host=4, in_flight=6), vetting=Vetting(allow_private=True)) as fetcher,
    ):
        web.gate, web.hold = threading.Event(), 0.005
        other.gate, other.hold = web.gate, web.hold
        stream = fetcher.fetch(candidates(*(server.url("/a") for _ in range(50) for server in (web, other))))
        with meanwhile(lambda: web.busy + other.busy == 6, web.gate.set):
            assert all(one.data for one in stream)
        assert max(web.peak, other.peak) <= 4
        web.gate.clear()
        stream = fetcher.fetch(candidates(*[web.url("/a")] * 50))
        with meanwhile(lambda: web.busy == 4, web.gate.set):
            assert all(one.data for one in stream)
        assert web.peak == 4


def test_a_host_that_has_enough_gets_less():
    """Half of the limit for each round of 429s, and one more for each round that goes well."""

    async def play() -> None:
        host = Host("a", 8, None)

        async def ask(throttled: bool) -> int:
            async with host.turn() as turn:
                together = host.active
                await asyncio.sleep(0.001)
                turn.throttled, turn.ok = throttled, not throttled
                return together

        assert max(await asyncio.gather(*(ask(False) for _ in range(20)))) == 8
        await asyncio.gather(*(ask(True) for _ in range(8)))
        assert host.limit == 4  # once, for all that were under way
        await ask(True)
        await ask(True)
        await ask(True)
        assert host.limit == 1
        assert max(await asyncio.gather(*(ask(False) for _ in range(3)))) <= 3
        await asyncio.gather(*(ask(False) for _ in range(60)))
        assert host.limit == 8
        assert host.idle

    asyncio.run(play())


def test_turns_come_in_order_and_are_not_lost_with_those_who_wait():
    async def play() -> None:
        host, order = Host("a", 2, None), []

        async def ask(number: int) -> None:
            async with host.turn():
                order.append(number)
                await asyncio.sleep(0.001)

        tasks = [asyncio.create_task(ask(number)) for number in range(30)]
        await asyncio.sleep(0)
        for number in range(2, 30, 3):
            tasks[number].cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert order == [number for number in range(30) if number % 3 != 2]
        assert host.idle
        async with host.turn(), host.turn():
            assert host.active == 2

    asyncio.run(play())


def test_the_time_that_a_host_asked_for_holds_for_all_who_wait():
    async def play() -> None:
        host, loop = Host("a", 4, None), asyncio.get_running_loop()
        async with host.turn() as turn:
            turn.throttled, turn.retry_after = True, 0.3
            begun = loop.time()

        async def ask() -> float:
            async with host.turn():
                return loop.time() - begun

        assert min(await asyncio.gather(*(ask() for _ in range(5)))) >= 0.29

    asyncio.run(play())


def test_memory_of_hosts_is_bounded_and_those_in_use_stay():
    async def play() -> None:
        hosts = Hosts(4)
        busy = hosts["busy"]
        async with busy.turn():
            for number in range(20_000):
                hosts[f"host{number}"].missed(80, Outcome.NO_HOST, 20, 600)
            assert len(hosts) < 5000
            assert hosts["busy"] is busy

    asyncio.run(play())


def test_the_worst_hosts_are_found_in_bounded_memory():
    frequent = SpaceSaving(50)
    for number in range(10_000):
        frequent.add(f"once{number}")
        if number % 10 == 0:
            frequent.add("bad")
        if number % 20 == 0:
            frequent.add("worse" if number < 5000 else "bad")
    word, count, error = frequent.worst()[0]
    assert word == "bad"
    assert count - error <= 1250 <= count
    assert len(frequent.worst(1000)) == 50


def test_a_slot_that_comes_free_elsewhere_is_taken(tmp_path: Path):
    slots = Slots(tmp_path, 1)
    slot = slots.take("127.0.0.2")
    assert slot is not None
    with (
        Web({"/a": Page()}, "127.0.0.2") as web,
        Fetcher(FetchConfig(per_host=1), tmp_path, vetting=Vetting(allow_private=True)) as fetcher,
    ):
        stream = fetcher.fetch(candidates(web.url("/a"), "ftp://x"))
        with meanwhile(lambda: fetcher.stats.outcomes["bad_url"] == 1, lambda: slots.give("127.0.0.2", slot)):
            assert next(stream).data
        assert len(web.seen) == 1
        stream.close()  # pyright: ignore[reportAttributeAccessIssue]
    slots.close()
