"""Ranged reads over HTTP(S), against a server that fails in every way that networks know."""

from __future__ import annotations

import os
import re
import signal
import ssl
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import pytest
from gristmill.shards.addresses import parse_address
from gristmill.shards.blob import Blob
from gristmill.shards.client import Client
from gristmill.shards.errors import GristmillError
from gristmill.shards.remote import HttpBlob
from gristmill.shards.retry import (
    Stopped,
    StorageError,
)

from ..faulty_http import FaultyServer
from ..waiting import wait_for
from .remotes import DATA, QUICK, blob_of

CANARY = "canary-8f3e"


def test_reads_ranges_over_one_connection(server: FaultyServer):
    blob = blob_of(server)
    assert isinstance(blob, Blob)
    assert blob.read(1000, 5000) == DATA[1000:6000]
    assert blob.size() == len(DATA)
    assert blob.identity() == f'etag "{len(DATA):x}-0"+{len(DATA)}'
    assert blob.read(len(DATA) - 10, 100) == DATA[-10:]
    assert blob.read(len(DATA), 100) == blob.read(10**9, 1) == blob.read(5, 0) == b""
    assert [one.range for one in server.asked()] == ["bytes=1000-5999", f"bytes={len(DATA) - 10}-{len(DATA) - 1}"]
    assert len({one.connection for one in server.asked()}) == 1
    assert server.asked()[1].headers["if-match"] == f'"{len(DATA):x}-0"'
    stats = blob.client.stats
    assert (stats.requests, stats.connections, stats.bytes) == (2, 1, 5010)
    assert (stats.retries, stats.failures, stats.in_flight) == ({}, {}, 0)


def test_what_it_is_costs_one_byte(server: FaultyServer):
    blob = blob_of(server)
    assert blob.size() == len(DATA)
    assert blob.client.stats.bytes == 1
    server.put("/empty", b"")
    empty = blob_of(server, "/empty")
    assert (empty.size(), empty.read(0, 10)) == (0, b"")
    assert blob_of(server, "/empty").read(0, 10) == b""


