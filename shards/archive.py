"""What lies where in a tar, from its headers alone: one walk over any blob, local or remote, that reads little else.

`tarfile` and with it the webdataset library stop without a word at a bad header in the middle and at a cut between two
members; here both are errors that name the shard and the offset. The walk goes from size to size in a short loop, and
checks and names a few thousand headers at a time as NumPy arrays; a wrong one that sent the walk astray is still the
first that is found. How far a read goes follows the members: where many headers lie within what a request costs, on over
the data, else the header alone. ustar, GNU and PAX; links and devices are counted and never followed; a sparse file,
whose bytes do not lie in one piece, is an error, as is all that cannot be told from damage.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from .blob import Blob, LocalBlob
from .errors import GristmillError
from .headers import BLOCK, DATALESS, KINDS, META, REGULAR, checksums_agree, name, names, number, padded, text

_REMEDY = "restore the shard from its source, or leave it out of the data set"
_PACKED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\0": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x04\x22\x4d\x18": "lz4",
    b"PK\x03\x04": "zip",
}
_LONGEST = 1 << 20  # of a long name or a PAX header
_PADDING = 1 << 30  # zeros after the end mark; tar itself writes 10 KiB, and a blocking factor some MiB
_BATCH = 1024  # headers checked at a time: so few that they stay in a core's cache
_ZERO = bytes(BLOCK)
_CLOSERS = frozenset(b"\0 ")
_TIMES = frozenset([b"mtime=", b"atime=", b"ctime="])


class ShardError(GristmillError):
    """A tar that cannot be indexed. `shard` is its path or url, `offset` the byte at which the trouble was seen."""

    def __init__(self, shard: str | Path, offset: int, problem: str, remedy: str = _REMEDY) -> None:
        super().__init__(f"{shard}, byte {offset}: {problem}; {remedy}")
        self.shard, self.offset, self.problem, self.remedy = shard, offset, problem, remedy


@dataclass
class Members:
    """The regular files of a tar, in order, n of them; `others` counts the rest by kind ("symbolic links", ...)."""

    names: list[str] = field(default_factory=list)
    offsets: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))  # int64 [n], of the first data byte
    lengths: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))  # int64 [n]
    others: Counter[str] = field(default_factory=Counter)
    size: int = 0  # of the whole tar
    identity: str = ""  # of the blob, before the first byte was read

    def __len__(self) -> int:
        return len(self.names)


def scan(source: Blob | str | Path) -> Members:
    """The members of a plain, whole tar. Raises ShardError for anything else; a remote blob's own errors pass through."""
    if not isinstance(source, (str, Path)):
        return _scan(source, source.url)
    with LocalBlob(source) as blob:
        return _scan(blob, source)


def _scan(blob: Blob, shard: str | Path) -> Members:
    try:
        identity, size = blob.identity(), blob.size()
    except OSError as error:
        raise ShardError(shard, 0, f"cannot be opened ({error.strerror})") from error
    try:
        found = _Walk(blob, shard, size).run()
    except OSError as error:
        raise ShardError(shard, 0, f"cannot be read ({error.strerror})") from error
    found.size, found.identity = size, identity
    return found


