"""Parquet with images in it: whose column it is, slices of row groups of any size, damage that costs its rows alone."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from gristmill.shards.ingest import tables
from gristmill.shards.ingest.candidate import Candidate, Outcome
from gristmill.shards.ingest.errors import IngestError
from gristmill.shards.ingest.sources import plan, read_unit
from gristmill.shards.ingest.tables import cut
from hypothesis import given
from hypothesis import strategies as st


def hugging_face(path: Path, images: list[bytes | None], *, rows: int = 10**6, **columns: list[Any]) -> Path:
    """A table as Hugging Face's datasets write one: bytes and path in a struct, and the features in the metadata."""
    values = [
        None if image is None else {"bytes": image, "path": f"{number}.jpg"} for number, image in enumerate(images)
    ]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({**columns, "image": pa.array(values, kind)})
    told = {"huggingface": '{"info": {"features": {"image": {"_type": "Image"}}}}'}
    pq.write_table(table.replace_schema_metadata(told), path, row_group_size=rows)
    return path


def read(source: Path, work: Path, **options: Any) -> list[Candidate]:
    found = plan([source], work, **options)
    return [one for number in range(len(found)) for one in read_unit(found.unit(number), work)]


def test_the_layout_of_hugging_face_with_columns_kept(tmp_path: Path) -> None:
    when = datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC)
    path = hugging_face(
        tmp_path / "a.parquet", [b"A", b"B"], label=[3, None], score=[float("nan"), 0.5], when=[when, None],
        source=["https://host/a?sig=canary", "ü"], boxes=[[1], [2]],
    )  # fmt: skip
    a, b = read(path, tmp_path / "work", keep=["*"])
    assert (a.data, a.locator) == (b"A", f"{path}#0")
    assert a.meta == {"label": 3, "score": None, "when": "2026-01-02T00:00:00+00:00", "source": "https://host/a?..."}
    assert b.meta == {"label": None, "score": 0.5, "when": None, "source": "ü"}
    assert [one.meta for one in read(path, tmp_path / "two", keep=["label"])] == [{"label": 3}, {"label": None}]
    assert [one.meta for one in read(path, tmp_path / "none")] == [{}, {}]


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.binary_view()])
def test_a_plain_column_of_bytes(tmp_path: Path, kind: pa.DataType) -> None:
    table = pa.table({"key": ["x", "y"], "jpg": pa.array([b"A", b"B"], kind), "url": ["http://h/a", "http://h/b"]})
    pq.write_table(table, tmp_path / "a.parquet")
    candidates = read(tmp_path / "a.parquet", tmp_path / "work", keep=["url", "key"])
    assert [one.data for one in candidates] == [b"A", b"B"]
    assert candidates[1].meta == {"url": "http://h/b", "key": "y"}
    found = plan([tmp_path / "a.parquet"], tmp_path / "urls", url="url")  # asked for, the urls are meant
    assert [one.url for one in read_unit(found.unit(0), tmp_path / "urls")] == ["http://h/a", "http://h/b"]


def test_which_column_is_never_guessed(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [b"A"], "mask": [b"M"], "n": [1]}), tmp_path / "a.parquet")
    with pytest.raises(IngestError, match=r"several columns of bytes \(image, mask\): say --image-column"):
        plan([tmp_path / "a.parquet"], tmp_path / "work")
    assert [one.data for one in read(tmp_path / "a.parquet", tmp_path / "work", image="mask")] == [b"M"]
    with pytest.raises(IngestError, match=r"'n' .* holds int64"):
        plan([tmp_path / "a.parquet"], tmp_path / "other", image="n")
    with pytest.raises(IngestError, match="no column 'maks' to keep; did you mean 'mask'"):
        plan([tmp_path / "a.parquet"], tmp_path / "other", image="image", keep=["maks"])
    with pytest.raises(IngestError, match=r"'mask' .* cannot be kept"):
        plan([tmp_path / "a.parquet"], tmp_path / "other", image="image", keep=["mask"])
    pq.write_table(pa.table({"n": [1]}), tmp_path / "n.parquet")
    with pytest.raises(IngestError, match=r"no column that is known to hold urls \(its first row names: n\)"):
        plan([tmp_path / "n.parquet"], tmp_path / "other")


def test_in_a_folder_each_table_is_what_its_columns_say(tmp_path: Path) -> None:
    source, work = tmp_path / "source", tmp_path / "work"
    source.mkdir()
    hugging_face(source / "a.parquet", [b"A"])
    pq.write_table(pa.table({"URL": ["http://host/b.jpg"]}), source / "b.parquet")
    pq.write_table(pa.table({"n": [1]}), source / "c.parquet")
    (source / "d.parquet").write_bytes(b"PAR1 damaged PAR1")
    found = plan([source], work)
    kinds = [found.unit(number).kind for number in range(len(found))]
    candidates = [one for number in range(len(found)) for one in read_unit(found.unit(number), work)]
    assert kinds == ["table", "urls", "urls"]
    assert (candidates[0].data, candidates[1].url) == (b"A", "http://host/b.jpg")
    assert candidates[2].problem is not None
    assert candidates[2].problem[0] is Outcome.UNREADABLE
    assert found.passed == {"Parquet files without a column of images or urls": 1}
    with pytest.raises(IngestError, match=r"d\.parquet cannot be taken in"):
        plan([source / "d.parquet"], tmp_path / "other")


