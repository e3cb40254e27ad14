"""What an interrupted check has looked at and found sound, so that the next one goes on: `.verify.jsonl` beside the manifest.

A line a shard: its identity (time of change and size, or etag) and a digest of its rows. The file belongs to one check:
one that comes to its end removes it, for bits rot without a change of date, and a check must mean a look. Where the folder
cannot be written, a check that is interrupted starts anew.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from contextlib import suppress

from .journal import append, held, whole_lines
from .manifest import Manifest, Rows

CHECKED = ".verify.jsonl"
_EVERY = 1.0  # seconds between two writes


class Checked:
    """Shards found sound by this check, at one depth. A context manager that keeps what was found on the way out."""

    def __init__(self, manifest: Manifest, deep: bool, *, again: bool = False) -> None:
        self.path = manifest.root / CHECKED
        self._kind = {"data": manifest.digest, "deep": deep}
        self._sound: dict[str, list[str]] = {}
        self._lines: list[str] = []
        self._last = time.monotonic()
        self.since = 0.0  # when the interrupted check began, in seconds since 1970; 0 if there was none
        if not again:
            with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):  # whatever lies there by that name
                self._load()
        if not self.since:
            self.done()
            self._lines.append(json.dumps({**self._kind, "since": time.time()}) + "\n")

    def _load(self) -> None:
        text = self.path.read_bytes()
        head, *lines = [json.loads(line) for line in text[: text.rfind(b"\n") + 1].splitlines()]
        if all(head.get(name) == value for name, value in self._kind.items()):
            self._sound = {line["shard"]: [line["identity"], line["rows"]] for line in lines}
            self.since = float(head["since"])

    def __len__(self) -> int:
        """Shards found sound before."""
        return len(self._sound)

    def knows(self, url: str, identity: str, rows: Rows) -> bool:
        """Whether this shard, as it is, was found sound before."""
        return self._sound.get(url) == [identity, _digest(rows)]

    def add(self, url: str, identity: str, rows: Rows) -> None:
        """Remember a sound shard."""
        self._lines.append(json.dumps({"shard": url, "identity": identity, "rows": _digest(rows)}) + "\n")
        if time.monotonic() - self._last >= _EVERY:
            self._flush()

    def done(self) -> None:
        """Forget all: the check has come to its end."""
        self._lines, self._sound = [], {}
        with suppress(OSError):
            self.path.unlink()

    def _flush(self) -> None:
        lines, self._lines, self._last = self._lines, [], time.monotonic()
        with suppress(OSError), held(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT) as handle:
            whole_lines(handle)
            append(handle, "".join(lines).encode())

    def __enter__(self) -> Checked:
        return self

    def __exit__(self, *_: object) -> None:
        if len(self._lines) > (0 if self.since else 1):
            self._flush()


def _digest(rows: Rows) -> str:
    """All that the manifest says of a shard, checksums too: a deep index changes what a check looks at."""
    return hashlib.blake2b(rows.places.tobytes() + "\0".join(rows.keys).encode(), digest_size=8).hexdigest()