class _Walk:
    """One pass over the headers of a blob."""

    def __init__(self, blob: Blob, shard: str | Path, size: int) -> None:
        self.blob, self.shard, self.size = blob, shard, size
        self.leap: int = getattr(blob, "leap", 1 << 20)
        self._start, self._window = 0, b""
        # Of the batch: headers, where they lie, the length of their data (-1 where it is no regular file), and names
        # that are not in the header itself.
        self._headers: list[bytes] = []
        self._places: list[int] = []
        self._lengths: list[int] = []
        self._named: dict[int, str] = {}
        self._total = self._reads = 0
        self._often = False  # whether there are PAX headers, which take three blocks for a member
        self._names: list[str] = []
        self._tables: list[np.ndarray] = []
        self._others: Counter[str] = Counter()

    def fail(self, offset: int, problem: str) -> ShardError:
        """The error to raise: that of an earlier header with a wrong checksum, if there is one."""
        try:
            self._flush()
        except ShardError as earlier:
            return earlier
        return ShardError(self.shard, min(offset, self.size), problem)

    def read(self, offset: int, length: int) -> bytes:
        """Bytes [offset, offset + length), fewer at the end of the blob."""
        at = offset - self._start
        if at < 0 or at + length > len(self._window):
            self._start, at = offset, 0
            self._reads += 1
            wanted = max(length, self._ahead(offset))
            self._window = self.blob.read(offset, min(wanted, max(0, self.size - offset)))
        return self._window[at : at + length]

    def _ahead(self, offset: int) -> int:
        """How far to read on from a header: as far as headers have been found to lie so close that it pays."""
        count = self._total + len(self._headers)
        if count < 64:
            return min(self.leap, 1 << 16)
        if offset < count * self.leap:
            return max(1 << 17, 8 * self.leap)
        return BLOCK if self._reads * 10 > count * 9 and not self._often else min(self.leap, 1 << 16)

    def run(self) -> Members:
        self._greet()
        offset = 0
        pax: dict[str, str] = {}  # for the next member: its long name, its size
        always: dict[str, str] = {}  # from a global PAX header
        while True:
            if not pax and not always:
                offset = self._plain(offset)
            header = self.read(offset, BLOCK)
            if header == _ZERO:
                break
            if len(header) < BLOCK:
                raise self.fail(offset, "cut short: the shard ends without its end mark")
            self._add(header, offset, -1)
            kind, size = header[156:157], number(header[124:136])
            if size is None:
                raise self.fail(offset, "damaged header (no size)")
            if kind in META:
                offset = self._meta(kind, offset, size, pax, always)
                continue
            offset = self._member(header, kind, offset, size, always | pax)
            pax = {}
        if pax:
            raise self.fail(offset, "cut short: a long name without its member")
        self._flush()
        self._only_zeros(offset)
        table = np.concatenate(self._tables, axis=1) if self._tables else np.zeros((2, 0), np.int64)
        return Members(self._names, table[0], table[1], self._others)

    def _greet(self) -> None:
        first = self.read(0, BLOCK)
        if not first:
            raise ShardError(self.shard, 0, "the file is empty")
        for magic, packer in _PACKED.items():
            # A tar may begin with a name of these letters; then its header is sound.
            if first.startswith(magic) and not checksums_agree(
                np.frombuffer(first[:BLOCK].ljust(BLOCK, b"\0"), np.uint8)[None]
            ):
                remedy = "unpack it: samples in the middle of a compressed file cannot be reached"
                raise ShardError(self.shard, 0, f"the shard is compressed with {packer}", remedy)

    def _plain(self, offset: int) -> int:
        """The quick way over plain files, one after the other. Returns where it stopped: at any other case."""
        headers, places, lengths, read = self._headers, self._places, self._lengths, self.blob.read
        start, window, whole = self._start, self._window, self.size
        filled, ahead, left, reads = len(window), BLOCK, 0, 0
        while True:
            at = offset - start
            if at + BLOCK > filled:
                if left <= 0 or len(headers) >= _BATCH:  # think again about how far to read
                    if len(headers) >= _BATCH:
                        self._flush()
                        headers, places, lengths = self._headers, self._places, self._lengths
                    self._reads += reads
                    left, reads, ahead = 64, 0, self._ahead(offset)
                left -= 1
                reads += 1
                if offset + ahead > whole:
                    ahead = max(0, whole - offset)
                window, start, at = read(offset, ahead), offset, 0
                filled = len(window)
                if filled < BLOCK:
                    break
            header = window[at : at + BLOCK]
            # Eleven digits closed by NUL or a blank: how every common writer puts a size.
            if header[135] not in _CLOSERS:
                break
            try:
                data = offset + BLOCK
                length = int(header[124:135], 8)
            except ValueError:
                break
            if not 0 <= length <= whole - data:
                break
            if header[156] == 48:  # "0", a file
                lengths.append(length)
            elif header[156] == 120 and _tells_nothing(window[data - start : data - start + length], length):
                lengths.append(-1)
                self._often = True
            else:
                break
            headers.append(header)
            places.append(offset)
            offset = data + ((length + 511) & -512)
        self._reads += reads
        self._start, self._window = start, window
        return offset

    def _add(self, header: bytes, offset: int, length: int) -> None:
        if len(self._headers) >= _BATCH:
            self._flush()
        self._headers.append(header)
        self._places.append(offset)
        self._lengths.append(length)

    def _flush(self) -> None:
        """Check the headers of the batch together, and name its files."""
        if not self._headers:
            return
        blocks = np.frombuffer(b"".join(self._headers), np.uint8).reshape(-1, BLOCK)
        places, lengths, named = self._places, np.array(self._lengths, np.int64), self._named
        self._total += len(places)
        self._headers, self._places, self._lengths, self._named = [], [], [], {}
        bad = np.flatnonzero(~checksums_agree(blocks))
        if len(bad):
            raise ShardError(self.shard, places[bad[0]], "damaged header (its checksum is wrong)")
        keep = np.flatnonzero(lengths >= 0)
        found = names(blocks[keep] if len(keep) < len(blocks) else blocks)
        for at, row in enumerate(keep.tolist()) if named else ():
            found[at] = named.get(row, found[at])
        self._names += found
        self._tables.append(np.stack([np.array(places, np.int64)[keep] + BLOCK, lengths[keep]]))

    def _meta(self, kind: bytes, offset: int, size: int, pax: dict[str, str], always: dict[str, str]) -> int:
        """What a header says about others: long names and PAX records. Returns where the next header lies."""
        data = offset + BLOCK
        if size > _LONGEST or data + size > self.size:
            raise self.fail(offset, "damaged header (a long name that does not fit)")
        body = self.read(data, size)
        if len(body) < size:
            raise self.fail(data, "cut short within a long name")
        # Where several speak of one member, the first counts, as for tarfile.
        self._often = True
        if kind == b"L":
            pax.setdefault("path", text(body.partition(b"\0")[0]))
        elif kind == b"g":
            always.update(self._records(body, data))
            if "size" in always:
                raise self.fail(offset, "a global PAX header that sets a size")
        elif kind != b"K":
            for key, value in self._records(body, data).items():
                pax.setdefault(key, value)
        return data + padded(size)

    def _member(self, header: bytes, kind: bytes, offset: int, size: int, pax: dict[str, str]) -> int:
        """One member in all its varieties. Returns where the next header lies."""
        data = offset + BLOCK
        if kind == b"S" or "sparse" in pax:
            raise self.fail(offset, "a sparse file, whose bytes do not lie in one piece")
        if kind == b"\0" and header[:100].partition(b"\0")[0].endswith(b"/"):
            kind = b"5"  # a folder, as tars before 1988 wrote it
        if kind in DATALESS:
            self._others[KINDS[kind]] += 1
            return data
        if "size" in pax:
            digits = pax["size"]
            if not digits.isascii() or not digits.isdigit() or len(digits) > 20:
                raise self.fail(offset, "damaged PAX header (no size)")
            size = int(digits)
        if data + size > self.size:
            called = pax.get("path") or name(header)
            raise self.fail(offset, f"cut short: {called[:200]!r} should reach to byte {data + size} of {self.size}")
        if kind in REGULAR:
            self._lengths[-1] = size
            if "path" in pax:
                self._named[len(self._headers) - 1] = pax["path"]
        else:
            self._others["entries of an unknown kind"] += 1
        return data + padded(size)

    def _records(self, body: bytes, offset: int) -> dict[str, str]:
        """The records "<length> <key>=<value>\\n" of a PAX header that matter here: path, size, and signs of a hole."""
        records: dict[str, str] = {}
        at = 0
        while at < len(body) and body[at]:  # some writers fill up with NULs
            digits, space, _ = body[at : at + 20].partition(b" ")
            length = int(digits) if space and digits.isdigit() else 0
            record = body[at + len(digits) + 1 : at + length]
            key, equals, value = record.partition(b"=")
            if length <= len(digits) + 2 or at + length > len(body) or not record.endswith(b"\n") or not equals:
                raise self.fail(offset + at, "damaged PAX header")
            if key == b"path":
                records["path"] = text(value[:-1].rstrip(b"/"))
            elif key == b"size":
                records["size"] = text(value[:-1])
            elif key.startswith(b"GNU.sparse"):
                records["sparse"] = ""
            at += length
        return records

    def _only_zeros(self, offset: int) -> None:
        """What follows the end mark must be padding: more members there would be lost without a word."""
        if self.size - offset > _PADDING:
            raise ShardError(self.shard, offset, f"{self.size - offset} bytes after the end mark")
        while part := self.blob.read(offset, min(1 << 20, self.size - offset)):
            if part.count(0) != len(part):
                at = offset + int(np.flatnonzero(np.frombuffer(part, np.uint8))[0])
                raise self.fail(at, "data after the end mark (two tars in one file, or a header turned to zeros)")
            offset += len(part)


def _tells_nothing(body: bytes, length: int) -> bool:
    """Whether a PAX header of `length` bytes is one record that does not matter here. False too if it is not all there.

    img2dataset, and Python by default, write one for each member, with the time of its last change.
    """
    digits, _, record = body[:-1].partition(b" ")
    return (
        len(body) == length
        and body[-1:] == b"\n"
        and digits == b"%d" % length
        and record[:6] in _TIMES
        and b"\n" not in record
    )
