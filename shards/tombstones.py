"""Tombstones: samples that somebody asked to have removed, one JSON line each, in `tombstones.jsonl` beside the manifest.

The shards stay as they are; whoever reads never reads these samples again, whatever position they come up at, and puts
a substitute into their slot, so that no other sample moves. The file only grows, until shards are written anew (rewrite.py):
what a run honoured is known by the number and the digest of its first entries, to which later ones may be added. Lines are
appended under a lock and synced before the call returns; one that a kill left without its end is cut off by the next
writer, and never counted.
"""

from __future__ import annotations

import hashlib
import json
import os
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from .errors import GristmillError
from .journal import append, held, whole_lines
from .manifest import Manifest
from .storage import published, sync_folder

TOMBSTONES = "tombstones.jsonl"


class TombstoneError(GristmillError):
    """Tombstones that cannot be read or written, or a key that the data set does not have."""


class Tombstones:
    """The removed samples of a data set, as places (url of the shard, row in it), in the order of removal."""

    def __init__(self, path: str | Path) -> None:
        """Read the file, which need not exist. TombstoneError if it is spoiled."""
        self.path = Path(path)
        self._keys: dict[tuple[str, int], str] = {}
        self._reasons: dict[tuple[str, int], str] = {}
        try:
            self._load(self.path.read_bytes())
        except FileNotFoundError:
            pass
        except OSError as error:
            raise TombstoneError(f"{self.path} cannot be read ({error.strerror}): mend its permissions") from error

    @classmethod
    def of(cls, manifest: Manifest) -> Tombstones:
        """Those beside a manifest."""
        return cls(manifest.root / TOMBSTONES)

    def __contains__(self, place: tuple[str, int]) -> bool:
        return (place[0], int(place[1])) in self._keys

    def __len__(self) -> int:
        return len(self._keys)

    @property
    def count(self) -> int:
        """Number of removed samples."""
        return len(self._keys)

    def digest(self, count: int | None = None) -> str:
        """blake2b-64 hex of the first `count` places (all by default), in the order of removal; "" for none."""
        places = list(self._keys)[:count]
        return hashlib.blake2b(json.dumps(places).encode(), digest_size=8).hexdigest() if places else ""

    def places(self, urls: Sequence[str]) -> np.ndarray:
        """(shard, row) int64 [n, 2] of those that lie in the shards `urls`, ascending; shards are numbered as given."""
        number = {url: shard for shard, url in enumerate(urls)}
        found = sorted((number[url], row) for url, row in self._keys if url in number)
        return np.array(found, np.int64).reshape(-1, 2)

    def __iter__(self) -> Iterator[tuple[tuple[str, int], str, str]]:
        """Place, key and reason of each, in the order of removal."""
        return iter([(place, key, self._reasons[place]) for place, key in self._keys.items()])

    def remove(self, manifest: Manifest, keys: Iterable[str], reason: str) -> int:
        """Remove the samples with these keys, lastingly, each wherever it occurs; returns how many are newly removed.

        All or none: TombstoneError names the keys that the data set does not have, and a full disk.
        """
        wanted = set(keys)
        found = places_of(manifest, wanted)
        if missing := wanted - {key for _, key in found}:
            raise no_sample(str(manifest.root), missing)
        return self.add(found, reason)

    def add(self, entries: Iterable[tuple[tuple[str, int], str]], reason: str) -> int:
        """Remove the samples at these places, which hold these keys; returns how many are newly removed."""
        new = [(place, key) for place, key in entries if place not in self._keys]
        return self._append(new, reason) if new else 0

    def shift(self, gone: Mapping[str, Sequence[int]], count: int, digest: str) -> None:
        """After shards were written anew without the rows `gone` (ascending): drop those, move others to where they lie now.

        `count` and `digest` are of the entries before: done again, it does nothing. TombstoneError as `remove`.
        """
        if not self.path.exists():
            return
        try:
            with self._held() as handle:
                self._read(handle)
                if self.digest(count) != digest:
                    return
                lines = []
                for (url, row), key, reason in self:
                    rows = gone.get(url, ())
                    before = bisect_left(rows, row)
                    if before == len(rows) or rows[before] != row:
                        lines.append(_line((url, row - before), key, reason))
                if lines:
                    with published(self.path) as file:
                        file.write("".join(lines).encode())
                else:
                    self.path.unlink()
                    sync_folder(self.path.parent)
                self._keys.clear()
                self._load("".join(lines).encode())
        except OSError as error:
            raise TombstoneError(
                f"{self.path} cannot be written ({error.strerror}): make room or rights there"
            ) from error

    @contextmanager
    def _held(self) -> Iterator[int]:
        """Hold the file that has the name: whoever waited for it may find that `shift` put another in its place."""
        while True:
            with held(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT) as handle:
                try:
                    same = os.path.samestat(os.fstat(handle), os.stat(self.path))
                except FileNotFoundError:
                    same = False
                if same:
                    yield handle
                    return

    def _read(self, handle: int) -> None:
        self._keys.clear()
        self._load(whole_lines(handle))

    def _append(self, entries: list[tuple[tuple[str, int], str]], reason: str) -> int:
        try:
            with self._held() as handle:
                self._read(handle)  # what others removed meanwhile
                new = [(place, key) for place, key in entries if place not in self._keys]
                append(handle, "".join(_line(place, key, reason) for place, key in new).encode())
        except OSError as error:
            raise TombstoneError(f"{self.path} cannot be written ({error.strerror}): nothing was removed") from error
        self._keys.update(new)
        self._reasons.update((place, reason) for place, _ in new)
        return len(new)

    def _load(self, text: bytes) -> None:
        for number, line in enumerate(text[: text.rfind(b"\n") + 1].splitlines(), start=1):
            try:
                entry = json.loads(line)
                place = str(entry["shard"]), int(entry["row"])
                if place not in self._keys:
                    self._keys[place], self._reasons[place] = str(entry["key"]), str(entry.get("reason", ""))
            except (ValueError, TypeError, KeyError) as error:
                raise TombstoneError(
                    f"{self.path}, line {number}, is no tombstone ({error!r}): restore the file; a removed sample must "
                    "not come back unnoticed"
                ) from error


def places_of(manifest: Manifest, keys: set[str]) -> list[tuple[tuple[str, int], str]]:
    """Where the samples with these keys lie: ((url, row), key), each wherever it occurs."""
    return [
        ((url, row), key)
        for shard, url in enumerate(manifest.urls)
        if not keys.isdisjoint(manifest.rows(shard).keys)
        for row, key in enumerate(manifest.rows(shard).keys)
        if key in keys
    ]


def no_sample(where: str, missing: Iterable[str]) -> TombstoneError:
    """The error to raise about what is not there."""
    names = sorted(missing)
    some = ", ".join(names[:3]) + (f" and {len(names) - 3} others" if len(names) > 3 else "")
    return TombstoneError(f"{where} has no sample {some}: nothing was removed; check the keys")


def _line(place: tuple[str, int], key: str, reason: str) -> str:
    entry = {"shard": place[0], "row": place[1], "key": key, "reason": reason}
    return json.dumps(entry, ensure_ascii=False) + "\n"
