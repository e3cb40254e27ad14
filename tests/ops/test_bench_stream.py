"""The benchmark of readers compares like with like: all of them read the same images, and what is missing is named."""

import json
import os
from pathlib import Path

import pytest
from gristmill.ops.bench import readers
from gristmill.ops.bench import stream as bench
from gristmill.shards.demo import make_demo_images
from gristmill.shards.engine import ingest

OURS = [name for name in bench.READERS if name.startswith("gristmill")]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("bench")
    make_demo_images(root / "images", images=384, size=32)  # more than a batch
    ingest(root / "images", root / "data", shard_samples=100)
    return root


@pytest.fixture
def read(root: Path):
    """All images that a reader gives."""
    yield lambda name: [bytes(image) for image in bench.READERS[name](root)]
    for order, threads in (("shuffled", 2), ("sequential", 2), ("shuffled", 1)):
        readers.reader_of(root, order, threads).close()
    readers.reader_of.cache_clear()
    for handle in {handle for handle, *_ in readers._places(root)[0]}:
        os.close(handle)
    readers._places.cache_clear()


def test_ours_and_webdataset_read_the_same_images(root: Path, read) -> None:
    plain = read("webdataset")
    assert len(plain) == 384
    assert len(OURS) == 3
    assert read("gristmill, as on disk") == plain
    for name in [*OURS, "webdataset, buffer of 1000", "a copy and a checksum, nothing else", "a copy, nothing else"]:
        images = read(name)
        assert sorted(images) == sorted(plain), name
        assert bench.read_all(bench.READERS[name], root) == (len(plain), sum(map(len, plain))), name
    one_thread = read("gristmill, shuffled, 1 thread")
    assert one_thread == read("gristmill, shuffled") != plain


def test_a_reader_that_does_not_read_everything_is_not_measured(root: Path) -> None:
    with pytest.raises(RuntimeError, match="read"):
        bench._measure(lambda _: iter([b"one"]), root, 1)


def test_the_figures_as_json(root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """In processes of their own, as always; one of the readers does not exist."""
    names = ["webdataset", "gristmill, shuffled", "no such reader"]
    monkeypatch.setattr(bench, "READERS", {name: bench.READERS.get(name) for name in names})
    assert bench.bench_stream(root / "images", 384, True, ("reader", "resume")) == 0
    found = json.loads(capsys.readouterr().out)
    base, ours, missing = (found["reader"]["readers"][name] for name in names)
    assert base["cpu_us"] > 0
    assert ours["over_webdataset"] == base["cpu_us"] / ours["cpu_us"]
    assert "no such reader" in missing["missing"]
    assert found["resume"]["first_batch_s"] >= found["resume"]["manifest_and_stream_s"] > 0
