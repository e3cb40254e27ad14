"""Tars for tests, made and listed by Python's `tarfile`."""

import io
import tarfile
from pathlib import Path

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def tar(
    path: Path, entries: list[tuple[str, bytes]], kind: str = "ustar", links: dict[str, bytes] | None = None
) -> Path:
    """Write a tar of files (name, bytes), after entries without data (name: type)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=FORMATS[kind]) as file:
        for name, entry in (links or {}).items():
            member = tarfile.TarInfo(name)
            member.type, member.linkname = entry, "/etc/passwd"
            file.addfile(member)
        for name, data in entries:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            file.addfile(member, io.BytesIO(data))
    return path


def by_tarfile(path: Path) -> list[tuple[str, int, int]]:
    """The regular files of a tar: name, offset, length."""
    with tarfile.open(path) as file:
        return [(member.name, member.offset_data, member.size) for member in file if member.isreg()]
