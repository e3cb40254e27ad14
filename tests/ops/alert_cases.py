"""What a run serves while all is well, and what is different when it is not: series for promtool, five minutes apart.

Every case is a run of its own in one and the same database, so that a thousand rule evaluations judge all of them at
once, and a rule that mixes runs up is found. Each goes well for four hours (ONSET); then something happens to it.
"""

import re
from functools import cache

STEP = 300  # seconds between two values
ONSET, COUNT = 48, 108  # the value with which things go wrong, and how many there are: nine hours
LEFT = COUNT - ONSET
STATES = ("starting", "restoring", "training", "probing", "checkpointing", "refreshing", "ending")
PHASES = {"data_wait": 3, "forward": 60, "backward": 90, "optimizer": 10, "verdict": 5, "checkpoint": 3, "probe": 2,
          "refresh": 0}  # fmt: skip
Values = tuple[float | str | None, ...]  # one every STEP seconds; None: nothing was scraped, STALE: the series ends
Series = dict[str, Values]  # by name and labels within the run
STALE = "stale"


def line(start: float, growth: float, count: int = COUNT) -> Values:
    return tuple(start + growth * i for i in range(count))


def flat(value: float, count: int = COUNT) -> Values:
    return (value,) * count


def none(count: int) -> Values:
    return (None,) * count


def then(value: float, before: float = 0.0) -> Values:
    """`before` until the onset, and `value` from there on."""
    return flat(before, ONSET) + flat(value, LEFT)


def bent(before: float, after: float, start: float = 0.0) -> Values:
    """A counter that grows by `before` a value until the onset, and by `after` from there on."""
    grown = line(start, before, ONSET)
    return grown + line(start + before * (ONSET - 1) + after, after, LEFT)


def cut(values: Values, at: int = ONSET) -> Values:
    """The first values, and then the series ends."""
    return (*values[:at], STALE)


def still(values: Values, at: int = ONSET) -> Values:
    """The first values, and the last of them from there on."""
    return values[:at] + (values[at - 1],) * (len(values) - at)


@cache
def written(values: Values) -> str:
    """As promtool reads them, runs of equal growth in short."""
    pieces: list[str] = []
    at = 0
    while at < len(values):
        start, end = values[at], at + 1
        if isinstance(start, float | int) and end < len(values) and isinstance(values[end], float | int):
            growth = float(values[end]) - start  # pyright: ignore[reportArgumentType]
            while end < len(values) and _near(values[end], start + growth * (end - at)):
                end += 1
            pieces.append(f"{start:.15g}{growth:+.15g}x{end - at - 1}")
        else:
            while end < len(values) and values[end] == start:
                end += 1
            pieces.append(f"_x{end - at}" if start is None else " ".join([str(start)] * (end - at)))
        at = end
    return " ".join(pieces)


def _near(value: float | str | None, wanted: float) -> bool:
    return isinstance(value, float | int) and abs(value - wanted) <= 1e-9 * max(1.0, abs(wanted))


