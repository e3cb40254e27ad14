"""Sources far away: behind HTTP, in a real S3, in what answers as Google's storage does; and when they do not answer."""

from __future__ import annotations

import gzip
import io
import json
import os
import signal
import tarfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq
import pytest
from gristmill.shards import remote
from gristmill.shards.ingest.candidate import Candidate, Outcome
from gristmill.shards.ingest.errors import IngestError
from gristmill.shards.ingest.sources import plan, read_unit
from gristmill.shards.objects import _credentials
from gristmill.shards.retry import RetryPolicy, StorageError

from ...faulty_http import FaultyServer
from ...servers import Server

QUICK = RetryPolicy(deadline=2.0, first_pause=0.005, longest_pause=0.05, stall_timeout=0.3, connect_timeout=1.0)
AWS = [name for name in os.environ if name.startswith("AWS_")]


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Nothing of this machine's own keys, and no patience of ten minutes."""
    for name in AWS:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    opened = remote.client_for
    monkeypatch.setattr(remote, "client_for", lambda policy: opened(QUICK))
    _credentials.cache_clear()
    yield
    _credentials.cache_clear()


def read(sources: list[str], work: Path) -> list[Candidate]:
    found = plan(sources, work)
    return [one for number in range(len(found)) for one in read_unit(found.unit(number), work)]


def a_tar(count: int = 3, size: int = 5) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as out:
        for number in range(count):
            for suffix, data in (("json", b'{"n": %d}' % number), ("jpg", bytes([number]) * size)):
                member = tarfile.TarInfo(f"{number}.{suffix}")
                member.size = len(data)
                out.addfile(member, io.BytesIO(data))
    return file.getvalue()


def a_table() -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table({"jpg": [b"A", b"B"], "n": [1, 2]}), file)
    return file.getvalue()


FILES = {
    "/a.tar": a_tar(),
    "/b.parquet": a_table(),
    "/c.txt.gz": gzip.compress(b"http://host/1.jpg\nhttp://host/2.jpg\n"),
    "/d.jpg": b"D",
}


def test_single_files_behind_http(tmp_path: Path) -> None:
    with FaultyServer(FILES) as server:
        query = "?X-Amz-Signature=canary&v=1"
        sources = [server.url(path) + query for path in FILES]
        candidates = read(sources, tmp_path / "work")
        assert [one.data for one in candidates] == [b"\0" * 5, b"\1" * 5, b"\2" * 5, b"A", b"B", None, None, None]
        assert [one.meta for one in candidates[:3]] == [{"n": 0}, {"n": 1}, {"n": 2}]
        assert [one.url for one in candidates[5:]] == ["http://host/1.jpg", "http://host/2.jpg", sources[3]]
        assert candidates[0].locator == server.url("/a.tar") + "?...::0.jpg"
        assert "canary" not in repr(candidates)
        work = tmp_path / "work"
        holding = [path.name for path in work.iterdir() if b"canary" in path.read_bytes()]
        assert set(holding) <= {"roots.json", "urls-00000.parquet"}
        assert "canary" not in repr([plan(sources, work).unit(number) for number in range(4)])


def test_signed_anew_it_is_the_same_source(tmp_path: Path) -> None:
    with FaultyServer(FILES) as server:
        url, work = server.url("/a.tar"), tmp_path / "work"
        before = plan([f"{url}?v=1&X-Amz-Signature=old&Expires=1"], work)
        after = plan([f"{url}?v=1&X-Amz-Signature=new&Expires=2"], work)
        assert before.digest == after.digest
        assert json.loads((work / "roots.json").read_text()) == [f"{url}?v=1&X-Amz-Signature=new&Expires=2"]
        with pytest.raises(IngestError, match="other queries") as caught:
            plan([f"{url}?v=2&X-Amz-Signature=new"], work)
        assert "v=2" not in str(caught.value)


def test_a_remote_tar_is_read_in_few_requests(tmp_path: Path) -> None:
    with FaultyServer({"/a.tar": a_tar(200, 3000)}) as server:
        found = plan([server.url("/a.tar")], tmp_path / "work")
        server.log.clear()
        candidates = list(read_unit(found.unit(0), tmp_path / "work"))
        assert [one.data for one in candidates] == [bytes([number]) * 3000 for number in range(200)]
        assert len(server.log) <= 4