def test_many_threads_share_a_bounded_number_of_connections(server: FaultyServer):
    blob = blob_of(server, connections=3)
    server.hold = 0.005
    with ThreadPoolExecutor(12) as pool:
        parts = list(pool.map(lambda i: blob.read(i * 1000, 1000), range(60)))
    assert b"".join(parts) == DATA[:60000]
    assert server.peak <= 3
    assert blob.client.stats.connections <= 3


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ({"kind": "status", "code": 503}, "503"),
        ({"kind": "status", "code": 429, "headers": {"Retry-After": "0"}}, "429"),
        ({"kind": "status", "code": 500}, "500"),
        ({"kind": "reset", "after": 10_000}, "cut"),
        ({"kind": "end", "after": 10_000}, "short"),
        ({"kind": "short_header", "after": 10_000}, "short"),
        ({"kind": "hangup"}, "cut"),
        ({"kind": "garbage"}, "protocol"),
        ({"kind": "wrong_part"}, "protocol"),
        ({"kind": "stall", "after": 10_000}, "stalled"),
        ({"kind": "stall", "after": 0}, "stalled"),
        ({"kind": "drip", "rate": 2000.0}, "slow"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_faults_that_pass_are_retried(server: FaultyServer, fault: dict, reason: str):
    server.fault(times=2, **fault)
    blob = blob_of(server, min_rate=50_000.0, stall_timeout=0.3 if reason in ("stalled", "slow") else 3.0)
    assert blob.read(3, 50_000) == DATA[3:50_003]
    assert blob.client.stats.retries == {reason: 2}
    assert blob.client.stats.failures == {}


def test_goes_on_from_the_received_byte(server: FaultyServer):
    server.fault("end", after=10_000)
    server.fault("reset", after=7)
    blob = blob_of(server)
    assert blob.read(100, 50_000) == DATA[100:50_100]
    starts = [int(one.range.removeprefix("bytes=").partition("-")[0]) for one in server.asked() if one.range]
    assert starts[:2] == [100, 10_100]
    assert 10_100 <= starts[2] <= 10_107  # a reset may take bytes with it that had arrived


def test_headers_that_drip_in_are_cut_off(server: FaultyServer):
    server.fault("slow_head", rate=50.0)
    blob = blob_of(server, min_rate=1000.0, stall_timeout=0.3)
    assert blob.read(0, 10) == DATA[:10]
    assert blob.client.stats.retries == {"slow": 1}


def test_a_connection_that_the_server_closed_meanwhile_is_no_failure(server: FaultyServer):
    blob = blob_of(server)
    blob.read(0, 10)
    server.fault("hangup")  # the next request on the kept connection
    assert blob.read(10, 10) == DATA[10:20]
    assert blob.client.stats.retries == {}
    assert blob.client.stats.connections == 2


@pytest.mark.parametrize(("code", "word"), [(404, "missing"), (410, "missing"), (403, "denied"), (401, "denied")])
def test_what_will_not_pass_is_said_at_once(server: FaultyServer, code: int, word: str):
    server.fault("status", code=code, times=9)
    blob = HttpBlob(server.url(f"/a.tar?X-Amz-Signature={CANARY}"), Client(QUICK))
    with pytest.raises(StorageError, match=f"127.0.0.1:{server.port}/a.tar.*{code}") as caught:
        blob.read(0, 10)
    assert caught.value.reason == word
    assert len(server.asked()) == 1
    assert CANARY not in str(caught.value) + blob.url
    assert blob.client.stats.failures == {word: 1}


def test_after_the_deadline_it_tells_what_was_tried(server: FaultyServer):
    server.fault("status", code=503, times=1000)
    blob = blob_of(server, deadline=2.0)
    with pytest.raises(StorageError) as caught:
        blob.read(0, 10)
    text = str(caught.value)
    found = re.search(r"(\d+) tries in .* failed \((\d+) x 503", text)
    assert found, text
    tries, refused = map(int, found.groups())
    assert caught.value.reason == "deadline"
    assert tries >= 3
    # For the last try only milliseconds may be left, too few for an answer.
    assert tries - 1 <= refused <= len(server.asked()) <= tries
    assert "start the same command again, it goes on from what was saved" in text
    assert isinstance(caught.value, GristmillError)


def test_who_waits_long_is_told_so_once_in_a_while(server: FaultyServer, caplog: pytest.LogCaptureFixture):
    server.fault("status", code=503, times=4)
    blob = blob_of(server, tell_after=0.0)
    assert blob.read(0, 10) == DATA[:10]
    assert len(server.asked()) == 5
    (line,) = caplog.messages
    assert re.fullmatch(rf"waiting for http://127.0.0.1:{server.port}/a.tar: .*503.*; it gives up in \d+ s", line)
    server.fault("status", code=503, times=4)
    assert blob.read(0, 10) == DATA[:10]  # the next read, soon after it: it was told of this host
    assert len(caplog.messages) == 1
    server.fault("status", code=503, times=4)
    assert blob_of(server, tell_after=0.0, tell_every=0.0).read(0, 10) == DATA[:10]
    assert len(caplog.messages) == 5
    server.fault("status", code=503, times=4)
    assert blob_of(server, tell_every=0.0).read(0, 10) == DATA[:10]
    assert len(caplog.messages) == 5, "a short wait is nobody's concern"


def test_a_warning_of_waiting_holds_no_secret(server: FaultyServer, caplog: pytest.LogCaptureFixture):
    server.fault("status", code=503, times=1)
    policy = QUICK.model_copy(update={"tell_after": 0.0})
    blob = HttpBlob(f"http://user:{CANARY}@127.0.0.1:{server.port}/a.tar?X-Amz-Signature={CANARY}", Client(policy))
    assert blob.read(0, 10) == DATA[:10]
    assert "waiting for http://" in caplog.text
    assert CANARY not in caplog.text


def test_no_server_at_all():
    with FaultyServer() as server:
        url = server.url("/a.tar")
    blob = HttpBlob(url, Client(QUICK.model_copy(update={"deadline": 0.2})))
    with pytest.raises(StorageError, match="x connect; last: no connection"):
        blob.read(0, 1)


def test_a_retry_after_beyond_the_deadline_ends_it_at_once(server: FaultyServer):
    server.fault("status", code=503, headers={"Retry-After": "3600"}, times=9)
    blob = blob_of(server)
    with pytest.raises(StorageError, match="left alone for 3600 s"):
        blob.read(0, 10)
    assert len(server.asked()) == 1
    with pytest.raises(StorageError, match="throttled"):  # it holds for the host
        blob.read(10, 10)
    assert len(server.asked()) == 1


@pytest.mark.parametrize("as_date", [False, True])
def test_retry_after_is_waited_for(server: FaultyServer, as_date: bool):
    until = int(time.time()) + 2
    when = datetime.fromtimestamp(until, UTC).strftime("%a, %d %b %Y %H:%M:%S GMT") if as_date else "1"
    server.fault("status", code=429, headers={"Retry-After": when})
    blob = blob_of(server)
    assert blob.read(0, 10) == DATA[:10]
    first, second = server.asked()
    least = time.monotonic() - time.time() + until - 0.01 if as_date else first.began + 1.0
    assert second.began >= least  # waiting longer is always allowed
    assert blob.client.stats.throttled == 1


def test_a_503_storm_is_survived_with_fewer_requests_at_a_time(server: FaultyServer):
    """The server takes 3 at a time; 12 threads want 16. All get their bytes, and the limit comes down and up again."""
    server.capacity, server.hold = 3, 0.01
    blob = blob_of(server)
    assert blob.client.throttle(parse_address(server.url("/"))).limit == 16

    with ThreadPoolExecutor(12) as pool:
        parts = list(pool.map(lambda i: blob.read(i * 100, 100), range(150)))
    assert b"".join(parts) == DATA[:15000]
    stats = blob.client.stats
    assert stats.retries.keys() == {"503"}
    assert stats.throttled >= 2
    assert stats.limit < 16
    assert stats.throttled_seconds > 0
    storm = len(server.asked())
    assert storm - 150 < 150, "most requests must succeed once the limit is found"

    server.capacity, server.hold, low = None, 0.0, stats.limit
    for i in range(100):
        blob.read(i, 1)
    assert blob.client.stats.limit > low


@pytest.mark.parametrize("lengths", [True, False])
def test_a_server_that_ignores_ranges(server: FaultyServer, lengths: bool):
    """Never the whole object for a part of it; whole in one go with `download`, across cuts."""
    server.ranges, server.lengths = False, lengths
    blob = blob_of(server)
    with pytest.raises(StorageError, match=r"ignores [Rr]ange.*"):
        blob.read(1000, 10)
    assert blob.client.stats.bytes < len(DATA) // 2
    if lengths:
        server.fault("end", after=100_000)
        found = bytearray()
        blob.download(found.extend)
        assert found == DATA
        found.clear()
        blob.download(found.extend, start=500_000)
        assert found == DATA[500_000:]
        assert blob.read(0, len(DATA)) == DATA  # all of it was asked for


def test_a_download_is_one_request_and_goes_on_after_a_cut(server: FaultyServer):
    blob = blob_of(server)
    blob.size()
    server.fault("end", after=200_000)
    found = bytearray()
    blob.download(found.extend, start=12)
    assert found == DATA[12:]
    assert [one.range for one in server.asked()][1:] == [
        f"bytes=12-{len(DATA) - 1}",
        f"bytes=200012-{len(DATA) - 1}",
    ]


def test_a_download_can_be_called_off(server: FaultyServer):
    server.fault("stall", after=1000, path="/a.tar")
    blob, stop = blob_of(server, stall_timeout=100.0), threading.Event()
    blob._about = blob_of(server, "/a.tar")._about
    arrived = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(blob.download, lambda _: arrived.set(), 0, stop)
        while not server.asked():
            time.sleep(0.01)
        stop.set()
        with pytest.raises(Stopped):
            job.result(timeout=20)
    assert blob.client.stats.in_flight == 0


def test_a_sinks_own_error_passes_through(server: FaultyServer):
    def full(_: memoryview) -> None:
        raise OSError(28, "No space left on device")

    blob = blob_of(server)
    with pytest.raises(OSError, match="No space"):
        blob.download(full)
    assert blob.client.stats.retries == {}
    assert blob.client.stats.in_flight == 0
    assert blob.read(0, 10) == DATA[:10]


def test_redirects_are_followed_and_remembered(server: FaultyServer):
    with FaultyServer({"/real.tar": DATA}) as other:
        server.fault("moved", code=302, headers={"Location": other.url(f"/real.tar?sig={CANARY}")})
        blob = HttpBlob(f"http://user:{CANARY}@127.0.0.1:{server.port}/a.tar", Client(QUICK))
        assert blob.read(0, 10) + blob.read(10, 10) == DATA[:20]
        assert len(server.asked()) == 1
        assert len(other.asked()) == 2
        assert "authorization" in server.asked()[0].headers
        assert "authorization" not in other.asked()[0].headers, "a password is for its own server"
        # The place it moved to was good for a while only.
        other.fault("status", code=403)
        server.fault("moved", code=307, headers={"Location": other.url("/real.tar")})
        assert blob.read(20, 10) == DATA[20:30]


@pytest.mark.parametrize("target", ["file:///etc/passwd", "gopher://127.0.0.1/", "http://[bad", ""])
def test_redirects_to_elsewhere_are_not(server: FaultyServer, target: str):
    server.fault("moved", code=302, headers={"Location": target}, times=9)
    with pytest.raises(StorageError, match="redirects to"):
        blob_of(server).read(0, 10)


def test_redirects_in_a_circle_end(server: FaultyServer):
    server.fault("moved", code=302, headers={"Location": server.url("/a.tar")}, times=100)
    with pytest.raises(StorageError, match="more than 5 times"):
        blob_of(server).read(0, 10)


def test_https_with_a_certificate_that_is_known_and_one_that_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pem = tmp_path / "server.pem"
    with FaultyServer({"/a.tar": DATA}, tls=pem) as server:
        with pytest.raises(StorageError, match="certificate") as caught:
            blob_of(server).read(0, 10)
        assert caught.value.reason == "certificate"
        monkeypatch.setenv("SSL_CERT_FILE", str(pem))
        blob = blob_of(server)
        assert blob.read(5, 50_000) == DATA[5:50_005]
        assert blob.read(100, 10) == DATA[100:110]
        assert blob.client.stats.connections == 1
        server.fault("end", after=3000)
        assert blob.read(0, 10_000) == DATA[:10_000]
        with FaultyServer({"/a.tar": DATA}) as plain:
            server.fault("moved", code=302, headers={"Location": plain.url("/a.tar")})
            with pytest.raises(StorageError, match="unencrypted"):
                blob.read(0, 10)
            assert plain.asked() == []
    assert ssl.OPENSSL_VERSION


def test_a_fork_starts_with_connections_of_its_own(server: FaultyServer):
    blob = blob_of(server)
    blob.read(0, 10)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        ok = blob.read(100, 1000) == DATA[100:1100] and blob.client.stats.connections == 1
        os.write(write, b"y" if ok else b"n")
        os._exit(0)
    assert blob.read(5, 10) == DATA[5:15]
    assert os.read(read, 1) == b"y"
    os.waitpid(child, 0)
    assert len({one.connection for one in server.asked()}) == 2
    os.close(read)
    os.close(write)


@pytest.mark.parametrize("fault", ["status", "end", "garbage", "hangup", "moved"])
def test_no_fault_brings_a_secret_to_light(server: FaultyServer, fault: str):
    headers = {"Location": f"ftp://u:{CANARY}@h/?q={CANARY}"} if fault == "moved" else {}
    server.fault(fault, times=1000, code=302 if fault == "moved" else 500, headers=headers, body=CANARY.encode())
    url = f"http://user:{CANARY}@127.0.0.1:{server.port}/a.tar?X-Amz-Signature={CANARY}"
    blob = HttpBlob(url, Client(QUICK.model_copy(update={"deadline": 0.1})))
    with pytest.raises(StorageError) as caught:
        blob.read(0, 10)
    everything = [str(caught.value), caught.value.url, blob.url, repr(blob), repr(blob.client.stats)]
    cause: BaseException | None = caught.value
    while cause is not None:
        everything += [str(cause), repr(cause)]
        cause = cause.__cause__
    assert CANARY not in " ".join(everything)
    # The client may give up before the server has come to write down what it was asked.
    assert wait_for(server.asked, 60)[0].headers["authorization"].startswith("Basic ")


def test_a_server_gone_and_back_again():
    """A process that serves is stopped (SIGSTOP) for longer than a try lasts, then goes on: the read only takes longer."""
    code = "import sys\nfrom http.server import *\ns=ThreadingHTTPServer(('127.0.0.1',0),SimpleHTTPRequestHandler)\nprint(s.server_port,flush=True)\ns.serve_forever()"
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=Path(__file__).parent, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        try:
            assert process.stdout is not None
            port = int(process.stdout.readline())
            here = Path(__file__).read_bytes()
            client = Client(QUICK.model_copy(update={"stall_timeout": 0.3, "connect_timeout": 0.3}))
            blob = HttpBlob(f"http://127.0.0.1:{port}/{Path(__file__).name}", client)
            assert blob.size() == len(here)  # Python's server ignores ranges: only whole reads will do
            process.send_signal(signal.SIGSTOP)
            with ThreadPoolExecutor(1) as pool:
                reading = pool.submit(blob.read, 0, len(here))
                while not client.stats.retries:
                    time.sleep(0.01)
                process.send_signal(signal.SIGCONT)
                assert reading.result() == here
            assert client.stats.retries.keys() <= {"stalled", "connect", "cut"}
        finally:
            process.kill()
