"""The manifest: what is written is read back, the digest means identity, and a folder that is none says so."""

import json
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
from gristmill.shards.manifest import GROUPS, Manifest, ManifestError, Rows
from gristmill.shards.writer import ManifestWriter, write_manifest
from hypothesis import given, settings
from hypothesis import strategies as st


def rows(n: int, first: int = 0, deep: bool = True) -> Rows:
    number = np.arange(first, first + n)
    return Rows(
        keys=[f"{i:032x}" for i in number],
        offset=(number - first) * 2048 + 512,
        length=number % 1000 + 1,
        crc32=(number * 2654435761 % 2**32).astype(np.uint32),
        width=(number % 500 + 1).astype(np.int32),
        height=(number % 300 + 1).astype(np.int32),
        format=["jpg" if i % 2 else "png" for i in number],
        deep=deep,
    )


def shards(counts: list[int]) -> list[tuple[str, int, Rows]]:
    starts = np.cumsum([0, *counts])
    return [(f"{i:06d}.tar", 10_240 * (i + 1), rows(n, int(starts[i]))) for i, n in enumerate(counts)]


@settings(max_examples=20, deadline=None)
@given(counts=st.lists(st.integers(1, 30), min_size=1, max_size=12))
def test_what_is_written_is_read_back(tmp_path_factory: pytest.TempPathFactory, counts: list[int]) -> None:
    root = tmp_path_factory.mktemp("set")
    written = shards(counts)
    digest = write_manifest(root, written)
    manifest = Manifest.open(root)
    assert manifest.digest == digest
    assert manifest.samples == sum(counts)
    assert manifest.counts.tolist() == counts
    assert manifest.counts.dtype == np.int64
    assert manifest.urls == [url for url, _, _ in written]
    assert manifest.shard_bytes.tolist() == [size for _, size, _ in written]
    assert manifest.path(0) == root / "000000.tar"
    for shard, (_, _, expected) in enumerate(written):
        found = manifest.rows(shard)
        assert found.keys == expected.keys
        assert found.format == expected.format
        assert found.deep
        for name, kind in (("offset", "int64"), ("length", "int64"), ("crc32", "uint32"), ("width", "int32")):
            assert getattr(found, name).dtype == kind
            assert getattr(found, name).tolist() == getattr(expected, name).tolist()


def test_many_shards_go_to_several_files(tmp_path: Path) -> None:
    count = GROUPS + 3
    write_manifest(tmp_path, shards([2] * count))
    assert len(list((tmp_path / "samples").iterdir())) == 2
    manifest = Manifest.open(tmp_path)
    assert manifest.rows(GROUPS).keys == [f"{2 * GROUPS + i:032x}" for i in (0, 1)]
    assert manifest.rows(count - 1).keys[-1] == f"{2 * count - 1:032x}"


def test_the_digest_is_the_identity_and_nothing_else(tmp_path: Path) -> None:
    base = shards([5, 7])

    def digest(name: str, changed: list[tuple[str, int, Rows]]) -> str:
        return write_manifest(tmp_path / name, changed)

    known = digest("base", base)
    assert digest("again", base) == known
    url, size, first = base[0]
    with_crc = Rows(first.keys, first.offset, first.length, first.crc32 + 1, first.width, first.height, first.format)
    assert digest("checksums", [(url, size, with_crc), base[1]]) == known
    quick = Rows(first.keys, first.offset, first.length, first.crc32, first.width, first.height, first.format, False)
    assert digest("quick", [(url, size, quick), base[1]]) == known

    def other(**change: object) -> list[tuple[str, int, Rows]]:
        return [(url, size, Rows(**(vars(first) | change))), base[1]]  # type: ignore[arg-type]

    different = {
        "name": [("x.tar", size, first), base[1]],
        "order": base[::-1],
        "less": base[:1],
        "key": other(keys=["other", *first.keys[1:]]),
        # The same letters cut differently are other keys.
        "cut": other(keys=[first.keys[0] + first.keys[1][:1], first.keys[1][1:], *first.keys[2:]]),
        "offset": other(offset=first.offset + 512),
        "length": other(length=first.length + 1),
    }
    digests = [digest(name, changed) for name, changed in different.items()]
    assert len({known, *digests}) == len(digests) + 1


def test_a_quick_index_stays_one(tmp_path: Path) -> None:
    write_manifest(tmp_path, [("000000.tar", 512, rows(4, deep=False))])
    found = Manifest.open(tmp_path).rows(0)
    assert not found.deep
    assert found.crc32.tolist() == found.width.tolist() == [0, 0, 0, 0]


