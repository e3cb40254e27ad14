"""What goes wrong below HTTP, made to happen: connections that are refused, cut, silent, slow, or not what they seem."""

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from gristmill.shards.ingest.candidate import Outcome
from gristmill.shards.ingest.fetch import Fetcher

from ...faulty_http import FaultyServer
from .web import FORM, Page, Web, candidates, fetchers

BODY = bytes(range(256)) * 200
QUICK: dict[str, Any] = {"first_pause": 0.01, "longest_pause": 1.0}


@pytest.fixture
def server() -> Iterator[FaultyServer]:
    with FaultyServer({"/a.jpg": BODY, "/b.jpg": FORM}) as server:
        yield server


@pytest.fixture
def fetcher() -> Iterator[Callable[..., Fetcher]]:
    with fetchers("127.0.0.1", **QUICK) as make:
        yield make


@pytest.mark.parametrize(
    ("fault", "outcome", "detail"),
    [
        ({"kind": "reset", "after": 1000}, Outcome.CUT, "the body ended too soon"),
        ({"kind": "end", "after": 1000}, Outcome.CUT, "the body ended too soon"),
        ({"kind": "end", "after": len(BODY) - 1}, Outcome.CUT, "the body ended too soon"),
        ({"kind": "hangup"}, Outcome.CUT, "connection lost"),
        ({"kind": "stall", "after": 1000}, Outcome.TIMED_OUT, "no byte for 0.3 s"),
        ({"kind": "stall", "after": 0}, Outcome.TIMED_OUT, "no byte for 0.3 s"),
        ({"kind": "drip", "rate": 200}, Outcome.TIMED_OUT, "bytes/s, less than 1024"),
        ({"kind": "slow_head", "rate": 100}, Outcome.TIMED_OUT, "not done within 0.9 s"),
        ({"kind": "garbage"}, Outcome.SERVER_ERROR, "no proper HTTP answer"),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_what_may_pass_is_tried_again(
    server: FaultyServer, fetcher: Callable[..., Fetcher], fault: dict[str, Any], outcome: Outcome, detail: str
):
    # aiohttp asks once more by itself where a connection was lost before the answer began.
    server.fault(times=8 if fault["kind"] == "hangup" else 2, path="/a.jpg", **fault)
    # A good answer that is late counts as a try, too: so only where time is the matter it is short.
    times = {"stall_timeout": 0.3, "timeout": 0.9} if outcome is Outcome.TIMED_OUT else {}
    one = fetcher(tries=2, **times)
    [failed] = one.fetch(candidates(server.url("/a.jpg")))
    assert failed.problem is not None
    assert failed.problem[0] is outcome
    assert failed.problem[1].endswith(f"{detail} (2 tries)")
    assert one.stats.retries == {outcome.value: 1}
    [good] = one.fetch(candidates(server.url("/b.jpg")))
    assert good.data == FORM
    server.heal()
    server.fault(times=1, **fault)
    [again] = fetcher(tries=9, **times).fetch(candidates(server.url("/a.jpg")))
    assert again.data == BODY
    assert one.stats.odd == {}


def test_a_length_that_is_too_short_spoils_no_other_answer(server: FaultyServer, fetcher: Callable[..., Fetcher]):
    """Bytes beyond the announced ones are not the image's, and not the next answer's either."""
    server.fault("short_header", path="/a.jpg", after=len(BODY))
    server.fault("short_header", path="/a.jpg", after=10)
    one = fetcher(per_host=1)
    found = [candidate.data for candidate in one.fetch(candidates(*map(server.url, 2 * ["/a.jpg", "/b.jpg"])))]
    assert found[1] == found[3] == FORM
    assert found[0] is not None
    assert found[2] is not None
    assert BODY.startswith(found[0])
    assert BODY.startswith(found[2])


def test_a_chunked_body(server: FaultyServer, fetcher: Callable[..., Fetcher]):
    server.lengths = False
    [found] = fetcher().fetch(candidates(server.url("/a.jpg")))
    assert found.data == BODY


@contextmanager
def answering(answer: bytes) -> Iterator[str]:
    """A server that says the same to everybody; the url of it."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                    with connection:
                        connection.recv(65536)
                        connection.sendall(answer)
                except OSError:
                    if listener.fileno() < 0:
                        return

        thread = Thread(target=serve, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            listener.close()
            thread.join()


@pytest.mark.parametrize(
    ("answer", "outcome"),
    [
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nabcde\r\nCANARY\r\n", Outcome.SERVER_ERROR),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nabcde\r\n5\r\nabc", Outcome.CUT),
        (b"HTTP/1.1 200 OK\r\nX: " + b"CANARY" * 4000 + b"\r\n\r\n", Outcome.SERVER_ERROR),
        (b"HTTP/1.1 200 OK\r\n" + b"X: CANARY\r\n" * 3000 + b"\r\n", Outcome.SERVER_ERROR),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabcd", Outcome.SERVER_ERROR),
        (b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\nabcd", Outcome.SERVER_ERROR),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999999999999999\r\n\r\nabcd", Outcome.SERVER_ERROR),
        (b"HTTP/1.1 302 Found\r\nLocation: \xff\xfe http://[\r\nContent-Length: 0\r\n\r\n", Outcome.REDIRECTS),
        (b"HTTP/1.1 999 CANARY\r\nContent-Length: 0\r\n\r\n", Outcome.SERVER_ERROR),
        (b"SSH-2.0-CANARY\r\n", Outcome.SERVER_ERROR),
        (b"\x16\x03\x01\x00", Outcome.SERVER_ERROR),
        (b"", Outcome.CUT),
    ],
)
def test_odd_answers(fetcher: Callable[..., Fetcher], answer: bytes, outcome: Outcome):
    with answering(answer) as url:
        one = fetcher(tries=1)
        [found] = one.fetch(candidates(url))
    assert found.problem is not None
    assert found.problem[0] is outcome
    assert "CANARY" not in repr(found) + found.problem[1]
    assert one.stats.odd == {}


def test_a_certificate_has_to_be_right(
    fetcher: Callable[..., Fetcher], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with FaultyServer({"/a.jpg": BODY}, tls=tmp_path / "tls.pem") as server:
        port, lookup = server.port, lambda *_: ["127.0.0.1"]
        monkeypatch.delenv("SSL_CERT_FILE", raising=False)
        one = fetcher(lookup)
        [stranger] = one.fetch(candidates(server.url("/a.jpg")))
        assert stranger.problem == (Outcome.NO_CONNECTION, "its certificate is not to be trusted")
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "tls.pem"))
        urls = [server.url("/a.jpg"), f"https://localhost:{port}/a.jpg", f"https://other.example:{port}/a.jpg"]
        address, name, other = fetcher(lookup).fetch(candidates(*urls))
        assert address.data == name.data == BODY
        assert other.problem == (Outcome.NO_CONNECTION, "its certificate is not to be trusted")
        [plain] = fetcher(tries=1).fetch(candidates(f"http://127.0.0.1:{port}/a.jpg"))
        assert plain.problem is not None
        assert plain.problem[0] is Outcome.CUT
    with Web({}, "127.0.0.1") as web:
        [found] = fetcher().fetch(candidates(f"https://127.0.0.1:{web.port}/"))
        assert found.problem == (Outcome.NO_CONNECTION, "encryption failed")


def test_a_host_that_takes_no_connection(fetcher: Callable[..., Fetcher]):
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full:
        waiting = []
        for _ in range(4):  # until its queue is full, and the kernel answers nobody
            waiting.append(socket.socket())
            waiting[-1].setblocking(False)
            waiting[-1].connect_ex(full.getsockname())
        [found] = fetcher(connect_timeout=0.3, tries=2).fetch(candidates(f"http://127.0.0.1:{full.getsockname()[1]}/"))
        for one in waiting:
            one.close()
    assert found.problem == (Outcome.NO_CONNECTION, "no connection within 0.3 s (2 tries)")


def test_a_dead_host_is_given_up_and_its_neighbour_is_not(
    server: FaultyServer, fetcher: Callable[..., Fetcher], closed_port: int
):
    dead = f"http://127.0.0.1:{closed_port}/a"
    one = fetcher(give_up_after=10, per_host=4)
    found = list(one.fetch(candidates(*(dead if number % 2 else server.url("/b.jpg") for number in range(400)))))
    assert all(candidate.data == FORM for candidate in found[::2])
    assert {candidate.problem[0] for candidate in found[1::2] if candidate.problem} == {Outcome.NO_CONNECTION}
    said = [candidate.problem[1] for candidate in found[1::2] if candidate.problem]
    assert said[-1].startswith("host left alone after 1")
    assert one.stats.requests - 200 <= 10 + 4  # those that were under way when the tenth failed
    assert one.stats.hosts.worst() == [("127.0.0.1", 200, 0)]


def test_a_host_that_is_back_is_asked_again(fetcher: Callable[..., Fetcher], closed_port: int):
    one = fetcher(give_up_after=2, give_up_seconds=0.2, tries=1, per_host=1)
    url = f"http://127.0.0.1:{closed_port}/a.jpg"
    assert [bool(found.problem) for found in one.fetch(candidates(url, url, url))] == [True, True, True]
    assert one.stats.requests == 2
    with Web({"/a.jpg": Page(body=BODY)}, "127.0.0.1", closed_port):
        found = list(one.fetch(candidates(*[url] * 20)))
        while found[-1].data is None:
            found = list(one.fetch(candidates(url)))
        assert found[-1].data == BODY


def test_successes_in_between_keep_a_host(server: FaultyServer, fetcher: Callable[..., Fetcher]):
    """Every second request stalls: never twice in a row, so the host is not given up."""
    for number in range(6):
        server.files[f"/bad{number}.jpg"] = BODY
        server.fault("slow_head", path=f"/bad{number}.jpg", rate=1.0)
    urls = [server.url(path) for number in range(6) for path in (f"/bad{number}.jpg", "/b.jpg")]
    one = fetcher(give_up_after=2, tries=1, per_host=1, stall_timeout=0.5)
    found = list(one.fetch(candidates(*urls)))
    assert all(candidate.data == FORM for candidate in found[1::2])
    assert {candidate.problem[0] for candidate in found[::2] if candidate.problem} == {Outcome.TIMED_OUT}
