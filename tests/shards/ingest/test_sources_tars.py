"""Tars as sources: every image with what stands beside it, every damage told, no header believed."""

from __future__ import annotations

import io
import json
import tarfile
import tracemalloc
from pathlib import Path

import pytest
from gristmill.shards.ingest.candidate import Candidate, Outcome
from gristmill.shards.ingest.errors import IngestError
from gristmill.shards.ingest.sources import plan, read_unit

from ..tars import FORMATS, by_tarfile, tar

SIGNED = "https://host/a.jpg?X-Amz-Signature=canary-7c1"


def read(source: Path, work: Path, unit: int = 1000) -> list[Candidate]:
    found = plan([source], work, unit=unit)
    return [one for number in range(len(found)) for one in read_unit(found.unit(number), work)]


@pytest.mark.parametrize("kind", list(FORMATS))
def test_images_with_their_sidecars(tmp_path: Path, kind: str) -> None:
    entries = [
        ("./n01/a.jpg", b"A"),
        ("./n01/a.json", b'{"license": "CC0", "nan": NaN, "caption": "from json"}'),
        ("./n01/a.txt", "a caption, ü\n".encode()),
        ("./n01/a.cls", b"17"),
        ("n02/a.txt", b"another folder, another sample"),
        ("n02/b.json", b"[1, 2]"),
        ("n02/b.PNG", b"B"),
        ("n02/b.seg.png", b"two images of one sample"),
        ("photo.2020.jpg", b"a name with a dot"),
        ("alone", b"no suffix"),
    ]
    source = tar(tmp_path / "a.tar", entries, kind)
    candidates = read(source, tmp_path / "work", unit=2)
    assert [one.data for one in candidates] == [b"A", b"B", b"two images of one sample", b"a name with a dot"]
    assert candidates[0].meta == {"license": "CC0", "nan": None, "caption": "a caption, ü", "cls": 17}
    assert [one.meta for one in candidates[1:]] == [{"json": [1, 2]}, {"json": [1, 2]}, {}]
    assert [one.labels for one in candidates] == [("n01",), ("n02",), ("n02",), ()]
    assert candidates[1].locator == f"{source}::n02/b.PNG"


def test_sidecars_that_are_wrong_cost_nothing_but_themselves(tmp_path: Path) -> None:
    entries = [
        ("a.jpg", b"A"), ("a.json", b"{"),
        ("b.jpg", b"B"), ("b.json", b"[" * 100_000),
        ("c.jpg", b"C"), ("c.txt", b"\xff" + b"x" * (1 << 20)), ("c.cls", b"cat"),
        ("d.jpg", b"D"), ("d.json", json.dumps({"url": SIGNED, "deep": [{"of": f"see {SIGNED}"}]}).encode()),
        ("e.jpg", b"E"), ("e.json", b'{"half": "\\ud800"}'),
    ]  # fmt: skip
    candidates = read(tar(tmp_path / "a.tar", entries), tmp_path / "work")
    assert b"".join(one.data or b"" for one in candidates) == b"ABCDE"
    broken, deep, large, signed, half = (one.meta for one in candidates)
    assert broken == deep == {"sidecar_problem": "json: is none"}
    assert large == {"cls": "cat", "sidecar_problem": "txt: larger than 1 MiB"}
    assert signed == {"url": "https://host/a.jpg?...", "deep": [{"of": "see https://host/a.jpg?..."}]}
    assert half == {"half": "\\ud800"}


