"""A run of two ranks that real exporters serve, and a web server that is not ours."""

import io
import json
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

from gristmill.ops.monitor.exporter import Exporter
from gristmill.ops.monitor.screen import Screen
from rich.console import Console

from .processes import NOW, Process

Two = tuple[Path, list[Process], list[Exporter]]


def as_now(process: Process) -> Process:
    """The same, with its timestamps set against the clock."""
    for name, labels in list(process.gauges):
        if name.endswith("_timestamp_seconds") or name == "process_start_time_seconds":
            process.gauges[name, labels] += time.time() - NOW
    return process


@contextmanager
def two_ranks(folder: Path) -> Iterator[Two]:
    """A run folder with two ranks behind it, as serving.py leaves it."""
    (folder / "targets").mkdir(parents=True)
    processes = [as_now(Process(rank)) for rank in range(2)]
    with ExitStack() as stack:
        exporters = [stack.enter_context(Exporter(process.registry(), 0)) for process in processes]
        for process, exporter in zip(processes, exporters, strict=True):
            target(folder / "targets", process, exporter.port)
        (folder / "metrics.url").write_text(exporters[0].url + "\n")
        yield folder, processes, exporters


def target(folder: Path, process: Process, port: int, **labels: str) -> None:
    entry = {"targets": [f"127.0.0.1:{port}"], "labels": {"job": "gristmill", **process.labels, **labels}}
    (folder / f"{process.rank:05}.json").write_text(json.dumps([entry]))


def shown(answer: dict[str, Any], width: int = 100) -> str:
    page = io.StringIO()
    Console(file=page, width=width, highlight=False).print(Screen(answer))
    return page.getvalue()


class Stranger:
    """A web server that is not ours, on loopback."""

    def __init__(self, status: int, body: bytes):
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(status)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                """Says nothing."""

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)

    def __enter__(self) -> str:
        self.thread.start()
        return f"http://127.0.0.1:{self.server.server_port}/metrics"

    def __exit__(self, *exception: object) -> None:
        self.server.shutdown()
        self.server.server_close()
