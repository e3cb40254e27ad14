"""Serves a registry to Prometheus at /metrics, and the pages that it is given, loopback unless told otherwise.

prometheus_client's own server answers every path and takes a thread for each connection, so a client that hangs keeps
one for good. Here one daemon thread runs an event loop: a request has a deadline, connections have a bound, answers
are paced, and a page that was just rendered is served again, so that a flood of scrapes hardly slows the training loop.
Pages and ticks run in that thread, too, and never in training's: what they raise is counted; a page's is answered by a
500, a tick's is said once.

A web page that somebody opens beside a run may point its own name at 127.0.0.1 and then read what is served there as if it
were its own (DNS rebinding). Nothing here is secret to the machine's users, but a run's name and losses are no business
of a web site; so on a loopback address a request must call the machine by an address or by its name. An address
cannot be rebound, and Prometheus, curl and forwarded ports all send one, or `localhost`.
"""

import asyncio
import html
import inspect
import ipaddress
import socket
import ssl
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from typing import TypeAlias
from urllib.parse import parse_qsl

from prometheus_client import CollectorRegistry, generate_latest

from .ports import ExporterError, listen

__all__ = ["Exporter", "ExporterError", "Handler", "Page", "Tick"]

URL_FILE = "metrics.url"  # in the run folder: one line, where this run's metrics are
DEADLINE = 5.0  # seconds for a client to ask, again for a page to be made, and again to take the answer
CONNECTIONS = 64  # at once; for one more, the oldest is dropped, so that idle clients cannot lock Prometheus out
REQUEST_BYTES = 16384
FRESH = 0.2  # seconds for which rendered metrics are served again
PACE = 0.004  # seconds between two answers: each takes the interpreter from the training loop for about 0.3 ms
FAILURES = "gristmill_exporter_failures_total"
FAILURES_HELP = "Pages and ticks of the exporter that raised an error; training never notices."
TEXT = "text/plain; version=0.0.4; charset=utf-8"  # of Prometheus' exposition format
HTML = "text/html; charset=utf-8"

Page: TypeAlias = tuple[str, bytes]  # content type, body
Handler: TypeAlias = Callable[
    [dict[str, str]], Page | Awaitable[Page]
]  # takes the query; an awaited one may take a while
Tick: TypeAlias = tuple[float, Callable[[], None]]  # every so many seconds, the first time at once