def img2dataset(folder: Path) -> None:
    """A folder as img2dataset writes it, in its webdataset format: report, statistics, and PAX times for each member."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir()
    rows = []
    with tarfile.open(folder / "00000.tar", "w", format=tarfile.PAX_FORMAT) as file:
        for number in range(5):
            key, failed = f"{number:09d}", number == 3
            about = {"caption": f"caption {number}", "url": f"http://host/{number}.jpg?sig=canary", "key": key,
                     "status": "failed_to_download" if failed else "success",
                     "error_message": "HTTP Error 404: Not Found" if failed else None}  # fmt: skip
            rows.append(about)
            if failed:
                continue
            for suffix, data in (("jpg", b"J%d" % number), ("json", json.dumps(about, indent=4).encode()),
                                 ("txt", f"caption {number}".encode())):  # fmt: skip
                member = tarfile.TarInfo(f"{key}.{suffix}")
                member.size, member.mtime = len(data), 1_700_000_000.25  # type: ignore[assignment]
                file.addfile(member, io.BytesIO(data))
    pq.write_table(pa.Table.from_pylist(rows), folder / "00000.parquet")
    (folder / "00000_stats.json").write_text("{}")


def test_a_folder_of_img2dataset_is_its_tars_and_nothing_is_fetched_again(tmp_path: Path) -> None:
    img2dataset(tmp_path / "out")
    found = plan([tmp_path / "out"], tmp_path / "work")
    candidates = list(read_unit(found.unit(0), tmp_path / "work"))
    assert [one.data for one in candidates] == [b"J0", b"J1", b"J2", b"J4"]
    assert candidates[3].meta["caption"] == "caption 4"
    assert candidates[3].meta["key"] == "000000004"
    assert "canary" not in repr(candidates)
    assert found.passed == {"img2dataset's reports on its shards": 1, "files of other kinds": 1}
    again = plan([tmp_path / "out" / "00000.parquet"], tmp_path / "urls")  # named by itself, it is a list
    assert again.unit(0).kind == "urls"
    assert again.inputs == 5


def test_names_are_only_names(tmp_path: Path) -> None:
    names = ["../../etc/x.jpg", "/etc/passwd.jpg", "a/../b.jpg", "CON.jpg", "a\nb.jpg", "-rf.jpg"]
    links = {"evil.jpg": tarfile.SYMTYPE, "hard.jpg": tarfile.LNKTYPE, "dev.jpg": tarfile.CHRTYPE}
    source = tar(tmp_path / "a.tar", [(name, name.encode()) for name in names], "gnu", links)
    before = sorted(tmp_path.rglob("*"))
    found = plan([source], tmp_path / "work")
    candidates = list(read_unit(found.unit(0), tmp_path / "work"))
    assert [one.data for one in candidates] == [name.encode() for name in names]
    assert [one.labels for one in candidates[:3]] == [("etc",), ("etc",), ("a",)]
    assert found.passed["names that are absolute or hold `..`, used as keys alone"] == 3
    assert sum(count for kind, count in found.passed.items() if kind.endswith("in tars")) == 3
    assert [
        path
        for path in sorted(tmp_path.rglob("*"))
        if path.parts[: len(tmp_path.parts) + 1] != (tmp_path / "work").parts
    ] == before


@pytest.mark.parametrize("kind", list(FORMATS))
def test_cut_anywhere_the_members_before_are_there_and_the_rest_is_told(tmp_path: Path, kind: str) -> None:
    long = "long-name-" * 6 + "/" + "long-name-" * 6  # takes a header of its own in two of the formats
    entries = [(f"{long}{number}.jpg", bytes([number]) * 700) for number in range(4)]
    whole = tar(tmp_path / "whole.tar", entries, kind)
    members, data = by_tarfile(whole), whole.read_bytes()
    end = members[-1][1] + 1024
    for size in range(512, end, 256):
        source, work = tmp_path / f"{size}.tar", tmp_path / f"work-{size}"
        source.write_bytes(data[:size])
        intact = [bytes([number]) * 700 for number, (_, at, length) in enumerate(members) if at + length <= size]
        if not intact:
            with pytest.raises(IngestError, match="cannot be taken in"):
                plan([source], work)
            continue
        candidates = read(source, work)
        assert [one.data for one in candidates] == [*intact, None]
        problem = candidates[-1].problem
        assert problem is not None
        assert problem[0] is Outcome.UNREADABLE
        assert "cut short" in problem[1] or "does not fit" in problem[1]


def header(name: str, size: int, kind: bytes = b"0") -> bytes:
    member = tarfile.TarInfo(name)
    member.size, member.type = size, kind
    return member.tobuf(tarfile.GNU_FORMAT)


def pax(records: bytes, size: int | None = None) -> bytes:
    return header("PaxHeader", len(records) if size is None else size, b"x") + records + bytes(-len(records) % 512)


GOOD = header("a.jpg", 4) + b"good" + bytes(508)


@pytest.mark.parametrize(
    "bad",
    [
        pytest.param(header("b.jpg", 1 << 62), id="2^62 bytes"),
        pytest.param(header("b.jpg", 5000) + b"short" + bytes(507), id="more than there is"),
        pytest.param(pax(b"", 1 << 40), id="a PAX header of a terabyte"),
        pytest.param(pax(b"30 path=" + b"x" * 21 + b"\n" + b"9" * 20 + b" a=b\n"), id="a PAX record beyond its header"),
        pytest.param(pax(b"2 " * 600_000), id="a PAX header of many lies"),
        pytest.param(pax(b"28 size=4611686018427387904\n") + header("b.jpg", 1) + bytes(512), id="a PAX size of 2^62"),
        pytest.param(header("././@LongLink", 1 << 30, b"L") + bytes(1024), id="a long name of a gigabyte"),
        pytest.param(header("b.jpg", 4)[:148] + b"0000000\0" + header("b.jpg", 4)[156:] + bytes(512), id="checksum"),
        pytest.param(b"\xff" * 512 + bytes(512), id="no header"),
    ],
)
def test_lying_headers_are_told_and_not_believed(tmp_path: Path, bad: bytes) -> None:
    (tmp_path / "a.tar").write_bytes(GOOD + bad + bytes(1024))
    tracemalloc.start()
    try:
        candidates = read(tmp_path / "a.tar", tmp_path / "work")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert [one.data for one in candidates] == [b"good", None]
    assert candidates[1].problem is not None
    assert candidates[1].problem[0] is Outcome.UNREADABLE
    assert peak < 32 << 20


def test_a_member_too_large_is_told_and_not_read(tmp_path: Path) -> None:
    source = tmp_path / "a.tar"
    with source.open("wb") as file:
        file.write(GOOD + header("huge.png", 300 << 20))
        file.seek(300 << 20, io.SEEK_CUR)  # a hole: nothing of it is on the disk
        file.write(GOOD + bytes(1024))
    tracemalloc.start()
    try:
        candidates = read(source, tmp_path / "work")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert [one.data for one in candidates] == [b"good", None, b"good"]
    assert candidates[1].problem == (Outcome.TOO_LARGE, f"{300 << 20} bytes, more than 256 MiB")
    assert peak < 32 << 20


def test_a_tar_that_is_replaced_or_gone(tmp_path: Path) -> None:
    source, work = tar(tmp_path / "a.tar", [("a.jpg", b"A"), ("b.jpg", b"B")]), tmp_path / "work"
    found = plan([source], work)
    tar(tmp_path / "a.tar", [("c.jpg", b"C" * 600), ("d.jpg", b"D")])
    said = "the tar was replaced since its members were listed"
    assert [one.problem for one in read_unit(found.unit(0), work)] == [(Outcome.UNREADABLE, said)] * 2
    source.unlink()
    assert [one.problem for one in read_unit(found.unit(0), work)] == [
        (Outcome.UNREADABLE, "No such file or directory")
    ] * 2


def test_a_pattern_stands_for_many_tars(tmp_path: Path) -> None:
    for number in range(3):
        tar(tmp_path / f"x-{number:03d}.tar", [("a.jpg", b"%d" % number)])
    work = tmp_path / "work"
    found = plan([f"{tmp_path}/x-{{000..002}}.tar"], work)
    assert [one.data for n in range(len(found)) for one in read_unit(found.unit(n), work)] == [b"0", b"1", b"2"]
