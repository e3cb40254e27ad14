"""Alerts on the way of the data: which part starves the step, the storage, the cache, damage, and an ingest.

At each buffer either side may wait, and whoever is waited for more than it waits itself limits the stream
(pipeline/stats.py). The rank that waits most for data is judged, since all others wait for it, and exactly one of the
three stages is named.
"""

from .alert import EACH, Alert, Record
from .alerts_run import SLOWED, STARVED, WORK

WORST = "topk by (run) (1, rank:gristmill_data_wait:ratio) > 0.15"
LATE = f"and on ({EACH}) rank:gristmill_reader_lag:ratio > 0"
IN_STORAGE = f"on ({EACH}) rank:gristmill_reader_storage:ratio > 0.5"
RANKS = "count by (run) (gristmill_world_size)"
# What an ingest takes, and what it leaves out because it was asked to; all else is a failure of sources or network.
FINE = 'outcome!~"kept|duplicate|near_duplicate|filtered|opted_out"'
ITEMS = "gristmill_ingest_items_total"


def _rejected(window: str) -> str:
    bad = f"sum by (run, instance) (rate({ITEMS}{{{FINE}}}{window}))"
    return f"({bad} / sum by (run, instance) (rate({ITEMS}{window})))"


NOW = _rejected("[$900s]")


RECORDS: tuple[Record, ...] = (
    Record(
        "rank:gristmill_data_wait:ratio",
        f'sum by ({EACH}) (rate(gristmill_step_phase_seconds_total{{phase="data_wait"}}[$600s]))'
        f" / sum by ({EACH}) (rate(gristmill_step_phase_seconds_total{{{WORK}}}[$600s]))",
    ),
    # Share of the time for which augmentation waits for the reader, less that for which the reader waits for room.
    Record(
        "rank:gristmill_reader_lag:ratio",
        f'sum by ({EACH}) (rate(gristmill_buffer_starved_seconds_total{{buffer="encoded"}}[$600s]))'
        f' - sum by ({EACH}) (rate(gristmill_buffer_blocked_seconds_total{{buffer="encoded"}}[$600s]))',
    ),
    Record(
        "rank:gristmill_reader_storage:ratio",
        f"sum by ({EACH}) (rate(gristmill_storage_seconds_total[$600s]))"
        f" / sum by ({EACH}) (rate(gristmill_read_seconds_total[$600s]))",
    ),
)

ALERTS: tuple[Alert, ...] = (
    Alert(
        "GristmillStarvedByStorage",
        "warn",
        f"max by (run) ({WORST} {LATE} and {IN_STORAGE})",
        "More than 15 % of a step is spent waiting for data, and the storage is what is slow.",
        "A slow or shared file system, a far object store, or a cache that is too small.",
        hold=900,
        keep=600,
        value="ratio",
        masks=SLOWED,
    ),
    Alert(
        "GristmillStarvedByReader",
        "warn",
        f"max by (run) ({WORST} {LATE} unless {IN_STORAGE})",
        "More than 15 % of a step is spent waiting for data, and the reader itself is what is slow.",
        "Too few processor cores for reading, or shards of very many small members.",
        hold=900,
        keep=600,
        value="ratio",
        masks=SLOWED,
    ),
    Alert(
        "GristmillStarvedByAugmentation",
        "warn",
        f"max by (run) ({WORST} unless on ({EACH}) rank:gristmill_reader_lag:ratio > 0)",
        "More than 15 % of a step is spent waiting for data, and decoding and augmentation are what is slow.",
        "Too few threads for the recipe's crops, or images much larger than the crops.",
        hold=900,
        keep=600,
        value="ratio",
        masks=SLOWED,
    ),
    Alert(
        "GristmillStorageThrottled",
        "warn",
        "avg by (run) (rate(gristmill_storage_throttled_seconds_total[$900s])) > 0.2",
        "Reads wait for their turn for more than a fifth of the time, because the store asks to be spared.",
        "Too many ranks for the store's request limit, or a limit that other jobs use up.",
        hold=900,
        keep=600,
        value="ratio",
        masks=("GristmillStorageRetries", "GristmillStarvedByStorage", *SLOWED),
    ),
    Alert(
        "GristmillStorageRetries",
        "warn",
        f"sum by (run) (rate(gristmill_storage_retries_total[$900s])) / {RANKS} > 0.1",
        "Each rank repeats more than six requests a minute.",
        "An overloaded or failing store, or a bad network path.",
        hold=900,
        keep=600,
        masks=("GristmillStarvedByStorage", *SLOWED),
    ),
    Alert(
        "GristmillCacheThrash",
        "warn",
        "sum by (run) (rate(gristmill_cache_evicted_bytes_total[$1800s]))"
        " / sum by (run) (rate(gristmill_read_bytes_total[$1800s])) > 2",
        "The cache throws away more than twice as many bytes as are read from it: shards are fetched again and again.",
        "The cache is smaller than what the ranks of a node have in use at once.",
        hold=1800,
        keep=1800,
        masks=("GristmillStorageThrottled", "GristmillStorageRetries", "GristmillStarvedByStorage", *SLOWED),
    ),
    Alert(
        "GristmillDataDamaged",
        "warn",
        "sum by (run) (increase(gristmill_substituted_samples_total[$3600s]))"
        " / sum by (run) (increase(gristmill_read_samples_total[$3600s])) > 0.0005"
        " and on (run) sum by (run) (increase(gristmill_substituted_samples_total[$3600s])) > 10",
        "More than one sample in two thousand was damaged and replaced; at one in a thousand the run stops.",
        "Shards are damaged on the storage or on the way.",
        value="ratio",
    ),
    Alert(
        "GristmillIngestRejects",
        "warn",
        f"{NOW} > 0.2 and on (run, instance) {NOW} > 2 * {_rejected('[$21600s] offset $900s')} or {NOW} > 0.95",
        "The ingest rejects twice as large a share of its inputs as before, or nearly all of them.",
        "A host that blocks or is down, a name server that fails, or an archive of something else than images.",
        hold=900,
        keep=900,
        value="ratio",
    ),
    Alert(
        "GristmillIngestStalled",
        "warn",
        "max by (run, instance) (changes(gristmill_ingest_done_inputs[$1800s])) == 0"
        " and on (run, instance) gristmill_ingest_done_inputs < gristmill_ingest_inputs"
        " and on (run, instance) gristmill_ingest_done_inputs offset $1800s",
        "The ingest was not through with a single input for half an hour.",
        "A host that answers very slowly, a full disk, or workers that were killed.",
        hold=300,
    ),
    Alert(
        "GristmillIngestDown",
        "warn",
        'up{job="gristmill-ingest"} == 0 and on (run, instance)'
        " last_over_time(gristmill_ingest_done_inputs[$86400s])"
        " < 0.98 * last_over_time(gristmill_ingest_inputs[$86400s])",
        "The ingest no longer answers, and it was not near its end.",
        "It was killed, or its machine is gone.",
        hold=300,
    ),
)

assert {alert.name for alert in ALERTS} >= set(STARVED)
