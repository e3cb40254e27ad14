"""The way of the data through one rank, and which of several ranks holds up the others.

storage -> reader -> [encoded] -> augment -> [ready] -> step: stages are busy, buffers are filled, and at each buffer
either side may wait. Which stage limits the stream is the loader's own rule (pipeline/stats.py), fed with what its
exporter tells.
"""

from collections.abc import Mapping, Sequence
from statistics import median_low
from typing import Any

from ...pipeline.stats import Stats, bottleneck
from .labels import APART
from .reading import Rank

# A rank is called a straggler from so many times the median, and if it costs the others so much of a step. Of an even
# number of ranks the median is the lower of the two in the middle: of two ranks their mean would hide the slower one.
SLOW, EXCESS = 1.3, 0.1
HIDDEN = 0.02  # share of a step that it may wait for data before anything is to be done: prefetch hides the rest

WORDS = {
    "consumer": "the step itself: batches lie ready for it",
    "augment": "augmentation: encoded images lie ready for it, batches do not",
    "reader": "the reader: it is asked for more than it unpacks, and the storage keeps up",
    "storage": "the storage: most of reading is waiting for it",
    "none": "nothing was read in this time",
}
REMEDIES = {
    "augment": "raise stream.augment_threads, or augment on the GPU",
    "reader": "raise stream.reader_threads",
    "storage": "faster or nearer storage, a cache, or more threads that fetch ahead",
}


def data_wait(rank: Rank) -> float | None:
    """Share of the steps' time that was spent waiting for data; what comes now and then between them is left out."""
    seconds = _working(rank)
    return rank.grown("gristmill_step_phase_seconds_total", phase="data_wait") / seconds if seconds else None


def step_seconds(rank: Rank) -> float | None:
    """Seconds of a step without what comes now and then: checkpoints, probes, passes over the data."""
    steps = rank.grown("gristmill_steps_total")
    return _working(rank) / steps if steps else None


def _working(rank: Rank) -> float:
    spent = rank.grown_by("gristmill_step_phase_seconds_total", "phase")
    return sum(seconds for phase, seconds in spent.items() if phase not in APART)


def limits(rank: Rank) -> str:
    """The stage that limits this rank's stream: storage, reader, augment, consumer, or none."""
    ready, encoded = {"buffer": "ready"}, {"buffer": "encoded"}
    spent = Stats(
        starved_seconds=rank.grown("gristmill_buffer_starved_seconds_total", **ready),
        hungry_seconds=rank.grown("gristmill_buffer_starved_seconds_total", **encoded),
        blocked_seconds=rank.grown("gristmill_buffer_blocked_seconds_total", **ready),
        encoded_blocked_seconds=rank.grown("gristmill_buffer_blocked_seconds_total", **encoded),
        read_seconds=rank.grown("gristmill_read_seconds_total"),
        storage_seconds=rank.grown("gristmill_storage_seconds_total"),
        augment_seconds=rank.grown("gristmill_augment_seconds_total"),
    )
    return bottleneck(spent)


def flow(rank: Rank) -> list[dict[str, Any]]:
    """The stages and buffers of a rank in order. Ratios are shares of the time; a stage of several threads can exceed 1."""
    read, stored = rank.grown("gristmill_read_seconds_total"), rank.grown("gristmill_storage_seconds_total")
    wait = data_wait(rank)
    return [
        _stage("storage", rank, stored),
        _stage("reader", rank, max(read - stored, 0.0)),
        _buffer("encoded", rank),
        _stage("augment", rank, rank.grown("gristmill_augment_seconds_total")),
        _buffer("ready", rank),
        {"stage": "step", "kind": "stage", "busy_ratio": None if wait is None else max(1.0 - wait, 0.0)},
    ]


def _stage(name: str, rank: Rank, busy: float) -> dict[str, Any]:
    return {"stage": name, "kind": "stage", "busy_ratio": busy / rank.seconds if rank.seconds else None}


