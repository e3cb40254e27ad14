"""What becomes of a url, with real servers: statuses, redirects, refusals, robots, sizes, secrets."""

import itertools
import logging
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from gristmill.shards.ingest.candidate import Outcome
from gristmill.shards.ingest.fetch import Fetcher

from .web import FORM, Page, Web, candidates, fetchers

QUICK: dict[str, Any] = {"first_pause": 0.01, "longest_pause": 2.0, "timeout": 10.0}
IMAGE = Page()


@pytest.fixture
def web() -> Iterator[Web]:
    with Web({"/a.jpg": IMAGE}, "127.0.0.2") as web:
        yield web


@pytest.fixture
def other() -> Iterator[Web]:
    """A server on an address that is not allowed; whatever reaches it is a breach."""
    with Web({"/a.jpg": IMAGE, "/b.jpg": IMAGE}, "127.0.0.1") as web:
        yield web


@pytest.fixture
def fetcher() -> Iterator[Callable[..., Fetcher]]:
    """One for which 127.0.0.2 is public, and 127.0.0.1 is not."""
    with fetchers("127.0.0.2", **QUICK) as make:
        yield make


def problems(fetcher: Fetcher, *urls: str) -> list[tuple[Outcome, str] | None]:
    found = list(fetcher.fetch(candidates(*urls)))
    assert [one.number for one in found] == list(range(len(urls)))
    assert all((one.data is None) == (one.problem is not None) for one in found)
    return [one.problem for one in found]


def test_bytes_come_as_they_are(web: Web, fetcher: Callable[..., Fetcher]):
    web.pages["/gzip.jpg"] = Page(headers=(("Content-Encoding", "gzip"),), body=b"\x1f\x8b bomb")
    web.pages["/open.jpg"] = Page(length=False)
    web.pages["/empty.jpg"] = Page(body=b"")
    urls = [web.url(path) for path in ("/a.jpg", "/a.jpg?x=%20y&z#part", "/gzip.jpg", "/open.jpg", "/empty.jpg")]
    one = fetcher()
    assert [found.data for found in one.fetch(candidates(*urls))] == [FORM, FORM, b"\x1f\x8b bomb", FORM, b""]
    assert "/a.jpg?x=%20y&z" in web.paths()
    sent = web.seen[0].headers
    assert sent["accept-encoding"] == "identity"
    assert sent["user-agent"] == "gristmill"
    assert sent["host"] == f"127.0.0.2:{web.port}"
    assert one.stats.bytes == 3 * len(FORM) + 7
    assert one.stats.outcomes == {"fetched": 5}
    assert sum(one.stats.seconds) == one.stats.requests == 5


@pytest.mark.parametrize(
    ("status", "outcome", "requests"),
    [
        (204, Outcome.GONE, 1),
        (304, Outcome.GONE, 1),
        (302, Outcome.GONE, 1),  # without a Location
        (400, Outcome.GONE, 1),
        (403, Outcome.GONE, 1),
        (404, Outcome.GONE, 1),
        (410, Outcome.GONE, 1),
        (408, Outcome.SERVER_ERROR, 3),
        (429, Outcome.SERVER_ERROR, 3),
        (500, Outcome.SERVER_ERROR, 3),
        (501, Outcome.SERVER_ERROR, 1),
        (503, Outcome.SERVER_ERROR, 3),
    ],
)
def test_statuses(web: Web, fetcher: Callable[..., Fetcher], status: int, outcome: Outcome, requests: int):
    web.pages["/x"] = Page(status, body=b"")
    [problem] = problems(fetcher(), web.url("/x"))
    assert problem is not None
    assert problem[0] is outcome
    assert f"status {status}" in problem[1]
    assert len(web.seen) == requests


def test_a_server_is_asked_again_when_it_wants_to_be(web: Web, fetcher: Callable[..., Fetcher]):
    web.first["/x"] = [Page(503, (("Retry-After", "1"),), b"")]
    web.pages["/x"] = IMAGE
    one, begun = fetcher(), time.monotonic()
    [found] = one.fetch(candidates(web.url("/x")))
    assert found.data == FORM
    assert time.monotonic() - begun >= 1
    assert web.paths() == ["/x", "/x"]
    assert one.stats.retries == {"server_error": 1}


def test_nobody_waits_longer_for_a_server_than_told_and_the_host_is_left_alone(
    web: Web, fetcher: Callable[..., Fetcher]
):
    web.pages["/x"] = Page(503, (("Retry-After", "3600"),), b"")
    first, *rest = problems(fetcher(per_host=1), web.url("/x"), web.url("/a.jpg"), web.url("/a.jpg"))
    assert first == (Outcome.SERVER_ERROR, "status 503, not to be asked again for 3600 s")
    assert rest == 2 * [(Outcome.SERVER_ERROR, "host wants to be left alone")]
    assert web.paths() == ["/x"]


