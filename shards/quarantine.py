"""The quarantine: samples that were found damaged while a run read them, one JSON line each.

It is a cache of facts and never an input: the substitute of a damaged sample is the same whether or not the damage was
known before, so a lost file costs time and no exactness. An entry is appended under a lock and synced before anyone
acts on it. A kill in mid-write leaves a line without its end, which the next opening cuts off.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from .errors import GristmillError
from .journal import append, held, whole_lines


class QuarantineError(GristmillError):
    """The quarantine's file cannot be read or written."""


@dataclass(frozen=True)
class Damaged:
    """One damaged sample: the shard's url in the manifest, its row there, its key, and what is wrong with it."""

    shard: str
    row: int
    key: str
    reason: str


class Quarantine:
    """The samples known to be damaged. `(url, row) in quarantine` is one look into a set.

    Several processes may share a file; each sees what was there when it opened it, and what it added itself.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._entries: dict[tuple[str, int], Damaged] = {}
        if self.path.exists():
            self._load()

    def __contains__(self, place: tuple[str, int]) -> bool:
        return (place[0], int(place[1])) in self._entries

    def __iter__(self) -> Iterator[Damaged]:
        """In the order of (shard, row), whatever the order of discovery."""
        return iter([self._entries[place] for place in sorted(self._entries)])

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def count(self) -> int:
        """Number of samples in quarantine."""
        return len(self._entries)

    @property
    def digest(self) -> str:
        """blake2b-128 hex of the places (shard, row), whatever the order of discovery and the wording of reasons."""
        text = json.dumps(sorted(self._entries))
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def add(self, shard: str, row: int, key: str, reason: str) -> bool:
        """Remember a damaged sample, lastingly. Returns False if it was known. Raises QuarantineError."""
        place = (shard, int(row))
        if place in self._entries:
            return False
        entry = Damaged(shard, int(row), key, reason)
        line = (json.dumps(asdict(entry), ensure_ascii=False) + "\n").encode()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with held(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT) as handle:
                append(handle, line)
        except OSError as error:
            raise QuarantineError(
                f"{self.path} cannot be written ({error.strerror}): make room or give the run another folder"
            ) from error
        self._entries[place] = entry
        return True

    def _load(self) -> None:
        try:
            text = self.path.read_bytes()
            if text and not text.endswith(b"\n"):
                with held(self.path, os.O_RDWR) as handle:  # another process may just be writing that line
                    text = whole_lines(handle)
        except OSError as error:
            raise QuarantineError(f"{self.path} cannot be read ({error.strerror}): mend it or remove it") from error
        for number, line in enumerate(text.splitlines(), start=1):
            try:
                entry = Damaged(**json.loads(line))
            except (ValueError, TypeError) as error:
                raise QuarantineError(
                    f"{self.path}, line {number}, is no quarantine entry ({error}): remove the line, or the file; "
                    "damage is found again when it is read again"
                ) from error
            self._entries[(entry.shard, entry.row)] = entry
