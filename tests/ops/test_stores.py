"""Stores: a folder, and a real object store; publishing is all or nothing, and no secret is ever repeated."""

import os
import socket
import traceback
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import torch
from gristmill.ops.checkpoint import CheckpointError, Content, Part, Saved, digest_of, newest
from gristmill.ops.objects import ObjectStore
from gristmill.ops.stores import LocalStore, Store, open_store
from gristmill.ops.writer import Writer
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import fs

from ..ranks import run_ranks
from ..servers import WEED_MISSING, Server, find_weed, weed_server


def contents(value: float, world: int, size: int = 1000) -> list[Content]:
    edges = [size * rank // world for rank in range(world + 1)]
    found = [
        Content([Part("student", "w", start, (size,), torch.full((stop - start,), value))])
        for start, stop in pairwise(edges)
    ]
    found[0].whole, found[0].state = {"objectives": {"queue": torch.full((9,), value)}}, {"value": value}
    return found


def write(stores: list[Any], position: int, value: float, size: int = 1000, keep: int = 9) -> list[Any]:
    """One rank a store; what `finish` gave on each."""
    writers = [Writer(store, rank, len(stores), keep) for rank, store in enumerate(stores)]
    for writer, content in zip(writers, contents(value, len(stores), size), strict=True):
        writer.begin(position, content)
    return run_ranks(len(stores), lambda rank, total: writers[rank].finish(total))


def value(store: Store) -> tuple[int, float]:
    saved, told = newest(store)
    assert saved is not None
    assert told == []
    numbers = saved.assembled("student")["w"].unique().tolist()
    assert numbers == saved.whole("objectives")["queue"].unique().tolist() == [saved.state["value"]]
    saved.close()
    return saved.position, numbers[0]


def test_what_opens_what(tmp_path: Path):
    for where in (tmp_path / "a b", str(tmp_path / "a b"), f"file://{quote(str(tmp_path / 'a b'))}"):
        store = open_store(where)
        assert isinstance(store, LocalStore)
        assert store.root == tmp_path / "a b"
    with pytest.raises(CheckpointError, match="ftp://host/x is no place for checkpoints"):
        open_store("ftp://host/x")


def test_leftovers_are_swept_and_a_replaced_checkpoint_comes_back(tmp_path: Path):
    store = LocalStore(tmp_path)
    write([store], 64, 1.0)
    (tmp_path / "000000000064").rename(tmp_path / ".replaced-000000000064")  # killed between two renames
    assert store.positions() == [64]
    assert value(store) == (64, 1.0)
    for rest in (".writing-000000000128", ".removing-000000000032", ".replaced-000000000016"):
        (tmp_path / rest).mkdir()
        (tmp_path / rest / "rank-00000.safetensors").write_bytes(b"x")
    (tmp_path / "notes.txt").write_text("not ours")
    store.prepare()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000000000016", "000000000064", "notes.txt"]
    assert store.positions() == [64, 16]


def test_a_folder_that_cannot_be_written_is_an_error_at_the_start(tmp_path: Path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match=r"cannot be written to .*file/checkpoints"):
        Writer(LocalStore(tmp_path / "file" / "checkpoints"), 0, 1, keep=1)


def test_bytes_that_read_back_differently_are_not_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    fsync = os.fsync

    def lying(handle: int) -> None:
        fsync(handle)
        os.pwrite(handle, b"\0" * 64, 1200)  # the disk kept something else

    monkeypatch.setattr(os, "fsync", lying)
    (error,) = write([LocalStore(tmp_path)], 64, 1.0)
    assert "reads back differently" in str(error)
    assert list(tmp_path.iterdir()) == []


def told(error: BaseException) -> str:
    """All that a user would see of an error, less the source lines, which quote this file."""
    frames = traceback.TracebackException.from_exception(error)
    texts = list(frames.format_exception_only())
    for inner in (frames.__cause__, None if frames.__suppress_context__ else frames.__context__):
        texts += inner.format() if inner else []
    return "".join(texts)


words = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=20)


