"""The exporter over real sockets: what it answers, what a bad client can do to it, and a real Prometheus."""

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlencode
from urllib.request import ProxyHandler, build_opener

import pytest
from gristmill.ops.monitor import exporter as module
from gristmill.ops.monitor.exporter import CONNECTIONS, Exporter, ExporterError, port_holder
from gristmill.ops.monitor.metrics import Metrics

T = TypeVar("T")


@pytest.fixture
def metrics() -> Metrics:
    metrics = Metrics("<first>", {"world": 1})
    metrics.observe_step({"position": 32, "batch": 32, "loss": 2.5, "phases": {"data_wait": 0.1, "student": 0.4}})
    return metrics


@pytest.fixture
def exporter(metrics: Metrics) -> Iterator[Exporter]:
    with Exporter(metrics.registry, 0) as exporter:
        yield exporter


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


def eventually(look: Callable[[], T | None], seconds: float = 60.0) -> T:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if (found := look()) is not None:
            return found
        time.sleep(0.1)
    raise AssertionError(f"nothing after {seconds} s")


def test_metrics_and_a_page_for_people_and_nothing_else(exporter: Exporter):
    status, headers, body = get(exporter, "/metrics")
    assert status == "HTTP/1.1 200 OK"
    assert headers["Content-Type"].startswith("text/plain; version=0.0.4")
    assert int(headers["Content-Length"]) == len(body)
    assert b"gristmill_mixture_loss 2.5\n" in body
    assert b"_created" not in body
    status, headers, body = get(exporter, "/")
    assert headers["Content-Type"].startswith("text/html")
    assert b"&lt;first&gt;" in body
    assert str(exporter.port).encode() in body
    for path in ("/xyz", "/metrics/", "/metrics/../etc/passwd", "//metrics", "*", "/%6detrics"):
        assert get(exporter, path)[0] == "HTTP/1.1 404 Not Found"
    assert get(exporter, "/metrics?name=x")[0] == "HTTP/1.1 200 OK"


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "get"])
def test_it_is_only_read(exporter: Exporter, method: str):
    status, headers, _ = ask(exporter, f"{method} /metrics HTTP/1.1\r\n\r\n".encode())
    assert status == "HTTP/1.1 405 Method Not Allowed"
    assert headers["Allow"] == "GET, HEAD"


def test_head_is_get_without_the_body(exporter: Exporter):
    status, headers, body = ask(exporter, b"HEAD /metrics HTTP/1.1\r\n\r\n")
    assert status == "HTTP/1.1 200 OK"
    assert int(headers["Content-Length"]) > 1000
    assert body == b""


@pytest.mark.parametrize(
    ("host", "welcome"),
    [
        ("127.0.0.1:9464", True), ("10.1.2.3", True), ("[::1]:9464", True), ("LocalHost:80", True), (socket.gethostname(), True),
        ("evil.example", False), ("localhost.evil.example:9464", False), ("127.0.0.1.evil.example", False), ("", False), ("[x]", False),
    ],
)  # fmt: skip
def test_a_web_site_cannot_pass_its_own_name_off_for_loopback(metrics: Metrics, host: str, welcome: bool):
    request = f"GET /metrics HTTP/1.1\r\nAccept: */*\r\nhost:  {host}\r\n\r\n".encode()
    with Exporter(metrics.registry, 0) as exporter:
        status, _, body = ask(exporter, request)
        assert (status == "HTTP/1.1 200 OK") == welcome == (b"gristmill_mixture_loss" in body)
        assert welcome or status == "HTTP/1.1 421 Misdirected Request"
    with Exporter(metrics.registry, 0, "0.0.0.0") as exporter:  # others may reach it, by names unknown here
        assert ask(exporter, request)[0] == "HTTP/1.1 200 OK"


