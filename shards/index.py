"""Where the images lie in a tar: an index from its headers alone, without reading what lies between them.

Any WebDataset tar will do: ustar, GNU long names, PAX. `tarfile` and with it the webdataset library stop without a word
at a bad header in the middle and at a cut between two members; here both are errors that name the shard and the offset.
Headers are fetched by `pread` (a mapped file that shrinks would kill the process) and their checksums are verified
together at the end, as one NumPy sum; a wrong one that sent the walk astray is still the first that is found.
Samples are grouped as webdataset groups them: neighbours whose names agree up to the first dot.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np

from .errors import GristmillError
from .manifest import Rows

BLOCK = 512
IMAGES = {"jpg": 0, "jpeg": 1, "png": 2, "webp": 3}  # the order of preference where a sample has several
_REMEDY = "restore the shard from its source, or remove it and make the data set again"
_PACKED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_REGULAR, _DATALESS = b"0\07", b"123456"  # tarfile's view: links, devices, folders and pipes have no data
_META = re.compile(r"__[^/]*__($|/)")  # webdataset's own entries
_LONGEST = 1 << 20  # of a long name or a PAX header
_ZERO = bytes(BLOCK)


class ShardError(GristmillError):
    """A tar that cannot be indexed. `shard` is its path, `offset` the byte at which the trouble was seen."""

    def __init__(self, shard: Path, offset: int, problem: str, remedy: str = _REMEDY) -> None:
        super().__init__(f"{shard}, byte {offset}: {problem}; {remedy}")
        self.shard, self.offset, self.problem = shard, offset, problem


def index_shard(path: str | Path) -> Rows:
    """The samples of a tar that hold an image, in order; `crc32`, `width` and `height` are left at zero.

    Members without an image beside them, and webdataset's own `__meta__` entries, are no samples. Raises ShardError for
    anything that is not a whole, plain tar with at least one image.
    """
    path = Path(path)
    keys: list[str] = []
    formats: list[str] = []
    places: list[tuple[int, int]] = []
    current, suffixes, rank = None, set(), len(IMAGES)
    for name, offset, length in members(path):
        folder, slash, base = name.rpartition("/")
        stem, dot, suffix = base.partition(".")
        if not dot or not stem or (name.startswith("__") and _META.match(name)):
            continue
        key, suffix = folder + slash + stem, suffix.lower()
        if key != current:
            current, suffixes, rank = key, set(), len(IMAGES)
        if suffix in suffixes:
            raise ShardError(path, offset, f"sample {key!r} has two members {suffix!r}")
        suffixes.add(suffix)
        better = IMAGES.get(suffix, len(IMAGES))
        if better < rank:
            if rank < len(IMAGES):  # the sample has an image already, but this one goes before it
                del keys[-1], formats[-1], places[-1]
            rank = better
            keys.append(key)
            formats.append("jpg" if suffix == "jpeg" else suffix)
            places.append((offset, length))
    if not keys:
        looked = ", ".join(IMAGES)
        raise ShardError(path, 0, f"no sample with an image (looked for {looked})", "leave it out of the data set")
    n = len(keys)
    table = np.array(places, np.int64).reshape(n, 2)
    return Rows(
        keys=keys,
        offset=np.ascontiguousarray(table[:, 0]),
        length=np.ascontiguousarray(table[:, 1]),
        crc32=np.zeros(n, np.uint32),
        width=np.zeros(n, np.int32),
        height=np.zeros(n, np.int32),
        format=formats,
        deep=False,
    )


def members(path: Path) -> list[tuple[str, int, int]]:
    """All regular files of a tar, in order: name, offset and length of the bytes. Raises ShardError."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise ShardError(path, 0, f"cannot be opened ({error.strerror})") from error
    try:
        return _Walk(path, handle).run()
    except OSError as error:
        raise ShardError(path, 0, f"cannot be read ({error.strerror})") from error
    finally:
        os.close(handle)


