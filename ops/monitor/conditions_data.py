"""Conditions on the way of the data, in the order of alerts_data.py: what starves the step, the storage, the cache, damage.

The rank that waits most for data is judged, as the alerts do, and exactly one of its three stages is named.
"""

from .flow import data_wait
from .glyphs import number, percent
from .reading import Rank
from .scene import Condition, Scene

INGEST = "it is about an ingest, and this view is about training"

UNKNOWN = {"GristmillIngestRejects": INGEST, "GristmillIngestStalled": INGEST, "GristmillIngestDown": INGEST}


def _lag(rank: Rank) -> float:
    """Seconds that augmentation waited for the reader, less those that the reader waited for room."""
    starved = rank.grown("gristmill_buffer_starved_seconds_total", buffer="encoded")
    return starved - rank.grown("gristmill_buffer_blocked_seconds_total", buffer="encoded")


def _in_storage(rank: Rank, share: float) -> bool:
    return rank.grown("gristmill_storage_seconds_total") > share * rank.grown("gristmill_read_seconds_total")


def _worst(scene: Scene, limit: float) -> tuple[Rank, list[str]] | None:
    """The rank that waits longest for data, if that is too long, and the words for it."""
    waits = {rank.name: data_wait(rank) or 0.0 for rank in scene.answering}
    if not waits or max(waits.values()) <= limit:
        return None
    worst = max(scene.answering, key=lambda rank: waits[rank.name])
    return worst, [f"rank {worst.name} waits {percent(waits[worst.name])} of its steps for data"]


def _storage(scene: Scene, limit: float, share: float) -> list[str]:
    found = _worst(scene, limit)
    return found[1] if found and _lag(found[0]) > 0 and _in_storage(found[0], share) else []


def _reader(scene: Scene, limit: float, share: float) -> list[str]:
    found = _worst(scene, limit)
    return found[1] if found and _lag(found[0]) > 0 and not _in_storage(found[0], share) else []


def _augmentation(scene: Scene, limit: float) -> list[str]:
    found = _worst(scene, limit)
    return found[1] if found and _lag(found[0]) <= 0 else []


def _throttled(scene: Scene, limit: float, window: float) -> list[str]:
    rates = [scene.rate(rank, "gristmill_storage_throttled_seconds_total", window) for rank in scene.answering]
    mean = sum(rates) / len(rates) if rates else 0.0
    return [f"reads wait their turn for {percent(mean)} of the time"] if mean > limit else []


def _retries(scene: Scene, limit: float, window: float) -> list[str]:
    rates = [
        scene.rate(rank, "gristmill_storage_retries_total", window, reason=reason)
        for rank in scene.answering
        for reason in (rank.now.by("gristmill_storage_retries_total", "reason") if rank.now else ())
    ]
    mean = sum(rates) / len(scene.answering) if rates else 0.0
    return [f"{number(round(mean * 60, 1))} requests a minute are repeated by each rank"] if mean > limit else []


def _thrash(scene: Scene, limit: float, window: float) -> list[str]:
    evicted = sum(scene.increase(rank, "gristmill_cache_evicted_bytes_total", window) for rank in scene.answering)
    read = sum(scene.increase(rank, "gristmill_read_bytes_total", window) for rank in scene.answering)
    return [f"{evicted / read:.1f} × the bytes read are thrown away"] if read and evicted / read > limit else []


def _damaged(scene: Scene, limit: float, least: float, window: float) -> list[str]:
    bad = sum(scene.increase(rank, "gristmill_substituted_samples_total", window) for rank in scene.answering)
    read = sum(scene.increase(rank, "gristmill_read_samples_total", window) for rank in scene.answering)
    return [f"{number(bad)} of {number(read)} samples were damaged"] if bad > least and bad > limit * read else []


CONDITIONS = {
    "GristmillStarvedByStorage": Condition(_storage, (0.15, 0.5)),
    "GristmillStarvedByReader": Condition(_reader, (0.15, 0.5)),
    "GristmillStarvedByAugmentation": Condition(_augmentation, (0.15,)),
    "GristmillStorageThrottled": Condition(_throttled, (0.2, 900)),
    "GristmillStorageRetries": Condition(_retries, (0.1, 900)),
    "GristmillCacheThrash": Condition(_thrash, (2, 1800)),
    "GristmillDataDamaged": Condition(_damaged, (0.0005, 10, 3600)),
}