def test_pages_are_given_the_query_and_what_they_raise_is_theirs(metrics: Metrics):
    async def slow(query: dict[str, str]) -> tuple[str, bytes]:
        await asyncio.sleep(0.01)
        return "text/plain", b"awaited"

    pages = {
        "": lambda query: ("text/html", b"the page"),
        "board.json": lambda query: ("application/json", json.dumps(query).encode()),
        "slow": slow,
        "broken": lambda query: ("text/plain", str(1 // 0).encode()),
    }
    with Exporter(metrics.registry, 0, pages=pages) as exporter:
        assert get(exporter, "/")[2] == b"the page"
        assert json.loads(get(exporter, "/board.json?since=3&run=%C3%A9+x&blank=")[2]) == {
            "since": "3",
            "run": "é x",
            "blank": "",
        }
        assert get(exporter, "/slow")[2] == b"awaited"
        assert get(exporter, "/board.json?" + "a=1&" * 40)[0] == "HTTP/1.1 400 Bad Request"
        status, _, body = get(exporter, "/broken")
        assert status == "HTTP/1.1 500 Internal Server Error"
        assert b"ZeroDivisionError" in body
        assert b"/board.json" in get(exporter, "/other")[2]
        assert b'gristmill_exporter_failures_total{what="page"} 1.0\n' in get(exporter, "/metrics")[2]


def test_a_page_that_never_comes_is_given_up(metrics: Metrics, monkeypatch: pytest.MonkeyPatch):
    async def never(query: dict[str, str]) -> tuple[str, bytes]:
        await asyncio.Event().wait()
        raise AssertionError

    monkeypatch.setattr(module, "DEADLINE", 0.2)
    with Exporter(metrics.registry, 0, pages={"never": never}) as exporter:
        assert get(exporter, "/never")[0] == "HTTP/1.1 500 Internal Server Error"
        assert get(exporter, "/metrics")[0] == "HTTP/1.1 200 OK"


def test_a_collector_that_raises_is_a_500_and_not_the_end(metrics: Metrics):
    class Broken:
        def collect(self):
            raise RuntimeError("not now")

    with Exporter(metrics.registry, 0) as exporter:
        metrics.registry.register(
            broken := Broken(),
        )  # pyright: ignore[reportArgumentType]
    with Exporter(metrics.registry, exporter.port) as exporter:
        assert get(exporter, "/metrics")[0] == "HTTP/1.1 500 Internal Server Error"
        metrics.registry.unregister(broken)  # pyright: ignore[reportArgumentType]
        assert b'gristmill_exporter_failures_total{what="metrics"} 1.0\n' in get(exporter, "/metrics")[2]


def test_ticks_go_on_in_the_exporters_thread_whatever_they_raise(metrics: Metrics):
    seen: list[str] = []

    def tick() -> None:
        seen.append(threading.current_thread().name)
        raise RuntimeError("every time")

    with Exporter(metrics.registry, 0, ticks=[(0.01, tick)]) as exporter:
        eventually(lambda: True if len(seen) > 3 else None)
        assert get(exporter, "/metrics")[0] == "HTTP/1.1 200 OK"
        assert exporter.failures["tick"] > 2
    assert set(seen) == {"gristmill-exporter"}
    after = len(seen)
    time.sleep(0.05)
    assert len(seen) == after


def test_another_socket_is_served_too_and_closed_with_it(metrics: Metrics):
    other = socket.create_server(("127.0.0.1", 0))
    address = other.getsockname()
    with Exporter(metrics.registry, 0) as exporter:
        exporter.also(other)
        for _ in range(2):
            with socket.create_connection(address, timeout=30) as client:
                client.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
                assert client.recv(15) == b"HTTP/1.1 200 OK"
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(address, timeout=30)
    exporter.also(other := socket.create_server(("127.0.0.1", 0)))  # too late: closed at once
    assert other.fileno() == -1


@pytest.mark.parametrize("request_", [b"\x16\x03\x01\r\n\r\n", b"GET\r\n\r\n", b"GET /metrics SMTP\r\n\r\n"])
def test_what_is_not_http_is_refused(exporter: Exporter, request_: bytes):
    assert ask(exporter, request_)[0] == "HTTP/1.1 400 Bad Request"


def test_a_request_without_end_is_cut_off(exporter: Exporter):
    with connect(exporter) as client:
        try:
            client.sendall(b"GET /metrics HTTP/1.1\r\n" + b"X: y\r\n" * 100_000)
            assert client.recv(100) == b""
        except (ConnectionResetError, BrokenPipeError):
            pass  # cut off while still sending
    assert get(exporter, "/metrics")[0] == "HTTP/1.1 200 OK"


def test_values_are_fresh(metrics: Metrics, exporter: Exporter):
    get(exporter, "/metrics")
    metrics.observe_step({"loss": 1.25})
    eventually(lambda: True if b"gristmill_mixture_loss 1.25\n" in get(exporter, "/metrics")[2] else None)


def test_it_listens_on_loopback_only(exporter: Exporter):
    assert exporter.url == f"http://127.0.0.1:{exporter.port}/metrics"
    assert exporter._sockets[0].getsockname()[0] == "127.0.0.1"


def test_a_wildcard_address_is_published_by_name(metrics: Metrics):
    with Exporter(metrics.registry, 0, "0.0.0.0") as exporter:
        assert exporter.url == f"http://{socket.gethostname()}:{exporter.port}/metrics"


def test_ipv6(metrics: Metrics):
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:  # a machine without IPv6: the user is told, as for any address that is not there
        with pytest.raises(ExporterError, match=r"metrics\.address"):
            Exporter(metrics.registry, 0, "::1")
        return
    with Exporter(metrics.registry, 0, "::1") as exporter:
        assert exporter.url.startswith("http://[::1]:")
        assert get(exporter, "/metrics")[0] == "HTTP/1.1 200 OK"


def test_a_taken_port_is_told_with_holder_and_remedy(metrics: Metrics, exporter: Exporter):
    with pytest.raises(ExporterError) as caught:
        Exporter(metrics.registry, exporter.port)
    message = str(caught.value)
    name = Path("/proc/self/comm").read_text().strip()
    assert f"port {exporter.port}" in message
    assert f"process {os.getpid()} ({name})" in message
    for remedy in ("metrics.port=NUMBER", "metrics.port=0", "metrics.port=off"):
        assert remedy in message


def test_the_holder_may_be_another_process():
    code = "import socket, sys; s = socket.create_server(('127.0.0.1', 0)); print(s.getsockname()[1], flush=True)\n"
    other = subprocess.Popen([sys.executable, "-c", code + "sys.stdin.read()"], stdin=-1, stdout=-1)
    try:
        assert other.stdout is not None
        assert f"process {other.pid} (" in (port_holder(int(other.stdout.readline())) or "")
    finally:
        other.communicate(b"")


def test_other_addresses_and_ports_are_refused_with_a_reason(metrics: Metrics):
    with pytest.raises(ExporterError, match=r"metrics\.address must be an address of this machine"):
        Exporter(metrics.registry, 0, "192.0.2.1")
    with pytest.raises(ExporterError, match=r"metrics\.address"):
        Exporter(metrics.registry, 0, "no such host")
    for port in (-1, 65536):
        with pytest.raises(ExporterError, match=f"metrics.port={port} is no port"):
            Exporter(metrics.registry, port)


def test_close_frees_the_port_and_ends_the_thread_whatever_clients_do(metrics: Metrics):
    exporter = Exporter(metrics.registry, 0)
    clients = [connect(exporter) for _ in range(20)]
    for client in clients[:10]:
        client.sendall(b"GET /metr")
    eventually(lambda: True if len(exporter._open) == 20 else None)
    exporter.close()
    exporter.close()
    assert not exporter._thread.is_alive()
    with Exporter(metrics.registry, exporter.port) as again:
        assert get(again, "/metrics")[0] == "HTTP/1.1 200 OK"
    for client in clients:
        client.close()


def test_hanging_clients_cannot_lock_others_out(exporter: Exporter):
    hanging = [connect(exporter) for _ in range(CONNECTIONS * 3)]
    for client in hanging:
        client.sendall(b"GET /metrics HTTP/1.1\r\nX: ")
    assert get(exporter, "/metrics")[0] == "HTTP/1.1 200 OK"
    assert len(exporter._open) <= CONNECTIONS
    assert threading.active_count() < 10
    for client in hanging:
        client.close()


def test_a_hanging_client_is_dropped_at_the_deadline(metrics: Metrics, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "DEADLINE", 0.2)
    with Exporter(metrics.registry, 0) as exporter, connect(exporter) as silent, connect(exporter) as dripping:
        dripping.sendall(b"GET /metrics")
        for client in (silent, dripping):
            with suppress(ConnectionResetError):
                assert client.recv(100) == b""
        eventually(lambda: True if not exporter._open else None)


def test_a_client_that_does_not_take_its_answer_is_dropped(metrics: Metrics, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "DEADLINE", 0.2)
    monkeypatch.setattr(module, "generate_latest", lambda registry: b"x" * (64 << 20))
    with Exporter(metrics.registry, 0) as exporter, connect(exporter) as client:
        client.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
        eventually(lambda: True if exporter._page else None)
        eventually(lambda: True if not exporter._open else None)


def test_a_flood_of_scrapes_is_answered_from_few_renderings(metrics: Metrics, monkeypatch: pytest.MonkeyPatch):
    """A thousand scrapes while steps go on: all answered, steps taken, and only a rendering now and then."""
    renderings = []
    render = module.generate_latest
    monkeypatch.setattr(module, "generate_latest", lambda registry: renderings.append(1) or render(registry))
    scraped: list[str] = []
    start = time.monotonic()
    with Exporter(metrics.registry, 0) as exporter:

        def flood() -> None:
            scraped.extend(get(exporter, "/metrics")[0] for _ in range(300))

        threads = [threading.Thread(target=flood) for _ in range(4)]
        for thread in threads:
            thread.start()
        steps = 0
        while any(thread.is_alive() for thread in threads):
            metrics.observe_step({"loss": 1.0, "phases": {"student": 0.1}})
            steps += 1
    assert scraped == ["HTTP/1.1 200 OK"] * 1200
    assert steps > 100
    assert len(renderings) <= (time.monotonic() - start) / module.FRESH + 2


def test_a_process_with_an_exporter_and_a_hanging_client_leaves_at_once(tmp_path: Path):
    """The thread is a daemon: a training process that ends without close() is not held."""
    code = (
        "import sys; from gristmill.ops.monitor import Exporter, Metrics\n"
        "e = Exporter(Metrics('x', {}).registry, 0); print(e.url, flush=True); sys.stdin.readline()\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdin=-1, stdout=-1)
    assert process.stdout is not None
    port = int(re.findall(rb":(\d+)/", process.stdout.readline())[0])
    with socket.create_connection(("127.0.0.1", port)) as client:
        client.sendall(b"GET ")
        process.communicate(b"\n", timeout=30)
    assert process.returncode == 0


@pytest.mark.system
@pytest.mark.program("prometheus")
def test_a_real_prometheus_scrapes_it(exporter: Exporter, metrics: Metrics, tmp_path: Path):
    config = {
        "global": {"scrape_interval": "500ms", "scrape_timeout": "500ms"},
        "scrape_configs": [
            {"job_name": "gristmill", "static_configs": [{"targets": [f"127.0.0.1:{exporter.port}"]}]},
        ],
    }
    (tmp_path / "prometheus.yml").write_text(json.dumps(config))  # JSON is YAML
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = ["prometheus", f"--config.file={tmp_path / 'prometheus.yml'}", f"--storage.tsdb.path={tmp_path / 'db'}"]
    log = (tmp_path / "log").open("w")
    server = subprocess.Popen([*command, f"--web.listen-address={address}", "--log.level=warn"], stderr=log, stdout=log)
    opener = build_opener(ProxyHandler({}))

    def query(expression: str) -> list[dict] | None:
        assert server.poll() is None, (tmp_path / "log").read_text()
        try:
            with opener.open(f"http://{address}/api/v1/query?{urlencode({'query': expression})}", timeout=5) as answer:
                return json.load(answer)["data"]["result"] or None
        except OSError:
            return None  # not up yet

    try:
        assert eventually(lambda: query("gristmill_mixture_loss"))[0]["value"][1] == "2.5"
        assert eventually(lambda: query("up"))[0]["value"][1] == "1"
        metrics.observe_step({"loss": 2.0, "phases": {"data_wait": 0.1, "student": 0.4}})
        eventually(lambda: query("increase(gristmill_steps_total[30s]) > 0"))
        phase = 'gristmill_step_phase_seconds_total{phase="data_wait"} / on() gristmill_step_seconds_sum'
        share = eventually(lambda: query(f"{phase} == 0.2") or query(phase))[0]["value"][1]
        assert float(share) == pytest.approx(0.2)
        assert int(eventually(lambda: query("scrape_samples_scraped"))[0]["value"][1]) < 300
        assert eventually(lambda: query("gristmill_run_info"))[0]["metric"]["run"] == "<first>"
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(timeout=30)
        log.close()
