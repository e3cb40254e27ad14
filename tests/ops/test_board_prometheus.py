"""A board whose Prometheus is none, dead, slow or talkative: said, bounded, and replaced by the own history."""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from gristmill.ops.monitor import board_prometheus
from gristmill.ops.monitor.board import board
from gristmill.ops.monitor.board_prometheus import ANSWER_BYTES, PATIENCE, Prometheus, PrometheusError
from gristmill.ops.monitor.metrics import Metrics
from gristmill.ops.monitor.panels_terms import Take

SCOPE = ("run", "rank")
EMPTY = json.dumps({"data": {"result": []}}).encode()
HEAD = b"HTTP/1.0 200 OK\r\n\r\n"
DRIP = b"drip"


@contextmanager
def answering(*replies: bytes) -> Iterator[tuple[str, list[bytes]]]:
    """(URL, what it was asked) of a server that gives these replies, one a question; then it hangs up without a word."""
    asked: list[bytes] = []

    def serve() -> None:
        while True:
            try:
                connection, _ = server.accept()
            except OSError:  # closed: the test is over
                return
            with connection:
                asked.append(connection.recv(65536))
                reply = replies[len(asked) - 1] if len(asked) <= len(replies) else b""
                try:
                    while reply == DRIP:
                        connection.sendall(HEAD[:1])
                        time.sleep(0.02)
                    connection.sendall(reply)
                except OSError:  # the other side has had enough
                    pass

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}", asked
        server.shutdown(socket.SHUT_RDWR)
    thread.join(30)


def question(server: Prometheus, deadline: float | None = None) -> Any:
    deadline = time.monotonic() + PATIENCE if deadline is None else deadline
    return server.evaluate(Take("gristmill_step"), np.array([0.0, 1.0]), 60.0, deadline)


def test_a_silent_prometheus_is_said_and_history_shown() -> None:
    """The words are about what is shown: of four ranks this one alone."""
    metrics = Metrics("alone", {})
    with answering() as (url, _):
        pages, _ = board(metrics.registry, run="alone", world=4, prometheus=url)
        made: Any = pages["board.json"].__self__  # pyright: ignore[reportFunctionMemberAccess]
        now = time.time()
        for ago in (20, 15, 10, 5, 0):
            busy = {
                "loader/read_seconds": 20.0 - ago,
                "loader/hungry_seconds": 20.0 - ago,
                "loader/starved_seconds": 20.0 - ago,
            }
            metrics.observe(busy)
            made.history.sample(now - ago)
        answer = json.loads(made.answer("overview", 300))
    assert "does not answer" in answer["note"]
    assert answer["source"] == "from this process's own history"
    assert answer["flow"]["words"][0].startswith("What limits this rank is the reader")
    made.prometheus = None
    assert "Rank 0 of 4" in json.loads(made.answer("overview", 300))["note"]
    made.world = 1
    assert json.loads(made.answer("overview", 300))["flow"]["words"][0].startswith("What limits the run is the reader")


def test_a_dead_prometheus_is_left_alone_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    with answering() as (url, asked):
        server = Prometheus(url, "run", SCOPE)
        for _ in range(3):
            with pytest.raises(PrometheusError, match=r"hung up|reset"):
                question(server)
        assert len(asked) == 1
        monkeypatch.setattr(board_prometheus, "REST", 0.0)
        with pytest.raises(PrometheusError, match=r"hung up|reset"):
            question(server)
        assert len(asked) == 2


def test_one_that_answered_a_part_of_a_page_is_asked_again() -> None:
    with answering(HEAD + EMPTY, b"", HEAD + EMPTY) as (url, asked):
        server = Prometheus(url, "run", SCOPE)
        page = time.monotonic() + PATIENCE
        assert question(server, page) == {}
        with pytest.raises(PrometheusError):
            question(server, page)
        assert question(server) == {}
        assert len(asked) == 3


def test_the_deadline_is_for_the_whole_answer() -> None:
    """A byte now and then keeps no question alive."""
    with answering(DRIP) as (url, asked), pytest.raises(PrometheusError, match="timed out"):
        question(Prometheus(url, "run", SCOPE), time.monotonic() + 1.0)
    assert len(asked) == 1


@pytest.mark.parametrize(
    ("reply", "why"),
    [
        (HEAD + b"[]", "not of Prometheus"),
        (HEAD + b'{"data": {"result": 1}}', "not of Prometheus"),
        (HEAD + b" " * (ANSWER_BYTES + 1), "more than 4 MiB"),
        (b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:1/\r\n\r\n", "302"),
    ],
)
def test_what_is_no_answer_is_said(reply: bytes, why: str) -> None:
    with answering(reply) as (url, asked), pytest.raises(PrometheusError, match=why):
        question(Prometheus(url, "run", SCOPE))
    assert len(asked) == 1


@pytest.mark.parametrize(
    "url", ["prometheus:9090", "file:///etc/passwd", "http://", "http://a/?query=up", "http://u:p@host:9090"]
)
def test_what_is_no_prometheus_is_refused_with_the_remedy(url: str) -> None:
    with pytest.raises(PrometheusError, match=r"metrics\.prometheus"):
        Prometheus(url, "run", SCOPE)


def test_a_run_s_name_cannot_widen_a_query() -> None:
    asked: list[str] = []
    server = Prometheus("http://127.0.0.1:9", 'a"} or up{x=".*', SCOPE)
    server._ask = lambda what, query, deadline: asked.append(query["query"]) or []  # type: ignore[method-assign]
    server.evaluate(Take("gristmill_step"), np.array([0.0, 1.0]), 60.0, 1e9)
    inside = re.fullmatch(r'gristmill_step\{run=~"((?:[^"\\]|\\.)*)",rank=~"\.\*"\}', asked[0])
    assert inside, asked