def test_redirects_are_followed_within_bounds(web: Web, fetcher: Callable[..., Fetcher]):
    for number in range(1, 8):
        web.pages[f"/{number}"] = Page((301, 302, 303, 307, 308)[number % 5], (("Location", f"{number - 1}"),), b"x")
    web.pages["/0"] = IMAGE
    web.pages["/round"] = Page(302, (("Location", web.url("/about")), ("Set-Cookie", "seen=1")), b"")
    web.pages["/about"] = Page(302, (("Location", "/round#again"),), b"")
    five, six, circle = list(fetcher().fetch(candidates(*map(web.url, ("/5", "/6", "/round")))))
    assert five.data == FORM
    assert six.problem == (Outcome.REDIRECTS, "more than 5")
    assert circle.problem == (Outcome.REDIRECTS, "in a circle of 2")
    assert not any("cookie" in one.headers for one in web.seen)


@pytest.mark.parametrize(
    ("location", "outcome"),
    [
        ("ftp://127.0.0.2/a", Outcome.BAD_URL),
        ("file:///etc/passwd", Outcome.BAD_URL),
        ("http://me:CANARY@127.0.0.2/", Outcome.BAD_URL),
        ("http://[", Outcome.BAD_URL),
        ("http://127.0.0.1:{port}/a.jpg", Outcome.BLOCKED_ADDRESS),
        ("http://2130706433:{port}/a.jpg", Outcome.BLOCKED_ADDRESS),
        ("http://0x7f.1:{port}/a.jpg", Outcome.BLOCKED_ADDRESS),
        ("http://[::ffff:127.0.0.1]:{port}/a.jpg", Outcome.BLOCKED_ADDRESS),
        ("http://localhost:{port}/a.jpg", Outcome.BLOCKED_ADDRESS),
        ("http://inner.example:{port}/a.jpg", Outcome.BLOCKED_ADDRESS),
        ("http://169.254.169.254/latest/meta-data/", Outcome.BLOCKED_ADDRESS),
        ("http://[fd00:ec2::254]/latest/meta-data/", Outcome.BLOCKED_ADDRESS),
        ("https://10.0.0.1/", Outcome.BLOCKED_ADDRESS),
    ],
)
def test_a_redirect_leads_only_where_a_url_may(
    web: Web, other: Web, fetcher: Callable[..., Fetcher], location: str, outcome: Outcome
):
    location = location.format(port=other.port)
    web.pages["/x"] = Page(302, (("Location", location),), b"")
    lookup = {"localhost": ["127.0.0.1"], "inner.example": ["8.8.8.8", "127.0.0.1"]}
    one = fetcher(lambda host, port: lookup[host])
    redirected, direct = problems(one, web.url("/x"), location)
    assert redirected is not None
    assert redirected[0] is outcome
    assert "passwd" not in redirected[1]
    if "CANARY" not in location:
        assert direct is not None
        assert direct[0] is outcome
    assert other.seen == []


def test_private_addresses_may_be_allowed(web: Web, other: Web, fetcher: Callable[..., Fetcher]):
    web.pages["/x"] = Page(302, (("Location", other.url("/a.jpg")),), b"")
    [found] = fetcher(allow_private=True).fetch(candidates(web.url("/x")))
    assert found.data == FORM


def test_the_connection_goes_to_the_address_that_was_checked(fetcher: Callable[..., Fetcher], closed_port: int):
    """A resolver that answers otherwise the second time: on the same port, so that the wrong one would serve."""
    pages = {"/a.jpg": IMAGE, "/b.jpg": IMAGE}
    with Web(pages, "127.0.0.1", closed_port) as inner, Web(pages, "127.0.0.2", closed_port) as web:
        answers = itertools.chain(["127.0.0.2"], itertools.repeat("127.0.0.1"))
        asked = []

        def lookup(host: str, port: int) -> list[str]:
            asked.append(host)
            return [next(answers)]

        one = fetcher(lookup)
        [first] = one.fetch(candidates(web.url("/a.jpg", "rebind.example")))
        assert first.data == FORM
        assert asked == ["rebind.example"]
        assert web.seen[0].headers["host"] == f"rebind.example:{web.port}"
        # Another fetcher has to ask the resolver anew, and hears the other address.
        assert problems(fetcher(lookup), web.url("/b.jpg", "rebind.example")) == [
            (Outcome.BLOCKED_ADDRESS, "rebind.example is 127.0.0.1, which is loopback")
        ]
        assert inner.seen == []


