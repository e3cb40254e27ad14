"""What `gristmill status` knows of one run, as plain numbers and names: the JSON that scripts read and the view draws.

Keys are stable (docs/watch.md lists them): new ones may come, none goes or changes its meaning. A number that a run does
not have (no cache, no GPU, no probe yet) is null or its group is empty. What differs between ranks is told by rank; what
is the same for all is taken from the lowest rank that answers.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from . import flow
from .reading import Rank, Reading

SCHEDULES = ("learning_rate", "weight_decay", "teacher_momentum", "teacher_temperature", "gradient_norm")
MEMORY = {
    "fill": "fill_ratio", "age": "age_steps", "expected_age": "expected_age_steps", "norm": "norm_mean",
    "nonfinite": "nonfinite_rows", "bytes": "size_bytes",
}  # fmt: skip


def summarize(name: str, ranks: Sequence[Rank], notes: Iterable[str] = ()) -> dict[str, Any]:
    """One run. Rates are of the time between the ranks' two answers, else of their whole processes."""
    ranks = sorted(ranks, key=lambda rank: rank.order)
    answering = [rank for rank in ranks if rank.now]
    if not any(rank.before and rank.grown("gristmill_steps_total") for rank in answering):
        answering = [rank.whole() for rank in answering]  # nothing happened meanwhile: it says more than 0/0
    seen = {(rank.url, rank.name): rank for rank in answering}
    lead = next(iter(answering), Rank("", now=Reading()))
    now = lead.now or Reading()
    waits = flow.describe(answering)
    shown = next((rank for rank in answering if rank.name == waits["rank"]), lead)
    return {
        "run": next(
            (rank.labels["run"] for rank in ranks if "run" in rank.labels), now.info().get("run") or name or "?"
        ),
        "facts": {"recipe" if k == "run" else k: v for k, v in now.info().items()},
        "notes": list(notes),
        "state": next((state for state, on in now.by("gristmill_state", "state").items() if on == 1), None),
        "window_seconds": lead.seconds if lead.before else None,
        "ranks": {
            "expected": max(_count(now.one("gristmill_world_size")), len(ranks)),
            "answering": len(answering),
            "list": [_rank(rank, seen.get((rank.url, rank.name), rank)) for rank in ranks],
        },
        "progress": _progress(lead),
        "bottleneck": waits,
        "flow": flow.flow(shown),
        "straggler": flow.straggler(answering),
        "phases": _shares(lead.grown_by("gristmill_step_phase_seconds_total", "phase")),
        "loss": {"all": now.one("gristmill_mixture_loss"), **now.by("gristmill_loss", "objective")},
        "weights": now.by("gristmill_loss_weight", "objective"),
        "signs": now.pairs("gristmill_objective_health", "objective", "name"),
        "schedules": {name: now.one(f"gristmill_{name}") for name in SCHEDULES},
        "teacher": {
            "updates": now.one("gristmill_teacher_updates_total"),
            "distance_ratio": now.one("gristmill_teacher_distance_ratio"),
        },
        "guard": {
            "bad_steps": now.one("gristmill_bad_steps_total"),
            "bad_in_a_row": now.one("gristmill_bad_steps_in_a_row"),
            "rollbacks": now.one("gristmill_rollbacks_total"),
            "clipped": now.one("gristmill_gradient_clipped_total"),
        },
        "memories": memories(now),
        "probes": now.pairs("gristmill_probe_ratio", "probe", "who"),
        "data": _data(answering),
        "disks": _disks(answering),
        "machine": {
            "resident_bytes": _most(answering, "process_resident_memory_bytes"),
            "cuda_bytes": {
                kind: _most(answering, "gristmill_cuda_memory_bytes", kind=kind)
                for kind in now.by("gristmill_cuda_memory_bytes", "kind")
            },
        },
        "checkpoint": _checkpoint(lead),
        "goodput": _goodput(now),
    }


def _rank(rank: Rank, seen: Rank) -> dict[str, Any]:
    """seen: the same over the time that growths are taken over."""
    return {
        "rank": rank.name,
        "node": rank.labels.get("node"),
        "url": rank.url,
        "answers": rank.now is not None,
        "why": rank.why,
        "step": rank.now.one("gristmill_step") if rank.now else None,
        "last_step_age_seconds": rank.now.age("gristmill_last_step_timestamp_seconds") if rank.now else None,
        "own_seconds": flow.own_seconds(seen) if rank.now else None,
        "data_wait_ratio": flow.data_wait(seen) if rank.now else None,
        "limited_by": flow.limits(seen) if rank.now else None,
    }