@given(user=st.just("AKUSER") | words, secret=words, quoted=st.booleans())
def test_no_secret_is_repeated(user: str, secret: str, quoted: bool):
    password = f"QQ{secret}ZZ"
    form = quote(password, safe="") if quoted else password
    query = f"endpoint_override=127.0.0.1:1&scheme=http&region=XYZZY-{form}"
    try:
        store = ObjectStore(f"s3://{quote(user, safe='')}:{form}@bucket/prefix?{query}")
    except CheckpointError as error:
        text = told(error)
        assert "is no place for checkpoints" in text
    else:
        text = f"{store} {store!r} {store.shown(64)}"
    assert password not in text
    assert form not in text
    assert "XYZZY" not in text


@pytest.fixture(scope="module")
def weed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    if find_weed() is None:
        pytest.skip(WEED_MISSING)
    with weed_server(tmp_path_factory.mktemp("weed")) as server:
        yield server


def address(server: Server, prefix: str, secret: str | None = None) -> str:
    password = quote(secret or server.secret, safe="")
    query = f"endpoint_override={server.endpoint}&scheme=http&allow_bucket_creation=true"
    return f"s3://{server.key}:{password}@grist/{prefix}?{query}"


@pytest.fixture(params=["file", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URI of an empty place: pyarrow's local file system, and SeaweedFS."""
    if request.param == "file":
        return f"file://{tmp_path}/objects"
    return address(request.getfixturevalue("weed"), f"{tmp_path.name}/objects")


def listing(place: str) -> list[str]:
    system, root = fs.FileSystem.from_uri(place)
    found = system.get_file_info(fs.FileSelector(root, recursive=True, allow_not_found=True))
    return sorted(entry.path.removeprefix(root + "/") for entry in found if entry.is_file)


def change(place: str, name: str, new: bytes | None) -> None:
    """Overwrite an object, or remove it."""
    system, root = fs.FileSystem.from_uri(place)
    if new is None:
        system.delete_file(f"{root}/{name}")
    else:
        system.create_dir(f"{root}/{name}".rpartition("/")[0], recursive=True)
        with system.open_output_stream(f"{root}/{name}") as stream:
            stream.write(new)


def test_objects_round_trip_over_ranks(place: str, tmp_path: Path):
    spool = tmp_path / "spool"
    spool.mkdir()
    for position in (64, 128, 192):
        (first, _) = write([ObjectStore(place), ObjectStore(place)], position, position, keep=2)
        assert first.failure is None, first
    files = ["rank-00000.safetensors", "rank-00001.safetensors", "state.digest", "state.json"]
    files.append("whole-objectives.safetensors")
    assert listing(place) == [f"{position:012d}/{name}" for position in (128, 192) for name in files]

    def work(rank, total):
        saved, told = newest(ObjectStore(place, spool=spool), rank, 3, total)
        assert saved is not None
        assert told == []
        return saved.position, saved.read("student", "w", 300 * rank, 300 * rank + 300).unique().tolist()

    assert run_ranks(3, work) == [(192, [192.0])] * 3
    saved, _ = newest(ObjectStore(place, spool=spool))
    assert saved is not None
    assert torch.equal(saved.assembled("student")["w"], torch.full((1000,), 192.0))
    assert list(spool.iterdir()) == []  # nothing to be left behind


def test_objects_are_published_by_their_state(place: str):
    store = ObjectStore(place)
    write([store], 64, 1.0)
    store.put(128, "rank-00000.safetensors", [memoryview(b"half")])  # killed before state.json
    change(place, "000000000064/rank-00007.json", b"a note of a killed writer")
    change(place, "notes.txt", b"not ours")
    assert store.positions() == [64]
    assert value(store) == (64, 1.0)
    Writer(store, 0, 1, keep=1)
    files = ["rank-00000.safetensors", "state.digest", "state.json", "whole-objectives.safetensors"]
    assert listing(place) == [*(f"000000000064/{name}" for name in files), "notes.txt"]


def test_replacing_objects_never_harms_the_published_ones(place: str, monkeypatch: pytest.MonkeyPatch):
    """Stop after each object that is put: what was there is whole until what is new is whole."""
    store = ObjectStore(place)
    write([store], 64, 1.0)
    put, left = ObjectStore.put, 0

    def stopping(self, position, name, chunks):
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(5, "killed")
        return put(self, position, name, chunks)

    monkeypatch.setattr(ObjectStore, "put", stopping)
    seen = []
    for count in range(1, 8):
        left = count
        answers = write([store], 64, 2.0)
        seen.append(value(store))
    assert seen == [(64, 1.0)] * 4 + [(64, 2.0)] * 3
    assert answers[0].failure is None
    assert len(listing(place)) == 4


@pytest.mark.parametrize("fault", ["zeroed bytes", "missing", "torn state"])
def test_damaged_objects_are_passed_over(place: str, fault: str):
    store = ObjectStore(place)
    for position in (64, 128):
        write([store, ObjectStore(place)], position, position)
    name = "000000000128/rank-00001.safetensors" if fault != "torn state" else "000000000128/state.json"
    data = store.read(128, name.partition("/")[2])
    new = {"zeroed bytes": data[:-100] + bytes(64) + data[-36:], "missing": None, "torn state": data[:50]}[fault]
    change(place, name, new)
    saved, told = newest(ObjectStore(place))
    assert saved is not None
    assert saved.position == 64
    assert name.partition("/")[2] in told[0]
    assert "c4nary" not in told[0]
    store.remove(128)
    assert store.positions() == [64]


def test_what_arrives_damaged_is_not_used(place: str):
    write([ObjectStore(place)], 64, 1.0)
    store = ObjectStore(place)
    saved, _ = newest(store)
    assert saved is not None
    saved.close()
    change(place, "000000000064/rank-00000.safetensors", b"x" * 100)  # after it was verified
    with pytest.raises(CheckpointError, match=r"rank-00000\.safetensors .* does not match its digest"):
        Saved(store, 64).read("student", "w")


def test_many_megabytes_go_up_in_parts(weed: Server, tmp_path: Path):
    store = ObjectStore(address(weed, tmp_path.name))
    data = torch.arange(12_000_000, dtype=torch.int32).view(torch.uint8).numpy()
    digest, size = store.put(64, "large", (data[i : i + 7_000_000].data for i in range(0, len(data), 7_000_000)))
    assert (digest, size) == (digest_of(data.tobytes()), 48_000_000)
    assert store.digest(64, "large") == digest
    assert Path(store.local(64, "large", digest)).stat().st_size == size
    store.release()


def test_a_wrong_secret_is_an_error_at_the_start(weed: Server, tmp_path: Path):
    with pytest.raises(CheckpointError, match="look at the bucket, its keys and its address") as caught:
        Writer(ObjectStore(address(weed, tmp_path.name, "wrong-c4nary")), 0, 1, keep=1)
    assert "s3://grist/" in str(caught.value)
    assert "c4nary" not in told(caught.value)


def test_an_object_store_that_is_gone_costs_the_checkpoint_and_not_the_run():
    class Gone(ObjectStore):
        def prepare(self) -> None:
            """It was there when the run began."""

    with socket.socket() as closed:  # bound, but nobody listens
        closed.bind(("127.0.0.1", 0))
        query = f"endpoint_override=127.0.0.1:{closed.getsockname()[1]}&scheme=http"
        store = Gone(f"s3://grist-key:c4nary-secret@grist/run?{query}")
        writer = Writer(store, 0, 1, keep=1)
        writer.begin(64, contents(1.0, 1)[0])
        with pytest.raises(CheckpointError, match="start again when they can") as listed:
            newest(store)
        with pytest.raises(CheckpointError, match="could not write the checkpoint s3://grist/run") as caught:
            writer.finish(list)
        assert not writer.busy
        writer.close()
    for error in (caught.value, listed.value):
        assert "c4nary" not in told(error)
