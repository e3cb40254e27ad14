"""What happens to runs: for each alert the series that make it fire, and much that must not make any fire."""

from .alert_cases import (
    COUNT,
    EVERYWHERE,
    FIRST,
    LEFT,
    ONSET,
    SECOND,
    SIGNS,
    STALE,
    STATES,
    STEP,
    TARGET,
    Series,
    bent,
    cut,
    flat,
    health,
    line,
    none,
    of_ingest,
    of_run,
    still,
    then,
)

SCRAPED = 'scrape_samples_scraped{job="gristmill"}'
UP = 'up{job="gristmill"}'
LAST = "gristmill_last_step_timestamp_seconds"
ALL = EVERYWHERE | FIRST


def phase(name: str) -> str:
    return f'gristmill_step_phase_seconds_total{{phase="{name}"}}'


def state(name: str) -> str:
    return f'gristmill_state{{state="{name}"}}'


def buffer(what: str) -> str:
    return f'gristmill_buffer_{what}_seconds_total{{buffer="encoded"}}'


def free(place: str) -> str:
    return f'gristmill_disk_free_bytes{{place="{place}"}}'


def size(place: str) -> str:
    return f'gristmill_disk_size_bytes{{place="{place}"}}'


def probe(name: str) -> str:
    return f'gristmill_probe_ratio{{who="teacher",probe="{name}"}}'


def memory(what: str, name: str = "instance.queue") -> str:
    return f'gristmill_memory_{what}{{memory="{name}"}}'


def frozen(at: int = ONSET) -> Series:
    """Counters and the last step stand still."""
    return {name: still(values, at) for name, values in ALL.items() if "_total" in name or name in (LAST, POSITION)}


def gone(names: Series, at: int = ONSET) -> Series:
    return {name: cut(values, at) for name, values in names.items()}


SAVED = "gristmill_checkpoint_last_success_timestamp_seconds"
POSITION = "gristmill_position_samples"
RETRIES = 'gristmill_storage_retries_total{reason="timeout"}'
PRODUCTIVE, LOST = (f'gristmill_wall_seconds_total{{state="{name}"}}' for name in ("productive", "lost"))
FAILED = 'gristmill_checkpoints_total{result="failed"}'
ERRORS = 'gristmill_interruptions_total{cause="error"}'
STANDS = bent(STEP, 0, start=-900)
STARVED = {
    phase("data_wait"): bent(3, 45),
    "gristmill_rank_own_seconds_total": bent(63, 105),
}
HUNGRY = STARVED | {buffer("starved"): bent(3, 60), buffer("blocked"): bent(120, 3)}
UNHEARD = gone(SECOND) | {UP: then(0, 1), SCRAPED: then(0, 280)}
ENDED = gone(TARGET | ALL)

