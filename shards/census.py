"""What is in a data set: counted shard by shard, in memory that does not grow with the samples.

Sizes go into histograms with 64 bins an octave, which gives quantiles to within about 1 %; smallest and largest are exact.
What the manifest cannot know (sources, outcomes, duplicates) comes from the ledger, a unit at a time; of many different
hosts or groups the frequent ones are kept, so that their counts may be a little low.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .collection import Collection
from .errors import GristmillError
from .manifest import Manifest, Rows
from .quarantine import Quarantine
from .rewrite import removed
from .tombstones import Tombstones

FRACTIONS = (0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99)
SIDES = (64, 128, 224, 256, 384, 512, 1024, 2048, 4096)  # pixels of the shorter side: bounds of the bins
ASPECTS = (1.05, 1.34, 1.51, 1.79, 2.01, 3.01)  # longer over shorter: bounds of the bins
_OCTAVE = 64


class Quantiles:
    """A histogram of positive numbers up to 2^48."""

    def __init__(self) -> None:
        self._bins = np.zeros(48 * _OCTAVE, np.int64)
        self.count, self.sum = 0, 0.0
        self.least, self.most = math.inf, 0.0

    def add(self, values: np.ndarray) -> None:
        """Take up values [n]."""
        if not len(values):
            return
        at = np.floor(np.log2(np.maximum(values, 1)) * _OCTAVE).astype(np.int64).clip(0, len(self._bins) - 1)
        self._bins += np.bincount(at, minlength=len(self._bins))
        self.count += len(values)
        self.sum += float(values.sum())
        self.least, self.most = min(self.least, float(values.min())), max(self.most, float(values.max()))

    def at(self, fraction: float) -> float:
        """The value below which this share of all lies, to within half a bin."""
        place = int(np.searchsorted(np.cumsum(self._bins), max(1, math.ceil(fraction * self.count))))
        return float(np.clip(2 ** ((place + 0.5) / _OCTAVE), self.least, self.most))

    def as_dict(self) -> dict[str, float]:
        """min, quantiles, max and mean; nothing for nothing."""
        if not self.count:
            return {}
        inner = {f"p{100 * fraction:g}": round(self.at(fraction)) for fraction in FRACTIONS}
        return {"min": round(self.least), **inner, "max": round(self.most), "mean": round(self.sum / self.count)}


@dataclass
class Census:
    """What was counted. Sizes in bytes and pixels."""

    samples: int = 0
    bytes: int = 0  # of the tars
    digests: dict[str, str] = field(default_factory=dict)  # of each data set
    formats: Counter[str] = field(default_factory=Counter)
    lengths: Quantiles = field(default_factory=Quantiles)
    widths: Quantiles = field(default_factory=Quantiles)
    heights: Quantiles = field(default_factory=Quantiles)
    sides: np.ndarray = field(default_factory=lambda: np.zeros(len(SIDES) + 1, np.int64))
    aspects: np.ndarray = field(default_factory=lambda: np.zeros(len(ASPECTS) + 1, np.int64))
    upright: Counter[str] = field(default_factory=Counter)  # landscape, portrait, square
    unsized: int = 0  # of shards that were indexed quickly
    undecoded: int = 0
    shard_samples: dict[str, float] = field(default_factory=dict)
    shard_bytes: dict[str, float] = field(default_factory=dict)
    shards: int = 0
    removed: Counter[str] = field(default_factory=Counter)  # with a tombstone, by reason
    erased: Counter[str] = field(default_factory=Counter)  # for good, by reason
    quarantine: Counter[str] | None = None  # by reason
    unreadable: list[str] = field(default_factory=list)  # shards whose rows cannot be read
    ledger: Any = None  # a shards.origins.Origins, where there is a ledger


def take_census(
    found: Collection, *, quarantine: Path | None = None, progress: Callable[[int, int], None] | None = None
) -> Census:
    """Count all of a collection. `quarantine`: a run's file; only what lies in these shards counts.

    `progress(done, total)` counts shards. Raises ManifestError, TombstoneError, QuarantineError and the like.
    """
    census = Census()
    manifests = [Manifest.open(part, cache_rows=0) for part in found.parts]
    counts = np.concatenate([manifest.counts for manifest in manifests])
    sizes = np.concatenate([manifest.shard_bytes for manifest in manifests])
    census.shards, census.samples, census.bytes = len(counts), int(counts.sum()), int(sizes.sum())
    census.shard_samples, census.shard_bytes = _spread(counts), _spread(sizes)
    done = 0
    for part, manifest in zip(found.parts, manifests, strict=True):
        census.digests[part.name] = manifest.digest
        for shard, url in enumerate(manifest.urls):
            try:
                _count(census, manifest.rows(shard))
            except GristmillError as error:
                census.unreadable.append(f"{found.name(part, url)}: {error}")
            done += 1
            if progress is not None:
                progress(done, len(counts))
        census.removed.update(reason for _, _, reason in Tombstones.of(manifest))
        census.erased.update(str(one["reason"]) for one in removed(part))
    if quarantine is not None:
        census.quarantine = Counter(_quarantined(quarantine, manifests))
    if found.ledger:
        from .origins import take_origins

        census.ledger = take_origins(found.root)
    return census


def _count(census: Census, rows: Rows) -> None:
    census.formats.update(str(kind) for kind in rows.format)
    census.lengths.add(rows.length)
    if not rows.deep:
        census.unsized += len(rows)
        return
    sized = (rows.width > 0) & (rows.height > 0)
    census.undecoded += int((~sized).sum())
    width, height = rows.width[sized].astype(np.int64), rows.height[sized].astype(np.int64)
    census.widths.add(width)
    census.heights.add(height)
    short, long = np.minimum(width, height), np.maximum(width, height)
    census.sides += np.bincount(np.searchsorted(SIDES, short, "right"), minlength=len(SIDES) + 1)
    census.aspects += np.bincount(
        np.searchsorted(ASPECTS, long / np.maximum(short, 1), "right"), minlength=len(ASPECTS) + 1
    )
    wide, high = int((width > height).sum()), int((width < height).sum())
    census.upright.update({"landscape": wide, "portrait": high, "square": len(width) - wide - high})


def _spread(values: np.ndarray) -> dict[str, float]:
    return {"min": int(values.min()), "median": float(np.median(values)), "max": int(values.max())}


def _quarantined(path: Path, manifests: list[Manifest]) -> Iterator[str]:
    """Reasons of what lies in these shards; a run over several data sets writes paths for urls."""
    file = path / "quarantine.jsonl" if path.is_dir() else path
    names = {url for manifest in manifests for url in manifest.urls}
    names |= {str(manifest.path(shard)) for manifest in manifests for shard in range(len(manifest.urls))}
    names |= {str(manifest.path(s).absolute()) for manifest in manifests for s in range(len(manifest.urls))}
    return (damaged.reason for damaged in Quarantine(file) if damaged.shard in names)