def _everywhere() -> Series:
    """What each rank serves."""
    good = {
        "gristmill_world_size": flat(2),
        "gristmill_last_step_timestamp_seconds": line(0, STEP),
        "gristmill_steps_total": line(0, STEP),
        "gristmill_bad_steps_total": line(0, 0.01),
        "gristmill_rollbacks_total": flat(0),
        "gristmill_rank_own_seconds_total": line(0, 63),
        "gristmill_teacher_updates_total": line(0, STEP),
        "gristmill_teacher_fingerprint": line(7, 1),
        "gristmill_teacher_momentum": flat(0.996),
        "gristmill_progress_ratio": line(0.3, 0.002),
        "gristmill_position_samples": line(0, 180_000),
        "gristmill_read_samples_total": line(0, 90_000),
        "gristmill_substituted_samples_total": line(0, 9),
        "gristmill_read_bytes_total": line(0, 1e10),
        "gristmill_read_seconds_total": line(0, 40),
        "gristmill_storage_seconds_total": line(0, 18),
        "gristmill_storage_throttled_seconds_total": line(0, 1),
        'gristmill_storage_retries_total{reason="timeout"}': line(0, 2),
        'gristmill_storage_retries_total{reason="throttled"}': line(0, 1),
        "gristmill_cache_evicted_bytes_total": line(0, 9e9),
        "gristmill_cache_size_bytes": flat(9.8e11),
        "gristmill_cache_limit_bytes": flat(1e12),
        'gristmill_checkpoints_total{result="failed"}': flat(0),
        'gristmill_checkpoints_total{result="ok"}': line(0, 0.1),
        'gristmill_loss{objective="instance"}': line(4, -0.004),
        'gristmill_loss{objective="group"}': line(6, -0.006),
        'gristmill_loss_weight{objective="instance"}': flat(1),
        'gristmill_teacher_temperature{objective="group"}': flat(0.07),
    }
    for state in STATES:
        good[f'gristmill_state{{state="{state}"}}'] = flat(float(state == "training"))
    for phase, seconds in PHASES.items():
        good[f'gristmill_step_phase_seconds_total{{phase="{phase}"}}'] = line(0, seconds)
    for buffer in ("ready", "encoded"):
        good[f'gristmill_buffer_starved_seconds_total{{buffer="{buffer}"}}'] = line(0, 3)
        good[f'gristmill_buffer_blocked_seconds_total{{buffer="{buffer}"}}'] = line(0, 120)
    for place, free in (("run", 5e11), ("checkpoints", 5e12), ("cache", 1e9)):
        good[f'gristmill_disk_free_bytes{{place="{place}"}}'] = flat(free)
        good[f'gristmill_disk_size_bytes{{place="{place}"}}'] = flat(1e13 if place == "checkpoints" else 1e12)
    for (objective, name), value in SIGNS.items():
        good[health(objective, name)] = flat(value)
    memories = ("instance.queue", 1.0), ("swapped.queue0", 1.0), ("hierarchy.memory", 1.0), ("local_group.teacher", 7.0)
    for memory, norm in memories:
        good[f'gristmill_memory_norm_mean{{memory="{memory}"}}'] = flat(norm)
        good[f'gristmill_memory_fill_ratio{{memory="{memory}"}}'] = flat(1)
        good[f'gristmill_memory_age_steps{{memory="{memory}"}}'] = flat(8.5)
        good[f'gristmill_memory_expected_age_steps{{memory="{memory}"}}'] = flat(8)
        good[f'gristmill_memory_nonfinite_rows{{memory="{memory}"}}'] = flat(0)
    return good


# Signs of life as trained networks show them.
SIGNS = {
    ("group", "teacher_entropy_ratio"): 0.75,
    ("group", "batch_entropy_ratio"): 0.4,  # 64 crops of a rank on 65,536 prototypes can have no more
    ("patch", "teacher_entropy_ratio"): 0.9,
    ("patch", "batch_entropy_ratio"): 0.9,
    ("swapped", "code_entropy_ratio"): 0.85,
    ("swapped", "queue_in_use"): 1.0,
    ("swapped", "batch_entropy_ratio"): 1.0,
    ("swapped", "accuracy"): 0.3,
    ("instance", "positive_similarity"): 0.85,
    ("instance", "accuracy"): 0.7,
    ("dense", "positive_similarity"): 0.6,
    ("dense", "accuracy"): 0.2,
    ("dense", "correct"): 0.7,
    ("dense", "correct_by_chance"): 0.2,
    ("dense", "factor"): 1.0,
    ("local_group", "positive_similarity"): 0.8,
    ("local_group", "accuracy"): 0.1,
    ("local_group", "neighbour_unique_ratio"): 0.8,
    ("batch_contrast", "positive_similarity"): 0.99,  # as alike as a collapse, but told apart
    ("batch_contrast", "accuracy"): 0.9,
    ("hierarchy", "level0_reseeded"): 3.0,
    ("hierarchy", "ramp"): 1.0,
    ("bootstrap", "prediction_std"): 0.7,
    ("bootstrap", "target_std"): 0.75,
    ("clusters", "accuracy"): 0.5,
    ("clusters", "used"): 1.0,
}


