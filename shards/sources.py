"""Where images come from: so far a folder of files, whose subfolders may name classes.

The order is that of the sorted paths, so that two ingests of the same folder agree whatever the file system's own order
is. Links to folders are followed, each real folder once, and its own path goes before any link to it.
"""

from __future__ import annotations

import errno
import os
import stat
from dataclasses import dataclass
from pathlib import Path

from .errors import GristmillError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
MAX_BYTES = 1 << 30


class SourceError(GristmillError):
    """A source that is missing, or that holds no images."""


@dataclass(frozen=True)
class Candidate:
    """A file that may become a sample: its path relative to the source, its bytes, the folders above it."""

    path: Path
    data: bytes
    label: tuple[str, ...]


def read_candidate(root: Path, path: Path) -> Candidate:
    """Read the file at `root / path`. OSError passes through, and is raised for what is no plain file, or over 1 GiB."""
    # Without O_NONBLOCK a named pipe called x.jpg would stop the ingest for good.
    with open(os.open(os.path.join(root, path), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb", buffering=0) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "no plain file")
        if status.st_size > MAX_BYTES:
            raise OSError(errno.EFBIG, "larger than 1 GiB")
        return Candidate(path, file.readall(), path.parts[:-1])


def find_images(folder: str | Path) -> list[Path]:
    """All files below a folder with an image's suffix, of any case, sorted by path, relative to the folder.

    Raises SourceError if the folder is missing, cannot be listed, or holds none.
    """
    root = Path(folder)
    if not root.is_dir():
        raise SourceError(f"{root} is no folder: name one that holds images")
    found: list[str] = []
    seen: set[tuple[int, int]] = set()
    pending: list[str] = [""]
    links: list[str] = []
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
            with os.scandir(place) as entries:
                for entry in entries:
                    name = os.path.join(inside, entry.name)
                    if entry.is_dir(follow_symlinks=False):
                        pending.append(name)
                    elif entry.name.lower().endswith(SUFFIXES) and not entry.is_dir():
                        found.append(name)
                    elif entry.is_symlink() and entry.is_dir():
                        links.append(name)
        except OSError as error:
            raise SourceError(f"{place} cannot be listed ({error.strerror}): make it readable or move it") from error
    if not found:
        raise SourceError(f"no image below {root}: looked for files that end in {', '.join(SUFFIXES)}, in any case")
    # By the parts of the path, as its folders nest; a plain string order would put "a-b" between "a" and "a/b".
    return sorted(map(Path, found), key=lambda path: path.parts)
