"""Conditions on a run as a whole, in the order of alerts_run.py: ranks, progress, stragglers, checkpoints, disks."""

from statistics import median_low

from .flow import EXCESS, SLOW, computing_seconds, step_seconds
from .glyphs import duration, number, percent, size
from .scene import Condition, Scene

HISTORY = "it compares with hours that this view has not seen"

UNKNOWN = {
    "GristmillRunVanished": "it is about runs that nobody is told of any more",
    "GristmillStateStuck": "the state has to be the same for an hour",
    "GristmillRestartLoop": HISTORY,
    "GristmillThroughputDrop": HISTORY,
    "GristmillGoodputLow": HISTORY,
    "GristmillDiskFilling": HISTORY,
}


def _silent(scene: Scene) -> list[str]:
    silent = [rank for rank in scene.ranks if not rank.now]
    told = [f"rank {rank.name} does not answer" for rank in silent[:4]]
    if len(silent) > 4:
        told.append(f"nor do {len(silent) - 4} more")
    unknown = scene.run["ranks"]["expected"] - len(scene.ranks) if scene.complete else 0
    return told + ([f"{unknown} of {scene.run['ranks']['expected']} ranks have no target"] if unknown > 0 else [])


def _ranks_missing(scene: Scene, moving: float) -> list[str]:
    still = scene.standstill
    return [] if still is not None and still < moving else _silent(scene)


def _exporter_down(scene: Scene, moving: float) -> list[str]:
    still = scene.standstill
    return _silent(scene) if still is not None and still < moving else []


def _no_progress(scene: Scene, limit: float) -> list[str]:
    still = scene.standstill
    return [f"the last step was {duration(still)} ago"] if still is not None and still > limit else []


def _straggler(scene: Scene, ratio: float, excess: float) -> list[str]:
    spent = {rank.name: seconds for rank in scene.answering if (seconds := computing_seconds(rank)) is not None}
    step = max((step_seconds(rank) or 0.0 for rank in scene.answering), default=0.0)
    if len(spent) < 2 or not step:
        return []
    middle, slowest = median_low(spent.values()), max(spent, key=lambda name: spent[name])
    if not middle or spent[slowest] / middle <= ratio or spent[slowest] - middle <= excess * step:
        return []
    return [f"rank {slowest} computes {spent[slowest] / middle:.2f} × as long as the median"]


def _checkpoint_overdue(scene: Scene, intervals: float, grace: float) -> list[str]:
    saved = scene.run["checkpoint"]
    if not saved["every_images"] or saved["age_images"] is None:
        return []
    behind = saved["age_images"] / saved["every_images"]
    if behind <= intervals or (saved["age_seconds"] is not None and saved["age_seconds"] < grace):
        return []
    return [f"the last one is {behind:.1f} intervals and {duration(saved['age_seconds'])} old"]


def _checkpoint_failed(scene: Scene, window: float) -> list[str]:
    failed = max(
        (scene.increase(rank, "gristmill_checkpoints_total", window, result="failed") for rank in scene.answering),
        default=0.0,
    )
    return [f"{number(failed)} failed"] if failed > 0 else []


def _disk_full(scene: Scene, checkpoints: float, share: float, failed: float, window: float) -> list[str]:
    times = failed if _checkpoint_failed(scene, window) else checkpoints
    told, wanted = [], (scene.run["checkpoint"]["bytes"] or 0.0) * times
    for place, disk in scene.run["disks"].items():
        free, whole = disk["free_bytes"], disk["size_bytes"]
        full = place != "cache" and whole is not None and free < share * whole
        if full or (place == "checkpoints" and free < wanted):
            of = f", {percent(free / whole)}" if whole else ""
            told.append(f"{size(free)}{of} left for {place} of rank {disk['rank']}")
    return told


def _too_many_series(scene: Scene, limit: float) -> list[str]:
    counts = [sum(map(len, rank.now.values.values())) for rank in scene.answering if rank.now]
    mean = sum(counts) / len(counts) if counts else 0
    return [f"{number(round(mean))} series a rank"] if mean > limit else []


CONDITIONS = {
    "GristmillRanksMissing": Condition(_ranks_missing, (300,)),
    "GristmillExporterDown": Condition(_exporter_down, (300,)),
    "GristmillNoProgress": Condition(_no_progress, (900,)),
    "GristmillStraggler": Condition(_straggler, (SLOW, EXCESS)),
    "GristmillCheckpointOverdue": Condition(_checkpoint_overdue, (2.5, 1800)),
    "GristmillCheckpointFailed": Condition(_checkpoint_failed, (3600,)),
    "GristmillDiskFull": Condition(_disk_full, (1.5, 0.01, 5, 3600)),
    "GristmillTooManySeries": Condition(_too_many_series, (450,)),
}
