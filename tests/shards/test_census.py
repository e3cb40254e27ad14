"""A census counts right, in bounded memory, with a ledger and without one."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from gristmill.shards.census import ASPECTS, SIDES, Quantiles, take_census
from gristmill.shards.collection import open_collection
from gristmill.shards.foreign import index_dataset
from gristmill.shards.frequent import Frequent
from gristmill.shards.ingest.ledger import FIELDS
from gristmill.shards.manifest import Manifest, Rows
from gristmill.shards.origins import NOWHERE, sources_of, take_origins
from gristmill.shards.quarantine import Quarantine
from gristmill.shards.tombstones import Tombstones
from gristmill.shards.writer import write_manifest
from hypothesis import given
from hypothesis import strategies as st


@given(st.lists(st.integers(1, 1 << 40), min_size=1, max_size=200), st.sampled_from([0.01, 0.25, 0.5, 0.9, 0.99]))
def test_quantiles_are_right_to_one_per_cent(values: list[int], fraction: float) -> None:
    found = Quantiles()
    for part in np.array_split(np.array(values), 3):
        found.add(part)
    exact = sorted(values)[max(0, int(np.ceil(fraction * len(values))) - 1)]
    assert abs(found.at(fraction) / exact - 1) < 0.012
    assert (found.least, found.most, found.count) == (min(values), max(values), len(values))
    assert np.isclose(found.sum, sum(values))


def test_frequent_names_survive_a_flood_of_rare_ones() -> None:
    found = Frequent(1000)
    for turn in range(50):
        found.update(["often"] * 40 + ["second"] * 20 + [f"{turn}-{number}" for number in range(300)])
    assert found.cut
    assert len(found.counts) <= 1000
    assert [name for name, _ in found.counts.most_common(2)] == ["often", "second"]
    assert found.counts["often"] == 2000


def made(root: Path, sizes: np.ndarray, per_shard: int, deep: bool = True) -> Manifest:
    """A manifest of samples with these (width, height, bytes) [n, 3], whose tars nobody asks for."""
    shards = []
    for first in range(0, len(sizes), per_shard):
        width, height, length = sizes[first : first + per_shard].T
        n = len(width)
        keys = [f"k{first + row}" for row in range(n)]
        offset = np.cumsum(length + 1024) - length
        rows = Rows(
            keys,
            offset,
            length,
            np.zeros(n, np.uint32),
            width,
            height,
            ["jpg", "png"] * (n // 2) + ["webp"] * (n % 2),
            deep,
        )
        shards.append((f"{first:06d}.tar", int(length.sum()), rows))
    write_manifest(root, shards)
    return Manifest.open(root)


def test_what_a_manifest_tells(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    sizes = np.stack([rng.integers(20, 5000, 999), rng.integers(20, 5000, 999), rng.integers(500, 10**6, 999)], 1)
    sizes[:7, :2] = 0  # did not decode
    sizes[7:20, 0] = sizes[7:20, 1] = 300
    data = made(tmp_path / "set", sizes, 100)
    Tombstones.of(data).remove(data, ["k1", "k2"], "asked")
    quarantine = Quarantine(tmp_path / "quarantine.jsonl")
    quarantine.add(data.urls[0], 3, "k3", "cut")
    quarantine.add(str(data.path(1)), 3, "k103", "flipped")
    quarantine.add("elsewhere.tar", 3, "k3", "cut")
    steps: list[tuple[int, int]] = []
    census = take_census(open_collection(data.root), quarantine=tmp_path, progress=lambda *step: steps.append(step))
    assert steps == [(n + 1, 10) for n in range(10)]
    assert (census.samples, census.undecoded, census.unsized, census.shards) == (999, 7, 0, 10)
    assert census.formats == Counter(jpg=499, png=499, webp=1)
    assert census.removed == Counter(asked=2)
    assert census.quarantine == Counter(cut=1, flipped=1)
    assert census.ledger is None
    width, height = sizes[7:, 0], sizes[7:, 1]
    short, long = np.minimum(width, height), np.maximum(width, height)
    for counts, bounds, values in ((census.sides, SIDES, short), (census.aspects, ASPECTS, long / short)):
        expected = np.histogram(values, [0, *bounds, np.inf])[0]
        assert counts.tolist() == expected.tolist()
    assert census.upright == Counter(
        landscape=(width > height).sum(), portrait=(width < height).sum(), square=(width == height).sum()
    )
    assert census.shard_samples == {"min": 99, "median": 100, "max": 100}
    assert (census.widths.count, census.widths.most) == (992, width.max())


def test_quick_indexes_and_damaged_rows(tmp_path: Path, folder: Path) -> None:
    index_dataset([str(path) for path in sorted(folder.glob("*.tar"))], folder)
    census = take_census(open_collection(folder))
    assert (census.unsized, census.widths.count, census.samples) == (15, 0, 15)
    assert census.widths.as_dict() == {}
    (folder / "samples" / "00000.parquet").write_bytes(b"junk")
    assert len(take_census(open_collection(folder)).unreadable) == 3


def ledger(root: Path, generations: list[tuple[str, int, list[dict]]]) -> None:
    for number, (kind, base, rows) in enumerate(generations):
        folder = root / "ledger" / f"{number:03d}"
        folder.mkdir(parents=True)
        whole = [{name: row.get(name) for name in FIELDS.names} for row in rows]
        with pq.ParquetWriter(folder / "00000.parquet", FIELDS) as writer:
            for first in range(0, len(whole), 3):
                writer.write_table(pa.Table.from_pylist(whole[first : first + 3], schema=FIELDS))
        about = {"base": base, "inputs": len(rows), "kind": kind, "outcomes": {}}
        (root / "ledger" / f"{number:03d}.json").write_text(json.dumps(about))


def test_a_ledger_of_several_ingests(tmp_path: Path) -> None:
    """The last row of an input counts, and all inputs sum up."""
    url, tar = "https://a.example/{}.jpg", "/data/x.tar::{}.jpg"
    first = [
        {"input": 0, "locator": url.format(0), "outcome": "kept", "key": "aa"},
        {"input": 1, "locator": url.format(1), "outcome": "duplicate", "duplicate_of": "aa"},
        {"input": 2, "locator": url.format(2), "outcome": "timed_out", "detail": "30 s"},
        {"input": 3, "locator": url.format(3), "outcome": "server_error", "detail": "503"},
        {"input": 4, "locator": None, "outcome": "kept", "detail": "removed on request", "key": "bb"},
    ]
    second = [
        {"input": 5, "locator": tar.format(0), "outcome": "kept", "key": "cc", "changed": "CMYK"},
        {"input": 6, "locator": tar.format(1), "outcome": "near_duplicate", "duplicate_of": "cc", "distance": 4},
        {"input": 7, "locator": tar.format(2), "outcome": "near_duplicate", "duplicate_of": "cc", "distance": 6},
    ]
    again = [
        {"input": 2, "locator": url.format(2), "outcome": "kept", "key": "dd"},
        {"input": 3, "locator": url.format(3), "outcome": "server_error", "detail": "503"},
    ]
    more = [{"input": 3, "locator": url.format(3), "outcome": "gone", "detail": "404"}]
    ledger(tmp_path, [("new", 0, first), ("append", 5, second), ("retry", 0, again), ("retry", 0, more)])
    found = take_origins(tmp_path)
    assert (found.inputs, found.ingests, found.forgotten) == (8, 4, 1)
    assert found.outcomes == Counter(kept=4, near_duplicate=2, duplicate=1, gone=1)
    assert found.sums
    assert found.sources.counts == Counter({"a.example": 4, "/data/x.tar": 3, NOWHERE: 1})
    assert found.kept.counts == Counter({"a.example": 2, "/data/x.tar": 1, NOWHERE: 1})
    assert found.changed == Counter(CMYK=1)
    assert found.details.counts == Counter({"gone: 404": 1})
    assert found.duplicates.counts == Counter(aa=1)
    assert found.near.counts == Counter(cc=2)
    assert found.distances == Counter({4: 1, 6: 1})
    (tmp_path / "ledger" / "000" / "00000.parquet").unlink()
    assert not take_origins(tmp_path).sums


def test_sources_of_locators() -> None:
    locators = {
        "https://a.example:8080/x/y.jpg": "a.example:8080",
        "http://b.example/p?... (/l.csv#3)": "b.example",
        "s3://bucket/x.tar::a/b.jpg": "bucket",
        "/t/x.tar::a::b#1.jpg": "/t/x.tar",
        "/t/x.parquet#12": "/t/x.parquet",
        "/a/b/c.jpg": "/a/b",
        "c.jpg": "c.jpg",
        None: NOWHERE,
    }
    assert sources_of(pa.array(list(locators), pa.string())).to_pylist() == list(locators.values())
    assert len(sources_of(pa.array([], pa.string()))) == 0
