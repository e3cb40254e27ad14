"""The walk over a tar's headers: equal to `tarfile` on whatever a writer makes, and no damage that goes unseen."""

import os
import subprocess
import tarfile
import threading
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gristmill.shards.archive import Members, ShardError, scan
from gristmill.shards.blob import LocalBlob
from gristmill.shards.headers import checksums_agree, name, names
from hypothesis import example, given, settings
from hypothesis import strategies as st

from .tars import FORMATS, by_tarfile

KINDS = [
    tarfile.REGTYPE,
    tarfile.AREGTYPE,
    tarfile.CONTTYPE,
    tarfile.DIRTYPE,
    tarfile.SYMTYPE,
    tarfile.LNKTYPE,
    tarfile.FIFOTYPE,
    tarfile.CHRTYPE,
    tarfile.BLKTYPE,
    b"V",  # GNU: a volume's name
    b"Z",  # nobody's
]
WITH_DATA = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE, b"V", b"Z")
part = st.text(st.characters(exclude_characters="\0/", exclude_categories=["Cs"]), min_size=1, max_size=8)
long_part = st.text("ab.", min_size=95, max_size=160).map(lambda text: "x" + text)
path = st.lists(part | long_part | st.just(".."), min_size=1, max_size=4).map("/".join)
entry = st.tuples(
    path, st.sampled_from(KINDS), st.sampled_from([*FORMATS.values()]), st.binary(max_size=1200), st.booleans()
)


def block(entry_name: str, kind: bytes, form: Any, data: bytes, pax: dict[str, str] | None = None) -> bytes:
    """One member as `tarfile` writes it, header, data and padding; ValueError where its format cannot hold it."""
    member = tarfile.TarInfo(entry_name)
    member.type, member.linkname = kind, "a.jpg" if kind in (tarfile.SYMTYPE, tarfile.LNKTYPE) else ""
    data = data if kind in WITH_DATA else b""
    member.size = len(data)
    member.pax_headers = pax or {}
    return member.tobuf(form, "utf-8", "strict") + data + bytes(-len(data) % 512)


def triples(found: Members) -> list[tuple[str, int, int]]:
    return list(zip(found.names, found.offsets.tolist(), found.lengths.tolist(), strict=True))


def attempt(place: Path) -> list[tuple[str, int, int]] | ShardError:
    try:
        return triples(scan(place))
    except ShardError as error:
        return error


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tars") / "shard.tar"


@settings(max_examples=80, deadline=None)
@given(entries=st.lists(entry, max_size=8))
@example(entries=[("x" * 99 + "/../0", tarfile.AREGTYPE, tarfile.GNU_FORMAT, b"data of a file", False)])
@example(entries=[("folder/", tarfile.AREGTYPE, tarfile.USTAR_FORMAT, b"data of a folder", False)])
def test_the_members_of_mixed_formats_and_kinds(shard: Path, entries: list) -> None:
    parts = []
    for called, kind, form, data, sized in entries:
        pax = {"size": str(len(data)), "comment": "x=1\n2"} if sized and form == tarfile.PAX_FORMAT else None
        try:
            if kind in WITH_DATA:
                parts.append(block(called, kind, form, data, pax))
            else:
                parts.append(block(called, kind, form, data))
        except ValueError:  # ustar refuses names that do not fit
            continue
    shard.write_bytes(b"".join(parts) + bytes(1024))
    if entries and any(kind == tarfile.AREGTYPE and called.endswith("/") for called, kind, *_ in entries):
        with pytest.raises(ShardError):  # a folder with data: `tarfile` takes the data for a header, and stops there
            scan(shard)
        return
    cut = [called.encode()[:100] for called, kind, *_ in entries if kind == tarfile.AREGTYPE]
    if any(name.endswith(b"/") for name in cut):  # what the header has of a long name looks like such a folder's
        found = attempt(shard)
        assert isinstance(found, ShardError) or found == by_tarfile(shard)
        return
    assert triples(scan(shard)) == by_tarfile(shard)


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 20_000) | st.integers(0, 600), min_size=1, max_size=200),
    leap=st.sampled_from([1, 512, 4096, 1 << 20]),
)
def test_how_far_it_reads_ahead_changes_nothing(shard: Path, sizes: list[int], leap: int) -> None:
    class Counted(LocalBlob):
        asked = 0

        def read(self, offset: int, length: int) -> bytes:
            self.asked += length
            assert offset + length <= self.size()
            return super().read(offset, length)

    with shard.open("wb") as file:
        for number, size in enumerate(sizes):
            file.write(block(f"{number}.bin", tarfile.REGTYPE, tarfile.USTAR_FORMAT, bytes([7]) * size))
        file.write(bytes(1024))
    with Counted(shard) as blob:
        blob.leap = leap
        found = scan(blob)
        assert triples(found) == by_tarfile(shard)
        assert found.size == shard.stat().st_size
        assert found.identity == blob.identity()
        if leap == 1:  # nothing is worth reading on over: headers alone, and the end mark once more
            assert blob.asked <= 512 * (len(sizes) + 3) + 1024