class _Walk:
    """One pass over the headers of an open tar."""

    def __init__(self, path: Path, handle: int) -> None:
        self.path, self.handle = path, handle
        self.size = os.fstat(handle).st_size
        self._start, self._window = 0, b""
        self._ahead = BLOCK
        self.found: list[tuple[str, int, int]] = []
        self.headers: list[bytes] = []
        self.offsets: list[int] = []

    def fail(self, offset: int, problem: str) -> ShardError:
        """The error to raise: that of an earlier header with a wrong checksum, if there is one."""
        if self.headers:
            blocks = np.frombuffer(b"".join(self.headers), np.uint8).reshape(-1, BLOCK)
            bad = np.flatnonzero(~_checksums_agree(blocks))
            if len(bad):
                offset, problem = self.offsets[bad[0]], "damaged header (its checksum is wrong)"
        return ShardError(self.path, min(offset, self.size), problem)

    def read(self, offset: int, length: int) -> bytes:
        """Bytes [offset, offset + length), fewer at the end of the file."""
        at = offset - self._start
        if at < 0 or at + length > len(self._window):
            self._start, at = offset, 0
            self._window = os.pread(self.handle, max(length, self._ahead), offset)
        return self._window[at : at + length]

    def run(self) -> list[tuple[str, int, int]]:
        first = self.read(0, BLOCK)
        if not first:
            raise ShardError(self.path, 0, "the file is empty")
        for magic, name in _PACKED.items():
            if first.startswith(magic):
                remedy = "unpack it: samples in the middle of a compressed file cannot be reached"
                raise ShardError(self.path, 0, f"the shard is compressed with {name}", remedy)
        offset = 0
        names: dict[str, str] = {}  # from PAX, for the next member
        always: dict[str, str] = {}  # from a global PAX header
        while True:
            if not names and not always:
                offset = self._plain(offset)
            header = self.read(offset, BLOCK)
            if header == _ZERO:
                break
            if len(header) < BLOCK:
                raise self.fail(offset, "cut short: the shard ends without its end mark")
            self.headers.append(header)
            self.offsets.append(offset)
            kind, data = header[156:157], offset + BLOCK
            size = _number(header[124:136])
            if size is None or size < 0:
                raise self.fail(offset, "damaged header (no size)")
            if kind in b"xgXLK":
                if size > _LONGEST or data + size > self.size:
                    raise self.fail(offset, "damaged header (a long name that does not fit)")
                body = self.read(data, size)
                if len(body) < size:
                    raise self.fail(data, "cut short within a long name")
                if kind == b"L":
                    names["path"] = _text(body.partition(b"\0")[0])
                elif kind != b"K":
                    (always if kind == b"g" else names).update(self._pax(body, data))
                offset = data + _padded(size)
                continue
            pax, names = always | names, {}
            if kind == b"S" or any(key.startswith("GNU.sparse") for key in pax):
                raise self.fail(offset, "a sparse file, whose bytes do not lie in one piece")
            if "size" in pax:
                if not pax["size"].isascii() or not pax["size"].isdigit():
                    raise self.fail(offset, "damaged PAX header (no size)")
                size = int(pax["size"])
            regular = kind in _REGULAR
            name = pax["path"] if "path" in pax else _name(header)
            if kind == b"\0" and name.endswith("/"):  # a folder, as tars before 1988 wrote it
                regular = False
            end = data if kind in _DATALESS else data + _padded(size)
            if data + (end > data) * size > self.size:
                raise self.fail(offset, f"cut short: {name!r} should reach to byte {data + size} of {self.size}")
            if regular:
                self.found.append((name, data, size))
            self._ahead = 1 << 17 if size < 1 << 14 else BLOCK  # small members: many headers for one read
            offset = end
        if names:
            raise self.fail(offset, "cut short: a long name without its member")
        if self.headers:
            blocks = np.frombuffer(b"".join(self.headers), np.uint8).reshape(-1, BLOCK)
            if not _checksums_agree(blocks).all():
                raise self.fail(offset, "")
        self._only_zeros(offset)
        return self.found

    def _plain(self, offset: int) -> int:
        """The quick way over plain files whose headers were read already. Returns where it stopped: at any other case."""
        window, start, size_of_file = self._window, self._start, self.size
        while True:
            at = offset - start
            header = window[at : at + BLOCK] if at >= 0 else b""
            if len(header) < BLOCK or header[156] != 48:  # "0"
                return offset
            try:
                size = int(header[124:136].rstrip(b" \0"), 8)
            except ValueError:
                return offset
            data = offset + BLOCK
            if not 0 <= size <= size_of_file - data:
                return offset
            self.headers.append(header)
            self.offsets.append(offset)
            self.found.append((_name(header), data, size))
            self._ahead = 1 << 17 if size < 1 << 14 else BLOCK
            offset = data + (size + BLOCK - 1) // BLOCK * BLOCK

    def _only_zeros(self, offset: int) -> None:
        """What follows the end mark must be padding: more members there would be lost without a word."""
        while part := os.pread(self.handle, 1 << 20, offset):
            if part.count(0) != len(part):
                at = offset + int(np.flatnonzero(np.frombuffer(part, np.uint8))[0])
                raise self.fail(at, "data after the end mark (two tars in one file, or a header turned to zeros)")
            offset += len(part)

    def _pax(self, body: bytes, offset: int) -> dict[str, str]:
        """Records "<length> <key>=<value>\\n" of a PAX header."""
        records: dict[str, str] = {}
        at = 0
        while at < len(body):
            digits, space, _ = body[at : at + 20].partition(b" ")
            length = int(digits) if space and digits.isdigit() else 0
            record = body[at + len(digits) + 1 : at + length]
            key, equals, value = record.partition(b"=")
            if length <= len(digits) + 2 or at + length > len(body) or not record.endswith(b"\n") or not equals:
                raise self.fail(offset + at, "damaged PAX header")
            records[_text(key)] = _text(value[:-1])
            at += length
        return records


