"""Tombstones: samples that somebody asked to have removed, one JSON line each, in `tombstones.jsonl` beside the manifest.

The shards stay as they are; whoever reads never reads these samples again, whatever position they come up at, and puts
a substitute into their slot, so that no other sample moves. The file only ever grows: what a run honoured is known by
the number and the digest of its first entries, to which later ones may be added. Lines are appended under a lock and
synced before the call returns; one that a kill left without its end is cut off by the next writer, and never counted.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from .errors import GristmillError
from .journal import append, held, whole_lines
from .manifest import Manifest

TOMBSTONES = "tombstones.jsonl"


class TombstoneError(GristmillError):
    """Tombstones that cannot be read or written, or a key that the data set does not have."""


class Tombstones:
    """The removed samples of a data set, as places (url of the shard, row in it), in the order of removal."""

    def __init__(self, path: str | Path) -> None:
        """Read the file, which need not exist. TombstoneError if it is spoiled."""
        self.path = Path(path)
        self._keys: dict[tuple[str, int], str] = {}
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

    def remove(self, manifest: Manifest, keys: Iterable[str], reason: str) -> int:
        """Remove the samples with these keys, lastingly, each wherever it occurs; returns how many are newly removed.

        All or none: TombstoneError names the keys that the data set does not have, and a full disk.
        """
        wanted = set(keys)
        found: list[tuple[tuple[str, int], str]] = []
        missing = set(wanted)
        for shard, url in enumerate(manifest.urls):
            for row, key in enumerate(manifest.rows(shard).keys):
                if key in wanted:
                    found.append(((url, row), key))
                    missing.discard(key)
        if missing:
            some = ", ".join(sorted(missing)[:3]) + (" and others" if len(missing) > 3 else "")
            raise TombstoneError(f"{manifest.root} has no sample {some}: nothing was removed; check the keys")
        return self._append([(place, key) for place, key in found if place not in self._keys], reason)

    def _append(self, entries: list[tuple[tuple[str, int], str]], reason: str) -> int:
        try:
            with held(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT) as handle:
                self._keys.clear()
                self._load(whole_lines(handle))  # what others removed meanwhile
                new = [(place, key) for place, key in entries if place not in self._keys]
                lines = [
                    json.dumps({"shard": url, "row": row, "key": key, "reason": reason}, ensure_ascii=False) + "\n"
                    for (url, row), key in new
                ]
                append(handle, "".join(lines).encode())
        except OSError as error:
            raise TombstoneError(f"{self.path} cannot be written ({error.strerror}): nothing was removed") from error
        self._keys.update(new)
        return len(new)

    def _load(self, text: bytes) -> None:
        for number, line in enumerate(text[: text.rfind(b"\n") + 1].splitlines(), start=1):
            try:
                entry = json.loads(line)
                place = str(entry["shard"]), int(entry["row"])
                self._keys.setdefault(place, str(entry["key"]))
            except (ValueError, TypeError, KeyError) as error:
                raise TombstoneError(
                    f"{self.path}, line {number}, is no tombstone ({error!r}): restore the file; a removed sample must "
                    "not come back unnoticed"
                ) from error