# Alert -> the changes that make it fire (one run each), as arguments of of_run; and what may fire beside it, being masked.
BAD: dict[str, list[dict]] = {
    "GristmillRanksMissing": [
        {"both": {UP: then(0, 1), SCRAPED: then(0, 280)} | gone(ALL)},  # all of them died; their targets are still listed
        {"both": frozen(), "second": UNHEARD},  # one did, and the other waits for it
        {"both": {UP: then(0, 1), SCRAPED: then(0, 280)} | gone(ALL) | {state(name): () for name in STATES}},
    ],
    "GristmillExporterDown": [{"second": UNHEARD}],
    "GristmillRunVanished": [{"both": ENDED}],
    "GristmillNoProgress": [{"both": frozen()}],
    "GristmillStateStuck": [{"both": frozen() | {state("training"): then(0, 1), state("checkpointing"): then(1)}}],
    "GristmillRestartLoop": [
        {"both": {ERRORS: flat(0, ONSET) + flat(1, 8) + flat(2, 8) + flat(3, LEFT - 16)}},
    ],
    "GristmillThroughputDrop": [{"both": {"gristmill_steps_total": bent(STEP, 150)}}],
    "GristmillStraggler": [{"second": {"gristmill_rank_own_seconds_total": bent(63, 90)}}],
    "GristmillGoodputLow": [{"both": {PRODUCTIVE: bent(170, 80), LOST: bent(0, 90)}}],
    "GristmillCheckpointOverdue": [
        {"both": {
            SAVED: STANDS,
            "gristmill_checkpoint_last_position_samples": bent(180_000, 0, start=-900_000),
        }},
    ],
    "GristmillCheckpointFailed": [{"both": {FAILED: then(1)}}],
    "GristmillDiskFull": [
        {"both": {free("checkpoints"): then(6e9, 5e12)}},
        {"both": {free("run"): then(4e9, 5e11)}},
        # Room for four of the size that is known, and one of another size that did not fit.
        {"both": {free("checkpoints"): then(2e10, 9e11), size("checkpoints"): flat(1e12), FAILED: then(1)}},
    ],
    "GristmillDiskFilling": [{"both": {free("run"): bent(0, -1.5e9, start=2.5e11)}}],
    "GristmillTooManySeries": [{"both": {SCRAPED: then(500, 280)}}],
    "GristmillStarvedByStorage": [
        {"both": HUNGRY | {"gristmill_storage_seconds_total": bent(18, 150), "gristmill_read_seconds_total": bent(40, 160)}},
        {"second": HUNGRY | {"gristmill_storage_seconds_total": bent(18, 150), "gristmill_read_seconds_total": bent(40, 160)}},
    ],
    "GristmillStarvedByReader": [{"both": HUNGRY | {"gristmill_read_seconds_total": bent(40, 160)}}],
    "GristmillStarvedByAugmentation": [{"both": STARVED}],
    "GristmillStorageThrottled": [{"both": {"gristmill_storage_throttled_seconds_total": bent(1, 80)}}],
    "GristmillStorageRetries": [{"both": {RETRIES: bent(2, 40)}}],
    "GristmillCacheThrash": [{"both": {"gristmill_cache_evicted_bytes_total": bent(9e9, 6e10)}}],
    "GristmillDataDamaged": [{"both": {"gristmill_substituted_samples_total": bent(9, 80)}}],
    "GristmillBadSteps": [{"both": {"gristmill_bad_steps_total": bent(0, 2)}}],
    "GristmillRollback": [{"both": {"gristmill_rollbacks_total": then(1)}}],
    "GristmillLossSpike": [
        {"both": {'gristmill_loss{objective="instance"}': line(4, -0.004, ONSET) + flat(5, LEFT)}},
        *(  # one step whose loss was no number does not hide what comes after it
            {"both": {'gristmill_loss{objective="instance"}': (*line(4, -0.004, ONSET - 6), odd, *line(4, -0.004, 5), *flat(5, LEFT))}}
            for odd in ("NaN", "+Inf")
        ),
    ],
    "GristmillCollapseUniform": [
        {"both": {health("group", "teacher_entropy_ratio"): then(0.998, 0.75)}},
        {"both": {health("swapped", "code_entropy_ratio"): then(0.998, 0.85)}},
    ],
    "GristmillCollapseOneGroup": [
        {"both": {health("group", "batch_entropy_ratio"): then(0.001, 0.4)}},
        {"both": {health("patch", "batch_entropy_ratio"): then(0.001, 0.9)}},
    ],
    "GristmillCollapseContrast": [
        {"both": {health("instance", "positive_similarity"): then(0.9999, 0.85), health("instance", "accuracy"): then(0, 0.7)}},
        {"both": {health("dense", "positive_similarity"): then(0.9999, 0.6), health("dense", "accuracy"): then(0, 0.2)}},
    ],
    "GristmillCollapseBootstrap": [
        {"both": {health("bootstrap", "target_std"): then(0.01, 0.75)}},
        {"both": {health("bootstrap", "prediction_std"): then(0.01, 0.7)}},
    ],
    "GristmillContrastAtChance": [{"both": {health("instance", "accuracy"): then(0.0003, 0.7)}}],
    "GristmillPrototypesDead": [
        {"both": {health("clusters", "used"): then(0.4, 1)}},
        {"both": {health("hierarchy", "level0_reseeded"): then(900, 3)}},
    ],
    "GristmillNeighboursCollapsed": [{"both": {health("local_group", "neighbour_unique_ratio"): then(0.016, 0.8)}}],
    "GristmillMatchesAtChance": [{"both": {health("dense", "correct"): then(0.2, 0.7)}}],
    "GristmillFeaturesCollapsed": [
        {"both": {probe("feature_std"): then(0.01, 0.8)}},
        {"both": {probe("rank_me"): then(1.2, 100)}},
    ],
    "GristmillProbeFell": [{"both": {probe("class_knn"): then(0.3, 0.6)}}],
    "GristmillTeacherFrozen": [
        {"both": {"gristmill_teacher_fingerprint": bent(1, 0)}},
        {"both": {"gristmill_teacher_updates_total": bent(STEP, 0)}},
    ],
    "GristmillQueueStale": [{"both": {memory("age_steps"): bent(0, 1, start=8.5)}}],
    "GristmillQueueNotUnit": [
        {"both": {memory("norm_mean"): then(1.2, 1)}},
        {"both": {memory("norm_mean", "swapped.queue0"): then(0.5, 1)}},
    ],
    "GristmillMemoryNotFinite": [{"second": {memory("nonfinite_rows"): then(3)}}],
}  # fmt: skip
# Of the same cause, and masked by it; nothing else may fire.
BESIDE = {
    ("GristmillRanksMissing", 1): {"GristmillNoProgress"},
    ("GristmillDiskFull", 0): {"GristmillDiskFilling"},
    ("GristmillDiskFull", 1): {"GristmillDiskFilling"},
    ("GristmillDiskFull", 2): {"GristmillDiskFilling", "GristmillCheckpointFailed"},
}
BAD_INGEST: dict[str, list[Series]] = {
    "GristmillIngestRejects": [
        {
            'gristmill_ingest_items_total{outcome="kept"}': bent(6e4, 2e4),
            'gristmill_ingest_items_total{outcome="gone"}': bent(3e4, 7e4),
        },
        {
            'gristmill_ingest_items_total{outcome="kept"}': bent(6e4, 0),
            'gristmill_ingest_items_total{outcome="duplicate"}': bent(1e4, 0),
            'gristmill_ingest_items_total{outcome="no_host"}': bent(0, 1e5),
        },
    ],
    "GristmillIngestStalled": [{"gristmill_ingest_done_inputs": still(line(0, 1e5))}],
    "GristmillIngestDown": [
        {'up{job="gristmill-ingest"}': then(0, 1), "gristmill_ingest_done_inputs": cut(line(0, 1e5)),
         "gristmill_ingest_inputs": cut(flat(1e9))},
    ],
}  # fmt: skip


