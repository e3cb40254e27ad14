"""Many urls at a time: their order, the window's bounds, what a slow one holds up, and what closing leaves behind."""

import gc
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from gristmill.shards.ingest.candidate import Candidate, Outcome
from gristmill.shards.ingest.errors import IngestError
from gristmill.shards.ingest.fetch import Fetcher

from .web import FORM, Page, Web, candidates, fetchers, meanwhile

QUICK: dict[str, Any] = {"first_pause": 0.01, "longest_pause": 2.0, "timeout": 30.0}
IMAGE = Page()


@pytest.fixture
def web() -> Iterator[Web]:
    with Web({"/a.jpg": IMAGE}, "127.0.0.2") as web:
        yield web


@pytest.fixture
def fetcher() -> Iterator[Callable[..., Fetcher]]:
    """One for which 127.0.0.2 is public, so that no other server is reached."""
    with fetchers("127.0.0.2", **QUICK) as make:
        yield make


def test_what_is_there_already_passes_through_in_its_place(web: Web, fetcher: Callable[..., Fetcher]):
    web.pages["/none"] = Page(404)
    given = candidates(*map(web.url, ("/a.jpg", "/none", "/a.jpg")))
    given.insert(0, Candidate(10, "file", data=b"file"))
    given.insert(2, Candidate(11, "broken", problem=(Outcome.UNREADABLE, "x")))
    given.append(Candidate(12, "both", data=b"file", url=web.url("/a.jpg")))
    found = list(fetcher().fetch(iter(given)))
    assert [one.number for one in found] == [10, 0, 11, 1, 2, 12]
    assert all(one is other for one, other in zip(found, given, strict=True))
    assert found[2].problem == (Outcome.UNREADABLE, "x")
    assert found[5].data == b"file"


def test_files_alone_start_nothing_and_are_drawn_one_by_one(fetcher: Callable[..., Fetcher]):
    drawn = []

    def source() -> Iterator[Candidate]:
        for number in range(5):
            drawn.append(number)
            yield Candidate(number, "file", data=b"x")

    before, one = set(threading.enumerate()), fetcher()
    for number, candidate in enumerate(one.fetch(source())):
        assert candidate.number == number
        assert len(drawn) == number + 1
    assert not set(threading.enumerate()) - before


def test_an_error_of_the_input_comes_after_what_came_before_it(web: Web, fetcher: Callable[..., Fetcher]):
    def source() -> Iterator[Candidate]:
        yield from candidates(web.url("/a.jpg"), web.url("/b"))
        raise ZeroDivisionError

    found = []
    with pytest.raises(ZeroDivisionError):
        found.extend(fetcher().fetch(source()))  # keeps what was yielded
    assert len(found) == 2


def test_the_window_is_bounded_in_number_and_a_slow_url_holds_up_no_more(web: Web, fetcher: Callable[..., Fetcher]):
    web.gate = threading.Event()
    with Web({"/a.jpg": IMAGE}, "127.0.0.2") as fast:
        drawn = 0

        def source() -> Iterator[Candidate]:
            nonlocal drawn
            for number in range(60):
                drawn += 1
                yield Candidate(number, "x", url=(fast if number else web).url("/a.jpg"))

        one = fetcher(window=40)
        found = one.fetch(source())
        with meanwhile(lambda: one.stats.outcomes["fetched"] == 39, web.gate.set):  # all but the slow one
            first = next(found)
        assert first.number == 0
        assert drawn == 40
        assert len(fast.seen) == 39
        assert [candidate.number for candidate in found] == list(range(1, 60))


