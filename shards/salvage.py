"""What can still be read of a damaged tar: its members as far as headers are sound, its images wherever they lie.

`tarfile` gives up, or worse stops without a word, at the first bad header. Here the walk takes up again at the next block
that is a sound header, but never inside an image that the manifest knows: those bytes are somebody's picture, and may look
like anything. An image counts by its checksum where there is one, and by decoding in any case.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from isal.isal_zlib import crc32

from .blob import Blob
from .headers import BLOCK, DATALESS, META, REGULAR, checksums_agree, name, number, padded, text
from .images import ImageError, check_image
from .index import IMAGES, split_name
from .manifest import Rows

_WINDOW = 1 << 20
_LONGEST = 1 << 20  # of a long name
_SIDES = 64 << 20  # of all that lies beside one image
_NO_PLACES = np.zeros((2, 0), np.int64)


@dataclass(frozen=True)
class Member:
    """A regular file of the tar whose header is sound and whose bytes are all there."""

    name: str
    offset: int
    length: int


@dataclass
class Saved:
    """One sample as it can be written anew. `changed` says why the image's bytes are not its own."""

    key: str
    format: str
    data: bytes
    crc32: int
    width: int
    height: int
    changed: str | None = None
    sides: dict[str, bytes] = field(default_factory=dict)  # by suffix


@dataclass(frozen=True)
class Lost:
    """A sample, or (with a suffix) a file beside one, that cannot be saved."""

    key: str
    problem: str


def salvage(blob: Blob, rows: Rows | None) -> Iterator[Saved | Lost]:
    """Every sample of a shard, in order, saved or lost; without `rows` those that the tar itself still shows.

    Holds the headers of one shard and one sample in memory. A blob's own errors pass through.
    """
    if rows is None:
        yield from _by_members(blob, list(members_of(blob, _NO_PLACES)))
        return
    members = list(members_of(blob, _sound_places(blob, rows)))
    places = [member.offset for member in members]
    by_name: dict[str, list[Member]] = {}
    for member in members:
        key, suffix = split_name(member.name)
        if suffix.lower() in IMAGES:
            by_name.setdefault(key, []).append(member)
    for row, key in enumerate(rows.keys):
        offset, length = int(rows.offset[row]), int(rows.length[row])
        crc = int(rows.crc32[row]) if rows.deep else None
        found = _look(key, blob.read(offset, length), length, crc)
        for member in by_name.get(key, ()) if isinstance(found, Lost) else ():  # the tar may have been packed anew
            again = _look(key, blob.read(member.offset, member.length), member.length, crc)
            if isinstance(again, Saved) and (crc is not None or member.length == length):
                found, offset = again, member.offset
                break
        if isinstance(found, Saved):
            yield from _beside(blob, found, _around(members, places, offset, key))
        yield found


def _sound_places(blob: Blob, rows: Rows) -> np.ndarray:
    """Where images lie for certain: int64 [2, n], ascending, the first bytes and those after the last ones."""
    found = []
    for row, (offset, length) in enumerate(zip(rows.offset.tolist(), rows.length.tolist(), strict=True)):
        data = blob.read(offset, length)
        if len(data) < length:
            continue
        if crc32(data) == rows.crc32[row] if rows.deep else isinstance(_look("", data, length, None), Saved):
            found.append((offset, offset + length))
    return np.array(sorted(found), np.int64).reshape(-1, 2).T


def members_of(blob: Blob, images: np.ndarray) -> Iterator[Member]:
    """The members of a tar, damaged or not, in order. `images` int64 [2, n]: as `_sound_places` gives them."""
    starts, ends = images
    size, at, called = blob.size(), 0, ""
    while at + BLOCK <= size:
        header = blob.read(at, BLOCK)
        length = number(header[124:136])
        sound = length is not None and checksums_agree(np.frombuffer(header, np.uint8)[None])[0]
        if not sound or length is None:
            at, called = _next_header(blob, at + BLOCK, size, starts, ends), ""
            continue
        kind, data = header[156:157], at + BLOCK
        if kind in META:
            if kind in b"LxX" and length <= _LONGEST:
                called = _long_name(kind, blob.read(data, length)) or called
            at = data + padded(length)
            continue
        if kind in DATALESS:
            at, called = data, ""
            continue
        # A size that reaches over the beginning of an image that lies further on is a lie.
        further = int(np.searchsorted(starts, data, "right"))
        if data + length > size or (further < len(starts) and data + length > starts[further]):
            at, called = _next_header(blob, data, size, starts, ends), ""
            continue
        if kind in REGULAR:
            yield Member(called or name(header), data, length)
        at, called = data + padded(length), ""