def test_faults_that_pass_are_retried_and_others_are_told(tmp_path: Path) -> None:
    with FaultyServer(FILES) as server:
        server.fault("status", 2, path="/a.tar", code=503)
        server.fault("reset", 1, path="/a.tar", after=300)
        sources = [server.url(path) for path in ("/a.tar", "/b.parquet")]
        found, work = plan(sources, tmp_path / "work"), tmp_path / "work"
        server.fault("reset", 2, path="/b.parquet", after=50)
        assert [one.data for one in read_unit(found.unit(1), work)] == [b"A", b"B"]
        server.put("/a.tar", a_tar(3, 6))
        said = {one.problem for one in read_unit(found.unit(0), work)}
        assert said == {(Outcome.UNREADABLE, "the tar was replaced since its members were listed")}
        del server.files["/a.tar"]
        assert {one.problem for one in read_unit(found.unit(0), work)} == {(Outcome.UNREADABLE, "is not there")}
        server.fault("status", 10_000, path="/a.tar", code=503)
        with pytest.raises(StorageError, match="could not be read"):
            list(read_unit(found.unit(0), work))
        with pytest.raises(StorageError, match="could not be read"):
            plan([server.url("/a.tar")], tmp_path / "other")
        assert not (tmp_path / "other").exists()
        with pytest.raises(IngestError, match="is not there"):
            plan([server.url("/e.tar")], tmp_path / "other")


@pytest.fixture
def store(weed: Server, monkeypatch: pytest.MonkeyPatch) -> pyarrow.fs.S3FileSystem:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", weed.key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", weed.secret)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{weed.endpoint}")
    store = pyarrow.fs.S3FileSystem(
        access_key=weed.key, secret_key=weed.secret, endpoint_override=weed.endpoint, scheme="http",
        allow_bucket_creation=True,
    )  # fmt: skip
    store.create_dir("crawl")
    return store


MIXED = {"b/ü 1.jpg": b"U", "a.jpg": b"A", "b-c/2.png": b"2", "b/0#?.jpg": b"0", "c.tar": a_tar(), "d.parquet": a_table(),
         "e.parquet": FILES["/b.parquet"][:100], "notes.txt": b"no list, in a folder"}  # fmt: skip


def test_a_prefix_of_a_real_s3(weed: Server, store: pyarrow.fs.S3FileSystem, tmp_path: Path) -> None:
    for name, data in MIXED.items():
        with store.open_output_stream(f"crawl/mixed/{name}") as file:
            file.write(data)
    work = tmp_path / "work"
    found = plan(["s3://crawl/mixed"], work, unit=3)
    candidates = [one for number in range(len(found)) for one in read_unit(found.unit(number), work)]
    assert [one.data for one in candidates[:-1]] == [
        b"A", b"0", b"U", b"2", b"\0" * 5, b"\1" * 5, b"\2" * 5, b"A", b"B",
    ]  # fmt: skip
    assert candidates[-1].problem is not None
    assert candidates[1].locator == "s3://crawl/mixed/b/0%23%3F.jpg"
    assert candidates[2].labels == ("b",)
    assert found.passed == {"text files in folders": 1}
    single = f"s3://crawl/mixed/c.tar?endpoint_override=http://{weed.endpoint}&region=us-east-1"
    assert [one.meta["n"] for one in read([single], tmp_path / "single")] == [0, 1, 2]
    store.delete_file("crawl/mixed/a.jpg")
    (gone, *_) = read_unit(found.unit(0), work)
    assert gone.problem == (Outcome.UNREADABLE, "is not there")
    secrets = [path.name for path in work.iterdir() if weed.secret.encode() in path.read_bytes()]
    assert not secrets


