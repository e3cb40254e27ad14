"""Which urls are read at all, what of them is ever shown, and the arithmetic of waiting."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import quote

import pytest
from gristmill.shards.addresses import AddressError, redact
from gristmill.shards.blob import LocalBlob
from gristmill.shards.remote import HttpBlob, client_for, open_blob
from gristmill.shards.retry import RetryPolicy, next_pause, retry_after_seconds
from hypothesis import given
from hypothesis import strategies as st

DATA = bytes(range(256))
CANARY = "canary-8f3e"


def test_paths_and_files_are_read_locally(tmp_path: Path):
    place = tmp_path / "a b.tar"
    place.write_bytes(DATA)
    for name in (place, str(place), f"file://{quote(str(place))}", f"file://localhost{quote(str(place))}"):
        blob = open_blob(name)
        assert isinstance(blob, LocalBlob)
        assert blob.read(3, 4) == DATA[3:7]


@pytest.mark.parametrize(
    ("url", "said"),
    [
        (f"pipe:curl -H 'Token: {CANARY}' http://x/", "'pipe:...' is no address"),
        ("ftp://host/a.tar", "'ftp:...' is no address"),
        ("PIPE:cat x", "nothing is ever run"),
        ("gs://bucket/a.tar", "'gs:...' is no address"),
        ("file://elsewhere/a.tar", "no file of this machine"),
        ("http://", "no usable address"),
        (f"http://user:{CANARY}@host:port/x", "no usable address"),
        ("s3://bucket", "names no object"),
        ("s3://bucket/", "names no object"),
        (f"s3://key:{CANARY}@bucket/a.tar", "AWS_ACCESS_KEY_ID"),
        ("s3://bucket/a.tar?regoin=x", "'regoin'"),
    ],
)
def test_no_other_address_is_taken(url: str, said: str):
    with pytest.raises(AddressError) as caught:
        open_blob(url)
    assert said in str(caught.value)
    assert CANARY not in str(caught.value)


def test_one_client_for_one_policy():
    first, second = open_blob("http://h/a"), open_blob("https://h/b")
    assert isinstance(first, HttpBlob)
    assert isinstance(second, HttpBlob)
    assert first.client is second.client is client_for(RetryPolicy())


names = st.text("abcdefXYZ019-._~%", min_size=1, max_size=8)
secrets = st.text("abcXYZ019:/?#@!$&'()*+,;=%", max_size=6).map(lambda noise: noise[:3] + CANARY + noise[3:])


@given(scheme=st.sampled_from(["http", "https", "s3"]), host=names, user=secrets, password=secrets, path=names)
def test_no_user_and_password_is_ever_shown(scheme: str, host: str, user: str, password: str, path: str):
    for userinfo in (f"{user}:{password}", f"{quote(user, safe='')}:{quote(password, safe='')}"):
        shown = redact(f"cannot read {scheme}://{userinfo}@{host}/{path}, sorry")
        assert CANARY not in shown
        assert shown.startswith("cannot read ")


@given(scheme=st.sampled_from(["http", "https", "s3"]), host=names, query=secrets, path=names)
def test_no_query_is_ever_shown(scheme: str, host: str, query: str, path: str):
    shown = redact(f"{scheme}://{host}:8080/{path}?X-Amz-Signature={query}")
    assert CANARY not in shown
    assert redact(f"{scheme}://{host}/{path}") == f"{scheme}://{host}/{path}"


def test_what_is_shown_can_be_recognised():
    assert redact("https://me:pw@h:1/a.tar?sig=1#x") == "https://h:1/a.tar?..."
    assert redact("http://h/img@2x/a.tar") == "http://h/img@2x/a.tar"
    # This might be a user h with a password that was not encoded.
    assert redact("http://h:8080/img@2x/a.tar") == "http://...@2x/a.tar"
    assert redact("/data/a.tar") == "/data/a.tar"
    assert redact(f"9http://me:{CANARY}@h/a (s3://h/b#c)") == "9http://h/a (s3://h/b"
    assert redact(f"://me:{CANARY}@h/a") == "://h/a"
    assert redact("http" * 250_000) == "http" * 250_000  # at once: a look from each of its letters would take an hour


def test_retry_after_in_both_forms():
    now = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
    assert retry_after_seconds("17", now) == 17.0
    assert retry_after_seconds("Fri, 02 Jan 2026 03:04:35 GMT", now) == 30.0
    assert retry_after_seconds("Fri, 02 Jan 2026 03:00:00 GMT", now) == 0.0
    for nonsense in (None, "", "soon", "-1", "1.5.2", "Fri, 99 Foo 2026"):
        assert retry_after_seconds(nonsense, now) is None


@given(st.lists(st.floats(0, 1, exclude_max=True), min_size=1, max_size=30))
def test_pauses_stay_between_the_first_and_thrice_the_last(draws: list[float]):
    policy = RetryPolicy(first_pause=0.1, longest_pause=5.0)
    last = 0.0
    for draw in draws:
        pause = next_pause(policy, last, lambda draw=draw: draw)
        assert 0.1 <= pause <= min(5.0, max(0.1, 3 * last))
        last = pause
