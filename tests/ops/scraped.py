"""Requests to an exporter as they go over the wire."""

import socket

from gristmill.ops.monitor.exporter import Exporter


def connect(exporter: Exporter) -> socket.socket:
    return socket.create_connection((exporter.address, exporter.port), timeout=30)


def ask(exporter: Exporter, request: bytes) -> tuple[str, dict[str, str], bytes]:
    """(status, headers, body) of a raw request."""
    with connect(exporter) as client:
        client.sendall(request)
        answer = b"".join(iter(lambda: client.recv(65536), b""))
    head, _, body = answer.partition(b"\r\n\r\n")
    status, *lines = head.decode().split("\r\n")
    return status, dict(line.split(": ", 1) for line in lines), body


def get(exporter: Exporter, path: str) -> tuple[str, dict[str, str], bytes]:
    return ask(exporter, f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode())