def _counted(name: str) -> bool:
    """A counter of the process, which begins at zero with it."""
    return "_total" in name and not name.startswith(("gristmill_wall", "gristmill_interruptions"))


def late(names: Series, at: int = ONSET) -> Series:
    """As they begin with a run that begins now: counters at zero, the rest as at the start of a good run."""
    return {name: none(at) + values[: COUNT - at] for name, values in names.items()}


def again(names: Series, gap: int = 3) -> Series:
    """As they go on after a restart that took `gap` values: counters of the process from zero, the rest where it was."""
    told = {}
    for name, values in names.items():
        onward = values[: LEFT - gap] if _counted(name) else values[ONSET + gap :]
        told[name] = cut(values) + none(gap - 1) + onward
    return told


def while_in(name: str, count: int) -> Series:
    """In another state than training for `count` values, steps standing still meanwhile, and wall time going on."""
    told = {
        state("training"): flat(1, ONSET) + flat(0, count) + flat(1, LEFT - count),
        state(name): flat(0, ONSET) + flat(1, count) + flat(0, LEFT - count),
    }
    for each in frozen():
        if not each.startswith("gristmill_wall"):
            values = ALL[each]
            onward = values[ONSET + count :] if each == LAST else values[ONSET : COUNT - count]
            told[each] = still(values[: ONSET + count]) + onward
    return told


