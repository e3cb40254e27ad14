"""S3: signatures, a real server (SeaweedFS) that checks them and goes away, and the ways in which S3 says no."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import quote

import pyarrow.fs
import pytest
from gristmill.shards.addresses import parse_address
from gristmill.shards.cache import Cache
from gristmill.shards.client import Client
from gristmill.shards.credentials import Credentials, CredentialsError, Keys
from gristmill.shards.objects import S3Blob, sign
from gristmill.shards.remote import open_blob
from gristmill.shards.retry import ChangedError, RetryPolicy, StorageError

from ..faulty_http import FaultyServer
from ..servers import Server

DATA = bytes(range(256)) * 2000
QUICK = RetryPolicy(deadline=20.0, first_pause=0.005, longest_pause=0.05, stall_timeout=3.0, connect_timeout=1.0)
CANARY = "canary-8f3e"
AWS = [name for name in os.environ if name.startswith("AWS_")]


@pytest.fixture(autouse=True)
def keys(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing of this machine's own keys, and no question to a cloud that it may be in."""
    for name in AWS:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


@pytest.fixture
def store(weed: Server, monkeypatch: pytest.MonkeyPatch) -> pyarrow.fs.S3FileSystem:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", weed.key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", weed.secret)
    store = pyarrow.fs.S3FileSystem(
        access_key=weed.key,
        secret_key=weed.secret,
        endpoint_override=weed.endpoint,
        scheme="http",
        allow_bucket_creation=True,
    )
    store.create_dir("shards")
    return store


def put(store: pyarrow.fs.S3FileSystem, path: str, data: bytes) -> None:
    with store.open_output_stream(path) as file:
        file.write(data)


def blob_at(weed: Server, path: str, **limits: float) -> S3Blob:
    keys = Credentials()
    blob = S3Blob(f"s3://{path}?endpoint_override=http://{weed.endpoint}", Client(QUICK.model_copy(update=limits)))
    blob._credentials = keys  # not those that another test found
    return blob


def test_the_published_signature():
    """The example "GET Object" of Amazon's own description of Signature Version 4 for S3."""
    keys = Keys("AKIAIOSFODNN7EXAMPLE", "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY")
    address = parse_address("https://examplebucket.s3.amazonaws.com/test.txt")
    when = time.strptime("20130524T000000Z", "%Y%m%dT%H%M%SZ")
    headers = sign(address, {"Range": "bytes=0-9"}, keys, "us-east-1", when)
    assert headers["Authorization"].endswith("f0e8bdb87c964420e857bd35b5d6ed310bd44f0170aba48dd91039c6036bdb41")
    assert "host;range;x-amz-content-sha256;x-amz-date" in headers["Authorization"]
    assert "EXAMPLEKEY" not in repr(keys)


@pytest.mark.parametrize("name", ["a.tar", "deep/er/00000.tar", "a b+c=d.tar", "ü#1%20.tar", "~(x)'!*&.tar"])
def test_ranges_of_real_objects(weed: Server, store: pyarrow.fs.S3FileSystem, name: str):
    put(store, f"shards/{name}", DATA)
    blob = blob_at(weed, "shards/" + quote(name))
    assert blob.read(1000, 70_000) == DATA[1000:71_000]
    assert blob.size() == len(DATA)
    assert blob.read(len(DATA) - 5, 100) == DATA[-5:]
    assert blob.identity().startswith('etag "')
    assert blob.client.stats.connections == 1


def test_with_the_options_that_pyarrow_takes(weed: Server, store: pyarrow.fs.S3FileSystem):
    put(store, "shards/a.tar", DATA)
    url = f"s3://shards/a.tar?endpoint_override={weed.endpoint}&scheme=http&region=us-east-1"
    blob = open_blob(url, policy=QUICK)
    assert blob.read(5, 5) == DATA[5:10]
    assert blob.url == "s3://shards/a.tar"