def test_what_s3_refuses(
    weed: Server, store: pyarrow.fs.S3FileSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(IngestError, match="s3://crawl/nowhere is not there"):
        plan(["s3://crawl/nowhere"], tmp_path / "work")
    with pytest.raises(IngestError, match="option 'secret_key' that is not known"):
        plan(["s3://crawl/mixed?secret_key=canary"], tmp_path / "work")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "canary-that-is-wrong")
    _credentials.cache_clear()
    with pytest.raises(IngestError, match="cannot be listed") as caught:
        plan([f"s3://crawl/mixed?endpoint_override={weed.endpoint}&scheme=http&region=eu-west-1"], tmp_path / "work")
    assert "canary" not in str(caught.value)
    assert not (tmp_path / "work").exists()


class Bucket(BaseHTTPRequestHandler):
    """As much of Google's JSON interface as listing and reading take. No emulator of it is to be had from PyPI that runs here."""

    objects: dict[str, bytes]
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(parts.query).items()}
        path = parts.path.removeprefix("/download").removeprefix("/storage/v1")
        if path.startswith("/b/crawl/o/"):
            name = unquote(path.removeprefix("/b/crawl/o/"))
            if name not in self.objects:
                self._answer(b'{"error": {"code": 404, "message": "none"}}', 404)
            elif query.get("alt") == "media":
                self._media(self.objects[name])
            else:
                self._answer(json.dumps(self._about(name)).encode())
        elif path == "/b/crawl/o":
            prefix, mark = query.get("prefix", ""), query.get("delimiter")
            names = [name for name in sorted(self.objects) if name.startswith(prefix)]
            inner = {name for name in names if mark and mark in name[len(prefix) :]}
            folders = sorted({prefix + name[len(prefix) :].partition(mark or "/")[0] + (mark or "/") for name in inner})
            items = [self._about(name) for name in names if name not in inner]
            self._answer(json.dumps({"kind": "storage#objects", "items": items, "prefixes": folders}).encode())
        elif path == "/b/crawl":
            self._answer(b'{"kind": "storage#bucket", "name": "crawl", "id": "crawl"}')
        else:
            self._answer(b'{"error": {"code": 404, "message": "none"}}', 404)

    def _about(self, name: str) -> dict[str, str]:
        stamp = "2026-01-01T00:00:00.000Z"
        return {"kind": "storage#object", "name": name, "bucket": "crawl", "size": str(len(self.objects[name])),
                "timeCreated": stamp, "updated": stamp, "generation": "1", "metageneration": "1"}  # fmt: skip

    def _media(self, data: bytes) -> None:
        asked = self.headers["Range"]
        low, _, high = (asked or "bytes=0-").removeprefix("bytes=").partition("-")
        part = data[int(low) : int(high) + 1 if high else None]
        headers = {"Content-Range": f"bytes {low}-{int(low) + len(part) - 1}/{len(data)}"} if asked else {}
        self._answer(part, 206 if asked else 200, {"x-goog-generation": "1", **headers})

    def _answer(self, body: bytes, code: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(code)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def google() -> Iterator[str]:
    class Crawl(Bucket):
        objects = {f"mixed/{name}": data for name, data in MIXED.items()}  # noqa: RUF012

    server = ThreadingHTTPServer(("127.0.0.1", 0), Crawl)
    child = os.fork()  # in a process of its own: pyarrow waits for answers without letting other threads run
    if not child:
        server.serve_forever()
    server.server_close()
    yield f"?endpoint_override=127.0.0.1:{server.server_address[1]}&scheme=http&anonymous=true"
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def test_a_prefix_of_googles_storage(google: str, tmp_path: Path) -> None:
    candidates = read([f"gs://crawl/mixed{google}"], tmp_path / "work")
    assert [one.data for one in candidates[:-1]] == [
        b"A", b"0", b"U", b"2", b"\0" * 5, b"\1" * 5, b"\2" * 5, b"A", b"B",
    ]  # fmt: skip
    assert candidates[-1].problem is not None
    assert candidates[4].locator == "gs://crawl/mixed/c.tar::0.jpg"
    with pytest.raises(IngestError, match="gs://crawl/nowhere is not there"):
        plan([f"gs://crawl/nowhere{google}"], tmp_path / "other")
