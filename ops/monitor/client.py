"""Asks an exporter, over http or https: what `gristmill status` reads, and what a script may.

Not urllib: no proxy is asked for loopback, no redirect is followed, and the timeout is for the whole answer, so that an
exporter which drips a byte a second cannot hold a view for hours. HTTP/1.0 makes the end of the connection the end of
the answer. A certificate of one's own is shown where the server wants one (mTLS).
"""

from __future__ import annotations

import re
import socket
import ssl
import time
from http.client import HTTPException, responses
from urllib.parse import urlsplit

TIMEOUT = 3.0  # seconds for all of it
PAGE_BYTES = 64 << 20  # a node's page speaks for all its ranks
CHUNK = 1 << 16


def get(
    url: str,
    ca: str | None = None,
    cert: str | None = None,
    key: str | None = None,
    timeout: float = TIMEOUT,
    most: int = PAGE_BYTES,
) -> bytes:
    """What `url` answers, `most` bytes with its headers.

    ca: file of the authority that signed the server's certificate (default: those that the system trusts); cert, key:
    files of our own certificate. Raises OSError (also for an answer other than 200, and certificates that do not fit),
    ValueError or HTTPException.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or re.search(r"[\s\x00-\x1f]", url):
        raise ValueError(f"{url} is no http or https URL")
    until = time.monotonic() + timeout
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    host = parts.netloc.rpartition("@")[2]
    with socket.create_connection(
        (parts.hostname, parts.port or (443 if parts.scheme == "https" else 80)), timeout
    ) as raw:
        connection = raw
        if parts.scheme == "https":
            raw.settimeout(_left(until))
            connection = _context(ca, cert, key).wrap_socket(raw, server_hostname=parts.hostname)
        with connection:
            connection.settimeout(_left(until))
            connection.sendall(f"GET {target} HTTP/1.0\r\nHost: {host}\r\nAccept: */*\r\n\r\n".encode("ascii"))
            answer = bytearray()
            while chunk := connection.recv(CHUNK):
                answer += chunk
                if len(answer) > most:
                    raise ValueError(f"more than {most >> 20} MiB")
                connection.settimeout(_left(until))
    return _body(bytes(answer))


def _context(ca: str | None, cert: str | None, key: str | None) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=ca)
    if cert:
        context.load_cert_chain(cert, key, password=_no_password)
    return context


def _body(answer: bytes) -> bytes:
    head, found, body = answer.partition(b"\r\n\r\n")
    status = re.match(rb"HTTP/1\.[01] (\d{3})\b", head)
    if not found or not status:
        raise HTTPException("that is no HTTP" if answer else "it hung up without an answer")
    if status[1] != b"200":
        raise OSError(f"HTTP {int(status[1])} {responses.get(int(status[1]), '')}".strip())
    length = re.search(rb"(?i)\r\ncontent-length:[ \t]*(\d{1,12})[ \t]*(?:\r|$)", head)
    if length and len(body) < int(length[1]):
        raise HTTPException(f"cut off {int(length[1]) - len(body)} bytes before its end")
    return body


def _left(until: float) -> float:
    left = until - time.monotonic()
    if left <= 0:
        raise TimeoutError("timed out")
    return left


def _no_password() -> str:
    raise ValueError("the key is encrypted; give one without a password")
