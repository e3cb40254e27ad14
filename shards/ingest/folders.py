"""Folders, local or in a bucket: what lies there, in the order of the parts of the paths, and the images among it.

Order and rules are those of `sources.find_images`: links to folders are followed, each real folder once, its own path
before any link to it; files are taken by their suffix, hidden ones too. But nothing is sorted as a whole: a walk holds
the names of one folder a level, and for the links' sake the paths of all folders, however many files lie in them.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable, Iterator
from functools import partial
from typing import NamedTuple

from ..blob import read_at
from ..errors import GristmillError
from ..manifest import DATASET, SAMPLES, SHARDS
from ..parallel import in_order
from ..places import PACKED
from .buckets import lister
from .candidate import Candidate
from .errors import IngestError
from .places import as_text, is_remote, join, open_place, show
from .trouble import MAX_BYTES, problem_of, too_large

IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")  # candidates; the check looks at the bytes
TEXTS = (".txt", ".csv", ".tsv", ".jsonl", ".ndjson")
_WORK = ".ingest"  # of an ingest; its lists of urls are no sources
_AT_ONCE = 8  # objects read ahead, where each takes a request


class Found(NamedTuple):
    """Something in a folder: where below it, and what by its name (see `kind_of`), or `record`, or `ours`."""

    inside: str
    kind: str


def kind_of(name: str) -> str:
    """`image`, `tar`, `parquet`, `text`, `packed` (a compressed tar), or nothing that is known: an empty string."""
    name = name.lower()
    if name.endswith(IMAGES):
        return "image"
    if name.endswith(PACKED):
        return "packed"
    if name.removesuffix(".gz").endswith(TEXTS):
        return "text"
    return {".tar": "tar", ".parquet": "parquet"}.get(os.path.splitext(name)[1], "")


def walk(root: str) -> Iterator[Found]:
    """All that lies below a folder or a bucket's prefix, but for folders themselves. Raises IngestError, StorageError.

    `record`: a Parquet file beside a tar or a folder of its name, as img2dataset writes one on each of its shards.
    `ours`: what Gristmill itself keeps in a data set beside the shards.
    """
    list_one = lister(root) if is_remote(root) else partial(_list_folder, root, _folders(root))
    levels = [("", iter(_level(*list_one(""))))]
    while levels:
        inside, entries = levels[-1]
        for name, kind in entries:
            place = f"{inside}{name}"
            if kind == "folder":
                levels.append((f"{place}/", iter(_level(*list_one(place)))))
                break
            yield Found(place, kind)
        else:
            levels.pop()


def _level(files: list[str], folders: list[str]) -> list[tuple[str, str]]:
    """Names in a folder, sorted, each with its kind."""
    found = [(name, kind_of(name)) for name in files]
    if any(kind == "parquet" for _, kind in found):
        named = {name[: -len(".tar")] for name, kind in found if kind == "tar"}.union(folders)
        found = [
            (name, "record" if kind == "parquet" and name[: -len(".parquet")] in named else kind)
            for name, kind in found
        ]
    ours = {_WORK}
    if DATASET in files:
        ours |= {DATASET, SHARDS, SAMPLES}
    found += [(name, "folder") for name in folders]
    return sorted((name, "ours" if name in ours else kind) for name, kind in found)


def _folders(root: str) -> set[str]:
    """The folders below `root` that are walked, links among them, relative to it."""
    walked: set[str] = set()
    seen: set[tuple[int, int]] = set()
    pending, links = [""], []
    while pending or links:
        if not pending:  # real folders first, then what links lead to
            links.sort(reverse=True)
            pending.append(links.pop())
        inside = pending.pop()
        place = os.path.join(root, inside)
        try:
            status = os.stat(place)
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            walked.add(inside)
            with os.scandir(place) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        pending.append(os.path.join(inside, entry.name))
                    elif entry.is_symlink() and _leads_to_folder(entry):
                        links.append(os.path.join(inside, entry.name))
        except OSError as error:
            raise _unlisted(place, error) from error
    return walked


def _list_folder(root: str, walked: set[str], inside: str) -> tuple[list[str], list[str]]:
    files, folders = [], []
    place = os.path.join(root, inside)
    try:
        with os.scandir(place) as entries:
            for entry in entries:
                if not _leads_to_folder(entry):
                    files.append(entry.name)
                elif os.path.join(inside, entry.name) in walked:
                    folders.append(entry.name)
    except OSError as error:
        raise _unlisted(place, error) from error
    return files, folders


def _leads_to_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself: no folder, and no reason to stop
        return False


def _unlisted(place: str, error: OSError) -> IngestError:
    return IngestError(f"{show(place)} cannot be listed ({error.strerror}): make it readable or move it")


def read_files(root: str, insides: Iterable[str]) -> Iterator[Candidate]:
    """The files at `insides` below `root` (the root itself for an empty one) as candidates, in order, one at a time.

    Objects behind a network are asked for a few ahead. Errors that are not the file's pass through.
    """
    read = partial(_read, root)
    if is_remote(root):
        yield from in_order(read, insides, _AT_ONCE, "gristmill-objects")
    else:
        yield from map(read, insides)


def _read(root: str, inside: str) -> Candidate:
    place = join(root, inside)
    labels = tuple(as_text(part) for part in inside.split("/")[:-1])
    candidate = Candidate(-1, show(place), labels=labels)
    try:
        size, candidate.data = _read_object(place) if is_remote(place) else _read_file(place)
    except (OSError, GristmillError) as error:
        candidate.problem = problem_of(error)
        return candidate
    if candidate.data is None:
        candidate.problem = too_large(size)
    return candidate


def _read_file(path: str) -> tuple[int, bytes | None]:
    # Without O_NONBLOCK a named pipe called x.jpg would stop the ingest for good.
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "no plain file")
        return status.st_size, read_at(handle, 0, status.st_size) if status.st_size <= MAX_BYTES else None
    finally:
        os.close(handle)


def _read_object(place: str) -> tuple[int, bytes | None]:
    blob = open_place(place)
    data = blob.read(0, 1 << 20)  # one request for most; the size is known from then on
    size = blob.size()
    if size > MAX_BYTES:
        return size, None
    return size, data + blob.read(len(data), size - len(data))
