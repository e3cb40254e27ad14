"""Lists of urls: the same ones from every kind of file, each row an input, and no secret where it can be seen."""

from __future__ import annotations

import gzip
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from gristmill.shards.addresses import AddressError
from gristmill.shards.ingest.candidate import Candidate, Outcome
from gristmill.shards.ingest.errors import IngestError
from gristmill.shards.ingest.lists import check_url
from gristmill.shards.ingest.sources import plan, read_unit
from hypothesis import given
from hypothesis import strategies as st

URLS = [f"http://host{number}/ü/{number}.jpg" for number in range(25)]
CAPTIONS = [f'a "caption", of {number}\nin two lines' for number in range(25)]


def read(source: Path, work: Path, **options: Any) -> list[Candidate]:
    found = plan([source], work, **options)
    return [one for number in range(len(found)) for one in read_unit(found.unit(number), work)]


def write(path: Path) -> Path:
    """The list as what its name says."""
    kind = path.name.removesuffix(".gz").rpartition(".")[2]
    if kind == "parquet":
        pq.write_table(pa.table({"TEXT": CAPTIONS, "URL": URLS}), path, row_group_size=7)
        return path
    quoted = [f'"{caption.replace(chr(34), 2 * chr(34))}"' for caption in CAPTIONS]
    mark = "\t" if kind == "tsv" else ","
    text = {
        "txt": "\n".join(URLS),
        "jsonl": "".join(json.dumps({"TEXT": c, "URL": u}) + "\n" for c, u in zip(CAPTIONS, URLS, strict=True)),
    }.get(kind, f"TEXT{mark}URL\r\n" + "".join(f"{c}{mark}{u}\r\n" for c, u in zip(quoted, URLS, strict=True)))
    data = text.encode()
    path.write_bytes(gzip.compress(data) if path.name.endswith(".gz") else data)
    return path


