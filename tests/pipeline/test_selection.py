"""Filters: read as a language and never as code, true to a plain reading of the rows, and selectable at a bit a sample."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from gristmill.pipeline import selection as module
from gristmill.pipeline.selection import Selection, select_rows
from gristmill.pipeline.where import Where, WhereError
from gristmill.shards.manifest import GROUPS, SAMPLES, Manifest, ManifestError, Rows
from gristmill.shards.writer import write_manifest
from hypothesis import given, settings
from hypothesis import strategies as st

FIELDS = [("width", pa.int32()), ("crc32", pa.uint32()), ("score", pa.float64()), ("format", pa.string())]
SCHEMA = pa.schema([*FIELDS, ("good", pa.bool_()), ("tags", pa.list_(pa.string()))])
TABLE = pa.table(
    {
        "width": [10, None, 30, 40],
        "crc32": [2**32 - 1, 0, 5, None],
        "score": [0.5, 1.5, None, float("nan")],
        "format": ["jpg", "png", None, "webp"],
        "good": [True, False, None, True],
        "tags": [[], [], [], []],
    },
    schema=SCHEMA,
)


def manifest(root: Path, counts: list[int], deep: bool = True) -> Manifest:
    shards = []
    for shard, n in enumerate(counts):
        number = np.arange(n) + 1000 * shard
        rows = Rows(
            keys=[f"{i:06d}" for i in number],
            offset=np.arange(n) * 1024 + 512,
            length=number * 7919 % 997 + 1,
            crc32=(number % 2**32).astype(np.uint32),
            width=(number * 31 % 101 + 1).astype(np.int32),
            height=(number * 17 % 89 + 1).astype(np.int32),
            format=["jpg" if i % 3 else "png" for i in number],
            deep=deep,
        )
        shards.append((f"{shard:06d}.tar", 1024 * (n + 1), rows))
    write_manifest(root, shards)
    return Manifest.open(root)


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("width > 10", [2, 3]),
        ("width >= 10 and format == 'jpg'", [0]),
        ("10 <= width < 40", [0, 2]),
        ("width <= 10 or format == 'png'", [0, 1]),  # unknown or true is true
        ("not width > 10", [0]),  # and not unknown is unknown
        ("not (width > 10 and format == 'png')", [0, 3]),
        ("format in ('jpg', 'webp')", [0, 3]),
        ("format not in ['jpg', 'webp']", [1]),
        ("width in {10, 30}", [0, 2]),
        ("width is None", [1]),
        ("format is not None", [0, 1, 3]),
        ("width * 2 - 1 == 19", [0]),
        ("width / 4 > 2.5", [2, 3]),
        ("-width < -35", [3]),
        ("crc32 == 4294967295", [0]),
        ("score < 2", [0, 1]),  # not a number is no value
        ("score / 0 > 1e300", [0, 1]),
        ("good", [0, 3]),
        ("not good and width is None", [1]),
        ("good == False", [1]),
        ("width > 10\n  and width < 40", [2]),
        ("True", [0, 1, 2, 3]),
        ("1 < 2", [0, 1, 2, 3]),
    ],
)
def test_the_language(text, rows):
    mask, _ = Where(text, SCHEMA)(TABLE)
    assert mask.dtype == bool
    assert np.flatnonzero(mask).tolist() == rows


def test_it_counts_what_it_cannot_know():
    where = Where("width > 10 and crc32 > 1", SCHEMA)
    assert where(TABLE)[1] == 1  # the last row: the second one is false whatever its width
    assert where.columns == ("crc32", "width")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("widht > 3", r"no column 'widht': did you mean 'width'\?.*format"),
        ("colour == 'red'", "no column 'colour'.*The manifest has width"),
        ("width > ", "cannot be read"),
        ("width > 10)(", "cannot be read"),
        ("width = 3", "cannot be read"),
        ("", "leave it out"),
        ("1 < 2 " * 400, "characters long"),
        ("width", "gives a number and no yes or no"),
        ("width > 'a'", "`width > 'a'` compares a number with a text"),
        ("format > 3", "compares a text with a number"),
        ("format in ('jpg', 3)", "looks for a number in format"),
        ("format in ()", "needs a list"),
        ("format in 'jpg'", "needs a list"),
        ("width and good", "`width` is a number, where a comparison is needed"),
        ("format * 2 == 'a'", "`format` is a text, where a number is needed"),
        ("width == None", "compares a number with a null"),
        ("width is 3", "needs None"),
        ("tags == 'a'", "is a column of list"),
        ("width > 1e999", "no value that a column can have"),
        ("width < 1" + "0" * 30, "no value"),
        ("width ** 2 > 4", "not part of the language"),
        ("width % 2 == 0", "not part of the language"),
        ("__import__('os').system('true')", "not part of the language"),
        ("format.upper() == 'JPG'", "not part of the language"),
        ("(lambda: True)()", "not part of the language"),
        ("[x for x in (1,)] == 3", "not part of the language"),
        ("f'{width}' == '3'", "not part of the language"),
        ("width[0] == 3", "not part of the language"),
        ("(w := 3) == 3", "not part of the language"),
        ("good if good else good", "not part of the language"),
        ("width > 3, good", "not part of the language"),
        ("good == b'1'", "no value"),
        ("good\0", "cannot be read"),
        ("(" * 900 + "good" + ")" * 900, "cannot be read"),
    ],
)
def test_what_is_wrong_is_named(text, message):
    """Whatever is given, the answer is a filter or an error that a user can read."""
    with pytest.raises(WhereError, match=message):
        Where(text, SCHEMA)


@pytest.mark.parametrize("text", ["not " * 450 + "good", "-" * 1900 + "3 > 2", "(" * 150 + "good" + ")" * 150])
def test_depth_is_no_danger(text):
    """Deep filters are read, or refused; how deep the parser goes is its own affair."""
    try:
        mask, _ = Where(text, SCHEMA)(TABLE)
    except WhereError:
        return
    assert mask.shape == (4,)


@settings(deadline=None, max_examples=300)
@given(st.text(alphabet="()wid<>=! andornot'jpg0.1,+-*/[]{}\n#\\", max_size=40))
def test_no_text_does_anything_else(text):
    try:
        mask, unknown = Where(text, SCHEMA)(TABLE)
    except WhereError:
        return
    assert mask.shape == (4,)
    assert 0 <= unknown <= 4


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(0, 1300), min_size=1, max_size=6), st.floats(0, 1), st.integers(0, 2**32 - 1), st.booleans()
)
def test_select_finds_the_kth_row(sizes, share, seed, in_a_file):
    """Against numpy's flatnonzero, with empty shards, empty blocks and full ones, in memory and in a file."""
    draws = np.random.default_rng(seed)
    masks = [draws.random(n) < (share if draws.random() < 0.7 else round(share)) for n in sizes]
    for mask in masks:
        mask[: draws.integers(0, len(mask) + 1) // 2] &= draws.random() < 0.5
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_IN_MEMORY", -1 if in_a_file else 1 << 24)
        got = Selection(sizes, iter(masks))
    assert (got._bits.nbytes == 0) >= in_a_file
    other = Selection(sizes, iter(masks))
    assert [got.digest(n) for n in range(len(sizes) + 1)] == [other.digest(n) for n in range(len(sizes) + 1)]
    assert got.counts.tolist() == [int(mask.sum()) for mask in masks]
    shard = np.repeat(np.arange(len(sizes)), got.counts)
    rank = np.concatenate([np.arange(n) for n in got.counts])
    expected = np.concatenate([np.flatnonzero(mask) for mask in masks])
    mixed = draws.permutation(len(shard))
    assert np.array_equal(got.select(shard[mixed], rank[mixed]), expected[mixed])
    for s, mask in enumerate(masks):
        assert np.array_equal(got.holds(np.full(len(mask), s), np.arange(len(mask))), mask)


def test_where_there_is_no_room_for_the_bits_it_is_said(monkeypatch):
    monkeypatch.setattr(module, "_IN_MEMORY", -1)
    full = Path("/dev/full").open("w+b", buffering=0)  # noqa: SIM115
    monkeypatch.setattr(module.tempfile, "TemporaryFile", lambda: full)
    with full, pytest.raises(WhereError, match=r"128 bytes of bits cannot be kept in .*No space left.*TMPDIR"):
        Selection([600], iter([np.ones(600, bool)]))


def test_it_costs_a_bit_a_sample():
    sizes = np.full(200, 10_000)
    got = Selection(sizes, (np.arange(10_000) % 3 == 0 for _ in range(200)))
    assert got.nbytes * 8 / sizes.sum() < 1.11  # 1.0625, the rest of the last block of each shard, and 16 bytes a shard


@pytest.mark.parametrize("rows", [1 << 20, 100])
def test_a_manifest_is_filtered_by_its_columns(tmp_path, monkeypatch, rows):
    monkeypatch.setattr(module, "_ROWS", rows)  # several stretches a file
    counts = [40, 1, 75, 8, 33]
    data = manifest(tmp_path, counts)
    seen = []
    text = "width >= 20 and width / height < 3 and format == 'jpg'"
    got = select_rows(data, text, progress=lambda done, total: seen.append((done, total)))
    for shard in range(len(counts)):
        there = data.rows(shard)
        mask = (there.width >= 20) & (there.width / there.height < 3) & (np.array(there.format) == "jpg")
        assert got.holds(np.full(len(mask), shard), np.arange(len(mask))).tolist() == mask.tolist()
    assert seen[-1] == (sum(counts), sum(counts))
    assert got.unknown == 0
    same = select_rows(data, "format != 'png' and not (width < 20 or not width / height < 3)")
    assert same.digest() == got.digest()  # the choice counts, not its wording
    assert select_rows(data, "width >= 60").digest() != select_rows(data, "width >= 20").digest()
    assert select_rows(data, text).digest(2) == select_rows(manifest(tmp_path / "cut", counts[:2]), text).digest()


def test_more_shards_than_a_file_has_groups(tmp_path):
    data = manifest(tmp_path, [2] * (GROUPS + 5))
    got = select_rows(data, "format == 'png'")
    assert got.counts.tolist() == [data.rows(s).format.count("png") for s in range(GROUPS + 5)]


def test_a_filter_that_leaves_nothing_is_refused(tmp_path):
    with pytest.raises(WhereError, match=r"selects none of the 9 samples(?!.*lack)"):
        select_rows(manifest(tmp_path / "deep", [4, 5]), "width > 1000")
    assert select_rows(manifest(tmp_path / "some", [4, 5], deep=False), "length > 0 or width > 10").unknown == 0
    assert select_rows(manifest(tmp_path / "few", [4, 5], deep=False), "width > 10 or format == 'png'").unknown == 6
    with pytest.raises(WhereError, match=r"9 of them lack a value.*--deep"):
        select_rows(manifest(tmp_path / "quick", [4, 5], deep=False), "width > 10")


def test_missing_rows_are_named(tmp_path):
    data = manifest(tmp_path, [4, 5])
    path = tmp_path / SAMPLES / "00000.parquet"
    pq.write_table(pq.read_table(path).slice(0, 3), path)
    with pytest.raises(ManifestError, match="make or index"):
        select_rows(data, "width > 10")
    path.unlink()
    with pytest.raises(ManifestError, match="00000"):
        select_rows(data, "width > 10")