def _buffer(name: str, rank: Rank) -> dict[str, Any]:
    now = rank.now
    depth = now.one("gristmill_buffer_depth_batches", buffer=name) if now else None
    capacity = now.one("gristmill_buffer_capacity_batches", buffer=name) if now else None
    seconds = rank.seconds
    waited = {  # a wait is counted when it ends, so that one may be longer than the time looked at
        side: min(rank.grown(f"gristmill_buffer_{side}_seconds_total", buffer=name) / seconds, 1.0) if seconds else None
        for side in ("starved", "blocked")
    }
    return {
        "stage": name,
        "kind": "buffer",
        "depth": depth,
        "capacity": capacity,
        "fill_ratio": depth / capacity if depth is not None and capacity else None,
        "starved_ratio": waited["starved"],
        "blocked_ratio": waited["blocked"],
    }


def describe(ranks: Sequence[Rank]) -> dict[str, Any]:
    """The bottleneck of a run in words: that of the rank that waits longest for its data, since the others wait for it."""
    answering = [rank for rank in ranks if rank.now]
    if not answering:
        return {"stage": "none", "rank": None, "words": WORDS["none"], "remedy": None, "data_wait_ratio": None}
    worst = max(answering, key=lambda rank: data_wait(rank) or 0.0)
    stage, wait = limits(worst), data_wait(worst)
    words = WORDS[stage]
    if stage not in ("none", "consumer") and wait is not None:
        words += f"; the step waits {wait:.0%} of its time"
    remedy = REMEDIES.get(stage) if (wait or 0.0) > HIDDEN else None
    return {"stage": stage, "rank": worst.name, "words": words, "remedy": remedy, "data_wait_ratio": wait}


def own_seconds(rank: Rank) -> float | None:
    """Seconds of data wait and forward in a step.

    Nobody waits for other ranks there, but under ZeRO 3 and where an objective gathers rows for its loss.
    """
    if rank.now and rank.now.one("gristmill_rank_own_seconds_total") is not None:
        return rank.per_step("gristmill_rank_own_seconds_total")
    parts = [_phase(rank, phase) for phase in ("data_wait", "forward")]
    return None if None in parts else sum(part for part in parts if part is not None)


def computing_seconds(rank: Rank) -> float | None:
    """The same without waiting for data, which has alerts of its own."""
    own, wait = own_seconds(rank), _phase(rank, "data_wait")
    return None if own is None else max(own - (wait or 0.0), 0.0)


def _phase(rank: Rank, phase: str) -> float | None:
    return rank.per_step("gristmill_step_phase_seconds_total", phase=phase)


def straggler(ranks: Sequence[Rank]) -> dict[str, Any] | None:
    """The slowest rank against the median of all, and what it spends the time on; None for fewer than two ranks."""
    own = {rank.name: seconds for rank in ranks if (seconds := own_seconds(rank)) is not None}
    middle = median_low(own.values()) if len(own) > 1 else 0.0
    if not middle:
        return None
    slowest = max(own, key=lambda name: own[name])
    excess = {phase: _excess(ranks, slowest, phase) for phase in ("forward", "data_wait")}
    cause = max(excess, key=lambda phase: excess[phase])
    of = next(rank for rank in ranks if rank.name == slowest)
    step = max(step_seconds(rank) or 0.0 for rank in ranks)
    return {
        "rank": slowest,
        "node": of.labels.get("node"),
        "ratio": own[slowest] / middle,
        "own_seconds": own[slowest],
        "median_seconds": middle,
        "because": {"data_wait": "its data", "forward": "its computing"}[cause],
        "slow": own[slowest] / middle > SLOW and own[slowest] - middle > EXCESS * step,
    }


def _excess(ranks: Sequence[Rank], name: str, phase: str) -> float:
    """What a rank spends on a phase of a step above the median of all."""
    spent: Mapping[str, float] = {rank.name: _phase(rank, phase) or 0.0 for rank in ranks if rank.now}
    return spent[name] - median_low(spent.values())
