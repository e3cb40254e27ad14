"""From paths to checked images: threads read, hash and decode, and hand over in the order of the paths.

All three leave the GIL alone. Work goes out in chunks bounded in number and in bytes, at most two a thread ahead, so
that memory is bounded whatever the source holds, and the outcome does not depend on the number of threads.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterator, Set
from dataclasses import dataclass
from pathlib import Path

from .images import CheckedImage, ImageError, check_image
from .parallel import in_order
from .sources import read_candidate

_CHUNK_FILES, _CHUNK_BYTES = 32, 8 << 20
_MACHINE = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)  # faults that are not the file's


@dataclass(frozen=True)
class Checked:
    """What became of one file: `problem` says why it cannot be used; else `digest` is the blake2b-128 of its bytes.

    `image` is missing where the digest was known already, for then nothing was decoded.
    """

    path: Path
    digest: bytes = b""
    image: CheckedImage | None = None
    problem: str | None = None


def check_files(source: Path, paths: list[Path], known: Set[bytes], threads: int) -> Iterator[Checked]:
    """Check the files `source / path`, in the order of the paths. `known` may grow meanwhile: digests not to decode.

    Raises OSError where the machine has no more files or memory, and MemoryError.
    """

    def check(chunk: list[Path]) -> list[Checked]:
        return [_check(source, path, known) for path in chunk]

    for found in in_order(check, _chunks(source, paths), threads, "gristmill-ingest"):
        yield from found


def _check(source: Path, path: Path, known: Set[bytes]) -> Checked:
    try:
        data = read_candidate(source, path).data
        digest = hashlib.blake2b(data, digest_size=16).digest()
        return Checked(path, digest, None if digest in known else check_image(data))
    except ImageError as error:
        return Checked(path, problem=str(error))
    except OSError as error:
        if error.errno in _MACHINE:
            raise
        return Checked(path, problem=f"cannot be read: {error.strerror}")


def _chunks(source: Path, paths: list[Path]) -> Iterator[list[Path]]:
    chunk: list[Path] = []
    total = 0
    for path in paths:
        size = file_size(source, path)
        if chunk and (len(chunk) == _CHUNK_FILES or total + size > _CHUNK_BYTES):
            yield chunk
            chunk, total = [], 0
        chunk.append(path)
        total += size
    yield chunk


def file_size(source: Path, path: Path) -> int:
    """Bytes of a file; 0 where it cannot be looked at."""
    try:
        return os.stat(os.path.join(source, path)).st_size
    except OSError:
        return 0