def test_data_is_not_read(tmp_path: Path) -> None:
    """A tar of 40 GB is indexed at once; its data are holes, which nobody could read in the time."""
    place = tmp_path / "large.tar"
    offset = 0
    with place.open("wb") as file:
        for number in range(20):
            member = tarfile.TarInfo(f"{number}.jpg")
            member.size = 2_000_000_000
            header = member.tobuf(tarfile.USTAR_FORMAT)
            os.pwrite(file.fileno(), header, offset)
            offset += len(header) + -(-member.size // 512) * 512
        os.ftruncate(file.fileno(), offset + 10_240)
    found = scan(place)
    assert found.lengths.tolist() == [2_000_000_000] * 20
    assert found.offsets[-1] == offset - -(-2_000_000_000 // 512) * 512


def five(form: Any) -> list[bytes]:
    """Files of 0 to 1200 bytes, their names as long as the format has a special way for."""
    prefix = "" if form == tarfile.USTAR_FORMAT else "deep/" * 30
    return [block(f"{prefix}{i}.jpg", tarfile.REGTYPE, form, bytes([i + 1]) * (300 * i)) for i in range(5)]


@settings(max_examples=120, deadline=None)
@given(data=st.data())
def test_flipped_bytes_are_seen_or_harmless(shard: Path, data: st.DataObject) -> None:
    """Anywhere in a header, long name or PAX record: what `tarfile` finds in the whole tar, or an error that says where."""
    form = data.draw(st.sampled_from([*FORMATS.values()]))
    blocks = five(form)
    whole = b"".join(blocks) + bytes(1024)
    shard.write_bytes(whole)
    truth = by_tarfile(shard)
    starts = np.cumsum([0, *map(len, blocks)])
    which = data.draw(st.integers(0, 4))
    header_end = truth[which][1]
    changed = bytearray(whole)
    flips = data.draw(st.integers(1, 3))
    for _ in range(flips):
        at = data.draw(st.integers(int(starts[which]), header_end - 1))
        changed[at] ^= data.draw(st.integers(1, 255))
    shard.write_bytes(changed)
    found = attempt(shard)
    if isinstance(found, ShardError):
        assert 0 <= found.offset <= len(whole)
        assert str(found).startswith(f"{shard}, byte {found.offset}: ")
        return
    # No checksum covers a long name, a PAX record or their padding: a letter may change there, but nothing gets lost.
    assert [(offset, length) for _, offset, length in found] == [(offset, length) for _, offset, length in truth]
    touched = [here[0] != there[0] for here, there in zip(found, truth, strict=True)]
    assert sum(touched) <= 1
    assert not any(touched[:which] + touched[which + 1 :])
    # The checksum is a sum of bytes: one flip cannot hide from it, two may cancel out.
    assert not (form == tarfile.USTAR_FORMAT and flips == 1 and any(touched))


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_a_cut_anywhere_is_seen(shard: Path, data: st.DataObject) -> None:
    form = data.draw(st.sampled_from([*FORMATS.values()]))
    blocks = five(form)
    whole = b"".join(blocks) + bytes(512)  # one block of zeros is an end mark
    starts = np.cumsum([0, *map(len, blocks)]).tolist()
    near = st.sampled_from(starts).flatmap(lambda start: st.integers(max(0, start - 2), start + 2))
    cut = data.draw(st.integers(0, len(whole) - 1) | near)
    shard.write_bytes(whole[: min(cut, len(whole) - 1)])
    with pytest.raises(ShardError) as caught:
        scan(shard)
    assert 0 <= caught.value.offset <= cut


def forged(**fields: bytes) -> bytes:
    """A header with these bytes at these fields, and a checksum that agrees."""
    places = {"name": 0, "size": 124, "kind": 156, "magic": 257, "prefix": 345, "checksum": 148}
    header = bytearray(tarfile.TarInfo("a.jpg").tobuf(tarfile.USTAR_FORMAT))
    for field, value in fields.items():
        header[places[field] : places[field] + len(value)] = value
    if "checksum" not in fields:
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


CLAIMS = [
    b"77777777777\0",  # 8 GiB
    b"\x80" + b"\0" * 3 + b"\xff" * 8,  # 16 EiB
    b"\x80" + b"\xff" * 11,
    b"\xff" * 12,  # base 256, -1
    b"\xff" + b"\0" * 11,
    b"-0000000512\0",
    b"0000000x000\0",
    b"9999999999 \0",
    b"\x81" + b"\0" * 11,
]


@pytest.mark.parametrize("claim", CLAIMS, ids=range(len(CLAIMS)))
@pytest.mark.parametrize("kind", [b"0", b"x", b"g", b"L", b"K", b"S", b"7", b"V"])
def test_claims_of_size_are_not_believed(tmp_path: Path, claim: bytes, kind: bytes) -> None:
    place = tmp_path / "shard.tar"
    sound = block("ok.jpg", tarfile.REGTYPE, tarfile.USTAR_FORMAT, b"x" * 700)
    place.write_bytes(sound + forged(size=claim, kind=kind) + bytes(2048))
    tracemalloc.start()
    try:
        with pytest.raises(ShardError) as caught:
            scan(place)
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()
    assert caught.value.offset == len(sound)


def pax(body: bytes, kind: bytes = b"x") -> bytes:
    return forged(kind=kind, size=b"%011o\0" % len(body)) + body + bytes(-len(body) % 512)


@pytest.mark.parametrize(
    "body",
    [
        b"20 size=-1\n",
        b"12 size=-51\n",
        b"21 size=99999999999\n\n",
        b"30 size=%s\n" % (b"9" * 21),
        b"5008 size=%s\n" % (b"9" * 4997),  # more digits than Python turns into a number
        b"0 path=x\n",
        b"999999 path=x\n",
        b"path=x\n",
        b"9 path=xy",
        "11 size=\u0662\n".encode(),  # a digit, but none of ours
        b"\xff" * 40,
    ],
)
def test_pax_records_that_lie(tmp_path: Path, body: bytes) -> None:
    place = tmp_path / "shard.tar"
    place.write_bytes(pax(body) + block("a.jpg", tarfile.REGTYPE, tarfile.USTAR_FORMAT, b"x") + bytes(1024))
    with pytest.raises(ShardError, match=r"PAX|cut short"):
        scan(place)


def test_where_several_headers_name_one_member_the_first_counts(tmp_path: Path) -> None:
    place = tmp_path / "shard.tar"
    plain = block("plain.jpg", tarfile.REGTYPE, tarfile.USTAR_FORMAT, b"x" * 600)
    gnu = forged(kind=b"L", size=b"%011o\0" % 9) + b"gnu.jpg\0x" + bytes(503)
    first, second = pax(b"17 path=one.jpg/\n"), pax(b"16 path=two.jpg\n")
    for headers in ([first, second], [gnu, first], [first, gnu], [gnu], [first], [second, second, gnu]):
        place.write_bytes(b"".join(headers) + plain * 2 + bytes(1024))
        assert triples(scan(place)) == by_tarfile(place)
    place.write_bytes(pax(b"16 path=all.jpg\n", b"g") + plain + second + plain + bytes(1024))
    assert triples(scan(place)) == by_tarfile(place)
    place.write_bytes(pax(b"12 size=600\n", b"g") + plain + bytes(1024))
    with pytest.raises(ShardError, match="global PAX header"):
        scan(place)
    place.write_bytes(first + bytes(1024))
    with pytest.raises(ShardError, match="long name without its member"):
        scan(place)


@pytest.mark.parametrize(
    "form", ["gnu", "pax --sparse-version=0.0", "pax --sparse-version=0.1", "pax --sparse-version=1.0"]
)
def test_sparse_files_are_refused(tmp_path: Path, form: str) -> None:
    with (tmp_path / "a.jpg").open("wb") as file:
        file.write(b"x" * 4096)
        file.seek(1 << 20)
        file.write(b"y" * 4096)
    command = ["tar", "-cS", *f"--format={form}".split(), "-f", "shard.tar", "a.jpg"]
    subprocess.run(command, cwd=tmp_path, check=True)
    with pytest.raises(ShardError, match="a sparse file"):
        scan(tmp_path / "shard.tar")


@pytest.mark.parametrize("packer", ["gzip", "bzip2", "xz", "zstd"])
def test_compressed_tars_are_refused_by_what_they_are(tmp_path: Path, packer: str) -> None:
    place = tmp_path / "shard.tar"
    plain = block("a.jpg", tarfile.REGTYPE, tarfile.USTAR_FORMAT, b"x") + bytes(1024)
    if packer == "zstd":
        import pyarrow as pa

        place.write_bytes(pa.compress(plain, "zstd", asbytes=True))
    else:
        with tarfile.open(place, "w:" + {"gzip": "gz", "bzip2": "bz2", "xz": "xz"}[packer]):  # type: ignore[call-overload]
            pass
    with pytest.raises(ShardError, match=f"compressed with {packer}; unpack it"):
        scan(place)


def test_a_name_may_begin_like_a_compressed_file(tmp_path: Path) -> None:
    place = tmp_path / "shard.tar"
    place.write_bytes(block("BZh.jpg", tarfile.REGTYPE, tarfile.USTAR_FORMAT, b"x") + bytes(1024))
    assert scan(place).names == ["BZh.jpg"]


def test_a_pipe_in_a_shards_place_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "shard.tar")
    with pytest.raises(ShardError, match="not a regular file"):
        scan(tmp_path / "shard.tar")


def test_a_shard_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    place = tmp_path / "shard.tar"
    one = block("a.jpg", tarfile.REGTYPE, tarfile.USTAR_FORMAT, b"x" * 600)
    place.write_bytes(one * 50 + bytes(1024))
    with LocalBlob(place) as blob:
        blob.leap = 1

        class Shrinking:
            url, leap, size, identity = blob.url, 1, staticmethod(blob.size), staticmethod(blob.identity)

            def read(self, offset: int, length: int) -> bytes:
                if offset > 20_000:
                    os.truncate(place, 10_000)
                return blob.read(offset, length)

        with pytest.raises(ShardError, match="cut short"):
            scan(Shrinking())


def test_threads_may_share_a_blob(tmp_path: Path) -> None:
    place = tmp_path / "shard.tar"
    with place.open("wb") as file:
        for number in range(500):
            file.write(block(f"{number}.jpg", tarfile.REGTYPE, tarfile.USTAR_FORMAT, b"x" * number))
        file.write(bytes(1024))
    truth, found = by_tarfile(place), []
    with LocalBlob(place) as blob:
        threads = [threading.Thread(target=lambda: found.append(triples(scan(blob)))) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == [truth] * 4


fields = st.binary(max_size=100) | st.text("ab/\0\u00e9", max_size=40).map(str.encode)
checksums = st.sampled_from([b"%06o\0 ", b"%07o\0", b"%6o\0 ", b"%06o  ", b"%08o"])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(fields, fields, st.booleans(), checksums, st.integers(0, 2)), min_size=1, max_size=6))
def test_batches_are_read_as_single_headers_are(drawn: list[tuple[bytes, bytes, bool, bytes, int]]) -> None:
    headers = []
    for called, prefix, posix, written, wrong in drawn:
        header = bytearray(forged(magic=b"ustar\x0000" if posix else b"ustar  \0", prefix=prefix))
        header[:100] = called.ljust(100, b"\0")
        unsigned, signed = tarfile.calc_chksums(bytes(header))
        if wrong < 2 or signed > 0:
            header[148:156] = (written % (unsigned if wrong < 2 else signed)).ljust(8, b" ")
        header[500] ^= wrong == 1
        headers.append(bytes(header))
    blocks = np.frombuffer(b"".join(headers), np.uint8).reshape(-1, 512)
    assert names(blocks) == [name(header) for header in headers]
    truth = [tarfile.nti(header[148:156]) in tarfile.calc_chksums(header) for header in headers]  # type: ignore[attr-defined]
    assert checksums_agree(blocks).tolist() == truth


def test_a_whole_tar_with_nothing_in_it(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "shard.tar", "w"):
        pass
    assert len(scan(tmp_path / "shard.tar")) == 0