class Exporter:
    """Serves `registry` from the moment it is built until `close()`; usable as a context.

    port: 0 takes any free one; `port` and `url` tell which. tls: makes it https (tls.py builds one). pages: by their path
    without the first slash, "" being `/`. ticks: (seconds, call) to be made in the exporter's thread. Both should take
    milliseconds; one that hangs holds up scrapes, never training. Raises ExporterError, naming the port and the remedy.
    """

    def __init__(
        self,
        registry: CollectorRegistry,
        port: int,
        address: str = "127.0.0.1",
        *,
        tls: ssl.SSLContext | None = None,
        pages: Mapping[str, Handler] | None = None,
        ticks: Sequence[Tick] = (),
    ):
        self.registry = registry
        self.tls = tls
        self._sockets = [listen(address, port)]
        self.address = address
        self.port: int = self._sockets[0].getsockname()[1]
        self.failures = {"metrics": 0, "page": 0, "tick": 0}
        self._names = _names_of(address)
        self._pages = {f"/{path.removeprefix('/')}": handler for path, handler in (pages or {}).items()}
        self._ticks = ticks
        self._page = b""
        self._rendered = -1e9
        self._pace = asyncio.Lock()  # of whose turn it is
        self._next = 0.0  # when the next answer may go out
        self._open: dict[asyncio.Task[None], None] = {}  # in order of arrival
        self._background: set[asyncio.Task[None]] = set()
        self._loop = asyncio.new_event_loop()
        self._loop.set_exception_handler(lambda *_: None)  # a client's broken handshake is nothing for a terminal
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="gristmill-exporter", daemon=True)
        self._thread.start()

    @property
    def host(self) -> str:
        """This machine as others call it: its address, or its name where the exporter listens at all addresses."""
        return socket.gethostname() if self.address in ("", "0.0.0.0", "::") else self.address

    @property
    def url(self) -> str:
        """Where the metrics are."""
        return f"http{'s' if self.tls else ''}://{bracketed(self.host)}:{self.port}/metrics"

    def also(self, listening: socket.socket, tls: ssl.SSLContext | None = None) -> None:
        """Serve the same at another listening socket; the exporter closes it. From any thread."""

        def begin() -> None:
            self._sockets.append(listening)
            self._start(self._accept(listening, tls))

        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(begin)
            return
        listening.close()  # the exporter has ended

    def metrics(self) -> bytes:
        """The page at /metrics, rendered at most every FRESH seconds. For the exporter's own thread."""
        now = time.monotonic()
        if now - self._rendered >= FRESH:
            lines = [f"# HELP {FAILURES} {FAILURES_HELP}", f"# TYPE {FAILURES} counter"]
            lines += [f'{FAILURES}{{what="{what}"}} {float(count)}' for what, count in self.failures.items()]
            self._page, self._rendered = generate_latest(self.registry) + "\n".join([*lines, ""]).encode(), now
        return self._page

    def close(self) -> None:
        """Stops at once, whatever the clients are doing; the port is free afterwards. Safe to call twice."""
        with suppress(RuntimeError):  # the loop has ended already
            self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(timeout=2.0)
        for listening in self._sockets:
            listening.close()

    def __enter__(self) -> "Exporter":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _run(self) -> None:
        try:
            self._loop.run_until_complete(self._serve())
        finally:
            self._loop.close()

    async def _serve(self) -> None:
        for listening in list(self._sockets):
            self._start(self._accept(listening, self.tls))
        for seconds, call in self._ticks:
            self._start(self._repeat(seconds, call))
        await self._stop.wait()
        ending = [*self._background, *self._open]
        for task in ending:
            task.cancel()
        await asyncio.gather(*ending, return_exceptions=True)

    def _start(self, work: Awaitable[None]) -> None:
        self._background.add(asyncio.ensure_future(work))

    async def _repeat(self, seconds: float, call: Callable[[], None]) -> None:
        said = ""
        while True:
            trouble = ""
            try:
                call()
            except Exception as error:
                self.failures["tick"] += 1
                trouble = f"{type(error).__name__}: {error}"
            if trouble not in ("", said):  # a tick that fails every second is no reason to fill a log
                with suppress(OSError, ValueError):  # a terminal that is gone
                    print(f"warning: metrics: {trouble}", file=sys.stderr)
            said = trouble
            await asyncio.sleep(seconds)

    async def _accept(self, listening: socket.socket, tls: ssl.SSLContext | None) -> None:
        listening.setblocking(False)
        while True:
            try:
                client, _ = await self._loop.sock_accept(listening)
            except OSError:  # it left again, or the process is out of file handles: better here than in training
                await asyncio.sleep(0.1)
                continue
            if len(self._open) >= CONNECTIONS:
                oldest = next(iter(self._open))
                del self._open[oldest]
                oldest.cancel()
            self._open[asyncio.create_task(self._talk(client, tls))] = None

    async def _talk(self, client: socket.socket, tls: ssl.SSLContext | None) -> None:
        task = asyncio.current_task()
        assert task is not None
        transport = None
        try:
            if tls:
                await self._turn()  # a handshake costs more than an answer
            reader = asyncio.StreamReader(REQUEST_BYTES)
            protocol = asyncio.StreamReaderProtocol(reader)
            patience = {"ssl_handshake_timeout": DEADLINE, "ssl_shutdown_timeout": DEADLINE} if tls else {}
            transport, _ = await self._loop.connect_accepted_socket(lambda: protocol, client, ssl=tls, **patience)
            writer = asyncio.StreamWriter(transport, protocol, reader, self._loop)
            request = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), DEADLINE)
            await self._turn()
            writer.write(await self._answer(request))
            writer.close()
            await asyncio.wait_for(writer.wait_closed(), DEADLINE)
        except (OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, asyncio.CancelledError):
            pass  # it hung, left, was dropped, showed no certificate, or sent what is no request: no answer is owed
        finally:
            self._open.pop(task, None)
            if transport:
                transport.abort()
            client.close()

    async def _turn(self) -> None:
        async with self._pace:  # a client that is dropped while it waits gives its turn back
            await asyncio.sleep(self._next - self._loop.time())
            self._next = self._loop.time() + PACE

    async def _answer(self, request: bytes) -> bytes:
        line, *headers = request.rstrip(b"\r\n").decode("latin-1").split("\r\n")
        parts = line.split()
        if len(parts) != 3 or not parts[2].startswith("HTTP/1."):
            return _response("400 Bad Request", "not HTTP\n")
        method, target, _ = parts
        path, _, query = target.partition("?")
        if not self._meant(headers):
            asked = "this port answers to the machine's address, its name, and localhost\n"
            return _response("421 Misdirected Request", asked)
        if path not in ("/", "/metrics") and path not in self._pages:
            known = ", ".join(sorted({"/", "/metrics", *self._pages}))
            return _response("404 Not Found", f"only these are here: {known}\n")
        if method not in ("GET", "HEAD"):
            return _response("405 Method Not Allowed", "only GET and HEAD\n", extra="Allow: GET, HEAD\r\n")
        try:
            asked_for = dict(parse_qsl(query, keep_blank_values=True, max_num_fields=32))
        except ValueError:
            return _response("400 Bad Request", "a query of 32 fields at most\n")
        answer = await self._made(path, asked_for)
        return answer.partition(b"\r\n\r\n")[0] + b"\r\n\r\n" if method == "HEAD" else answer

    async def _made(self, path: str, query: dict[str, str]) -> bytes:
        what = "metrics" if path == "/metrics" else "page"
        try:
            if what == "metrics":
                return _response("200 OK", self.metrics(), TEXT)
            made = self._pages[path](query) if path in self._pages else (HTML, self._home())
            kind, body = await asyncio.wait_for(made, DEADLINE) if inspect.isawaitable(made) else made
            return _response("200 OK", body, kind)
        except Exception as error:
            self.failures[what] += 1
            return _response("500 Internal Server Error", f"{path} could not be made: {type(error).__name__}\n")

    def _meant(self, headers: list[str]) -> bool:
        """Whether the request is for this machine, by what it calls it; see the top of this file."""
        if self._names is None:
            return True
        for header in headers:
            name, _, value = header.partition(":")
            if name.strip().lower() == "host":
                return _is_address(host := _without_port(value.strip().lower())) or host in self._names
        return True  # only what is no browser sends none

    def _home(self) -> bytes:
        run = ""
        for metric in self.registry.collect():
            if metric.name == "gristmill_run":
                run = html.escape(metric.samples[0].labels.get("run", ""))
        return (
            "<!doctype html><meta charset=utf-8><title>Gristmill metrics</title>"
            f"<h1>Gristmill run {run}</h1><p><a href=/metrics>/metrics</a> is for Prometheus; "
            f"<code>gristmill status {html.escape(self.url)}</code> shows it in a terminal.</p>\n"
        ).encode()


def bracketed(host: str) -> str:
    """The host as a URL or `host:port` spells it."""
    return f"[{host}]" if ":" in host else host


def _response(status: str, body: bytes | str, kind: str = "text/plain; charset=utf-8", extra: str = "") -> bytes:
    body = body.encode() if isinstance(body, str) else body
    head = (
        f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n{extra}"
        "X-Content-Type-Options: nosniff\r\nCache-Control: no-store\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + body


def _names_of(address: str) -> set[str] | None:
    """The names that a request to a loopback address may use; None where others may reach it, by names unknown here."""
    if address != "localhost" and not (_is_address(address) and ipaddress.ip_address(address).is_loopback):
        return None
    return {"localhost", socket.gethostname().lower()}


def _is_address(host: str) -> bool:
    with suppress(ValueError):
        ipaddress.ip_address(host.strip("[]"))
        return True
    return False


def _without_port(host: str) -> str:
    return host[: host.index("]") + 1] if host.startswith("[") and "]" in host else host.partition(":")[0]