def test_a_cache_of_real_objects(weed: Server, store: pyarrow.fs.S3FileSystem, tmp_path: Path):
    put(store, "shards/a.tar", DATA)
    with Cache(tmp_path / "cache", 10**7, lambda _: 1.0).use("a", blob_at(weed, "shards/a.tar")) as path:
        assert path is not None
        assert path.read_bytes() == DATA


def test_an_object_replaced_is_named(weed: Server, store: pyarrow.fs.S3FileSystem):
    put(store, "shards/b.tar", DATA)
    blob = blob_at(weed, "shards/b.tar")
    blob.read(0, 10)
    put(store, "shards/b.tar", DATA[::-1])
    with pytest.raises(ChangedError, match=r"s3://shards/b\.tar was replaced"):
        blob.read(10, 10)


def test_what_is_not_there(weed: Server, store: pyarrow.fs.S3FileSystem):
    for path, code in (("shards/none.tar", "NoSuchKey"), ("nowhere/a.tar", "NoSuchBucket")):
        blob = blob_at(weed, path)
        with pytest.raises(StorageError, match=f"s3://{path} cannot be read .status 404, {code}") as caught:
            blob.read(0, 10)
        assert caught.value.reason == "missing"
        assert blob.client.stats.requests == 1


def test_wrong_keys(weed: Server, store: pyarrow.fs.S3FileSystem, monkeypatch: pytest.MonkeyPatch):
    put(store, "shards/a.tar", DATA)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", CANARY)
    with pytest.raises(StorageError, match=r"SignatureDoesNotMatch.*AWS_SECRET_ACCESS_KEY") as caught:
        blob_at(weed, "shards/a.tar").read(0, 10)
    assert caught.value.reason == "denied"
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", CANARY)
    with pytest.raises(StorageError, match="InvalidAccessKeyId") as caught:
        blob_at(weed, "shards/a.tar").read(0, 10)
    assert CANARY not in str(caught.value)
    anonymous = S3Blob(f"s3://shards/a.tar?endpoint_override=http://{weed.endpoint}&anonymous=true", Client(QUICK))
    with pytest.raises(StorageError, match="403"):
        anonymous.read(0, 10)


def test_gone_and_back(weed: Server, store: pyarrow.fs.S3FileSystem, tmp_path: Path):
    """The server is stopped while two threads read and one fills a cache; all of them only take longer."""
    put(store, "shards/a.tar", DATA)
    blob = blob_at(weed, "shards/a.tar", stall_timeout=0.4)
    blob.size()
    cache = Cache(tmp_path / "cache", 10**7, lambda _: 1.0)
    weed.process.send_signal(signal.SIGSTOP)
    try:
        with ThreadPoolExecutor(3) as pool:
            reads = [pool.submit(blob.read, start, 1000) for start in (0, 5000)]
            fetch = pool.submit(cache.fetch, "a", blob)
            while sum(blob.client.stats.retries.values()) < 3:
                time.sleep(0.01)
            weed.process.send_signal(signal.SIGCONT)
            assert [read.result() for read in reads] == [DATA[:1000], DATA[5000:6000]]
            lease = fetch.result()
    finally:
        weed.process.send_signal(signal.SIGCONT)
    assert lease is not None
    assert lease.read(0, 10**6) == DATA
    lease.release()
    assert blob.client.stats.failures == {}


def test_gone_for_longer_than_the_deadline(weed: Server, store: pyarrow.fs.S3FileSystem):
    put(store, "shards/a.tar", DATA)
    blob = blob_at(weed, "shards/a.tar", deadline=1.0, stall_timeout=0.4)
    blob.size()
    weed.process.send_signal(signal.SIGSTOP)
    try:
        with pytest.raises(StorageError, match=r"s3://shards/a\.tar could not be read: \d+ tries.*stalled") as caught:
            blob.read(0, 10)
    finally:
        weed.process.send_signal(signal.SIGCONT)
    assert caught.value.reason == "deadline"
    blob_at(weed, "shards/a.tar").size()  # it may take longer than the deadline until the server is itself again
    assert blob.read(0, 10) == DATA[:10]


def error(code: str) -> bytes:
    return f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{CANARY}</Message></Error>".encode()


