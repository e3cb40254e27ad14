"""A tar without some of its samples: every other byte is copied as it stands.

Members of a tar know nothing of each other, so what is left is what webdataset's writer would have made of the other
samples, and of tars that others wrote nothing else is lost: sidecars, long names, links. `tarfile` says where a member
with its extra headers begins; the index, which is stricter, says which member is whose, and both must agree.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from .archive import ShardError
from .blob import LocalBlob
from .headers import BLOCK, padded
from .index import Sampled, sample_shard, split_name
from .storage import Draft

_RECORD = 20 * BLOCK  # what tar fills up to
_PIECE = 8 << 20


def cut_shard(path: Path, rows: Iterable[int], out: Path) -> Sampled:
    """Write the tar `path` without the samples `rows` of its index under the name `out`, whole or not at all.

    Returns the index of what was written. Raises ShardError for a damaged tar; OSError passes through.
    """
    found = sample_shard(path)
    gone = set(rows)
    if gone and max(gone) >= len(found.rows):
        raise ShardError(path, 0, f"{len(found.rows)} samples, of which number {max(gone)} should go")
    left = [key for row, key in enumerate(found.rows.keys) if row not in gone]
    draft = Draft(out)
    try:
        with LocalBlob(path) as blob:
            for start, end in _kept(path, found, {member for row in gone for member in members_of(found, row)}):
                while start < end:
                    part = blob.read(start, min(_PIECE, end - start))
                    if not part:
                        raise ShardError(path, start, "cut short while it was read")
                    draft.write(part)
                    start += len(part)
        draft.write(bytes(2 * BLOCK))
        draft.write(bytes(-draft.tell() % _RECORD))
        draft.sync()
        again = sample_shard(draft.beside)
        if again.rows.keys != left:
            raise ShardError(draft.beside, 0, "was not read back as it was written", "check the disk and try again")
        draft.finish()
    except BaseException:
        draft.give_up()
        raise
    return again


def members_of(found: Sampled, row: int) -> list[int]:
    """All members of a sample, as numbers in `found.members`: its image, and what of the same key lies around it."""
    names = found.members.names
    key, image = found.rows.keys[row], found.images[row]
    members = [image]
    for step in (-1, 1):
        at = image + step
        while 0 <= at < len(names) and (here := split_name(names[at])[0]) in (
            "",
            key,
        ):  # what is in no sample may lie between
            if here:
                members.append(at)
            at += step
    return members


def _kept(path: Path, found: Sampled, gone: set[int]) -> Iterator[tuple[int, int]]:
    """The stretches of a tar (start, end) without the members `gone`."""
    places = found.members.offsets.tolist()
    dropped = {places[member] for member in gone}
    start = seen = 0
    with tarfile.open(path, "r:") as tar:
        for entry in tar:
            if seen < len(places) and entry.offset_data == places[seen]:
                seen += 1
                if entry.offset_data in dropped:
                    if entry.offset > start:
                        yield start, entry.offset
                    start = entry.offset_data + padded(entry.size)
            tar.members = []  # it would remember them all
        if seen != len(places):
            raise ShardError(path, places[seen], "two readers of tars disagree about this member")
        if tar.offset > start:
            yield start, tar.offset
