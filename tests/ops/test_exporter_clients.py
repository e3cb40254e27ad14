"""What many and bad clients can do to an exporter: neither lock others out, nor hold its end up, nor slow the steps."""

import threading
import time
from collections.abc import Iterator
from contextlib import suppress

import pytest
from gristmill.ops.monitor import exporter as module
from gristmill.ops.monitor.exporter import CONNECTIONS, Exporter
from gristmill.ops.monitor.metrics import Metrics

from ..waiting import wait_for
from .scraped import connect, get


@pytest.fixture
def metrics() -> Metrics:
    metrics = Metrics("run", {"world": 1})
    metrics.observe_step({"loss": 2.5})
    return metrics


@pytest.fixture
def exporter(metrics: Metrics) -> Iterator[Exporter]:
    with Exporter(metrics.registry, 0) as exporter:
        yield exporter


def test_close_frees_the_port_and_ends_the_thread_whatever_clients_do(metrics: Metrics):
    exporter = Exporter(metrics.registry, 0)
    clients = [connect(exporter) for _ in range(20)]
    for client in clients[:10]:
        client.sendall(b"GET /metr")
    wait_for(lambda: len(exporter._open) == 20, 60)
    exporter.close()
    exporter.close()
    assert not exporter._thread.is_alive()
    with Exporter(metrics.registry, exporter.port) as again:
        assert get(again, "/metrics")[0] == "HTTP/1.1 200 OK"
    for client in clients:
        client.close()


def test_hanging_clients_cannot_lock_others_out(exporter: Exporter):
    before = threading.active_count()
    hanging = [connect(exporter) for _ in range(CONNECTIONS * 3)]
    for client in hanging:
        client.sendall(b"GET /metrics HTTP/1.1\r\nX: ")
    assert get(exporter, "/metrics")[0] == "HTTP/1.1 200 OK"
    assert len(exporter._open) <= CONNECTIONS
    assert threading.active_count() <= before + 2
    for client in hanging:
        client.close()


def test_a_client_that_is_dropped_gives_its_turn_back(metrics: Metrics, monkeypatch: pytest.MonkeyPatch):
    """Each of twenty would keep those behind it waiting for two seconds more, and the last for too long."""
    turns = []

    class Counting(Exporter):
        async def _turn(self) -> None:
            turns.append(self)
            await super()._turn()

    monkeypatch.setattr(module, "PACE", 2.0)
    monkeypatch.setattr(module, "CONNECTIONS", 1)
    with Counting(metrics.registry, 0) as exporter:
        assert get(exporter, "/metrics")[0] == "HTTP/1.1 200 OK"
        for number in range(2, 22):  # one after the other comes to wait for its turn, and drops the one before
            with connect(exporter) as client:
                client.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
                wait_for(lambda number=number: len(turns) == number, 60, every=0.002)
        assert get(exporter, "/metrics")[0] == "HTTP/1.1 200 OK"


def test_a_hanging_client_is_dropped_at_the_deadline(metrics: Metrics, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "DEADLINE", 0.2)
    with Exporter(metrics.registry, 0) as exporter, connect(exporter) as silent, connect(exporter) as dripping:
        dripping.sendall(b"GET /metrics")
        for client in (silent, dripping):
            with suppress(ConnectionResetError):
                assert client.recv(100) == b""
        wait_for(lambda: not exporter._open, 60)


def test_a_client_that_does_not_take_its_answer_is_dropped(metrics: Metrics, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "DEADLINE", 1.0)  # of the request, too
    monkeypatch.setattr(module, "generate_latest", lambda registry: b"x" * (64 << 20))
    with Exporter(metrics.registry, 0) as exporter, connect(exporter) as client:
        client.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
        wait_for(lambda: exporter._page, 60)
        wait_for(lambda: not exporter._open, 60)


def test_a_flood_of_scrapes_is_answered_from_few_renderings(metrics: Metrics, monkeypatch: pytest.MonkeyPatch):
    """Hundreds of scrapes while steps go on: all answered, steps taken, and only a rendering now and then."""
    renderings = []
    render = module.generate_latest
    monkeypatch.setattr(module, "generate_latest", lambda registry: renderings.append(1) or render(registry))
    scraped: list[str] = []
    start = time.monotonic()
    with Exporter(metrics.registry, 0) as exporter:

        def flood() -> None:
            scraped.extend(get(exporter, "/metrics")[0] for _ in range(100))

        threads = [threading.Thread(target=flood) for _ in range(4)]
        for thread in threads:
            thread.start()
        steps = 0
        while any(thread.is_alive() for thread in threads):
            metrics.observe_step({"loss": 1.0, "phases": {"student": 0.1}})
            steps += 1
    assert scraped == ["HTTP/1.1 200 OK"] * 400
    assert steps > 100
    assert len(renderings) <= (time.monotonic() - start) / module.FRESH + 2