@pytest.mark.parametrize(
    "name", ["a.parquet", "a.csv", "a.tsv", "a.jsonl", "a.txt", "a.csv.gz", "a.TXT.gz", "a.jsonl.gz"]
)
def test_every_kind_of_list_gives_the_same(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name == "a.TXT.gz":
        write(tmp_path / "a.txt.gz").rename(path)
    else:
        write(path)
    told = "txt" not in name.lower()
    candidates = read(path, tmp_path / "work", unit=10, keep=["TEXT"] if told else [])
    assert [one.url for one in candidates] == URLS
    assert [one.locator for one in candidates] == URLS
    assert [one.data for one in candidates] == [None] * 25
    if told:
        assert [one.meta for one in candidates] == [{"TEXT": caption} for caption in CAPTIONS]


BAD = {
    "": "no url in this row",
    "/etc/passwd": "no http or https url",
    "file:///etc/passwd": "no http or https url",
    "s3://bucket/key": "no http or https url",
    "pipe:cat x": "no http or https url",
    "data:image/png;base64,AAAA": "no http or https url",
    "http://": "no usable host or port in it",
    "http://host:99999/": "no usable host or port in it",
    "http://ho st/": "",
    "http://[::1/": "no usable host or port in it",
    "http://host/\x00": "a character that no url has",
    "http://host/\r\nX-Evil: 1": "a character that no url has",
}


@pytest.mark.parametrize(("url", "said"), BAD.items())
def test_what_is_no_url_is_an_input_with_a_reason(tmp_path: Path, url: str, said: str) -> None:
    pq.write_table(pa.table({"url": ["http://host/a.jpg", url, None, "http://host/b.jpg"]}), tmp_path / "a.parquet")
    candidates = read(tmp_path / "a.parquet", tmp_path / "work")
    assert [one.url for one in candidates if one.url] in (
        ["http://host/a.jpg", "http://host/b.jpg"],
        ["http://host/a.jpg", "http://ho%20st/", "http://host/b.jpg"],  # for the resolver to refuse
    )
    if said:
        assert candidates[1].problem == (Outcome.BAD_URL, said)
        assert candidates[1].locator == f"{tmp_path}/a.parquet#1"
    assert candidates[2].problem == (Outcome.BAD_URL, "no url in this row")


@given(st.text(max_size=60) | st.text(max_size=30).map(lambda rest: f"http://{rest}"))
def test_no_text_is_a_url_with_a_break_in_it(url: str) -> None:
    try:
        found = check_url(url)
    except AddressError:
        return
    assert found.lower().startswith(("http://", "https://"))
    assert not any(char in found for char in "\r\n\t \0")


def test_rows_of_csv_that_are_odd(tmp_path: Path) -> None:
    rows = [
        b"\xef\xbb\xbfurl,caption",
        b"http://host/1.jpg,one",
        b"",
        b"http://host/2.jpg",
        b"http://host/3.jpg,three,and more",
        b"http://host/\xff.jpg,\xfe",
        b"http://host/a b.jpg,blank",
        b"x" * (2 << 20),
        b'http://host/5.jpg,"never closed',
        b"y" * 140_000,
        b"http://host/6.jpg,six",
    ]
    (tmp_path / "a.csv").write_bytes(b"\n".join(rows))
    candidates = read(tmp_path / "a.csv", tmp_path / "work", keep=["caption"])
    assert [one.url for one in candidates] == [
        "http://host/1.jpg", "http://host/2.jpg", "http://host/3.jpg", None, "http://host/a%20b.jpg", None, None,
        "http://host/6.jpg",
    ]  # fmt: skip
    assert [one.meta.get("caption") for one in candidates[:4]] == ["one", None, "three", "\\udcfe"]
    assert [one.problem[0] for one in candidates if one.problem] == [Outcome.BAD_URL] * 3
    assert candidates[3].locator == f"{tmp_path}/a.csv#6"  # as an editor counts lines
    assert candidates[6].meta == {"row_problem": "field larger than field limit (131072)"}


def test_lines_of_json_that_are_none(tmp_path: Path) -> None:
    lines = [
        '{"url": "http://host/1.jpg", "n": 1}',
        "{",
        "[" * 100_000,
        '"http://host/2.jpg"',
        "7",
        '{"n": 2}',
        '{"url": 3}',
        "",
        "9" * 9999,
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    candidates = read(tmp_path / "a.jsonl", tmp_path / "work", keep=["n"])
    assert [one.url for one in candidates] == ["http://host/1.jpg", None, None, "http://host/2.jpg"] + [None] * 4
    assert [one.meta.get("n") for one in candidates] == [1, None, None, None, None, 2, None, None]
    assert {one.problem for one in candidates if one.problem} == {(Outcome.BAD_URL, "no url in this row")}


def test_a_packed_list_that_is_cut_gives_what_came_before(tmp_path: Path) -> None:
    text = "".join(f"http://host/{number * 7919 % 100_003}.jpg\n" for number in range(20_000))
    packed = gzip.compress(text.encode())
    (tmp_path / "a.txt.gz").write_bytes(packed[: len(packed) // 2])
    candidates = read(tmp_path / "a.txt.gz", tmp_path / "work")
    urls = [one.url for one in candidates[:-1]]
    assert len(urls) > 3000
    assert urls == text.splitlines()[: len(urls)]
    assert candidates[-1].problem is not None
    assert candidates[-1].problem[0] is Outcome.UNREADABLE
    assert candidates[-1].locator == f"{tmp_path}/a.txt.gz#{len(urls) + 1}"


def test_a_page_of_a_parquet_list_that_is_damaged(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet")
    chunk = pq.read_metadata(path).row_group(1).column(1)
    data = bytearray(path.read_bytes())
    place = chunk.dictionary_page_offset or chunk.data_page_offset
    data[place : place + chunk.total_compressed_size] = b"\xff" * chunk.total_compressed_size
    path.write_bytes(data)
    candidates = read(path, tmp_path / "work")
    assert [one.url for one in candidates] == [*URLS[:7], None, *URLS[14:]]
    problem = candidates[7].problem
    assert problem is not None
    assert problem[0] is Outcome.UNREADABLE
    assert problem[1].startswith("7 rows: ")


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("a.csv", b"a,b\nhttp://host/1.jpg,x\n", r"no column that is known to hold urls \(its first row names: a, b\)"),
        ("a.csv", b"http://host/1.jpg?sig=canary\n", r"first row names: http://host/1\.jpg\?\.\.\.\)"),
        ("a.csv", b"link,image_url\nx,y\n", r"several columns of urls \(link, image_url\): say --url-column"),
        ("a.csv", b"", "no column that is known"),
        ("a.jsonl", b'{"a": 1}\n', "no column that is known"),
        ("a.txt", b"\n\n  \n", "no image, tar, table or list in"),
        ("a.txt", "http://host/a".encode("utf-16"), "UTF-16: convert it"),
        ("a.txt.gz", b"no gzip at all", None),
    ],
)
def test_lists_that_cannot_be_meant(tmp_path: Path, name: str, data: bytes, said: str | None) -> None:
    (tmp_path / name).write_bytes(data)
    if said is None:
        (only,) = read(tmp_path / name, tmp_path / "work")
        assert only.problem is not None
        assert only.problem[0] is Outcome.UNREADABLE
        return
    with pytest.raises(IngestError, match=said) as caught:
        plan([tmp_path / name], tmp_path / "work")
    assert "canary" not in str(caught.value)


def test_a_column_that_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"link,image_url,src\nx,y,http://host/1.jpg\n")
    (only,) = read(tmp_path / "a.csv", tmp_path / "work", url="src", keep=["*"])
    assert (only.url, only.meta) == ("http://host/1.jpg", {"link": "x", "image_url": "y"})
    with pytest.raises(IngestError, match="no column 'scr'"):
        plan([tmp_path / "a.csv"], tmp_path / "other", url="scr")


def test_secrets_are_in_the_frozen_urls_alone(tmp_path: Path) -> None:
    secret = ["http://user:canary@host/1.jpg", "http://host/2.jpg?token=canary&x=1", "http://host/3 4.jpg?a b=canary"]
    lines = [{"url": url, "page": f"https://page/?key=canary#{url}"} for url in [*secret, "/canary", "pipe:canary"]]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    work = tmp_path / "work"
    candidates = read(tmp_path / "a.jsonl", work, keep=["page"])
    assert [one.url for one in candidates[:2]] == secret[:2]
    assert candidates[2].url == "http://host/3%204.jpg?a%20b=canary"
    assert candidates[1].locator == f"http://host/2.jpg?... ({tmp_path}/a.jsonl#2)"
    assert "canary" not in repr(candidates)
    holding = [path.name for path in work.iterdir() if b"canary" in path.read_bytes()]
    assert set(holding) <= {"urls-00000.parquet"}


@pytest.mark.parametrize("name", ["a.csv", "a.txt.gz", "a.parquet"])
def test_memory_does_not_grow_with_the_list(tmp_path: Path, name: str) -> None:
    def peak(count: int) -> int:
        path = tmp_path / str(count) / name
        path.parent.mkdir()
        urls = [f"http://host/{number}/{'x' * 50}.jpg" for number in range(count)]
        if name == "a.parquet":
            pq.write_table(pa.table({"url": urls}), path)
        else:
            text = "\n".join(["url", *urls] if name == "a.csv" else urls).encode()
            path.write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
        del urls
        tracemalloc.start()
        before = pa.total_allocated_bytes()
        try:
            found = plan([path], path.parent / "work", unit=200)
            return tracemalloc.get_traced_memory()[1] + max(0, pa.total_allocated_bytes() - before)
        finally:
            assert found.inputs == count
            tracemalloc.stop()

    peak(400)  # modules and caches
    assert peak(10_000) < 1.5 * peak(2000) + (1 << 19)