def _first() -> Series:
    """What rank 0 alone serves."""
    good = {
        # A checkpoint each half hour.
        "gristmill_checkpoint_last_position_samples": line(-900_000, 180_000),
        "gristmill_checkpoint_every_samples": flat(1_800_000),
        "gristmill_checkpoint_last_success_timestamp_seconds": line(-900, STEP),
        "gristmill_checkpoint_size_bytes": flat(5e9),
        'gristmill_probe_ratio{who="teacher",probe="class_knn"}': flat(0.6),
        'gristmill_probe_ratio{who="random",probe="class_knn"}': flat(0.05),
        'gristmill_probe_ratio{who="random",probe="feature_std"}': flat(0.02),
        'gristmill_probe_ratio{who="teacher",probe="feature_std"}': flat(0.8),
        'gristmill_probe_ratio{who="teacher",probe="rank_me"}': flat(100),
    }
    for cause in ("killed", "signal", "error"):
        good[f'gristmill_interruptions_total{{cause="{cause}"}}'] = flat(0)
    for state, seconds in (("productive", 170), ("data_wait", 3), ("checkpoint", 4), ("probe", 3), ("lost", 0)):
        good[f'gristmill_wall_seconds_total{{state="{state}"}}'] = line(0, seconds)
    return good


def health(objective: str, name: str) -> str:
    return f'gristmill_objective_health{{objective="{objective}",name="{name}"}}'


TARGET = {'up{job="gristmill"}': flat(1), 'scrape_samples_scraped{job="gristmill"}': flat(280)}
EVERYWHERE, FIRST = _everywhere(), _first()
# What rank 1 has that differs from rank 0's, or is counted by rank; the rest would only make the test slower.
SECOND = {
    name: values
    for name, values in EVERYWHERE.items()
    if re.search("world|step|own|state|position|buffer|read|storage|substituted", name) and "memory" not in name
}
INGEST = {
    'up{job="gristmill-ingest"}': flat(1),
    "gristmill_ingest_inputs": flat(1e9),
    "gristmill_ingest_done_inputs": line(0, 1e5),
    'gristmill_ingest_items_total{outcome="kept"}': line(0, 6e4),
    'gristmill_ingest_items_total{outcome="duplicate"}': line(0, 1e4),
    'gristmill_ingest_items_total{outcome="gone"}': line(0, 3e4),
}


def labelled(name: str, run: str, rank: int | None) -> str:
    """The series with the labels of its target."""
    metric, _, own = name.rstrip("}").partition("{")
    place = f'rank="{rank}",node="n{rank}",' if rank is not None else ""
    port = 9464 + (rank or 0)
    return f'{metric}{{{own + "," if own else ""}run="{run}",{place}instance="{run}:{port}"}}'


def of_run(run: str, *changed: Series, ranks: tuple[Series, Series] = ({}, {})) -> Series:
    """A good run of two ranks but for what `changed` says for both, and `ranks` for each. () leaves a series out."""
    told: Series = {}
    for rank in (0, 1):
        mine = TARGET | (EVERYWHERE | FIRST if rank == 0 else SECOND)
        for change in changed:
            mine |= {name: values for name, values in change.items() if rank == 0 or name in mine}
        mine |= ranks[rank]
        told |= {labelled(name, run, rank): values for name, values in mine.items() if values}
    return told


def of_ingest(run: str, changed: Series) -> Series:
    return {labelled(name, run, None): values for name, values in (INGEST | changed).items() if values}