def _long_name(kind: bytes, body: bytes) -> str:
    if kind == b"L":
        return text(body.partition(b"\0")[0])
    at = 0
    while at < len(body):
        digits, space, _ = body[at : at + 20].partition(b" ")
        if not space or not digits.isdigit() or int(digits) <= len(digits) + 1:
            break
        record = body[at + len(digits) + 1 : at + int(digits)]
        if record.startswith(b"path="):
            return text(record[5:].rstrip(b"\n"))
        at += int(digits)
    return ""


def _next_header(blob: Blob, at: int, size: int, starts: np.ndarray, ends: np.ndarray) -> int:
    """The next block, from `at` on, that is a sound header and lies in no image; `size` if there is none."""
    while at + BLOCK <= size:
        window = blob.read(at, min(_WINDOW, (size - at) // BLOCK * BLOCK))
        if len(window) < BLOCK:
            return size
        blocks = np.frombuffer(window[: len(window) // BLOCK * BLOCK], np.uint8).reshape(-1, BLOCK)
        marked = np.flatnonzero((blocks[:, 257:262] == np.frombuffer(b"ustar", np.uint8)).all(axis=1))
        for block in marked[checksums_agree(blocks[marked])].tolist() if len(marked) else ():
            place = at + block * BLOCK
            before = int(np.searchsorted(starts, place, "right")) - 1
            if before < 0 or place >= ends[before]:
                return place
        at += len(blocks) * BLOCK
    return size


def _look(key: str, data: bytes, length: int, crc: int | None) -> Saved | Lost:
    if len(data) < length:
        return Lost(key, f"cut short: {len(data)} of {length} bytes")
    if crc is not None and crc32(data) != crc:
        return Lost(key, "bytes changed (crc32)")
    try:
        image = check_image(data)
    except ImageError as error:
        return Lost(key, str(error))
    return Saved(key, image.format, image.data, image.crc32, image.width, image.height, image.reencoded)


def _around(members: list[Member], places: list[int], offset: int, key: str) -> list[Member]:
    """Members of the sample `key` beside its image, which lies at `offset`; its own header may be gone."""
    at = bisect_right(places, offset)
    found: list[Member] = []
    for step, first in ((-1, at - 1), (1, at)):
        while 0 <= first < len(members) and split_name(members[first].name)[0] in ("", key):
            if members[first].offset != offset and split_name(members[first].name)[0]:
                found.append(members[first])
            first += step
    return found


def _beside(blob: Blob, sample: Saved, members: list[Member]) -> Iterator[Lost]:
    """Take up what lies beside an image. There is no checksum for it: what can be seen to be broken is left out."""
    room = _SIDES
    for member in members:
        suffix = split_name(member.name)[1]
        if (
            suffix.lower() in (sample.format, "jpeg" if sample.format == "jpg" else sample.format)
            or suffix in sample.sides
        ):
            continue
        room -= member.length
        data = blob.read(member.offset, member.length) if room >= 0 else b""
        if len(data) < member.length:
            yield Lost(f"{sample.key}.{suffix}", "too large" if room < 0 else "cut short")
            continue
        if suffix.lower() == "json":
            try:
                json.loads(data)
            except (ValueError, RecursionError):
                yield Lost(f"{sample.key}.{suffix}", "no JSON any more")
                continue
        sample.sides[suffix] = data


def _by_members(blob: Blob, members: list[Member]) -> Iterator[Saved | Lost]:
    """Samples as their names tell, where the manifest cannot say."""
    at = 0
    while at < len(members):
        key, stop = split_name(members[at].name)[0], at + 1
        while stop < len(members) and split_name(members[stop].name)[0] == key:
            stop += 1
        some = members[at:stop]
        ranked = sorted((IMAGES[s], m.offset, m) for m in some if (s := split_name(m.name)[1].lower()) in IMAGES)
        if key and ranked:
            image = ranked[0][2]
            found = _look(key, blob.read(image.offset, image.length), image.length, None)
            if isinstance(found, Saved):
                yield from _beside(blob, found, [member for member in some if member is not image])
            yield found
        at = stop