def _progress(rank: Rank) -> dict[str, Any]:
    now = rank.now or Reading()
    steps, seconds = rank.grown("gristmill_steps_total"), rank.grown("gristmill_step_seconds_sum")
    rate = rank.grown("gristmill_images_total") / seconds if seconds else None
    position, images, ratio = (
        now.one(f"gristmill_{name}") for name in ("position_samples", "run_images", "progress_ratio")
    )
    if images is None and ratio and position is not None:
        images = position / ratio
    left = max(images - position, 0.0) if images is not None and position is not None else None
    return {
        "ratio": ratio,
        "step": now.one("gristmill_step"),
        "position": position,
        "images": images,
        "images_per_second": rate,
        "step_seconds": seconds / steps if steps else None,
        "eta_seconds": left / rate if left is not None and rate else None,
        "last_step_age_seconds": now.age("gristmill_last_step_timestamp_seconds"),
    }


def memories(now: Reading) -> dict[str, dict[str, float]]:
    """What one rank tells of its memories, by name; the keys are those of MEMORY."""
    found: dict[str, dict[str, float]] = {}
    for what, metric in MEMORY.items():
        for memory, value in now.by(f"gristmill_memory_{metric}", "memory").items():
            found.setdefault(memory, {})[what] = value
    return found


def _data(ranks: Sequence[Rank]) -> dict[str, Any]:
    hits, misses = (sum(rank.grown(f"gristmill_cache_{what}_total") for rank in ranks) for what in ("hits", "misses"))
    retries: dict[str, float] = {}
    for rank in ranks:
        for reason, count in (rank.now.by("gristmill_storage_retries_total", "reason") if rank.now else {}).items():
            retries[reason] = retries.get(reason, 0.0) + count
    return {
        "samples": _sum(ranks, "gristmill_read_samples_total"),
        "bytes": _sum(ranks, "gristmill_read_bytes_total"),
        "substituted": _sum(ranks, "gristmill_substituted_samples_total"),
        "removed": _sum(ranks, "gristmill_removed_samples_total"),
        "quarantined": _most(ranks, "gristmill_quarantined_samples"),
        "retries": retries,
        "throttled_seconds": _sum(ranks, "gristmill_storage_throttled_seconds_total"),
        "cache": {
            "hit_ratio": hits / (hits + misses) if hits + misses else None,
            "evicted_bytes": _sum(ranks, "gristmill_cache_evicted_bytes_total"),
            "bytes": _most(ranks, "gristmill_cache_size_bytes"),
            "limit_bytes": _most(ranks, "gristmill_cache_limit_bytes"),
        },
    }


def _disks(ranks: Sequence[Rank]) -> dict[str, dict[str, Any]]:
    """By place, the disk with the least room."""
    found: dict[str, dict[str, Any]] = {}
    for rank in ranks:
        sizes = rank.now.by("gristmill_disk_size_bytes", "place") if rank.now else {}
        for place, free in (rank.now.by("gristmill_disk_free_bytes", "place") if rank.now else {}).items():
            if place not in found or free < found[place]["free_bytes"]:
                found[place] = {"free_bytes": free, "size_bytes": sizes.get(place), "rank": rank.name}
    return found


def _checkpoint(rank: Rank) -> dict[str, Any]:
    now = rank.now or Reading()
    position, last, every = (
        now.one(f"gristmill_{name}")
        for name in ("position_samples", "checkpoint_last_position_samples", "checkpoint_every_samples")
    )
    since = max(position - last, 0.0) if position is not None and last is not None else None
    results = now.by("gristmill_checkpoints_total", "result")
    return {
        "age_seconds": now.age("gristmill_checkpoint_last_success_timestamp_seconds"),
        "age_images": since,
        "every_images": every,
        "bytes": now.one("gristmill_checkpoint_size_bytes"),
        "ok": results.get("ok", 0.0),
        "failed": results.get("failed", 0.0),
    }


def _goodput(now: Reading) -> dict[str, Any]:
    spent = now.by("gristmill_wall_seconds_total", "state")
    return {
        "ratio": _shares(spent).get("productive"),
        "seconds": spent,
        "attempts": now.one("gristmill_attempts"),
        "interruptions": now.by("gristmill_interruptions_total", "cause"),
    }


def _shares(spent: Mapping[str, float]) -> dict[str, float]:
    total = sum(spent.values())
    return {name: part / total for name, part in spent.items()} if total > 0 else {}


def _count(value: float | None) -> int:
    return int(value) if value is not None and 0 <= value < 1e9 else 0


def _sum(ranks: Sequence[Rank], name: str) -> float | None:
    found = [value for rank in ranks if rank.now and (value := rank.now.one(name)) is not None]
    return sum(found) if found else None


def _most(ranks: Sequence[Rank], name: str, **labels: str) -> float | None:
    found = [value for rank in ranks if rank.now and (value := rank.now.one(name, **labels)) is not None]
    return max(found, default=None)