def test_rows_kept_in_memory_are_bounded(tmp_path: Path) -> None:
    write_manifest(tmp_path, shards([10] * 20))
    manifest = Manifest.open(tmp_path, cache_rows=35)
    kept = manifest.rows(0)
    assert manifest.rows(0) is kept
    for shard in range(1, 20):
        manifest.rows(shard)
    assert sum(map(len, manifest._rows.values())) == 30
    assert manifest.rows(0) is not kept
    assert manifest.rows(0).keys == kept.keys
    assert len(Manifest.open(tmp_path, cache_rows=1).rows(3)) == 10


def test_threads_may_share_it(tmp_path: Path) -> None:
    write_manifest(tmp_path, shards([3] * 40))
    manifest = Manifest.open(tmp_path, cache_rows=12)
    wrong: list[int] = []

    def look(start: int) -> None:
        for step in range(80):
            shard = (start * 7 + step * 11) % 40
            if manifest.rows(shard).keys[0] != f"{3 * shard:032x}":
                wrong.append(shard)

    threads = [threading.Thread(target=look, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_folder_that_is_no_data_set_says_so(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=r"is no folder: name one"):
        Manifest.open(tmp_path / "nowhere")
    with pytest.raises(ManifestError, match=r"dataset\.json is missing.*run it again.*`gristmill index` first"):
        Manifest.open(tmp_path)
    for half in ("probe", "train"):
        write_manifest(tmp_path / "run" / "data" / half, shards([2]))
    with pytest.raises(ManifestError, match=r"holds data/probe, data/train: name .*/run/data/train$"):
        Manifest.open(tmp_path / "run")
    write_manifest(tmp_path / "train", shards([2]))
    with pytest.raises(ManifestError, match=r"holds train: name .*train"):
        Manifest.open(tmp_path)
    about = tmp_path / "train" / "dataset.json"
    text = json.loads(about.read_text())
    for change, message in (
        ("not json", "cannot be read"),
        (json.dumps({"features": []}), "not Gristmill's"),
        (json.dumps(text | {"schema": 2}), "version 2, this Gristmill reads version 1"),
        (json.dumps(text | {"digest": "0" * 32}), "mixes two data sets"),
    ):
        about.write_text(change)
        with pytest.raises(ManifestError, match=message):
            Manifest.open(tmp_path / "train")


def test_damaged_parquet_is_named(tmp_path: Path) -> None:
    write_manifest(tmp_path / "a", shards([4, 4]))
    write_manifest(tmp_path / "b", shards([4, 5]))
    shards_file = tmp_path / "a" / "shards.parquet"
    whole = shards_file.read_bytes()
    shards_file.write_bytes(whole[:-20])
    with pytest.raises(ManifestError, match=r"shards\.parquet cannot be read"):
        Manifest.open(tmp_path / "a")
    shards_file.write_bytes(whole)
    shutil.copy(tmp_path / "b" / "samples" / "00000.parquet", tmp_path / "a" / "samples")
    manifest = Manifest.open(tmp_path / "a")
    assert len(manifest.rows(0)) == 4  # the same in both
    with pytest.raises(ManifestError, match=r"rows of shard 000001\.tar .* mixes two data sets"):
        manifest.rows(1)
    (tmp_path / "a" / "samples" / "00000.parquet").unlink()
    with pytest.raises(ManifestError, match=r"rows of shard 000001\.tar cannot be read"):
        Manifest.open(tmp_path / "a").rows(1)


def test_nothing_is_seen_before_it_is_published(tmp_path: Path) -> None:
    with ManifestWriter(tmp_path) as writer:
        for shard in shards([3, 3]):
            writer.add(*shard)
        with pytest.raises(ManifestError, match="is missing"):
            Manifest.open(tmp_path)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ManifestError, match="has no sample"):
        write_manifest(tmp_path, [("000000.tar", 10_240, rows(0))])
    assert list(tmp_path.iterdir()) == []


def test_a_second_manifest_replaces_the_first(tmp_path: Path) -> None:
    first = write_manifest(tmp_path, shards([3] * 4))
    second = write_manifest(tmp_path, shards([5]))
    manifest = Manifest.open(tmp_path)
    assert first != second == manifest.digest
    assert len(manifest.rows(0)) == 5
    assert not list(tmp_path.rglob("*.partial"))


def test_an_empty_data_set_is_refused_when_opened(tmp_path: Path) -> None:
    write_manifest(tmp_path, [])
    with pytest.raises(ManifestError, match="has no sample"):
        Manifest.open(tmp_path)