def test_the_window_is_bounded_in_bytes(web: Web, fetcher: Callable[..., Fetcher]):
    """The oldest stands still while all others want to come: they get no more than their room, and then come again."""
    size = 300_000
    web.gate = threading.Event()
    pages = {"/open": Page(body=lambda: iter([b"x" * size]), length=False), "/length": Page(body=b"x" * size)}
    with Web(pages, "127.0.0.2") as fast:
        urls = [web.url("/a.jpg"), *(fast.url(("/open", "/length")[number % 2]) for number in range(30))]
        one = fetcher(window_bytes=1_000_000, in_flight=31, per_host=31)
        # Three fit, and nobody else gets further while the oldest stands still.
        with meanwhile(lambda: one.stats.outcomes["fetched"] == 3 and one.stats.in_flight == 1, web.gate.set):
            first, *rest = one.fetch(candidates(*urls))
    assert first.data == FORM
    assert [len(candidate.data or b"") for candidate in rest] == 30 * [size]
    assert one.stats.dropped > 0
    assert one.stats.outcomes == {"fetched": 31}
    assert one.stats.bytes < 4 * 30 * size


def test_one_image_larger_than_the_window_still_comes(web: Web, fetcher: Callable[..., Fetcher]):
    web.pages["/big"] = Page(body=b"x" * 500_000)
    web.pages["/open"] = Page(body=lambda: iter([b"x" * 100_000] * 5), length=False)
    found = fetcher(window_bytes=1000).fetch(candidates(*map(web.url, ("/big", "/open", "/a.jpg", "/big"))))
    assert [len(candidate.data or b"") for candidate in found] == [500_000, 500_000, len(FORM), 500_000]


def sockets() -> Counter[str]:
    """What this process has open of them."""
    links = []
    for name in os.listdir("/proc/self/fd"):
        try:
            links.append(os.readlink(f"/proc/self/fd/{name}"))
        except FileNotFoundError:
            continue
    return Counter(link for link in links if link.startswith("socket:") or "eventpoll" in link)


@pytest.mark.parametrize("way", ["to the end", "left in the middle", "closed meanwhile", "never begun"])
def test_closing_leaves_no_thread_and_no_socket(fetcher: Callable[..., Fetcher], way: str):
    with Web({"/a.jpg": IMAGE}, "127.0.0.2") as web:
        web.gate = threading.Event()
        web.gate.set()
        gc.collect()
        before, threads = sockets(), set(threading.enumerate())
        one = fetcher(lambda host, port: ["127.0.0.2"])
        found = one.fetch(candidates(*(web.url("/a.jpg", "a.example") for _ in range(50))))
        if way != "never begun":
            next(found)
        if way == "to the end":
            assert len(list(found)) == 49
        if way == "left in the middle":
            web.gate.clear()
            found.close()  # pyright: ignore[reportAttributeAccessIssue]
            assert one.stats.in_flight == 0
            web.gate.set()
        if way == "closed meanwhile":
            web.gate.clear()
            one.close()
            with pytest.raises(IngestError, match="closed while it fetched"):
                list(found)
            web.gate.set()
        one.close()
        one.close()
        assert one.stats.in_flight == 0
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("gristmill-")]
        # The server's own threads and ends of connections go when it notices.
        until = time.monotonic() + 60
        while (sockets() - before or set(threading.enumerate()) - threads) and time.monotonic() < until:
            time.sleep(0.02)
        assert not sockets() - before
        assert not set(threading.enumerate()) - threads
    with pytest.raises(IngestError, match="make another"):
        list(one.fetch(candidates("http://127.0.0.2/")))


def test_one_fetcher_serves_several_streams(web: Web, fetcher: Callable[..., Fetcher]):
    one = fetcher(window=3)
    streams = [one.fetch(candidates(*(web.url("/a.jpg") for _ in range(10)))) for _ in range(3)]
    for row in zip(*streams, strict=True):
        assert len({candidate.number for candidate in row}) == 1
        assert all(candidate.data == FORM for candidate in row)


def test_a_forked_child_must_make_its_own(web: Web, fetcher: Callable[..., Fetcher], tmp_path: Path):
    one = fetcher(hosts=tmp_path)
    assert next(one.fetch(candidates(web.url("/a.jpg")))).data == FORM
    child = os.fork()
    if not child:
        try:
            list(one.fetch(candidates(web.url("/a.jpg"))))
        except IngestError:
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert next(one.fetch(candidates(web.url("/a.jpg")))).data == FORM