def s3_at(server: FaultyServer, monkeypatch: pytest.MonkeyPatch, **options: str) -> S3Blob:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", CANARY)
    more = "".join(f"&{name}={value}" for name, value in options.items())
    blob = S3Blob(f"s3://bucket/a.tar?endpoint_override={server.url('')}{more}", Client(QUICK))
    if "profile" not in options:
        blob._credentials = Credentials()
    return blob


@pytest.mark.parametrize(
    ("status", "code", "reason"),
    [(503, "SlowDown", "503"), (400, "RequestTimeout", "400"), (500, "InternalError", "500")],
)
def test_what_passes_is_retried(monkeypatch: pytest.MonkeyPatch, status: int, code: str, reason: str):
    with FaultyServer({"/bucket/a.tar": DATA}) as server:
        server.fault("status", code=status, body=error(code), times=2)
        blob = s3_at(server, monkeypatch)
        assert blob.read(0, 10) == DATA[:10]
        assert blob.client.stats.retries == {reason: 2}
        assert (blob.client.stats.throttled > 0) == (status == 503)
        assert blob.client.stats.connections == 1


@pytest.mark.parametrize(
    ("status", "code", "remedy"),
    [
        (403, "RequestTimeTooSkewed", "clock"),
        (400, "AuthorizationHeaderMalformed", "region"),
        (403, "AccessDenied", "rights"),
    ],
)
def test_what_does_not_pass_is_explained(monkeypatch: pytest.MonkeyPatch, status: int, code: str, remedy: str):
    with FaultyServer({"/bucket/a.tar": DATA}) as server:
        server.fault("status", code=status, body=error(code), times=9)
        with pytest.raises(StorageError, match=f"{code}.*{remedy}") as caught:
            s3_at(server, monkeypatch).read(0, 10)
        assert CANARY not in str(caught.value)
        assert len(server.asked()) == 1


def test_another_region_is_named_and_no_redirect_is_signed(monkeypatch: pytest.MonkeyPatch):
    with FaultyServer({"/bucket/a.tar": DATA}) as server:
        headers = {"Location": server.url("/elsewhere"), "x-amz-bucket-region": "eu-central-1"}
        server.fault("moved", code=301, headers=headers)
        with pytest.raises(StorageError, match=r"\?region=eu-central-1"):
            s3_at(server, monkeypatch).read(0, 10)
        assert len(server.asked()) == 1


def test_keys_that_ran_out_are_renewed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    program = tmp_path / "keys.py"
    counter = tmp_path / "count"
    program.write_text(
        "import json, pathlib\n"
        f"count = pathlib.Path({str(counter)!r})\n"
        "count.write_text(count.read_text() + 'x' if count.exists() else 'x')\n"
        "print(json.dumps({'Version': 1, 'AccessKeyId': 'key' + count.read_text(), 'SecretAccessKey': 's',\n"
        "    'SessionToken': 't', 'Expiration': '2999-01-01T00:00:00Z'}))\n"
    )
    (tmp_path / ".aws").mkdir()
    (tmp_path / ".aws" / "config").write_text(f"[profile mine]\ncredential_process = {sys.executable} {program}\n")
    with FaultyServer({"/bucket/a.tar": DATA}) as server:
        server.fault("status", code=400, body=error("ExpiredToken"))
        blob = s3_at(server, monkeypatch, profile="mine")
        assert blob.read(0, 10) + blob.read(10, 10) == DATA[:20]
        sent = [one.headers["authorization"] for one in server.asked()]
    assert ["Credential=keyx/" in sent[0], "Credential=keyxx/" in sent[1], "Credential=keyxx/" in sent[2]] == [True] * 3