def test_robots_are_heeded(web: Web, fetcher: Callable[..., Fetcher]):
    web.pages["/no"] = Page(headers=(("X-Robots-Tag", "otherbot: all"), ("X-Robots-Tag", "nofollow, NoAI")))
    web.pages["/other"] = Page(headers=(("X-Robots-Tag", "otherbot: noai"),))
    urls = [web.url("/no"), web.url("/other")]
    one = fetcher()
    assert problems(one, *urls) == [(Outcome.OPTED_OUT, "X-Robots-Tag: noai"), None]
    assert one.stats.outcomes == {"opted_out": 1, "fetched": 1}
    assert problems(fetcher(respect_robots=False), *urls) == [None, None]
    assert problems(fetcher(user_agent="OtherBot/2"), *urls)[1] == (Outcome.OPTED_OUT, "X-Robots-Tag: noai")


def test_what_is_too_large_is_not_read(web: Web, fetcher: Callable[..., Fetcher]):
    sent = 0

    def endless() -> Iterator[bytes]:
        nonlocal sent
        while True:
            sent += 1 << 16
            yield b"\0" * (1 << 16)

    web.pages["/endless"] = Page(body=endless, length=False)
    web.pages["/announced"] = Page(headers=(("Content-Length", str(10**15)),), body=endless)
    web.pages["/just"] = Page(body=b"x" * 100_000)
    web.pages["/over"] = Page(body=b"x" * 100_001)
    one = fetcher(max_bytes=100_000)
    assert problems(one, *map(web.url, ("/endless", "/announced", "/just", "/over"))) == [
        (Outcome.TOO_LARGE, "more than 100000 bytes"),
        (Outcome.TOO_LARGE, "1000000000000000 bytes announced, more than 100000"),
        None,
        (Outcome.TOO_LARGE, "100001 bytes announced, more than 100000"),
    ]
    assert sent < 50 << 20  # what the kernel buffers at most, not what there is
    assert one.stats.bytes < 1 << 20


def test_bad_urls_and_unknown_hosts(fetcher: Callable[..., Fetcher]):
    def lookup(host: str, port: int) -> list[str]:
        raise socket.gaierror(socket.EAI_AGAIN if host == "later.example" else socket.EAI_NONAME, "x")

    one = fetcher(lookup)
    assert problems(one, "ftp://a/", "no url", "http://none.example/", "http://later.example/") == [
        (Outcome.BAD_URL, "a url that is neither http nor https"),
        (Outcome.BAD_URL, "a url that is neither http nor https"),
        (Outcome.NO_HOST, "no such name"),
        (Outcome.NO_HOST, "the name cannot be resolved now (3 tries)"),
    ]
    assert one.stats.hosts.worst() == [("later.example", 1, 0), ("none.example", 1, 0)]


def test_no_secret_shows_anywhere(web: Web, fetcher: Callable[..., Fetcher], caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.DEBUG)
    web.pages["/moved"] = Page(302, (("Location", "/gone?token=CANARY"),), b"")
    web.pages["/bad"] = Page(302, (("Location", "http://CANARY:CANARY@x.example:CANARY/"),), b"")
    web.pages["/busy"] = Page(503, body=b"CANARY")
    one = fetcher(lambda host, port: ["10.0.0.1"])
    there = f"user:CANARY@127.0.0.2:{web.port}"
    found = list(
        one.fetch(
            candidates(
                f"http://{there}/a.jpg?token=CANARY",
                f"http://{there}/gone?token=CANARY",
                f"http://{there}/moved?token=CANARY",
                f"http://{there}/bad?token=CANARY",
                f"http://{there}/busy?token=CANARY",
                "http://user:CANARY@127.0.0.1/?token=CANARY",
                "http://user:CANARY@inner.example/?token=CANARY",
                "http://user:CANARY@127.0.0.2:1/?token=CANARY",
                "http://user:CAN/ARY@127.0.0.2/?token=CANARY",
                "ftp://user:CANARY@127.0.0.2/?token=CANARY",
            )
        )
    )
    assert found[0].data == FORM
    assert web.seen[0].headers["authorization"] == "Basic dXNlcjpDQU5BUlk="
    assert "token=CANARY" in web.paths()[0]
    assert all(candidate.problem for candidate in found[1:])
    said = repr([(candidate, candidate.locator, candidate.problem) for candidate in found])
    assert "CAN" not in said + repr(one.stats) + repr(one.stats.snapshot()) + repr(one.config) + caplog.text
