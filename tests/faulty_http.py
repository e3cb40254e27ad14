"""A real HTTP server on loopback that fails as real ones do: ranges and conditions right, faults put in by the test.

`server.fault(...)` lines up faults; each request takes the first one that is meant for its path. `server.log` tells what
was asked. The key below belongs to nobody: a server that is to speak TLS in a test needs some.
"""

from __future__ import annotations

import socket
import ssl
import struct
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

CERTIFICATE = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgvyaGFNd9ERd0tgzf
5wNFQpVglgenoeHjsVOXjo/LUZShRANCAATG9eOdGiiOGtnQ8PjKDnOsDvEmh3YU
iyl4MbAhiEhGM7yclG7BGqG0hFIfLwlu7uWaXR9VasavcMvJEGcAMkKX
-----END PRIVATE KEY-----
-----BEGIN CERTIFICATE-----
MIIBmzCCAUGgAwIBAgIUWLnQInwwFMlA/QL1uPBIeuCvp/UwCgYIKoZIzj0EAwIw
FDESMBAGA1UEAwwJbG9jYWxob3N0MCAXDTI2MTEyMjA2MTIyOFoYDzIxMjYxMDI5
MDYxMjI4WjAUMRIwEAYDVQQDDAlsb2NhbGhvc3QwWTATBgcqhkjOPQIBBggqhkjO
PQMBBwNCAATG9eOdGiiOGtnQ8PjKDnOsDvEmh3YUiyl4MbAhiEhGM7yclG7BGqG0
hFIfLwlu7uWaXR9VasavcMvJEGcAMkKXo28wbTAdBgNVHQ4EFgQUcfRl3w5NLvbp
WMiOUR9gnHS4/JgwHwYDVR0jBBgwFoAUcfRl3w5NLvbpWMiOUR9gnHS4/JgwDwYD
VR0TAQH/BAUwAwEB/zAaBgNVHREEEzARgglsb2NhbGhvc3SHBH8AAAEwCgYIKoZI
zj0EAwIDSAAwRQIgS0NaY6T8KJSY2MNcCoiTDQl+Z9EPKdS9XY4uqSpfcFgCIQCQ
RiG4fN8RhUGxs448g4RFOgdZnkMt/xGAV1WPTWnYaA==
-----END CERTIFICATE-----
"""
_MODIFIED = 1_700_000_000


@dataclass
class Fault:
    """What goes wrong with one request. `after` counts bytes of the body that still arrive."""

    kind: str  # status, reset, end, stall, drip, garbage, hangup, slow_head, short_header, moved, wrong_part
    path: str | None = None
    after: int = 0
    code: int = 503
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b"no"
    rate: float = 1000.0  # bytes a second of a drip
    seconds: float = 3600.0  # of a stall, unless the server is closed


@dataclass
class Asked:
    """One request as it came in."""

    path: str
    headers: dict[str, str]
    connection: int
    fault: str | None
    began: float

    @property
    def range(self) -> str | None:
        return self.headers.get("range")


class FaultyServer:
    """`with FaultyServer({"/a.tar": b"..."}) as server: server.url("/a.tar")`."""

    def __init__(self, files: dict[str, bytes] | None = None, *, tls: Path | None = None) -> None:
        self.files = dict(files or {})
        self.etags: dict[str, str | None] = {}
        self.ranges = True  # False: every answer is the whole object
        self.conditions = True  # False: If-Match and the like are ignored
        self.etag = self.modified = True  # whether answers carry them
        self.lengths = True  # False: whole answers come chunked
        self.capacity: int | None = None  # more simultaneous requests than this get a 503
        self.hold = 0.0  # seconds that each request takes at least
        self.log: list[Asked] = []
        self.peak = self.busy = 0
        self.revision: dict[str, int] = defaultdict(int)
        self._faults: list[Fault] = []
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._open: set[socket.socket] = set()
        owner = self

        class Handler(_Handler):
            server_of_test = owner

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 128

            def handle_error(self, request: Any, client_address: Any) -> None:
                """A client that hangs up is no news here."""

        self._server = Server(("127.0.0.1", 0), Handler)
        self.scheme = "http"
        if tls is not None:
            tls.write_text(CERTIFICATE)
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(tls)
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
            self.scheme = "https"
        self.port = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)

    def url(self, path: str) -> str:
        return f"{self.scheme}://127.0.0.1:{self.port}{path}"

    def put(self, path: str, data: bytes) -> None:
        """Put an object in its place, or a new one in the place of the old."""
        with self._lock:
            self.files[path] = data
            self.revision[path] += 1

    def fault(self, kind: str, times: int = 1, **options: Any) -> None:
        with self._lock:
            self._faults += [Fault(kind, **options) for _ in range(times)]

    def heal(self) -> None:
        """No more faults."""
        with self._lock:
            self._faults.clear()

    def asked(self, path: str | None = None) -> list[Asked]:
        return [one for one in list(self.log) if path is None or one.path == path]

    def close(self) -> None:
        self._closed.set()
        self._server.shutdown()
        self._server.server_close()
        with self._lock:
            for connection in self._open:
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
        self._thread.join()

    def __enter__(self) -> FaultyServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def take_fault(self, path: str) -> Fault | None:
        with self._lock:
            for number, fault in enumerate(self._faults):
                if fault.path in (None, path):
                    return self._faults.pop(number)
        return None

    def enter(self, connection: socket.socket, asked: Asked) -> bool:
        """Count a request in; False if the server has too many."""
        with self._lock:
            self.log.append(asked)
            self._open.add(connection)
            self.busy += 1
            self.peak = max(self.peak, self.busy)
            return self.capacity is None or self.busy <= self.capacity

    def leave(self) -> None:
        with self._lock:
            self.busy -= 1

    def wait(self, seconds: float) -> None:
        self._closed.wait(seconds)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_of_test: FaultyServer
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""

    def do_GET(self) -> None:
        server = self.server_of_test
        path = self.path.partition("?")[0]
        fault = server.take_fault(path)
        asked = Asked(
            path,
            {name.lower(): value for name, value in self.headers.items()},
            self.client_address[1],
            fault.kind if fault else None,
            time.monotonic(),
        )
        welcome = server.enter(self.connection, asked)
        try:
            if server.hold:
                server.wait(server.hold)
            if not welcome:
                fault = Fault("status", code=503)
            self._answer(path, fault)
        except (ConnectionError, ssl.SSLError):
            self.close_connection = True
        finally:
            server.leave()

    do_PUT = do_GET  # how a token is asked for

    def _answer(self, path: str, fault: Fault | None) -> None:
        server = self.server_of_test
        kind = fault.kind if fault else ""
        if fault and kind == "hangup":
            return self._reset()
        if fault and kind == "garbage":
            self.wfile.write(b"220 this is no web server\r\n\r\n")
            self.close_connection = True
            return None
        if fault and kind == "slow_head":
            for byte in b"HTTP/1.1 200 OK\r\n" + b"X-Drip: yes\r\n" * 1000:
                self.wfile.write(bytes([byte]))
                server.wait(1 / fault.rate)
                if server._closed.is_set():
                    break
            return self._reset()
        if fault and kind in ("status", "moved"):
            return self._plain(fault.code, fault.body, fault.headers)
        data = server.files.get(path)
        if data is None:
            return self._plain(404, b"not here", {})
        about = self._about(path, data)
        if server.conditions and not self._meets(about):
            return self._plain(412, b"another one", {})
        first, last = 0, len(data) - 1
        wanted = self.headers["Range"] if server.ranges else None
        if wanted:
            low, _, high = wanted.removeprefix("bytes=").partition("-")
            first, last = int(low), min(int(high or last), last)
            if first >= len(data):
                return self._plain(416, b"", {"Content-Range": f"bytes */{len(data)}", **about})
        body = data[first : last + 1]
        self.send_response(206 if wanted else 200)
        for name, value in about.items():
            self.send_header(name, value)
        if wanted:
            shift = 1 if kind == "wrong_part" else 0
            self.send_header("Content-Range", f"bytes {first + shift}-{last + shift}/{len(data)}")
        if not wanted and not server.lengths:
            self.send_header("Transfer-Encoding", "chunked")
            body = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in _pieces(body, 1000)) + b"0\r\n\r\n"
        else:
            self.send_header("Content-Length", str(fault.after if fault and kind == "short_header" else len(body)))
        self.end_headers()
        return self._body(body, fault)

    def _body(self, body: bytes, fault: Fault | None) -> None:
        server = self.server_of_test
        if fault is None or fault.kind == "wrong_part":
            self.wfile.write(body)
            return None
        if fault.kind == "drip":
            for piece in _pieces(body, max(1, int(fault.rate / 20))):
                self.wfile.write(piece)
                server.wait(0.05)
                if server._closed.is_set():
                    break
            return None
        self.wfile.write(body[: fault.after])
        self.wfile.flush()
        if fault.kind == "stall":
            server.wait(fault.seconds)
        if fault.kind == "reset":
            return self._reset()
        self.close_connection = fault.kind != "short_header"
        return None

    def _about(self, path: str, data: bytes) -> dict[str, str]:
        server, about = self.server_of_test, {}
        tag = server.etags.get(path, f'"{len(data):x}-{server.revision[path]}"')
        if server.etag and tag is not None:
            about["ETag"] = tag
        if server.modified:
            about["Last-Modified"] = formatdate(_MODIFIED + server.revision[path], usegmt=True)
        return about

    def _meets(self, about: dict[str, str]) -> bool:
        tag, since = self.headers["If-Match"], self.headers["If-Unmodified-Since"]
        if tag is not None:
            return tag == about.get("ETag")
        return since is None or since == about.get("Last-Modified")

    def _plain(self, code: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _reset(self) -> None:
        """End the connection so that the other side gets an error instead of an end."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        socket.close(self.connection.detach())


def _pieces(data: bytes, size: int) -> Iterator[bytes]:
    for start in range(0, len(data), size):
        yield data[start : start + size]
