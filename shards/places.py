"""Which shards were meant: folders, single tars, lists of them, and webdataset's braces, as one list of places.

Found in a folder are tars and, so that nobody takes them for indexed, compressed ones, which the index then refuses.
Symbolic links to shards are followed, links to folders are not: a loop would never end.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from .addresses import redact, scheme_of
from .errors import GristmillError

PACKED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst", ".tar.lz4")
REMOTE = ("http", "https", "s3")
_MOST = 1_000_000  # shards of one brace pattern: `{0..99}{0..99}...` grows faster than it looks
_GROUP = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(-?\d{1,18})\.\.(-?\d{1,18})")


class PlacesError(GristmillError):
    """A source that names no shard."""


def is_remote(place: str) -> bool:
    """Whether a shard is reached by a url, not by a path."""
    return scheme_of(place) in REMOTE


def find_shards(sources: Sequence[str | Path]) -> list[str]:
    """Paths (absolute) and urls of all shards meant, in order; a folder's in the order of their names.

    A source is a folder, a tar, a url, a text file with one of these a line (paths relative to the file, `#` begins a
    comment), or a pattern as `data-{000..127}.tar`. Raises PlacesError for what is none, or is named twice.
    """
    found: list[str] = []
    for source in sources:
        before = len(found)
        found += _expand(str(source), Path(), lists=True)
        if len(found) == before:
            raise PlacesError(f"no shard (*.tar) in {redact(str(source))}: name a folder or a list that has some")
    seen: set[str] = set()
    for place in found:
        if place in seen:
            raise PlacesError(f"{redact(place)} is named twice: its samples would count double; name each shard once")
        seen.add(place)
        try:
            place.encode()
        except UnicodeEncodeError as error:
            raise PlacesError(f"{place!r} cannot be written down as text: rename the file") from error
    return found


def _expand(source: str, base: Path, *, lists: bool) -> Iterator[str]:
    if is_remote(source):
        yield from _braces(source)
        return
    path = base / (source.removeprefix("file://") if scheme_of(source) == "file" else source)
    if path.is_dir():
        yield from _inside(path)
    elif _is_shard(path.name) and path.exists():
        yield os.path.abspath(path)
    elif lists and path.is_file():
        yield from _listed(path)
    elif "{" in source:
        for one in _braces(str(path)):
            if not os.path.exists(one):
                raise PlacesError(f"{one}, out of {source}, is not there: restore it or mend the pattern")
            yield os.path.abspath(one)
    else:
        problem = "is no tar" if path.exists() else "is not there"
        raise PlacesError(
            f"{path} {problem}: name a folder, a .tar, a list of them, or a pattern as x-{{000..127}}.tar"
        )


def _is_shard(name: str) -> bool:
    return name.lower().endswith((".tar", *PACKED))


def _inside(folder: Path) -> Iterator[str]:
    found: list[tuple[str, ...]] = []
    for place, folders, files in os.walk(os.path.abspath(folder), onerror=_unreadable):
        folders.sort()
        found += [(*Path(place).parts, name) for name in files if _is_shard(name)]
    yield from (os.path.join(*parts) for parts in sorted(found))


def _unreadable(error: OSError) -> None:
    raise PlacesError(f"{error.filename} cannot be listed ({error.strerror}): its shards would be missing") from error


def _listed(path: Path) -> Iterator[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise PlacesError(f"{path} is no list of shards ({error}): give a text file with one path a line") from error
    for number, line in enumerate(lines, start=1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        try:
            yield from _expand(line, path.parent, lists=False)
        except PlacesError as error:
            raise PlacesError(f"{path}, line {number}: {error}") from error


def _braces(pattern: str) -> Iterator[str]:
    if "{" not in pattern:
        yield pattern
        return
    from braceexpand import UnbalancedBracesError, braceexpand  # what webdataset itself expands with

    try:
        # The library makes whole ranges in memory, so how many there are is worked out before.
        few = math.prod(map(_choices, _GROUP.findall(pattern))) <= _MOST
        found = list(islice(braceexpand(pattern), _MOST + 1)) if few else []
    except UnbalancedBracesError:
        raise PlacesError(f"{redact(pattern)} has a brace that is not closed: close it") from None
    if not few or len(found) > _MOST:
        raise PlacesError(f"{redact(pattern)} stands for more than {_MOST} shards: mend the pattern")
    yield from found


def _choices(group: str) -> int:
    bounds = _RANGE.match(group)
    return abs(int(bounds[2]) - int(bounds[1])) + 1 if bounds else group.count(",") + 1
