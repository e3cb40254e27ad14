"""The tar index against `tarfile`: the same places for the same files, and no damage that goes unseen."""

import functools
import io
import tarfile
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from gristmill.shards import index
from gristmill.shards.index import ShardError, index_shard, members, sample_shard
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from .tars import FORMATS, by_tarfile, tar

# A tar's names are bytes; these are text without NUL, and no name is empty or ends as a folder.
letters = st.characters(exclude_characters="\0/", exclude_categories=["Cs"])
parts = st.text(letters, min_size=1, max_size=12) | st.text("abcxyz", min_size=90, max_size=120)
files = st.lists(
    st.tuples(st.lists(parts, min_size=1, max_size=3).map("/".join), st.binary(max_size=1500)), min_size=1, max_size=6
)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tars") / "shard.tar"


@settings(max_examples=100, deadline=None)
@given(files, st.sampled_from(sorted(FORMATS)))
def test_the_same_members_as_tarfile(scratch: Path, entries: list[tuple[str, bytes]], kind: str) -> None:
    try:
        tar(scratch, entries, kind)
    except ValueError:
        assume(False)  # ustar refuses names that do not fit
    assert members(scratch) == by_tarfile(scratch)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 10**6), st.sampled_from(["jpg", "JPEG", "png", "webp"])),
        min_size=1,
        max_size=20,
        unique_by=lambda pair: pair[0],
    ),
    st.sampled_from(sorted(FORMATS)),
    st.booleans(),
)
def test_the_same_samples_as_webdataset(scratch: Path, named: list, kind: str, long: bool) -> None:
    from webdataset.tariterators import group_by_keys, tar_file_iterator

    entries = []
    for number, suffix in named:
        key = f"{'long/' * 40 if long and kind != 'ustar' else 'a.b/'}{number}"
        entries += [(f"{key}.json", b"{}"), (f"{key}.{suffix}", bytes([number % 256]) * (number % 700))]
    tar(scratch, entries, kind)
    with scratch.open("rb") as file:
        expected = list(group_by_keys({**entry, "__url__": ""} for entry in tar_file_iterator(file)))  # pyright: ignore
    rows = index_shard(scratch)
    assert rows.keys == [sample["__key__"] for sample in expected]
    data = scratch.read_bytes()
    for row, sample in enumerate(expected):
        suffix = named[row][1].lower()
        assert rows.format[row] == suffix.replace("jpeg", "jpg")
        assert data[rows.offset[row] : rows.offset[row] + rows.length[row]] == sample[suffix]


named_alike = st.sampled_from(
    ["{}.jpg", "{}.png", "a.{}.jpg", "{}.jpg.jpg", "d/{}.jpg", "__{}.jpg", ".{}.jpg", "{}jpg", "{}.txt"]
)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=8), named_alike, named_alike | st.none())
def test_shards_of_images_alone_are_read_the_same_quickly(
    scratch: Path, numbers: list[int], first: str, odd: str | None
) -> None:
    """The few passes for plain names against the loop for all names, where they may differ: at the edges of "plain"."""
    entries = [(first.format(number), b"x") for number in numbers]
    tar(scratch, entries if odd is None else [*entries[1:], (odd.format(numbers[0]), b"x")], "ustar")

    def outcome() -> object:
        try:
            found = sample_shard(scratch)
        except ShardError as error:
            return str(error)
        return found.rows.keys, found.rows.format, found.rows.offset.tolist(), list(found.images), found.counts

    quick = outcome()
    with mock.patch.object(index, "_images_alone", return_value=None):
        assert outcome() == quick


SAMPLES = [(f"{i:04d}.{'jpg' if i % 3 else 'png'}", bytes([i]) * (200 * i + 13)) for i in range(8)]


