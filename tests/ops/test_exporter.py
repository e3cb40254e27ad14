"""The exporter over real sockets: what it answers, what its pages and ticks may do, and a real Prometheus."""

import asyncio
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlencode
from urllib.request import ProxyHandler, build_opener

import pytest
from gristmill.ops.monitor import exporter as module
from gristmill.ops.monitor.exporter import Exporter, ExporterError
from gristmill.ops.monitor.metrics import Metrics
from gristmill.ops.monitor.ports import port_holder

from ..servers import end, kept_ports
from ..waiting import wait_for
from .scraped import ask, connect, get


@pytest.fixture
def metrics() -> Metrics:
    metrics = Metrics("<first>", {"world": 1})
    metrics.observe_step({"position": 32, "batch": 32, "loss": 2.5, "phases": {"data_wait": 0.1, "student": 0.4}})
    return metrics


@pytest.fixture
def exporter(metrics: Metrics) -> Iterator[Exporter]:
    with Exporter(metrics.registry, 0) as exporter:
        yield exporter


@pytest.fixture
def kept() -> Iterator[int]:
    with kept_ports(1) as [port]:
        yield port


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

    with Exporter(metrics.registry, 0, pages={"never": never}) as exporter:
        with monkeypatch.context() as patch:
            patch.setattr(module, "DEADLINE", 1.0)  # of the request, too
            assert get(exporter, "/never")[0] == "HTTP/1.1 500 Internal Server Error"
        assert get(exporter, "/metrics")[0] == "HTTP/1.1 200 OK"


def test_a_collector_that_raises_is_a_500_and_not_the_end(metrics: Metrics):
    class Broken:
        def collect(self):
            raise RuntimeError("not now")

    with Exporter(metrics.registry, 0) as exporter:
        metrics.registry.register(broken := Broken())  # pyright: ignore[reportArgumentType]
        assert get(exporter, "/metrics")[0] == "HTTP/1.1 500 Internal Server Error"
        metrics.registry.unregister(broken)  # pyright: ignore[reportArgumentType]
        assert b'gristmill_exporter_failures_total{what="metrics"} 1.0\n' in get(exporter, "/metrics")[2]


def test_ticks_go_on_in_the_exporters_thread_whatever_they_raise(metrics: Metrics, capfd: pytest.CaptureFixture[str]):
    seen: list[str] = []

    def tick() -> None:
        seen.append(threading.current_thread().name)
        raise RuntimeError("every time")

    with Exporter(metrics.registry, 0, ticks=[(0.01, tick)]) as exporter:
        wait_for(lambda: len(seen) > 3, 60)
        assert get(exporter, "/metrics")[0] == "HTTP/1.1 200 OK"
        assert exporter.failures["tick"] > 2
    assert set(seen) == {"gristmill-exporter"}
    after = len(seen)
    time.sleep(0.05)
    assert len(seen) == after
    assert capfd.readouterr().err == "warning: metrics: RuntimeError: every time\n"


def test_what_is_wrong_with_a_tick_is_said_whenever_it_changes(metrics: Metrics, capfd: pytest.CaptureFixture[str]):
    troubles = ["a", "a", "b", "", "b", "b", ""]
    left = list(troubles)

    def tick() -> None:
        if left and (trouble := left.pop(0)):
            raise OSError(trouble)

    with Exporter(metrics.registry, 0, ticks=[(0.001, tick)]) as exporter:
        wait_for(lambda: not left, 60)
        assert exporter.failures["tick"] == sum(map(bool, troubles))
    assert capfd.readouterr().err.splitlines() == [f"warning: metrics: OSError: {what}" for what in "abb"]


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
    wait_for(lambda: b"gristmill_mixture_loss 1.25\n" in get(exporter, "/metrics")[2], 60)


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
def test_a_real_prometheus_scrapes_it(exporter: Exporter, metrics: Metrics, tmp_path: Path, kept: int):
    config = {
        "global": {"scrape_interval": "500ms", "scrape_timeout": "500ms"},
        "scrape_configs": [
            {"job_name": "gristmill", "static_configs": [{"targets": [f"127.0.0.1:{exporter.port}"]}]},
        ],
    }
    (tmp_path / "prometheus.yml").write_text(json.dumps(config))  # JSON is YAML
    command = ["prometheus", f"--config.file={tmp_path / 'prometheus.yml'}", f"--storage.tsdb.path={tmp_path / 'db'}"]
    log = (tmp_path / "log").open("w")
    address = f"127.0.0.1:{kept}"
    server = subprocess.Popen([*command, f"--web.listen-address={address}", "--log.level=warn"], stderr=log, stdout=log)
    opener = build_opener(ProxyHandler({}))

    def query(expression: str) -> list[dict]:
        assert server.poll() is None, (tmp_path / "log").read_text()
        try:
            with opener.open(f"http://{address}/api/v1/query?{urlencode({'query': expression})}", timeout=5) as answer:
                return json.load(answer)["data"]["result"]
        except OSError:
            return []  # not up yet

    try:
        assert wait_for(lambda: query("gristmill_mixture_loss"), 60)[0]["value"][1] == "2.5"
        assert wait_for(lambda: query("up == 1"), 60)  # a scrape over its time makes it 0 until the next
        metrics.observe_step({"loss": 2.0, "phases": {"data_wait": 0.1, "student": 0.4}})
        wait_for(lambda: query("increase(gristmill_steps_total[30s]) > 0"), 60)
        phase = 'gristmill_step_phase_seconds_total{phase="data_wait"} / on() gristmill_step_seconds_sum'
        share = wait_for(lambda: query(f"{phase} == 0.2") or query(phase), 60)[0]["value"][1]
        assert float(share) == pytest.approx(0.2)
        assert int(wait_for(lambda: query("scrape_samples_scraped"), 60)[0]["value"][1]) < 300
        assert wait_for(lambda: query("gristmill_run_info"), 60)[0]["metric"]["run"] == "<first>"
    finally:
        end(server)
        log.close()
