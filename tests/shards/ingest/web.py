"""A small HTTP server on any loopback address that answers each path exactly as a test says, and tells what was asked.

What goes wrong below HTTP is faulty_http.py's; this one is for statuses, headers that come twice, redirects between
servers, and bodies that never end.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

from gristmill.shards.ingest.candidate import Candidate
from gristmill.shards.ingest.fetch import FetchConfig, Fetcher
from gristmill.shards.ingest.vetting import Vetting

FORM = b"\xff\xd8 not a whole image, but bytes \xff\xd9"


class Page(NamedTuple):
    """An answer. `body` may be an iterator, which is sent until it ends or the client hangs up."""

    status: int = 200
    headers: tuple[tuple[str, str], ...] = ()
    body: bytes | Callable[[], Iterator[bytes]] = FORM
    length: bool = True


class Seen(NamedTuple):
    """One request; `address` is the one that the client connected to."""

    path: str
    headers: dict[str, str]
    address: str


class Web:
    """`with Web({"/a": Page()}, "127.0.0.2") as web: web.url("/a")`."""

    def __init__(self, pages: dict[str, Page] | None = None, address: str = "127.0.0.1", port: int = 0) -> None:
        self.pages = dict(pages or {})
        self.first: dict[str, list[Page]] = {}  # answers that come before those, each once
        self.seen: list[Seen] = []
        self.gate: threading.Event | None = None  # answers wait for it
        self.hold = 0.0  # seconds that they wait at least
        self.peak = self.busy = 0  # requests that wait for their answer
        self._lock = threading.Lock()
        owner = self

        class Handler(_Handler):
            web = owner

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 128

            def handle_error(self, request: Any, client_address: Any) -> None:
                """A client that hangs up is no news here."""

        self._server = Server((address, port), Handler)
        self.address, self.port = address, self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)

    def url(self, path: str, host: str | None = None) -> str:
        return f"http://{host or self.address}:{self.port}{path}"

    def paths(self) -> list[str]:
        return [one.path for one in self.seen]

    def enter(self) -> None:
        with self._lock:
            self.busy += 1
            self.peak = max(self.peak, self.busy)

    def leave(self) -> None:
        with self._lock:
            self.busy -= 1

    def __enter__(self) -> "Web":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.gate is not None:
            self.gate.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    web: Web
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""

    def do_GET(self) -> None:
        web = self.web
        names = {name.lower(): value for name, value in self.headers.items()}
        web.seen.append(Seen(self.path, names, self.connection.getsockname()[0]))
        web.enter()
        if web.gate is not None:
            web.gate.wait(20)
        time.sleep(web.hold)
        web.leave()  # whoever has the answer may ask again before this thread goes on
        try:
            path = self.path.partition("?")[0]
            before = web.first.get(path)
            self._send(before.pop(0) if before else web.pages.get(path, Page(404, body=b"not here")))
        except OSError:
            self.close_connection = True

    def _send(self, page: Page) -> None:
        self.send_response(page.status)
        for name, value in page.headers:
            self.send_header(name, value)
        if isinstance(page.body, bytes) and page.length:
            self.send_header("Content-Length", str(len(page.body)))
        else:
            self.send_header("Connection", "close")
            self.close_connection = True
        self.end_headers()
        for piece in [page.body] if isinstance(page.body, bytes) else page.body():
            self.wfile.write(piece)


@contextmanager
def fetchers(*allowed: str, **defaults: Any) -> Iterator[Callable[..., Fetcher]]:
    """make(lookup=..., hosts=..., **settings) -> a fetcher for which `allowed` are public; all are closed at the end."""
    made: list[Fetcher] = []

    def make(lookup: Callable[..., Any] | None = None, hosts: Path | None = None, **settings: Any) -> Fetcher:
        config = FetchConfig(**{**defaults, **settings})
        names: dict[str, Any] = {} if lookup is None else {"lookup": lookup}
        vetting = Vetting(allowed=allowed, allow_private=config.allow_private, **names)
        made.append(Fetcher(config, hosts, vetting=vetting))
        return made[-1]

    try:
        yield make
    finally:
        for one in made:
            one.close()


@contextmanager
def meanwhile(condition: Callable[[], bool], action: Callable[[], object]) -> Iterator[None]:
    """Do something, on a thread, once a condition holds; the test fails if it never does."""
    ended, held = threading.Event(), []

    def watch() -> None:
        until = time.monotonic() + 60
        while not condition() and not ended.is_set() and time.monotonic() < until:
            time.sleep(0.005)
        held.append(condition())
        action()

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
    assert held == [True]


def candidates(*urls: str) -> list[Candidate]:
    """One candidate a url, numbered, with a locator as sources make them."""
    return [Candidate(number, f"list.txt#{number}", url=url) for number, url in enumerate(urls)]
