"""Serves a registry to Prometheus: GET /metrics on one port, loopback unless told otherwise.

prometheus_client's own server answers every path and takes a thread for each connection, so a client that hangs keeps
one for good. Here one daemon thread runs an event loop: a request has a deadline, connections have a bound, answers
are paced, and a page that was just rendered is served again, so that a flood of scrapes hardly slows the training loop.
A port that is taken is the user's to decide (two runs on one machine are common): the error says who holds it.
"""

import asyncio
import errno
import html
import os
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path

from prometheus_client import CollectorRegistry, generate_latest

from ...shards.errors import GristmillError

URL_FILE = "metrics.url"  # in the run folder: one line, where this run's metrics are
DEADLINE = 5.0  # seconds for a client to ask, and again to take its answer
CONNECTIONS = 64  # at once; for one more, the oldest is dropped, so that idle clients cannot lock Prometheus out
REQUEST_BYTES = 16384
FRESH = 0.2  # seconds for which a rendered page is served again
PACE = 0.004  # seconds between two answers: each takes the interpreter from the training loop for about 0.3 ms

_TEXT = "text/plain; version=0.0.4; charset=utf-8"
_HTML = "text/html; charset=utf-8"


class ExporterError(GristmillError):
    """The metrics port cannot be opened."""


class Exporter:
    """Serves `registry` from the moment it is built until `close()`; usable as a context.

    port: 0 takes any free one; `port` and `url` tell which. Raises ExporterError, naming the port and the remedy.
    """

    def __init__(self, registry: CollectorRegistry, port: int, address: str = "127.0.0.1"):
        self.registry = registry
        self._socket = _listen(address, port)
        self.address = address
        self.port: int = self._socket.getsockname()[1]
        self._page = b""
        self._rendered = -1e9
        self._next = 0.0  # when the next answer may go out
        self._open: dict[asyncio.Task[None], None] = {}  # in order of arrival
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="gristmill-exporter", daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        """Where the metrics are, as seen from this machine; a wildcard address is given by the machine's name."""
        host = socket.gethostname() if self.address in ("", "0.0.0.0", "::") else self.address
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}/metrics"

    def close(self) -> None:
        """Stops at once, whatever the clients are doing; the port is free afterwards. Safe to call twice."""
        with suppress(RuntimeError):  # the loop has ended already
            self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(timeout=2.0)
        self._socket.close()

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
        server = await asyncio.start_server(self._accept, sock=self._socket, limit=REQUEST_BYTES)
        await self._stop.wait()
        server.close()
        for task in list(self._open):
            task.cancel()
        await asyncio.gather(*self._open, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        if len(self._open) >= CONNECTIONS:
            oldest = next(iter(self._open))
            del self._open[oldest]
            oldest.cancel()
        self._open[task] = None
        try:
            request = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), DEADLINE)
            await self._turn()
            writer.write(self._answer(request.partition(b"\r\n")[0]))
            writer.close()
            await asyncio.wait_for(writer.wait_closed(), DEADLINE)
        except (OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, asyncio.CancelledError):
            pass  # it hung, left, was dropped, or sent what is no request: no answer is owed
        finally:
            self._open.pop(task, None)
            writer.transport.abort()

    async def _turn(self) -> None:
        now = self._loop.time()
        self._next = max(now, self._next + PACE)
        await asyncio.sleep(self._next - now)

    def _answer(self, line: bytes) -> bytes:
        parts = line.split()
        if len(parts) != 3 or not parts[2].startswith(b"HTTP/1."):
            return _response("400 Bad Request", b"not HTTP\n")
        path = parts[1].partition(b"?")[0]
        if path not in (b"/", b"/metrics"):
            return _response("404 Not Found", b"only / and /metrics are here\n")
        if parts[0] != b"GET":
            return _response("405 Method Not Allowed", b"only GET\n", extra="Allow: GET\r\n")
        if path == b"/":
            return _response("200 OK", self._home(), _HTML)
        now = time.monotonic()
        if now - self._rendered >= FRESH:
            self._page, self._rendered = generate_latest(self.registry), now
        return _response("200 OK", self._page, _TEXT)

    def _home(self) -> bytes:
        run = ""
        for metric in self.registry.collect():
            if metric.name == "gristmill_run":
                run = html.escape(metric.samples[0].labels.get("run", ""))
        return (
            "<!doctype html><meta charset=utf-8><title>Gristmill metrics</title>"
            f"<h1>Gristmill run {run}</h1><p><a href=/metrics>/metrics</a> is for Prometheus; "
            f"<code>gristmill status http://{html.escape(self.address)}:{self.port}</code> shows it in a terminal.</p>\n"
        ).encode()


def _response(status: str, body: bytes, kind: str = "text/plain; charset=utf-8", extra: str = "") -> bytes:
    head = (
        f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n{extra}Connection: close\r\n\r\n"
    )
    return head.encode() + body


def _listen(address: str, port: int) -> socket.socket:
    remedy = (
        "choose another with metrics.port=NUMBER, any free one with metrics.port=0, or go without with metrics.port=off"
    )
    if not 0 <= port <= 65535:
        raise ExporterError(f"metrics.port={port} is no port (0 to 65535); {remedy}")
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        return socket.create_server((address, port), family=family, backlog=CONNECTIONS)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            holder = port_holder(port)
            by = f" by {holder}" if holder else ""
            raise ExporterError(f"port {port}, where metrics would be served, is taken{by}; {remedy}") from error
        if error.errno == errno.EACCES:
            raise ExporterError(f"port {port} may not be opened by this user; {remedy}") from error
        raise ExporterError(
            f"metrics cannot be served at {address!r} ({error.strerror or error}): metrics.address must be an address "
            "of this machine, such as 127.0.0.1"
        ) from error


def port_holder(port: int) -> str | None:
    """'process 4711 (python)' that listens on a TCP port of this machine, as far as this user may see; else None."""
    inodes = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        try:
            lines = Path(table).read_text().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            fields = line.split()
            if len(fields) > 9 and fields[3] == "0A" and int(fields[1].rpartition(":")[2], 16) == port:
                inodes.add(f"socket:[{fields[9]}]")
    if not inodes:
        return None
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if any(os.readlink(handle) in inodes for handle in (process / "fd").iterdir()):
                name = "".join(c for c in (process / "comm").read_text().strip() if c.isprintable())
                return f"process {process.name} ({name})"
        except OSError:  # gone meanwhile, or another user's
            continue
    return None