def _padded(size: int) -> int:
    return (size + BLOCK - 1) // BLOCK * BLOCK


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "backslashreplace")  # any bytes may be a name, but a key must be text


def _name(header: bytes) -> str:
    name = header[:100].partition(b"\0")[0]
    # Only POSIX has a prefix there; GNU keeps times in that place.
    if header[257:263] == b"ustar\0" and header[345]:
        name = header[345:500].partition(b"\0")[0] + b"/" + name
    return _text(name)


def _number(field: bytes) -> int | None:
    """A number of a header: octal digits, or base 256 after a set top bit (GNU)."""
    if field[0] & 0x80:
        return int.from_bytes(field[1:], "big") if field[0] == 0x80 else None
    digits = field.partition(b"\0")[0].strip()
    try:
        return int(digits or b"0", 8)
    except ValueError:
        return None


def _checksums_agree(blocks: np.ndarray) -> np.ndarray:
    """For headers [n, 512] uint8: does the sum of the bytes, the checksum itself read as spaces, agree with it? [n]."""
    outside = blocks.sum(axis=1, dtype=np.int64) - blocks[:, 148:156].sum(axis=1, dtype=np.int64) + 8 * 32
    # Some old writers summed signed bytes.
    signed = outside - 256 * ((blocks >= 128).sum(axis=1) - (blocks[:, 148:156] >= 128).sum(axis=1))
    digits = blocks[:, 148:154].astype(np.int64) - 48
    written = digits @ 8 ** np.arange(5, -1, -1)
    for row in np.flatnonzero(((digits < 0) | (digits > 7)).any(axis=1) | ~np.isin(blocks[:, 154], (0, 32))):
        written[row] = _number(blocks[row, 148:156].tobytes()) or 0
    return (written == outside) | (written == signed)