@given(st.lists(st.integers(0, 50), max_size=20), st.integers(1, 20))
def test_units_cover_every_row_once(groups: list[int], unit: int) -> None:
    units = list(cut(groups, unit))
    assert [row for start, count in units for row in range(start, start + count)] == list(range(sum(groups)))
    assert all(0 < count <= unit for _, count in units)


@pytest.mark.parametrize("rows", [1, 7, 30, 1000])
def test_row_groups_of_any_size_in_slices(tmp_path: Path, rows: int) -> None:
    images = [b"%d" % number * 50 for number in range(100)]
    path, work = (
        hugging_face(tmp_path / "a.parquet", list(images), rows=rows, label=list(range(100))),
        tmp_path / "work",
    )
    found = plan([path], work, unit=30, keep=["label"])
    for order in (range(len(found)), reversed(range(len(found))), [0, 2, 1, 3, 0]):  # as workers may take them up
        for number in order:
            unit = found.unit(number)
            candidates = list(read_unit(unit, work))
            assert [one.data for one in candidates] == images[unit.first : unit.first + unit.count]
            assert [one.meta["label"] for one in candidates] == list(range(unit.first, unit.first + unit.count))


def test_slices_of_a_large_row_group_are_read_on_and_not_from_its_beginning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, work = hugging_face(tmp_path / "a.parquet", [b"x"] * 5000), tmp_path / "work"
    found = plan([path], work, unit=500)
    begun = []
    rows = tables.Table.rows
    monkeypatch.setattr(tables.Table, "rows", lambda *arguments: begun.append(1) or rows(*arguments))
    assert sum(len(list(read_unit(found.unit(number), work))) for number in range(len(found))) == 5000
    assert len(begun) == 1
    list(read_unit(found.unit(3), work))
    assert len(begun) == 2


def test_memory_is_a_batch_and_not_a_row_group(tmp_path: Path) -> None:
    image = bytes(range(256)) * 400  # 100 KiB
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    with pq.ParquetWriter(tmp_path / "a.parquet", pa.schema([("image", kind)]), use_dictionary=False, write_batch_size=8,
                          compression="none") as writer:  # fmt: skip
        values = [{"bytes": image, "path": "x"}] * 1000  # 100 MB in one row group
        writer.write_table(pa.table({"image": pa.array(values, kind)}), row_group_size=10**6)
    del values
    work = tmp_path / "work"
    found = plan([tmp_path / "a.parquet"], work, unit=500)
    before, peak = pa.total_allocated_bytes(), 0
    for candidate in read_unit(found.unit(1), work):
        assert candidate.data == image
        peak = max(peak, pa.total_allocated_bytes() - before)
    assert peak < 60 << 20, peak


def test_rows_without_bytes_are_told(tmp_path: Path) -> None:
    candidates = read(hugging_face(tmp_path / "a.parquet", [b"A", None, b"", b"D"]), tmp_path / "work")
    assert [one.data for one in candidates] == [b"A", None, None, b"D"]
    assert [one.problem for one in candidates[1:3]] == [(Outcome.UNREADABLE, "no bytes in this row")] * 2


def test_a_damaged_page_costs_its_row_group(tmp_path: Path) -> None:
    images = [b"%04d" % number * 100 for number in range(40)]
    path = hugging_face(tmp_path / "a.parquet", list(images), rows=10)
    chunk = pq.read_metadata(path).row_group(1).column(0)
    data = bytearray(path.read_bytes())
    place = chunk.dictionary_page_offset or chunk.data_page_offset
    data[place : place + chunk.total_compressed_size] = b"\xff" * chunk.total_compressed_size
    path.write_bytes(data)
    candidates = read(path, tmp_path / "work", unit=40)
    assert [one.data for one in candidates] == images[:10] + [None] * 10 + images[20:]
    assert {one.problem[0] for one in candidates if one.problem} == {Outcome.UNREADABLE}
    assert candidates[10].locator == f"{path}#10"


def test_a_table_that_is_replaced_or_gone(tmp_path: Path) -> None:
    path, work = hugging_face(tmp_path / "a.parquet", [b"A", b"B"]), tmp_path / "work"
    found = plan([path], work)
    hugging_face(path, [b"C", b"D", b"E"])
    said = "the table was replaced since it was listed"
    assert [one.problem for one in read_unit(found.unit(0), work)] == [(Outcome.UNREADABLE, said)] * 2
    path.unlink()
    gone = list(read_unit(found.unit(0), work))
    assert [one.problem for one in gone] == [(Outcome.UNREADABLE, "No such file or directory")] * 2
    assert [one.locator for one in gone] == [f"{path}#0", f"{path}#1"]