@functools.cache
def sound(path: Path, kind: str) -> tuple[bytes, list[tuple[int, int]]]:
    """A good tar's bytes, and its headers' places [(from, to)] with what belongs to them."""
    name = "folder/" * 30 if kind != "ustar" else ""
    tar(path, [(name + key, data) for key, data in SAMPLES], kind)
    starts = [0]
    with tarfile.open(path) as file:
        found = file.getmembers()
    starts += [member.offset_data + -(-member.size // 512) * 512 for member in found]
    return path.read_bytes(), [(start, member.offset_data) for start, member in zip(starts, found, strict=False)]


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(sorted(FORMATS)), st.data())
def test_no_flipped_bit_in_a_header_goes_unseen(scratch: Path, kind: str, draw: st.DataObject) -> None:
    data, headers = sound(scratch, kind)
    start, end = draw.draw(st.sampled_from(headers))
    block = draw.draw(st.integers(0, (end - start) // 512 - 1))
    kinds = data[start + 512 * block + 156 : start + 512 * block + 157]
    at = start + 512 * block + draw.draw(st.integers(0, 511))
    changed = bytearray(data)
    changed[at] ^= 1 << draw.draw(st.integers(0, 7))
    scratch.write_bytes(changed)
    is_header = block == 0 or block == (end - start) // 512 - 1 or kinds in b"0"
    found = attempt(scratch)
    if isinstance(found, ShardError):
        assert found.shard == scratch
        assert 0 <= found.offset <= len(data)
        assert str(found).startswith(f"{scratch}, byte {found.offset}:")
        return
    good = members_of(data, scratch.with_suffix(".good"))
    # The only bits that no checksum covers are those of a long name, of the padding after it, and of a checksum field's
    # own trailing blank: then all members must be there still, in their places.
    assert [place[1:] for place in found] == [place[1:] for place in good]
    if is_header:
        assert found == good
        assert 148 <= (at - start) % 512 < 156


def attempt(path: Path) -> list[tuple[str, int, int]] | ShardError:
    try:
        return members(path)
    except ShardError as error:
        return error


def members_of(data: bytes, path: Path) -> list[tuple[str, int, int]]:
    path.write_bytes(data)
    return members(path)


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(sorted(FORMATS)), st.data())
def test_no_truncation_goes_unseen(scratch: Path, kind: str, draw: st.DataObject) -> None:
    data, headers = sound(scratch, kind)
    end = headers[-1][1] + -(-len(SAMPLES[-1][1]) // 512) * 512 + 512  # with one block of the end mark, all is there
    cuts = st.integers(0, end - 1) | st.sampled_from([start for start, _ in headers])
    cut = draw.draw(cuts)
    scratch.write_bytes(data[:cut])
    with pytest.raises(ShardError) as caught:
        index_shard(scratch)
    assert caught.value.shard == scratch
    assert 0 <= caught.value.offset <= cut


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=4096), st.integers(0, 8))
def test_junk_is_an_error_and_never_a_crash(scratch: Path, junk: bytes, whole: int) -> None:
    data, headers = sound(scratch, "ustar")
    start = headers[whole][0] if whole < len(headers) else len(data)
    scratch.write_bytes(data[:start] + junk + data[start + len(junk) :])
    found = attempt(scratch)
    if isinstance(found, ShardError):
        assert found.offset <= len(data) + len(junk)
    else:
        assert found[:whole] == members_of(data, scratch.with_suffix(".good"))[:whole]


def test_a_first_bad_header_is_the_one_named(tmp_path: Path) -> None:
    data, headers = sound(tmp_path / "shard.tar", "ustar")
    changed = bytearray(data)
    changed[headers[3][0] + 130] ^= 1  # a digit of the size: the walk goes astray from there
    changed[headers[6][0]] ^= 1
    (tmp_path / "shard.tar").write_bytes(changed)
    with pytest.raises(ShardError, match=f"byte {headers[3][0]}: damaged header"):
        index_shard(tmp_path / "shard.tar")


def test_a_header_turned_to_zeros_is_no_end(tmp_path: Path) -> None:
    data, headers = sound(tmp_path / "shard.tar", "ustar")
    start, end = headers[4]
    (tmp_path / "shard.tar").write_bytes(data[:start] + bytes(end - start) + data[end:])
    assert len(by_tarfile(tmp_path / "shard.tar")) == 4  # without a word
    with pytest.raises(ShardError, match="data after the end mark"):
        index_shard(tmp_path / "shard.tar")


def test_entries_that_are_no_samples_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "shard.tar"
    with tarfile.open(path, "w") as file:
        for name, kind in (("folder", tarfile.DIRTYPE), ("a.jpg", tarfile.SYMTYPE), ("b.jpg", tarfile.LNKTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "x"
            file.addfile(member)
    tar(tmp_path / "none.tar", [("__meta__/x.jpg", b"1"), ("README", b"1"), (".jpg", b"1"), ("only.json", b"{}")])
    for empty in (path, tmp_path / "none.tar"):
        with pytest.raises(ShardError, match="no sample with an image"):
            index_shard(empty)


def test_of_several_images_one_is_taken(tmp_path: Path) -> None:
    entries = [
        ("a.png", b"p"),
        ("a.jpg", b"j"),
        ("a.mask.png", b"m"),
        ("b.webp", b"w"),
        ("b.png", b"q"),
        ("c.txt", b""),
    ]
    rows = index_shard(tar(tmp_path / "shard.tar", entries))
    assert list(zip(rows.keys, rows.format, strict=True)) == [("a", "jpg"), ("b", "png")]
    assert not rows.deep
    assert rows.crc32.dtype == np.uint32


def test_a_doubled_member_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="sample 'a' has two members 'jpg'"):
        index_shard(tar(tmp_path / "shard.tar", [("a.jpg", b"1"), ("a.JPG", b"2")]))


@pytest.mark.parametrize("mode", ["gz", "bz2", "xz"])
def test_a_compressed_shard_is_refused_with_the_reason(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "shard.tar"
    with tarfile.open(path, f"w:{mode}"):  # type: ignore[call-overload]
        pass
    with pytest.raises(ShardError, match=r"compressed with .*unpack it"):
        index_shard(path)


def test_large_and_old_numbers(tmp_path: Path) -> None:
    path = tar(tmp_path / "shard.tar", [("a.jpg", b"x" * 600), ("b.jpg", b"y")], "gnu")
    data = bytearray(path.read_bytes())
    data[124:136] = b"\x80" + (600).to_bytes(11, "big")  # base 256, as GNU writes sizes over 8 GiB
    data[148:156] = b"        "
    data[148:156] = b"%06o\0 " % sum(data[:512])
    path.write_bytes(data)
    assert members(path) == [("a.jpg", 512, 600), ("b.jpg", 2048, 1)]
    data[124:136] = b"       1130 "  # blanks, as tars of the 1970s
    data[148:156] = b"        "
    data[148:156] = b"%6o\0 " % sum(data[:512])
    path.write_bytes(data)
    assert members(path) == [("a.jpg", 512, 600), ("b.jpg", 2048, 1)]


def test_a_size_in_a_pax_header_wins(tmp_path: Path) -> None:
    path = tmp_path / "shard.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as file:
        member = tarfile.TarInfo("a.jpg")
        member.size, member.pax_headers = 700, {"size": "700", "comment": "two\nlines"}
        file.addfile(member, io.BytesIO(b"z" * 700))
    assert members(path) == by_tarfile(path)


def test_missing_and_empty_files(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="cannot be opened"):
        index_shard(tmp_path / "nowhere.tar")
    with pytest.raises(ShardError, match="not a regular file"):
        index_shard(tmp_path)
    (tmp_path / "empty.tar").touch()
    with pytest.raises(ShardError, match="is empty"):
        index_shard(tmp_path / "empty.tar")