def test_keys_from_the_shared_files(tmp_path: Path):
    (tmp_path / ".aws").mkdir()
    (tmp_path / ".aws" / "credentials").write_text(
        "[default]\naws_access_key_id = one\naws_secret_access_key = s%cret\n"
        "[other]\naws_access_key_id = two\naws_secret_access_key = s\naws_session_token = t\n"
    )
    environ = {"HOME": str(tmp_path), "AWS_EC2_METADATA_DISABLED": "true"}
    assert Credentials(environ=environ).get() == Keys("one", "s%cret")
    assert Credentials("other", environ).get() == Keys("two", "s", "t")
    assert Credentials(environ=environ | {"AWS_PROFILE": "other"}).get().access == "two"
    both = environ | {"AWS_ACCESS_KEY_ID": "env", "AWS_SECRET_ACCESS_KEY": "s"}
    assert Credentials(environ=both).get().access == "env"
    assert Credentials("other", both).get().access == "two"
    with pytest.raises(CredentialsError, match="profile none has no keys"):
        Credentials("none", both).get()


def test_keys_from_the_machine(tmp_path: Path):
    answer = {"AccessKeyId": "role", "SecretAccessKey": "s", "Token": "t", "Expiration": "2999-01-01T00:00:00Z"}
    xml = "<A><AccessKeyId>web</AccessKeyId><SecretAccessKey>s</SecretAccessKey><SessionToken>t</SessionToken></A>"
    (tmp_path / "token").write_text(CANARY)
    roles = "/latest/meta-data/iam/security-credentials/"
    files = {
        "/container": json.dumps(answer).encode(),
        "/latest/api/token": b"imds-token",
        roles: b"my-role",
        roles + "my-role": json.dumps(answer).encode(),
        "/": xml.encode(),
    }
    with FaultyServer(files) as server:
        home = {"HOME": str(tmp_path)}
        container = home | {
            "AWS_CONTAINER_CREDENTIALS_FULL_URI": server.url("/container"),
            "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE": str(tmp_path / "token"),
        }
        assert Credentials(environ=container).get().access == "role"
        assert server.log[-1].headers["authorization"] == CANARY
        instance = home | {"AWS_EC2_METADATA_SERVICE_ENDPOINT": server.url("")}
        assert Credentials(environ=instance).get().expires == 32472144000.0
        assert server.log[-1].headers["x-aws-ec2-metadata-token"] == "imds-token"
        web = home | {
            "AWS_WEB_IDENTITY_TOKEN_FILE": str(tmp_path / "token"),
            "AWS_ROLE_ARN": "arn:aws:iam::1:role/x",
            "AWS_ENDPOINT_URL_STS": server.url(""),
        }
        assert Credentials(environ=web).get() == Keys("web", "s", "t")
        server.fault("status", code=500)
        with pytest.raises(CredentialsError) as caught:
            Credentials(environ=web).get()
        assert CANARY not in str(caught.value)


def test_no_keys_at_all_is_said_before_anything_is_sent(tmp_path: Path):
    with FaultyServer({"/bucket/a.tar": DATA}) as server:
        blob = S3Blob(f"s3://bucket/a.tar?endpoint_override={server.url('')}", Client(QUICK))
        blob._credentials = Credentials()
        with pytest.raises(CredentialsError, match="anonymous=true"):
            blob.read(0, 10)
        assert server.asked() == []
        public = S3Blob(f"s3://bucket/a.tar?endpoint_override={server.url('')}&anonymous=true", Client(QUICK))
        assert public.read(0, 10) == DATA[:10]
        assert "authorization" not in server.asked()[0].headers


def test_where_buckets_are(monkeypatch: pytest.MonkeyPatch):
    def address(url: str) -> str:
        return S3Blob(url, Client(QUICK))._address.shown

    assert address("s3://bucket/a/b.tar") == "https://bucket.s3.us-east-1.amazonaws.com/a/b.tar"
    assert address("s3://my.bucket/b.tar?region=eu-west-1") == "https://s3.eu-west-1.amazonaws.com/my.bucket/b.tar"
    monkeypatch.setenv("AWS_REGION", "ap-south-1")
    assert address("s3://bucket/b.tar") == "https://bucket.s3.ap-south-1.amazonaws.com/b.tar"
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9/base/")
    assert address("s3://bucket/b c.tar") == "http://127.0.0.1:9/base/bucket/b%20c.tar"
