"""The shards of one or several data sets, numbered one after the other, as a stream numbers them.

A shard has a name here, its url in the manifest, by which quarantine and messages know it. Two data sets may both have
a 000000.tar: of all but the first, names are whole places. Names are written down and shown, so nothing secret is in
them; `place` is where the shard really is.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..shards.addresses import redact
from ..shards.manifest import Manifest, Rows


class Library:
    """Several manifests as one. Attributes: `counts` int64 [S], `samples`, `bytes` int64 [S] of each shard, `title`."""

    def __init__(self, manifests: Manifest | Sequence[Manifest]) -> None:
        self.manifests = [manifests] if isinstance(manifests, Manifest) else list(manifests)
        self.counts = np.concatenate([manifest.counts for manifest in self.manifests])
        self.bytes = np.concatenate([manifest.shard_bytes for manifest in self.manifests])
        self.samples = int(self.counts.sum())
        self.title = " and ".join(str(manifest.root) for manifest in self.manifests)
        self._ends = np.cumsum([len(manifest.urls) for manifest in self.manifests]).tolist()

    def __len__(self) -> int:
        return len(self.counts)

    def split(self, shard: int) -> tuple[Manifest, int]:
        """(its manifest, its number there)."""
        first = 0
        for manifest, end in zip(self.manifests, self._ends, strict=True):
            if shard < end:
                return manifest, shard - first
            first = end
        raise IndexError(f"shard {shard} of {len(self)}")

    def rows(self, shard: int) -> Rows:
        """The samples of a shard, from memory or from Parquet."""
        manifest, number = self.split(shard)
        return manifest.rows(number)

    def name(self, shard: int) -> str:
        """Under which the shard is known in the quarantine and in messages."""
        manifest, number = self.split(shard)
        return redact(manifest.urls[number] if manifest is self.manifests[0] else manifest.place(number))

    def place(self, shard: int) -> str:
        """Path or url. May hold a secret: show `name`."""
        manifest, number = self.split(shard)
        return manifest.place(number)
