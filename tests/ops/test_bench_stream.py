"""The benchmark of readers compares like with like: all of them read the same images, and what is missing is named."""

import json
import os
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from gristmill.ops.bench import readers, scale
from gristmill.ops.bench import stream as bench
from gristmill.shards.demo import make_demo_images
from gristmill.shards.ingest import ingest_folder

OURS = [name for name in bench.READERS if name.startswith("gristmill")]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("bench")
    make_demo_images(root / "images", images=384, size=32)  # more than a batch
    ingest_folder(root / "images", root / "data", shard_samples=100)
    return root


@pytest.fixture
def read(root: Path):
    """All images that a reader gives."""
    yield lambda name: [bytes(image) for image in bench.READERS[name](root)]
    kept = [("shuffled", 2, False), ("sequential", 2, False), ("shuffled", 1, False), ("shuffled", 2, True)]
    for kind in [*kept, ("sequential", 2, True)]:
        readers.reader_of(root, *kind).close()
    readers.reader_of.cache_clear()
    readers._images_of.cache_clear()
    for handle in {handle for handle, *_ in readers._places(root)[0]}:
        os.close(handle)
    readers._places.cache_clear()


def test_ours_and_webdataset_read_the_same_images(root: Path, read) -> None:
    plain = read("webdataset")
    assert len(plain) == 384
    assert len(OURS) == 5
    assert read("gristmill, as on disk") == plain
    for name in [*OURS, "webdataset, buffer of 1000", "a copy and a checksum, nothing else", "a copy, nothing else"]:
        images = read(name)
        assert sorted(images) == sorted(plain), name
        for held in (True, False):  # the next epoch too, and it begins within a batch
            assert bench.read_all(bench.READERS[name], root, held) == (len(plain), sum(map(len, plain))), name
    assert read("gristmill, shuffled, 1 thread") == read("gristmill, shuffled") != plain


def test_a_reader_that_does_not_read_everything_is_not_measured(root: Path) -> None:
    with pytest.raises(RuntimeError, match="read"):
        bench._measure(lambda _: iter([b"one"]), root, 1, held=True)


def test_a_batch_is_held_until_it_is_full(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[weakref.ref] = []

    def read(root: Path) -> Iterator[np.ndarray]:
        for _ in range(10):
            image = np.zeros(3, np.uint8)
            given.append(weakref.ref(image))
            yield image
            del image
            alive.append(sum(one() is not None for one in given))

    monkeypatch.setattr(readers, "BATCH", 4)
    for held, expected in ((True, [1, 2, 3, 1, 1, 2, 3, 1, 1, 2]), (False, [1] * 10)):
        alive: list[int] = []
        assert readers.read_all(read, root, held) == (10, 30)
        assert alive == expected


def test_the_figures_as_json(root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """In processes of their own, as always; one of the readers does not exist."""
    names = ["webdataset", "gristmill, quick index, shuffled", "no such reader"]
    monkeypatch.setattr(bench, "READERS", {name: bench.READERS.get(name) for name in names})
    assert bench.bench_stream(root / "images", 384, True, ("reader", "resume")) == 0
    found = json.loads(capsys.readouterr().out)
    base, ours, missing = (found["reader"]["readers"][name] for name in names)
    assert base["cpu_us"] > 0
    assert base["singly_cpu_us"] > 0
    assert "singly_cpu_us" not in ours
    assert ours["over_webdataset"] == base["cpu_us"] / ours["cpu_us"]
    assert "no such reader" in missing["missing"]
    assert found["resume"]["first_batch_s"] >= found["resume"]["manifest_and_stream_s"] > 0


def test_a_manifest_of_linked_rows_is_a_whole_one(root: Path) -> None:
    """A thousandth of the benchmark's: opened, put at a cursor, filtered, and rows read and checked."""
    scale.make(root / "scale", shards=1100, per_shard=10)
    assert len(list((root / "scale" / "samples").iterdir())) == 3
    plain, filtered = scale.from_manifest(root / "scale"), scale.from_manifest(root / "scale", "width >= 256")
    assert plain["samples"] == 11_000
    assert 0.8 < filtered["samples"] / plain["samples"] < 0.86
    assert plain["peak_with_rows_MB"] >= plain["peak_MB"] > 20
    assert scale.synthetic(1_000_000)["cursor_bytes"] < 250
