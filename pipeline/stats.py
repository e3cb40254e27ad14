"""Counters of the loader, and what they say about where the time goes.

At each buffer either side may wait: the one behind it for an item, the one before it for room. Whoever is waited for
more than it waits itself limits the stream. A consumer whose batches lie ready is itself the limit; else it is the
augmentation if encoded images lie ready for it; else the storage, where most of a read is spent in calls to it, or the
reader's own work.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

Stage = Literal["storage", "reader", "augment", "consumer", "none"]


@dataclass
class Stats:
    """Counters since the loader was made. Depth and capacity are in batches."""

    samples: int = 0  # delivered
    bytes: int = 0  # encoded, of delivered samples
    substituted: int = 0  # delivered in place of damaged ones
    removed: int = 0  # delivered in place of removed ones
    quarantined: int = 0  # in the quarantine now, from earlier runs too
    ready_depth: int = 0
    ready_capacity: int = 0
    encoded_depth: int = 0
    encoded_capacity: int = 0
    dwell_seconds: float = 0.0  # delivered batches had lain ready, together
    encoded_dwell_seconds: float = 0.0  # and encoded before that
    starved_seconds: float = 0.0  # the consumer waited for a batch
    hungry_seconds: float = 0.0  # the augmenting thread waited for encoded samples
    blocked_seconds: float = 0.0  # the augmenting thread waited for room
    encoded_blocked_seconds: float = 0.0  # the reading thread waited for room
    read_seconds: float = 0.0
    storage_seconds: float = 0.0  # of these, in calls to disk or network
    augment_seconds: float = 0.0

    def since(self, before: Stats) -> Stats:
        """The growth of every number since then."""
        return Stats(*(getattr(self, field.name) - getattr(before, field.name) for field in fields(self)))


def bottleneck(spent: Stats) -> Stage:
    """The stage that limits the stream, by the growth of the counters over some time (`now.since(before)`).

    "none" if nothing happened yet. What is in progress is only counted when it ends.
    """
    if not spent.augment_seconds + spent.read_seconds:
        return "none"
    if spent.blocked_seconds >= spent.starved_seconds:
        return "consumer"
    if spent.encoded_blocked_seconds >= spent.hungry_seconds:
        return "augment"
    return "storage" if spent.storage_seconds > spent.read_seconds / 2 else "reader"