_AT_START = {name: values for name, values in ALL.items() if "_total" not in name and "world_size" not in name}
# A network at its start: no two images told apart yet, queues of noise, temperature and losses on their way up.
WARMING = {
    "gristmill_progress_ratio": line(0, 0.0002),
    **{health(objective, name): flat(0.999) for objective, name in SIGNS if "entropy" in name or "similarity" in name},
    **{health(objective, name): flat(0.0) for objective, name in SIGNS if name in ("accuracy", "factor", "ramp")},
    health("group", "batch_entropy_ratio"): flat(0.01),
    health("bootstrap", "target_std"): flat(0.05),
    health("local_group", "neighbour_unique_ratio"): flat(0.016),
    health("dense", "correct"): flat(0.2),
    health("hierarchy", "level0_reseeded"): flat(700),
    probe("feature_std"): flat(0.02),
    'gristmill_loss{objective="group"}': bent(0.0, 0.05, start=4),
    'gristmill_teacher_temperature{objective="group"}': bent(0, 0.0003, start=0.04),
    memory("fill_ratio"): line(0, 0.004),
    memory("age_steps"): line(0, 0.05),
}
QUIET: dict[str, dict] = {
    "good": {},
    "warming": {"both": WARMING},
    "scheduled": {  # a temperature and a loss that rise later on, a ramp that begins
        "both": {
            'gristmill_loss{objective="group"}': bent(0, 0.02, start=4),
            'gristmill_teacher_temperature{objective="group"}': bent(0, 0.0001, start=0.04),
        }
    },
    "clustering": {"both": {'gristmill_loss{objective="clusters"}': then(9, 3)}},
    "started": {  # no step before the fourth value, and what shows with the first step comes with it
        "both": late(TARGET | ALL)
        | {name: none(ONSET + 4) + values[: LEFT - 4] for name, values in _AT_START.items()}
        | {state("starting"): none(ONSET) + flat(1, 4) + flat(0, LEFT - 4)}
        | {state("training"): none(ONSET) + flat(0, 4) + flat(1, LEFT - 4)}
        | {LAST: none(ONSET + 4) + ALL[LAST][ONSET + 4 :]}
        | {SAVED: none(ONSET + 4) + ALL[SAVED][ONSET + 4 :]}
    },
    "finished": {"both": ENDED | {"gristmill_progress_ratio": cut(line(1 - 0.005 * (ONSET - 0.7), 0.005))}},
    "stopped": {  # asked to stop, and seen to end
        "both": ENDED | {state("ending"): (*flat(0, ONSET - 1), 1, STALE), state("training"): (*flat(1, ONSET - 1), 0, STALE)}
    },
    "restarted": {
        "both": again(ALL)
        | {UP: flat(1, ONSET) + flat(0, 1) + flat(1, LEFT - 1)}  # three minutes without an answer
        | {ERRORS: cut(flat(0)) + none(2) + flat(1, LEFT - 3)}
    },
    "probing": {"both": while_in("probing", 10)},
    "refreshing": {"both": while_in("refreshing", 40)},
    "one bad step": {"both": {"gristmill_bad_steps_total": then(1), 'gristmill_loss{objective="instance"}':
                     (*line(4, -0.004, ONSET), "NaN", *line(3.6, -0.004, LEFT - 1))}},
    "at the end": {"both": {"gristmill_teacher_momentum": then(0.9999999, 0.99999), "gristmill_teacher_fingerprint": flat(3)}},
    "on more ranks": {"both": {"gristmill_world_size": then(2, 1), "gristmill_steps_total": bent(STEP, 150)},
                      "second": late(TARGET | SECOND) | {"gristmill_world_size": none(ONSET) + flat(2, LEFT),
                                 "gristmill_steps_total": none(ONSET) + line(0, 150, LEFT)}},
    "cache grows": {"both": {"gristmill_cache_size_bytes": line(0, 1e9), free("run"): line(3e11, -1e9)}},
    "disk saws": {"both": {free("checkpoints"): (line(2.9e12, -5e9, 9) * COUNT)[:COUNT]}},
    "no memory": {"both": {name: () for name in EVERYWHERE if "memory" in name or "cache" in name}},
    "no probes": {"both": {name: () for name in FIRST if "probe" in name}},
}  # fmt: skip


def cases() -> dict[str, tuple[Series, set[str]]]:
    """Run -> its series, and the alerts that fire for it at some time."""
    found: dict[str, tuple[Series, set[str]]] = {}
    for alert, changes in BAD.items():
        for number, change in enumerate(changes):
            run = f"{alert}-{number}"
            found[run] = _told(run, change), {alert, *BESIDE.get((alert, number), ())}
    for alert, ingests in BAD_INGEST.items():
        for number, changed in enumerate(ingests):
            found[f"{alert}-{number}"] = of_ingest(f"{alert}-{number}", changed), {alert}
    for run, change in QUIET.items():
        found[run] = _told(run, change), set()
    found["good ingest"] = of_ingest("good ingest", {}), set()
    through = {"gristmill_ingest_inputs": cut(flat(4.85e6)), "gristmill_ingest_done_inputs": cut(line(1e5, 1e5))}
    found["ingest through"] = of_ingest("ingest through", through | {'up{job="gristmill-ingest"}': then(0, 1)}), set()
    return found


def _told(run: str, change: dict) -> Series:
    return of_run(run, change.get("both", {}), ranks=({}, change.get("second", {})))
